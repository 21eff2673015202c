"""Whether a folder is the model that it was made of, as its own package loads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from halfbyte.errors import ModelError
from halfbyte.export.agreement import Agreement, compare_logits
from halfbyte.export.elsewhere.types import ElsewhereType
from halfbyte.export.elsewhere.workers import Workshop
from halfbyte.export.gguf.check import MOST_DIFFERENT, Row


@dataclass(frozen=True)
class FolderCheck:
    """Of ``rows`` rows ``different`` came out in other tokens; ``logits`` beside those of the
    weights that it was made of. ``quantized`` matrices have the type, those in ``kept`` have 16
    bits. ``version`` is the package's."""

    rows: int
    different: int
    logits: Agreement
    quantized: int
    kept: tuple[str, ...]
    version: str


def check_folder(
    workshop: Workshop,
    folder: Path,
    rows: Sequence[Row],
    shown: Sequence[Tensor],
    reference: Sequence[Tensor],
    *,
    type: ElsewhereType,
    template: str | None,
    ends: set[int],
) -> FolderCheck:
    """Have the package load ``folder``, and compare it with what it was made of.

    ``rows`` are those whose tokens are compared, ``shown`` the ids [T] whose logits are, and
    ``reference`` [T, vocabulary] the logits of the weights before they got the type. Raises
    ModelError where tokens, template, ends or logits differ by more than ``type`` explains.
    """
    texts = [row.text for row in rows]
    found = workshop.load(folder, texts, [ids.tolist() for ids in shown])
    by = f"loaded by {workshop.target.package}"
    different = sum(tuple(ids) != row.ids for ids, row in zip(found.tokens, rows, strict=True))
    if different > MOST_DIFFERENT * len(rows):
        raise ModelError(
            f"{by}, {different} of {len(rows)} rows have other tokens than were trained: the model "
            "would answer badly, and is not kept."
        )
    if found.template != template:
        raise ModelError(f"{by}, the model has another chat template: it is not kept.")
    if not ends <= found.ends:
        raise ModelError(
            f"{by}, the model does not stop at the tokens {sorted(ends - found.ends)}, with which "
            "its answers end: it is not kept."
        )
    logits = compare_logits(found.logits, reference)
    if not logits.kl <= type.largest_kl:
        raise ModelError(
            f"{by}, the model's logits are {logits.kl:.2g} nats from those that it was made of, "
            f"where {type.name} explains {type.largest_kl:g}: it is not kept."
        )
    return FolderCheck(
        len(rows), different, logits, found.quantized, tuple(found.kept), found.version
    )
