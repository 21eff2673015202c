"""The decoding loop: the prompts at once, then one token a row at a time."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from halfbyte.generate.sampling import Sampling, next_token


@torch.no_grad()
def decode(
    network: Any,
    prompts: Sequence[list[int]],
    *,
    limits: Sequence[int],
    ends: set[int],
    sampling: Sampling,
    seeds: Sequence[int],
) -> Generator[list[int | None], None, None]:
    """Yields the next token of each row, None for a row that has ended.

    ``prompts`` are token ids, unequal lengths allowed, none empty; row i ends with a token of
    ``ends`` (which is yielded) or after ``limits[i]`` tokens. Each row draws from a generator of
    its own, seeded by ``seeds[i]``: what it draws depends neither on the other rows nor on
    torch's global state. ``network`` must be in ``ready_to_generate``.
    """
    from transformers import DynamicCache

    device = network.get_input_embeddings().weight.device
    rows, longest = len(prompts), max(map(len, prompts))
    total = longest + max(limits)
    ids = torch.zeros(rows, total, dtype=torch.int64)
    mask = torch.zeros(rows, total, dtype=torch.bool)
    for row, prompt in enumerate(prompts):  # padding on the left: the newest tokens are aligned
        ids[row, longest - len(prompt) : longest] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = True
    positions = (mask.cumsum(1) - 1).clamp_min(0).to(device)
    padded = not bool(mask.all())
    ids, mask = ids.to(device), mask.to(device)
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    cache = DynamicCache(config=network.config)
    open_rows = [limit > 0 for limit in limits]
    start, stop = 0, longest
    while any(open_rows):
        logits: Tensor = network(
            input_ids=ids[:, start:stop],
            # Without padding there is nothing to say, and attention may take its fast path.
            attention_mask=mask[:, :stop] if padded else None,
            position_ids=positions[:, start:stop],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        if sampling.is_argmax:
            drawn = logits.argmax(dim=-1)
        else:
            drawn = torch.zeros(rows, dtype=torch.int64, device=device)
            for row in (row for row in range(rows) if open_rows[row]):
                seen = ids[row, longest - len(prompts[row]) : stop]
                drawn[row] = next_token(logits[row], seen, sampling, generators[row])
        if stop < total:
            ids[:, stop] = drawn
        tokens = drawn.tolist()  # the one wait for the device in a step
        yield [token if is_open else None for token, is_open in zip(tokens, open_rows, strict=True)]
        start, stop = stop, stop + 1
        for row, token in enumerate(tokens):
            if token in ends or stop - longest >= limits[row]:
                open_rows[row] = False
