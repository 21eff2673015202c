"""Tokens that a recipe adds to a model's vocabulary."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from halfbyte.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

_AT_ONCE = 4096  # rows whose sum is taken at once, in fp64


@dataclass(frozen=True)
class NewTokens:
    """``count`` tokens from id ``first`` on, in a vocabulary of ``rows``, before of ``old_rows``.

    Many models have more rows than their tokenizer has tokens; the first of those to spare are
    taken before any is added.
    """

    first: int
    count: int
    old_rows: int
    rows: int

    def extended(self, weight: Tensor) -> Tensor:
        """A copy of an embedding's or a head's ``weight`` [old_rows, H] with all ``rows``.

        The new tokens' rows are the mean of those of all tokens that were there: near to none of
        them, and far from no hidden state. Rows between are zero. A weight of another size, which
        does not fit its model, is left as it is.
        """
        if len(weight) != self.old_rows:
            return weight
        total = weight.new_zeros(weight.shape[1], dtype=_double())
        for start in range(0, self.first, _AT_ONCE):
            total += weight[start : min(start + _AT_ONCE, self.first)].to(_double()).sum(0)
        found = weight.new_zeros(self.rows, weight.shape[1])
        found[: self.old_rows] = weight
        found[self.first : self.first + self.count] = (total / self.first).to(weight.dtype)
        return found


def add_tokens(tokenizer: Any, config: Any, tokens: Sequence[str], name: str) -> tuple[Any, Any]:
    """Extend ``tokenizer`` in place; returns (configuration with as many rows, NewTokens).

    ``config`` is transformers' and is left as it is. Raises ModelError for a token that the
    tokenizer of ``name`` has already.
    """
    there = tokenizer.get_vocab()
    for token in tokens:
        if token in there:
            raise ModelError(
                f"model.new_tokens has {token!r}, which the tokenizer of {name} has already as "
                f"token {there[token]}; leave it out, and train it with "
                "lora.modules_to_save=[embed_tokens, lm_head] if it was never trained."
            )
    tokenizer.add_tokens(list(tokens))
    ids = tokenizer.convert_tokens_to_ids(list(tokens))
    if ids != list(range(ids[0], ids[0] + len(ids))):
        raise ModelError(
            f"the tokenizer of {name} gives model.new_tokens the ids {ids}, which do not follow "
            "one another; spell each so that nothing of it is changed."
        )
    config = copy.deepcopy(config)
    text = config.get_text_config()
    rows = int(text.vocab_size)
    new = NewTokens(ids[0], len(ids), rows, max(rows, ids[-1] + 1))
    text.vocab_size = new.rows
    return config, new


def _double() -> Any:
    import torch

    return torch.float64
