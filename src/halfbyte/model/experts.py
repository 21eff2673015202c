"""Mixtures of experts: every expert's matrices in NF4, each dequantized when tokens come to it.

    y_t = Σ_e w_te · D_e (act(G_e x_t) · U_e x_t),    e over the experts chosen for token t

(Shazeer et al., 2017, arXiv 1701.06538; gated as in arXiv 2002.05202.) transformers keeps the
experts of a layer in two parameters of three dimensions, which bitsandbytes leaves in 16 bits: nine
tenths of such a model. Here each matrix is quantized by itself. Experts are frozen and have no
adapters, the router is kept like a norm; gradients flow through both to the layers below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.quant.dense import DenseWeight
from halfbyte.quant.nf4 import NF4Weight

UP, DOWN = "gate_up_proj", "down_proj"
# Tokens in one product. An expert's products are all of this shape, the last one filled up with
# zeros: by how many tokens it gets it would differ in the last bits what a token's outcome is, and
# a token of one row would change those of another.
TILE = 64


def find_experts(model: Any) -> dict[str, Any]:
    """The modules of ``model`` (of transformers) that hold experts of the kind that is known.

    Those are the ones that transformers itself can run by its own kernels for such a mixture
    (its ``use_experts_implementation`` says so), gated, without biases, stored as [out, in].
    """
    return {name: m for name, m in model.named_modules() if _is_known(m)}


def _is_known(module: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False))
    shapes = {name: parameter.dim() for name, parameter in own.items()}
    if shapes != {UP: 3, DOWN: 3} or not hasattr(module, "_apply_gate"):
        return False
    # An older transformers does not know of all that a newer one's experts may have.
    unwanted = ("has_bias", "is_transposed", "has_post_expert_norm")
    return getattr(module, "has_gate", False) and not any(
        getattr(module, n, False) for n in unwanted
    )


def mistaken_for_experts(network: Any, adapted: Iterable[str]) -> list[str]:
    """Last names of ``adapted`` layers that PEFT takes for those of the experts in ``network``.

    Old checkpoints name an expert's matrices as a dense MLP's or a shared expert's are named. Since
    transformers keeps them in one parameter, PEFT turns targets of these names into that parameter,
    and adapters of the other layers find no place.
    """
    if not any(isinstance(module, NF4Experts) for module in network.modules()):
        return []
    leaves = {name.rpartition(".")[2] for name in adapted}
    return [name for name in ("gate_proj", "up_proj", "down_proj") if name in leaves]


def expert_name(parameter: str, expert: int) -> str:
    """What the matrix of one expert in a parameter of all is called."""
    return f"{parameter}[{expert}]"


class NF4Experts(nn.Module):
    """In the place of transformers' module of a layer's experts.

    ``up`` holds [2 · intermediate, hidden] of each expert, ``down`` [hidden, intermediate].
    ``apply_gate`` makes [T, intermediate] of the product with ``up``. ``original`` gives, where it
    is set, the matrix to compute with in place of the stored one, by ``gate_up_proj`` or
    ``down_proj`` and the expert's number.
    """

    def __init__(
        self,
        up: Sequence[NF4Weight | DenseWeight],
        down: Sequence[NF4Weight | DenseWeight],
        apply_gate: Callable[[Tensor], Tensor],
        compute_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.matrices = {UP: list(up), DOWN: list(down)}
        self.apply_gate = apply_gate
        self.compute_dtype = compute_dtype
        self.original: Callable[[str, int], Tensor] | None = None

    @property
    def all_matrices(self) -> list[NF4Weight | DenseWeight]:
        return [*self.matrices[UP], *self.matrices[DOWN]]

    def weight(self, which: str, expert: int) -> Tensor:
        """One matrix [out, in] in ``compute_dtype``."""
        if self.original is not None:
            return self.original(which, expert)
        return self.matrices[which][expert].dequantize(self.compute_dtype)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, hidden] in its own type, from ``hidden_states`` [T, hidden], the experts chosen for
        each token [T, k] and their weights [T, k]. The host reads how many tokens each gets."""
        tokens, chosen = top_k_index.shape
        expert_of = top_k_index.reshape(-1)
        order = expert_of.argsort(stable=True)
        counts = torch.bincount(expert_of, minlength=len(self.matrices[UP])).tolist()
        # A copy for each choice: gradients of a token then meet in one sum, in a fixed order.
        spread = hidden_states[:, None].expand(-1, chosen, -1).reshape(tokens * chosen, -1)
        parts = [
            self._one_expert(number, part)
            for number, part in enumerate(spread.index_select(0, order).split(counts))
            if len(part)
        ]
        outcome = torch.cat(parts).index_select(0, order.argsort()).view(tokens, chosen, -1)
        weighted = outcome.to(hidden_states.dtype) * top_k_weights[..., None]
        return weighted.sum(dim=1).to(hidden_states.dtype)

    def _one_expert(self, number: int, x: Tensor) -> Tensor:
        """[n, hidden] of the products' type for the ``x`` [n, hidden] that come to an expert."""
        filled = nn.functional.pad(x, (0, 0, 0, -len(x) % TILE))
        gated = self.apply_gate(self._product(UP, number, filled))
        return self._product(DOWN, number, gated)[: len(x)]

    def _product(self, which: str, number: int, x: Tensor) -> Tensor:
        product: Tensor = _TiledProduct.apply(  # type: ignore[no-untyped-call]
            x, lambda: self.weight(which, number), self.compute_dtype
        )
        return product

    def extra_repr(self) -> str:
        return f"{len(self.matrices[UP])} experts of {self.matrices[DOWN][0].shape}, nf4"


class _TiledProduct(torch.autograd.Function):
    """``x Wᵀ`` with a frozen W that is asked for again in the backward pass, tile by tile."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Callable[[], Tensor], dtype: torch.dtype) -> Tensor:
        ctx.weight, ctx.dtype, ctx.input_dtype = weight, dtype, x.dtype
        w = weight().t()
        return torch.cat([tile @ w for tile in x.to(dtype).split(TILE)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        w = ctx.weight()
        tiles = grads[0].to(ctx.dtype).split(TILE)
        return torch.cat([tile @ w for tile in tiles]).to(ctx.input_dtype), None, None
