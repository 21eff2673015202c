"""Whether a GGUF file is the model that it was made of: its tokens and its logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.data.batch import Segment
from halfbyte.data.tokenize import tokenize_rows
from halfbyte.errors import ModelError
from halfbyte.export.agreement import Agreement, compare_logits
from halfbyte.export.gguf.llama_cpp import ask_llama_cpp
from halfbyte.export.gguf.model import probe
from halfbyte.export.gguf.template import llama_cpp_ids
from halfbyte.export.gguf.types import WeightType
from halfbyte.export.gguf.vocabulary import Vocabulary
from halfbyte.export.streamed_network import streamed_logits
from halfbyte.model.source import ModelSource

# Rows that come out in other tokens, of all: a few may hold text that llama.cpp does not normalize.
MOST_DIFFERENT = 0.1
# llama.cpp rounds what it multiplies with quantized weights to 8 bits, and with fp16 ones to fp16.
_LLAMA_CPP_ROUNDS = 0.02
# Vectors are written in fp32.
_EXACT = 1e-6


@dataclass(frozen=True)
class Row:
    """A row as it is trained: its text, and the ids that it was trained in."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class LlamaCppCheck:
    """The same by llama.cpp itself, of the version ``version``."""

    version: str
    different: int
    logits: Agreement


@dataclass(frozen=True)
class FileCheck:
    """Of ``rows`` rows ``different`` came out in other tokens; ``logits`` of the file beside those
    of the weights that it was made of. ``error`` is the largest relative error of a tensor, and
    ``tensor`` its name."""

    rows: int
    different: int
    error: float
    tensor: str
    logits: Agreement
    llama_cpp: LlamaCppCheck | None


def check_file(
    written: ModelSource,
    path: Path,
    rows: Sequence[Row],
    shown: Sequence[Tensor],
    reference: Sequence[Tensor],
    probes: Mapping[str, Tensor],
    *,
    type: WeightType,
    vocabulary: Vocabulary,
    tokenizer: Any,
    device: str,
    python: str | None,
) -> tuple[FileCheck, list[Tensor]]:
    """Compare the file in ``path`` with what it was made of; also gives the file's logits.

    ``rows`` are those whose tokens are compared, ``shown`` the ids [T] whose logits are, and
    ``reference`` [T, vocabulary] the logits of the weights before they got the type; ``probes``
    were made when it was written. ``tokenizer`` is the trained one, ``python`` one that has
    llama.cpp's binding. Raises ModelError where tokens, tensors or logits differ by more than
    ``type`` explains.
    """
    different = _different(rows, written.tokenizer, vocabulary, tokenizer)
    _require_tokens(different, len(rows), "halfbyte's own reader")
    error, tensor = _compare_tensors(written, probes, type)
    ours = streamed_logits(written, shown, device=device, dtype=torch.float32)
    logits = compare_logits(ours, reference)
    _require_logits(logits, type.largest_kl, type, "read again")
    asked = None
    if python is not None:
        texts = [row.text for row in rows]
        found = ask_llama_cpp(python, path, texts, [ids.tolist() for ids in shown])
        other = sum(tuple(ids) != row.ids for ids, row in zip(found.tokens, rows, strict=True))
        _require_tokens(other, len(rows), "llama.cpp")
        theirs = [torch.from_numpy(values) for values in found.logits]
        apart = compare_logits(theirs, reference)
        bound = max(type.largest_kl, _LLAMA_CPP_ROUNDS)
        _require_logits(apart, bound, type, "loaded by llama.cpp")
        asked = LlamaCppCheck(found.version, other, apart)
    return FileCheck(len(rows), different, error, tensor, logits, asked), ours


def _different(
    rows: Sequence[Row], file_tokenizer: Any, vocabulary: Vocabulary, tokenizer: Any
) -> int:
    found = 0
    for row in rows:
        [read] = tokenize_rows(file_tokenizer, [[Segment(row.text, False)]], [0])
        same = tuple(int(token) for token in read.input_ids) == row.ids
        if same and vocabulary.model == "llama":
            same = tuple(llama_cpp_ids(tokenizer, row.text, vocabulary)) == row.ids
        found += not same
    return found


def _compare_tensors(
    written: ModelSource, probes: Mapping[str, Tensor], type: WeightType
) -> tuple[float, str]:
    """The largest relative error of a tensor, and whose it is."""
    worst, at = 0.0, ""
    for name, expected in probes.items():
        apart = probe(written.read(name, torch.float32)) - expected
        error = float(apart.norm() / expected.norm().clamp_min(1e-20))
        most = type.error if expected.dim() > 1 else _EXACT
        if not error <= most:
            raise ModelError(
                f"read again, {name} is off by {error:.2g} of it, where {type.name} explains "
                f"{most:g}: the file is not kept."
            )
        if error >= worst:
            worst, at = error, name
    return worst, at


def _require_tokens(different: int, rows: int, who: str) -> None:
    if different > MOST_DIFFERENT * rows:
        raise ModelError(
            f"of {rows} rows {different} come out of the file in other tokens than were trained, "
            f"by {who}: the file would answer badly, and is not kept."
        )


def _require_logits(found: Agreement, most: float, type: WeightType, how: str) -> None:
    if not found.kl <= most:
        raise ModelError(
            f"{how}, the file's logits are {found.kl:.2g} nats from those of the model that it was "
            f"made of, where {type.name} explains {most:g}: the file is not kept."
        )
