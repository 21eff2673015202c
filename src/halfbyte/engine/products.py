"""Which library makes each large product: cuBLAS or cuBLASLt, by trying both.

They choose among the same kernels by different rules, and neither's is always right: on an H100 the
backward product of TinyLlama's gate and up projections takes 67 µs through cuBLAS and 51 through
cuBLASLt at 768 tokens, and 63 against 115 at 832. The order of a product's sums is the kernel's, so
a choice, once made, is kept: in the user's cache, for every later run on the machine, and in the
run's folder, for the run that goes on.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from halfbyte.model.fused import FusedNetwork
from halfbyte.quant.joined import JoinedLinear, use_library

LIBRARIES = ("cublas", "cublaslt")
_REPLAYS = 6
# The second library has to be faster by so much: less is noise.
_MARGIN = 0.97


def choose_libraries(
    fused: FusedNetwork, tokens: Sequence[int], known: Mapping[str, str]
) -> dict[str, str]:
    """Set the library of each product of ``fused`` for passes of these many ``tokens``.

    ``known`` are choices made before; all of them, old and new, are returned by the product's name.
    """
    chosen = dict(known)
    for group in _groups(fused):
        for count in tokens:
            for backward in (False, True):
                name = product_name(group[0], count, backward)
                if name not in chosen:
                    chosen[name] = _faster(group, count, backward)
                for joined in group:
                    joined.libraries[count, backward] = chosen[name]
    return chosen


def product_name(joined: JoinedLinear, tokens: int, backward: bool) -> str:
    """What tells products apart for which the choice may differ."""
    shape = f"{tokens}x{joined.width}x{joined.rows}"
    return f"{shape} {str(joined.dtype).removeprefix('torch.')} {'back' if backward else 'forth'}"


def read_choices(folder: Path) -> dict[str, str]:
    """Choices that earlier runs on this machine made."""
    try:
        found = json.loads((folder / _FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in found.items() if v in LIBRARIES} if isinstance(found, dict) else {}


def write_choices(folder: Path, choices: Mapping[str, str]) -> None:
    """Keep ``choices`` beside those that are there; a cache that cannot be written is no error."""
    with suppress(OSError):
        all_of_them = {**read_choices(folder), **choices}
        with tempfile.NamedTemporaryFile(
            "w", dir=folder, encoding="utf-8", suffix=".json", delete=False
        ) as file:
            json.dump(all_of_them, file, indent=1)
        os.replace(file.name, folder / _FILE)


_FILE = "products.json"


def _groups(fused: FusedNetwork) -> list[list[JoinedLinear]]:
    """The layers' products that are alike."""
    found: dict[tuple[int, int, int], list[JoinedLinear]] = {}
    for layer in fused.layers:
        for kind, joined in enumerate(layer.joined):
            found.setdefault((kind, joined.rows, joined.width), []).append(joined)
    return list(found.values())


def _faster(group: Sequence[JoinedLinear], tokens: int, backward: bool) -> str:
    first = group[0]
    width = first.rows if backward else first.width
    # No zeros, which multiply faster; and no generator, whose state is the run's.
    x = torch.linspace(-1, 1, tokens * width, device=first.device).view(tokens, width)
    x = x.to(first.dtype)
    # One after another through all layers, as a pass meets them: none finds its weight in cache.
    weights = [joined.weight_memory for joined in group]
    out = x.new_empty(tokens, first.width if backward else first.rows)
    times = {}
    for library in LIBRARIES:
        with use_library(library):
            times[library] = _milliseconds(lambda: _multiply(x, weights, out, backward))
    torch.cuda.empty_cache()  # each graph had memory of its own for work space
    return LIBRARIES[1] if times[LIBRARIES[1]] < _MARGIN * times[LIBRARIES[0]] else LIBRARIES[0]


def _multiply(x: Tensor, weights: Sequence[Tensor], out: Tensor, backward: bool) -> None:
    for weight in weights:
        torch.mm(x, weight if backward else weight.t(), out=out)


def _milliseconds(run: Callable[[], None]) -> float:
    """Device time of ``run`` as a CUDA graph, the least of a few replays."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin()
    run()
    graph.capture_end()
    graph.replay()
    found = []
    for _ in range(_REPLAYS):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        found.append(began.elapsed_time(ended))
    return min(found)
