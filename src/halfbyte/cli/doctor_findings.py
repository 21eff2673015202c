"""What the facts of a machine mean for training on it, in plain words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from halfbyte.cli.cuda_driver import fits, minimum_driver, newest_cuda
from halfbyte.cli.doctor_facts import Facts, Gpu, Package, Torch
from halfbyte.cli.units import bytes_text
from halfbyte.plan.device import BF16_CAPABILITY

Level = Literal["ok", "note", "problem"]

TESTED_PYTHONS = ((3, 11), (3, 12))
SMALLEST_MEMORY = 2e9  # the demo's model and its libraries take about so much
LITTLE_MEMORY = 4e9
LITTLE_DISK = 5e9  # a run writes tens to hundreds of MB, a model download some GB
SELECTOR = "pytorch.org/get-started/locally gives the command"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. ``blocks``: no training at all is possible with it."""

    about: str
    level: Level
    text: str
    do: str = ""  # one sentence of what to do
    blocks: bool = False


def judge(facts: Facts) -> list[Finding]:
    """All findings, in the order in which they are shown."""
    return [
        _system(facts),
        _python(facts),
        _cpu(facts),
        _memory(facts),
        *_disk(facts),
        *_gpu(facts),
        _device(facts),
        *_triton(facts),
        *judge_packages(facts.packages),
        *_hub(facts),
        *_optional(facts),
    ]


def _system(facts: Facts) -> Finding:
    if facts.wsl or facts.system != "Linux":
        where = "Windows' Linux (WSL)" if facts.wsl else facts.system
        return Finding("system", "note", f"{facts.platform}; halfbyte is not tested on {where}")
    return Finding("system", "ok", facts.platform)


def _python(facts: Facts) -> Finding:
    version = ".".join(map(str, facts.python))
    if facts.python[:2] not in TESTED_PYTHONS:
        tested = " and ".join(".".join(map(str, v)) for v in TESTED_PYTHONS)
        return Finding("Python", "note", f"{version}; tested are {tested}")
    return Finding("Python", "ok", version)


def _cpu(facts: Facts) -> Finding:
    threads = f"{facts.threads} thread{'s' if facts.threads != 1 else ''}"
    if facts.threads < facts.cores:
        threads += f" of {facts.cores} allowed to this process"
    bf16 = "multiplies bf16 itself" if facts.cpu_bf16 else "no native bf16"
    return Finding("CPU", "ok", f"{facts.cpu}, {threads}, {bf16}")


def _memory(facts: Facts) -> Finding:
    text = f"{bytes_text(facts.memory_bytes)}, {bytes_text(facts.memory_free)} free"
    if facts.memory_limit is not None:
        text += ", as this container allows"
    if facts.memory_free < SMALLEST_MEMORY:
        do = "close other programs, or give the container more: even the demo takes about 2 GB."
        return Finding("memory", "problem", text, do)
    if facts.memory_free < LITTLE_MEMORY:
        return Finding("memory", "note", f"{text}: enough for the demo, little for more")
    return Finding("memory", "ok", text)


def _disk(facts: Facts) -> list[Finding]:
    found = []
    text = f"{bytes_text(facts.folder_free)} free in {facts.folder}"
    if not facts.folder_writable:
        do = "change to another folder, or name one with --out."
        found.append(Finding("disk", "problem", f"{facts.folder} cannot be written", do))
    elif facts.folder_free < LITTLE_DISK:
        do = "free some: checkpoints take up to some hundred MB a run."
        found.append(Finding("disk", "note", text, do))
    else:
        found.append(Finding("disk", "ok", text))
    cache = f"models are kept in {facts.cache}, {bytes_text(facts.cache_free)} free"
    if facts.cache_free < LITTLE_DISK:
        do = "free some, or point HF_HOME at a larger disk: a model of 1B parameters takes 2 GB."
        found.append(Finding("cache", "note", cache, do))
    else:
        found.append(Finding("cache", "ok", cache))
    return found


def _gpu(facts: Facts) -> list[Finding]:
    torch = facts.torch
    if isinstance(torch, str):
        do = "install PyTorch again in this environment: pip install --force-reinstall torch."
        return [Finding("PyTorch", "problem", f"cannot be imported: {torch}", do, blocks=True)]
    build = "the CPU alone"
    if torch.cuda or torch.hip:
        build = f"CUDA {torch.cuda}" if torch.cuda else f"ROCm {torch.hip}, which is not tested"
    found = [Finding("PyTorch", "ok", f"{torch.version}, built for {build}")]
    if torch.usable:
        return [*found, *(_card(gpu, number) for number, gpu in enumerate(torch.gpus))]
    return [*found, _no_gpu(facts, torch)]


def _card(gpu: Gpu, number: int) -> Finding:
    capability = ".".join(map(str, gpu.capability))
    text = (
        f"{gpu.name}, {bytes_text(gpu.memory_bytes)}, {bytes_text(gpu.free_bytes)} free, "
        f"capability {capability}"
    )
    if not gpu.has_kernels:
        do = (
            "install a PyTorch build that has: an older one for an old card, a newer one for a new "
            f"card ({SELECTOR}); or train with --set device=cpu."
        )
        return Finding("GPU", "problem", f"{text}; this PyTorch has no code for it", do)
    if number:
        return Finding("GPU", "note", f"{text}; not used: a run trains on one GPU")
    if gpu.free_bytes < gpu.memory_bytes / 2:
        return Finding("GPU", "note", text, "another program uses it: nvidia-smi shows which.")
    return Finding("GPU", "ok", text)


def _no_gpu(facts: Facts, torch: Torch) -> Finding:
    """Why PyTorch uses no GPU."""
    driver = facts.driver
    if driver is None and not facts.nvidia_card:
        return Finding("GPU", "note", "no NVIDIA GPU here: training runs on the CPU")
    if driver is None:
        do = "install NVIDIA's driver; in a container, start it with access to the GPU."
        return Finding("GPU", "problem", "there is an NVIDIA card, but no driver that answers", do)
    if torch.cuda is None:
        newest = newest_cuda(driver)
        build = f"a build for CUDA {newest}" if newest else "a newer driver and a CUDA build"
        do = f"install {build} ({SELECTOR})."
        text = f"there is an NVIDIA driver ({driver}), but this PyTorch is built without CUDA"
        return Finding("GPU", "problem", text, do)
    if fits(torch.cuda, driver) is False:
        newest = newest_cuda(driver)
        other = f", or install a PyTorch built for CUDA {newest} ({SELECTOR})" if newest else ""
        return Finding(
            "GPU",
            "problem",
            f"this PyTorch is built for CUDA {torch.cuda}, which needs driver "
            f"{minimum_driver(torch.cuda)} or newer, and the driver here is {driver}",
            f"update the driver{other}.",
        )
    if facts.visible_devices is not None and facts.visible_devices.strip() in ("", "-1"):
        do = "unset CUDA_VISIBLE_DEVICES."
        return Finding("GPU", "problem", "CUDA_VISIBLE_DEVICES hides every GPU", do)
    said = f" ({torch.error})" if torch.error else ""
    do = "see whether nvidia-smi lists a GPU; after a driver update the machine must be restarted."
    return Finding("GPU", "problem", f"driver {driver} is there, but CUDA does not start{said}", do)


def _device(facts: Facts) -> Finding:
    """Where training will run, in which number format, and why."""
    torch = facts.torch
    if isinstance(torch, Torch) and torch.usable and torch.gpus:
        if not torch.gpus[0].has_kernels:
            return Finding("training", "note", "on the CPU alone, with --set device=cpu")
        if torch.gpus[0].capability >= BF16_CAPABILITY:
            return Finding("training", "ok", "on the GPU in bf16, which it multiplies itself")
        return Finding(
            "training",
            "ok",
            "on the GPU in fp16 with loss scaling: it has no native bf16, so leave precision at "
            "auto",
        )
    if facts.cpu_bf16:
        return Finding("training", "ok", "on the CPU, which multiplies bf16 itself")
    return Finding("training", "ok", "on the CPU in fp32: without native bf16 that is the fastest")


def _triton(facts: Facts) -> list[Finding]:
    torch = facts.torch
    if isinstance(torch, str) or not torch.usable:
        return []
    if not torch.gpus:
        return []
    from halfbyte.kernels.choice import choose_kernels  # needs the PyTorch that is there

    if facts.triton is None:
        do = "pip install triton: halfbyte's kernels make a step several times faster."
        return [Finding("kernels", "note", "Triton is not installed: PyTorch's own are used", do)]
    if not facts.c_compiler:
        do = "install gcc, or point CC at another C compiler: Triton needs one to launch kernels."
        return [Finding("kernels", "problem", f"Triton {facts.triton} finds no C compiler", do)]
    kernels, words = choose_kernels(torch.gpus[0].capability)
    if not kernels.adamw:
        return [Finding("kernels", "note", words)]
    text = f"{words} (Triton {facts.triton}), each tried before a run uses it"
    return [Finding("kernels", "ok", text)]


def judge_packages(packages: list[Package]) -> list[Finding]:
    """Whether what halfbyte needs is installed, and new enough."""
    if not packages:
        do = "install it: pip install halfbyte."
        return [Finding("packages", "note", "halfbyte itself is not installed as a package", do)]
    found = [
        Finding(
            "packages",
            "problem",
            f"{package.name} is {package.installed or 'not installed'}, needed is {package.needs}",
            f"pip install '{package.name}{package.needs}'",
            blocks=True,
        )
        for package in packages
        if not package.fits
    ]
    if found:
        return found
    named = ("transformers", "tokenizers", "datasets", "safetensors", "huggingface-hub", "gguf")
    versions = [f"{p.name} {p.installed}" for p in packages if p.name in named]
    text = f"all {len(packages)} as required: {', '.join(versions)} and others"
    return [Finding("packages", "ok", text)]


def _hub(facts: Facts) -> list[Finding]:
    found = []
    if facts.offline:
        do = "unset HF_HUB_OFFLINE to download."
        found.append(Finding("hub", "note", "the hub client is told to stay offline", do))
    if facts.token:
        found.append(Finding("hub", "ok", "a token is there (not shown)"))
    else:
        do = "for a gated model: hf auth login, or set HF_TOKEN."
        found.append(Finding("hub", "note", "not logged in, which open models do not need", do))
    if facts.reachable == "":
        found.append(Finding("network", "ok", f"{facts.endpoint} answers"))
    elif facts.reachable is not None:
        do = "use a local model folder, or set HTTPS_PROXY where there is a proxy."
        text = f"{facts.endpoint} does not answer ({facts.reachable})"
        found.append(Finding("network", "problem", text, do))
    return found


def _optional(facts: Facts) -> list[Finding]:
    found = []
    if not facts.chromium:
        do = "install Chromium for halfbyte report --pdf; everything else works without."
        found.append(Finding("report", "note", "no Chromium, so no PDF", do))
    if isinstance(facts.torch, Torch) and facts.torch.usable and not facts.pynvml:
        do = "pip install nvidia-ml-py."
        found.append(Finding("energy", "note", "the GPU's energy cannot be read", do))
    return found
