"""Rotary embeddings whose angles depend on the length of what is read.

``longrope`` (Phi 3 and 4; Ding et al., 2024, arXiv 2402.13753) has one set of frequencies for what
is no longer than the length the model was first trained with, and another for what is longer;
``dynamic`` stretches its frequencies with the length. transformers takes the longest row of a batch
for the length of all, so that one long row would turn the short ones beside it by other angles.
Here each row is turned by its own length, as when it stands alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

LONG, DYNAMIC = "longrope", "dynamic"


class RowRotary(nn.Module):
    """A rotary embedding of transformers, ``inner``, asked for each row by itself."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.rope_type = inner.rope_type

    def forward(
        self, x: Tensor, position_ids: Tensor, layer_type: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """(cos, sin) [B, T, rotated] in ``x``'s type for ``position_ids`` [B, T].

        A row begins wherever a position is 0, or with the first.
        """
        types: Any = self.rope_type
        kind = types if layer_type is None else types[layer_type]
        given = {} if layer_type is None else {"layer_type": layer_type}
        if kind == LONG:
            return self._by_two_sets(x, position_ids, given)
        if DYNAMIC in kind:
            return self._row_by_row(x, position_ids, given)
        return self._turn(x, position_ids, given)

    def _turn(self, x: Tensor, at: Tensor, given: dict[str, str]) -> tuple[Tensor, Tensor]:
        cos, sin = self.inner(x, at, **given)
        return cos, sin

    def _by_two_sets(
        self, x: Tensor, position_ids: Tensor, given: dict[str, str]
    ) -> tuple[Tensor, Tensor]:
        """Both sets for all positions, and of each row its own; the host reads nothing."""
        parameters: Any = self.inner.config.rope_parameters  # type: ignore[union-attr]
        if given:
            parameters = parameters[given["layer_type"]]
        original = int(parameters["original_max_position_embeddings"])
        # One position past the original length asks for the long set, none past it for the short.
        beyond = torch.full_like(position_ids[:, :1], original)
        long = self._turn(x, torch.cat([position_ids, beyond], dim=1), given)
        short = self._turn(x, position_ids.clamp(max=original - 1), given)
        is_long = (_row_lengths(position_ids) > original)[..., None]
        cos, sin = (torch.where(is_long, a[:, :-1], b) for a, b in zip(long, short, strict=True))
        return cos, sin

    def _row_by_row(
        self, x: Tensor, position_ids: Tensor, given: dict[str, str]
    ) -> tuple[Tensor, Tensor]:
        turned = []
        for one in position_ids:
            lengths = torch.diff(_starts(one[None])[0].nonzero().view(-1), append=_count(one))
            for row in one.split(lengths.tolist()):
                # It remembers the longest row until it sees one within the original length.
                self._turn(x, torch.zeros_like(row[None, :1]), given)
                turned.append(self._turn(x, row[None], given))
        cos, sin = (torch.cat(part, dim=1) for part in zip(*turned, strict=True))
        shape = (*position_ids.shape, cos.shape[-1])
        return cos.view(shape), sin.view(shape)


def use_row_rotary(model: Any) -> None:
    """Have ``model`` (a transformers model) turn each row by its own length, where it matters."""
    for name, module in list(model.named_modules()):
        kinds = getattr(module, "rope_type", None)
        if kinds is None or isinstance(module, RowRotary) or name.endswith(".inner"):
            continue
        if any(_depends_on_length(k) for k in (kinds.values() if _by_layer(kinds) else [kinds])):
            model.set_submodule(name, RowRotary(module))


def _by_layer(kinds: Any) -> bool:
    return isinstance(kinds, dict)


def _depends_on_length(kind: Any) -> bool:
    return isinstance(kind, str) and (kind == LONG or DYNAMIC in kind)


def _starts(position_ids: Tensor) -> Tensor:
    """Where rows begin, bool [B, T]."""
    starts = position_ids == 0
    starts[:, 0] = True
    return starts


def _row_lengths(position_ids: Tensor) -> Tensor:
    """Of each position, the last position of its row and one more, [B, T]."""
    row = _starts(position_ids).cumsum(dim=1) - 1
    last = torch.zeros_like(position_ids).scatter_reduce(1, row, position_ids, "amax")
    return last.gather(1, row) + 1


def _count(one: Tensor) -> Tensor:
    return torch.tensor([len(one)], device=one.device)
