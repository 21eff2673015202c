"""Rows of the embedding and the head that are trained with the adapter.

Those of new tokens, which have learned nothing yet, or all of a matrix that the recipe names
(``lora.modules_to_save``). What is trained is an fp32 copy of the rows; the matrix itself gets them
after each update, rounded to the type that it is kept in, so that whatever looks a token up or
makes logits reads what it always read. Only the gradients need more: of the embedding by a hook on
its output, of the head by :mod:`halfbyte.kernels.trained_head`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.errors import ModelError
from halfbyte.model.new_tokens import NewTokens

EMBEDDING, HEAD = "embed_tokens", "lm_head"  # as recipes and PEFT call them


@dataclass(eq=False)
class TrainedRows:
    """``values`` fp32 [n, H] are the rows from ``first`` on of ``weight`` [vocabulary, H].

    ``name`` is the full name of the module; of a weight that is both, the embedding's, and
    ``tied_to`` is then the head's. ``whole`` says that all rows are trained.
    """

    name: str
    weight: nn.Parameter
    values: nn.Parameter
    first: int
    whole: bool
    in_embedding: bool
    in_head: bool
    tied_to: str | None
    original: Tensor  # in main memory, in the weight's type

    @property
    def key(self) -> str:
        """What the parameter is called among those that are trained."""
        return f"{self.name}.{'modules_to_save' if self.whole else 'trainable_tokens_delta'}"

    @property
    def ids(self) -> list[int]:
        return list(range(self.first, self.first + len(self.values)))

    @torch.no_grad()
    def write(self) -> None:
        """Bring the weight up to date."""
        self._rows().copy_(self.values)

    @torch.no_grad()
    def restore(self) -> None:
        """Put back the rows as they were before training."""
        self._rows().copy_(self.original)

    def _rows(self) -> Tensor:
        return self.weight.data[self.first : self.first + len(self.values)]


def train_rows(
    network: Any, new_tokens: NewTokens | None, modules_to_save: Collection[str]
) -> dict[str, TrainedRows]:
    """Let the rows of embedding and head be trained that a recipe asks for, by the key of each.

    Raises ModelError for an embedding that does more than to look rows up and scale them.
    """
    if new_tokens is None and not modules_to_save:
        return {}
    embedding, head = network.get_input_embeddings(), network.get_output_embeddings()
    tied = head.weight is embedding.weight
    asked = set(modules_to_save)
    if tied and asked:
        asked = {EMBEDDING, HEAD}
    names = {id(module): name for name, module in network.named_modules()}
    found = []
    for kind, module in ((EMBEDDING, embedding), (HEAD, head)):
        if (tied and kind == HEAD) or (kind not in asked and new_tokens is None):
            continue
        whole = kind in asked
        first, count = 0, len(module.weight)
        if not whole and new_tokens is not None:
            first, count = new_tokens.first, new_tokens.count
        rows = module.weight.detach()[first : first + count]
        found.append(
            TrainedRows(
                name=names[id(module)],
                weight=module.weight,
                values=nn.Parameter(rows.to(torch.float32, copy=True)),
                first=first,
                whole=whole,
                in_embedding=kind == EMBEDDING,
                in_head=kind == HEAD or tied,
                tied_to=names[id(head)] if tied else None,
                original=rows.to("cpu", copy=True),
            )
        )
        if kind == EMBEDDING:
            _hook(module, found[-1])
    return {rows.key: rows for rows in found}


def _hook(embedding: nn.Module, rows: TrainedRows) -> None:
    scale = _scale_of(embedding)
    padding = getattr(embedding, "padding_idx", None)

    def with_gradient(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled() or not rows.values.requires_grad:
            return None
        return _LookedUp.apply(output, rows.values, inputs[0], rows.first, scale, padding)  # type: ignore[no-untyped-call]

    embedding.register_forward_hook(with_gradient)


@torch.no_grad()
def _scale_of(embedding: Any) -> float:
    """By what the embedding multiplies a row: Gemma's does."""
    scale = getattr(embedding, "embed_scale", None)
    factor = 1.0 if scale is None else float(torch.as_tensor(scale).to(embedding.weight.dtype))
    ids = torch.arange(1, 4, device=embedding.weight.device)
    rows = embedding.weight[1:4].float()
    if not torch.allclose(embedding(ids).float(), factor * rows, rtol=1e-2, atol=1e-6):
        raise ModelError(
            f"the embedding is a {type(embedding).__name__}, which does more than to look rows up, "
            "so its rows cannot be trained; leave out lora.modules_to_save and model.new_tokens."
        )
    return factor


class _LookedUp(torch.autograd.Function):
    """``output`` [..., H] as it is, with a gradient for the trained rows that are in it."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        values: Tensor,
        ids: Tensor,
        first: int,
        scale: float,
        padding: int | None,
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.first, ctx.count, ctx.scale, ctx.padding = first, len(values), scale, padding
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (ids,) = ctx.saved_tensors
        count = ctx.count
        inside = (ids >= ctx.first) & (ids < ctx.first + count)
        if ctx.padding is not None:  # as torch.nn.Embedding has it
            inside &= ids != ctx.padding
        # What is not trained goes to a row behind the last, of which no gradient is made.
        at = torch.where(inside, ids - ctx.first, count)
        d_output = grads[0].float() * ctx.scale
        d_values = torch.ops.aten.embedding_dense_backward(d_output, at, count + 1, count, False)
        return None, d_values[:count], None, None, None, None
