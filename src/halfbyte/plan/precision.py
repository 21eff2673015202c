"""The number format of the products: what is right on a device, and what is wrong with another."""

from __future__ import annotations

from halfbyte.plan.device import BF16_CAPABILITY, Device

# From here on GPUs have matrix units for fp16 (Volta); before, fp16 is no faster than fp32.
_FP16_CAPABILITY = (7, 0)
_AUTO = "let it be chosen with --set precision=auto"


def choose_precision(device: Device) -> tuple[str, str]:
    """The best format on ``device``, and why."""
    if device.capability is None:
        if device.bf16_native:
            return "bf16", "this CPU multiplies bf16 natively (AVX512_BF16, AMX or ARM's BF16)"
        return "fp32", (
            "this CPU only emulates bf16 and fp16: their products run up to 100 times slower "
            "than fp32's"
        )
    name = f"{device.name} (compute capability {_dotted(device.capability)})"
    if device.bf16_native:
        return "bf16", f"{name} computes bf16 natively, and bf16 needs no loss scaling"
    if device.capability >= _FP16_CAPABILITY:
        return "fp16", (
            f"{name} only emulates bf16, which needs {_dotted(BF16_CAPABILITY)}; fp16 with loss "
            "scaling is its fast format"
        )
    return "fp32", f"{name} has no matrix units for 16-bit products"


def precision_warning(stated: str, device: Device) -> str | None:
    """What is to be said of a format that the recipe states, if anything."""
    best = choose_precision(device)[0]
    if stated == best:
        return None
    if device.capability is None:
        if stated == "fp32":
            return None  # never wrong on a CPU, and bf16 is faster on few
        what = f"precision is {stated}, which this CPU only emulates"
        return (
            f"{what}: products run up to 100 times slower than in fp32; {_AUTO}, which is {best} "
            "here."
        )
    if stated == "bf16":
        return (
            f"precision is bf16, which {device.name} (compute capability "
            f"{_dotted(device.capability)}) only emulates, several times slower than {best}; "
            f"{_AUTO}, which is {best} here."
        )
    if stated == "fp16" and device.bf16_native:
        return (
            f"precision is fp16, whose range needs loss scaling, and {device.name} computes bf16 "
            f"just as fast; {_AUTO}, which is {best} here."
        )
    if stated == "fp16":
        return (
            f"precision is fp16, for which {device.name} has no matrix units; {_AUTO}, which is "
            f"{best} here."
        )
    return (
        f"precision is fp32, whose products {device.name} makes several times slower than those "
        f"in {best}; {_AUTO}, which is {best} here."
    )


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
