"""Whether a merged folder is the model that it was made of.

Two looks, each at what the other cannot see. Every matrix is multiplied with a few random vectors,
and compared with what base and adapter give apart: what of the adapter's own part is there is then
seen layer by layer, also where it moves the answers too little to be told from rounding. And the
whole model is asked, as transformers loads the folder, and its logits laid beside the adapter's:
that sees configuration, names and tokenizer.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halfbyte.data.batch import TokenizedRow
from halfbyte.data.batching import make_batch
from halfbyte.errors import ModelError
from halfbyte.evaluate.original_weights import original_weights
from halfbyte.export.agreement import Agreement, compare_logits
from halfbyte.export.merged_weights import BaseWeights
from halfbyte.export.streamed_network import streamed_logits
from halfbyte.finished.opened import OpenedAdapter
from halfbyte.kernels.dora_linear import row_squares
from halfbyte.model.causal import QLoRAModel
from halfbyte.model.experts import NF4Experts, expert_name
from halfbyte.model.source import ModelSource, open_model
from halfbyte.quant.linear import QLoRALinear
from halfbyte.recipe.schema import ModelRecipe

# By how much a number is off at most when it is rounded: 2⁻ᵖ of it, with p significant bits.
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# Sums in another order, relative to the sum.
_SUMMING = 2e-5
_PROBES = 16
# Mean KL of the logits in nats, by the type of the weights or, where that is wider, of the
# products: docs/merging.md has what was measured.
_MOST_KL = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# In a mixture a token that lies between two experts gets the other one, and other logits.
_MIXTURE = 10.0


@dataclass(frozen=True)
class TensorCheck:
    """Over ``compared`` tensors, of which ``adapted`` have an adapter.

    ``error`` is the largest relative error of a layer's outputs, ``layer`` its name. ``least`` and
    ``most`` are what of the adapter's part is there in a layer, 1 being all; layers whose adapter
    does less than rounding are not among the ``seen``.
    """

    compared: int
    adapted: int
    seen: int
    error: float
    layer: str
    least: float
    most: float


@dataclass(frozen=True)
class MergeCheck:
    """``logits`` are compared with the adapter on the weights it was merged onto, ``trained`` with
    the 4-bit model that was trained; None where these are the same."""

    tensors: TensorCheck
    logits: Agreement
    trained: Agreement | None
    base: Agreement  # with the base alone, on the same weights: how much the adapter does


def check_merge(
    folder: Path,
    open_it: Callable[[], OpenedAdapter],
    onto: BaseWeights,
    dtype: torch.dtype,
    rows: Sequence[TokenizedRow],
    texts: Sequence[str],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> MergeCheck:
    """Compare the merged model in ``folder``, in ``dtype``, with the adapter it is made of.

    ``open_it`` loads that adapter on its base in 4 bits, which is let go before the merged model is
    asked. ``rows`` are what both are shown, ``texts`` what both tokenizers are. Raises ModelError
    where they disagree by more than rounding to ``dtype`` explains, and of the logits the type of
    the products.
    """
    written = open_model(ModelRecipe(name=str(folder)))
    opened = open_it()
    _compare_tokenizers(written.tokenizer, opened.tokenizer, texts)
    device, compute = opened.qlora.device.type, opened.qlora.compute_dtype
    rough = max(dtype, compute, key=lambda one: ROUNDING[one])
    most = _MOST_KL[rough] * (_MIXTURE if _mixtures(opened.qlora) else 1.0)
    with torch.no_grad():
        with _weights(opened, onto):
            tensors = _compare_tensors(written, opened, onto, dtype, progress)
            adapter = _logits(opened.qlora, rows)
            with opened.qlora.adapter_on(False):
                base = compare_logits(adapter, _logits(opened.qlora, rows))
        in_4bit = None if onto == "4bit" else _logits(opened.qlora, rows)
    del opened
    gc.collect()
    ids = [torch.from_numpy(row.input_ids.astype(np.int64)) for row in rows]
    ours = streamed_logits(written, ids, device=device, dtype=compute)
    logits = compare_logits(ours, adapter)
    if not logits.kl <= most:
        raise _disagrees(
            f"its logits are {logits.kl:.2g} nats from the adapter's, where rounding explains "
            f"{most:g}"
        )
    trained = None if in_4bit is None else compare_logits(ours, in_4bit)
    return MergeCheck(tensors, logits, trained, base)


def _disagrees(what: str) -> ModelError:
    return ModelError(
        f"the merged model is not the adapter's: {what}; nothing is kept of it. This is a defect "
        "of halfbyte, or of the disk; please report it."
    )


def _logits(qlora: QLoRAModel, rows: Sequence[TokenizedRow]) -> list[Tensor]:
    """Of each row, fp32 on the CPU."""
    whole = qlora.logits(make_batch(list(rows))).float().cpu()
    return list(whole.split([len(row) for row in rows]))


def _compare_tokenizers(ours: Any, theirs: Any, texts: Sequence[str]) -> None:
    if ours.chat_template != theirs.chat_template:
        raise _disagrees("its chat template is another")
    for text in texts:
        if ours(text)["input_ids"] != theirs(text)["input_ids"]:
            raise _disagrees("its tokenizer makes other tokens of the same text")


def _weights(opened: OpenedAdapter, onto: BaseWeights) -> AbstractContextManager[None]:
    """The weights that were merged onto in the place of those in 4 bits."""
    return nullcontext() if onto == "4bit" else original_weights(opened.qlora, opened.source.read)


def _mixtures(qlora: QLoRAModel) -> dict[str, NF4Experts]:
    return {n: m for n, m in qlora.network.named_modules() if isinstance(m, NF4Experts)}


def _compare_tensors(
    written: ModelSource,
    opened: OpenedAdapter,
    onto: BaseWeights,
    dtype: torch.dtype,
    progress: Callable[[int, int], None],
) -> TensorCheck:
    qlora = opened.qlora
    linears, rounding = qlora.linears, ROUNDING[dtype]
    compared = _compare_rest(written, opened, onto, dtype)
    shares: list[float] = []
    worst, at = 0.0, ""
    for done, (name, layer) in enumerate(linears.items(), 1):
        error, share, fuzzy = _compare_layer(written, name, layer, rounding)
        if error > worst:
            worst, at = error, name
        compared += 1
        if share is not None and fuzzy < 0.25:
            if abs(share - 1.0) > 0.02 + fuzzy:
                raise _disagrees(
                    f"of what the adapter does at {name}, {share:.2f} is there in place of 1"
                )
            shares.append(share)
        progress(done, len(linears))
    return TensorCheck(
        compared=compared,
        adapted=len(qlora.lora),
        seen=len(shares),
        error=worst,
        layer=at,
        least=min(shares, default=1.0),
        most=max(shares, default=1.0),
    )


def _compare_layer(
    written: ModelSource, name: str, layer: QLoRALinear, rounding: float
) -> tuple[float, float | None, float]:
    """Relative error; what of the adapter's part is there (None: there is no adapter, or it does
    nothing), and how much of that may be rounding.

    Raises ModelError where the error is more than rounding's.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_PROBES, layer.in_features, generator=generator).to(layer.base.device)
    part = None
    with _in_fp32(layer):
        both = layer(x)
        if layer.lora_A is not None:
            layer.adapter_enabled = False
            try:
                part = both - layer(x)
            finally:
                layer.adapter_enabled = True
    weight = written.read(f"{name}.weight", torch.float32).to(x.device)
    if weight.shape != (layer.out_features, layer.in_features):
        raise _disagrees(f"{name} is {list(weight.shape)}")
    ours = x @ weight.t()
    most = rounding + _SUMMING
    size = float(both.norm())
    error = float((ours - both).norm()) / max(size, 1e-30)
    if not error <= most:
        raise _disagrees(f"{name} is off by {error:.2g} of it, where rounding explains {most:.2g}")
    if part is None:
        return error, None, 0.0
    effect = float(part.norm())
    if effect == 0.0:
        return error, None, 0.0
    share = 1.0 + float(((ours - both) * part).sum()) / effect**2
    # Rounding errors lie in no direction: of theirs, one in √n is in that of the adapter's part.
    fuzzy = 4.0 * most * size / effect / sqrt(part.numel())
    return error, share, fuzzy


@contextmanager
def _in_fp32(layer: QLoRALinear) -> Iterator[None]:
    """With products in fp32 and without bias.

    In 16 bits the outputs are rounded, and so is the adapter's part, which is a difference of two:
    of a weak adapter too little then seems to be there (0.84 in bf16 after four steps).
    """
    kept = layer.compute_dtype, layer.bias, layer.dense, layer.row_squares
    layer.compute_dtype, layer.bias, layer.dense = torch.float32, None, None
    if layer.row_squares is not None:
        layer.row_squares = row_squares(layer.weight_dense())
    try:
        yield
    finally:
        layer.compute_dtype, layer.bias, layer.dense, layer.row_squares = kept


def _compare_rest(
    written: ModelSource, opened: OpenedAdapter, onto: BaseWeights, dtype: torch.dtype
) -> int:
    """Embedding, head, norms, biases and experts, number by number."""
    qlora = opened.qlora
    there = set(written.names())
    count = 0
    trained = {f"{name}.{leaf}" for name in qlora.lora for leaf in ("lora_A", "lora_B")}
    for name, parameter in qlora.network.named_parameters(remove_duplicate=False):
        if name in there and name not in trained:
            _require_equal(name, written.read(name), parameter, dtype)
            count += 1
    for name, layer in qlora.linears.items():
        if layer.bias is not None:
            _require_equal(f"{name}.bias", written.read(f"{name}.bias"), layer.bias, dtype)
            count += 1
    for name, module in _mixtures(qlora).items():
        for which, matrices in module.matrices.items():
            for expert, matrix in enumerate(matrices):
                full = expert_name(f"{name}.{which}", expert)
                theirs = (
                    matrix.dequantize(torch.float32)
                    if onto == "4bit"
                    else opened.source.read(full, torch.float32)
                )
                _require_equal(full, written.read(full), theirs, dtype)
                count += 1
    return count


def _require_equal(name: str, ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    expected = theirs.detach().float().cpu()
    if ours.shape != expected.shape:
        raise _disagrees(f"{name} is {list(ours.shape)} in place of {list(expected.shape)}")
    most = ROUNDING[dtype] + ROUNDING[theirs.dtype] if theirs.is_floating_point() else 0.0
    # fp16 has no steps below 2⁻²⁴.
    apart = (ours.float() - expected).abs() - 1.01 * most * expected.abs() - 2.0**-24
    if not bool((apart <= 0.0).all()):
        raise _disagrees(f"{name} has other numbers")
