"""The decoding loop: the prompts at once, then one token a row at a time."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halfbyte.generate.sampling import Sampling, next_token

if TYPE_CHECKING:
    from halfbyte.generate.captured import StaticStep

# Capturing takes as long as about four tokens launched one kernel at a time.
CAPTURED_FROM = 16


@torch.no_grad()
def decode(
    network: Any,
    prompts: Sequence[list[int]],
    *,
    limits: Sequence[int],
    ends: set[int],
    sampling: Sampling,
    seeds: Sequence[int],
    on_fallback: Callable[[str], None] | None = None,
) -> Generator[list[int | None], None, None]:
    """Yields the next token of each row, None for a row that has ended.

    ``prompts`` are token ids, unequal lengths allowed, none empty; row i ends with a token of
    ``ends`` (which is yielded) or after ``limits[i]`` tokens. Each row draws from a generator of
    its own, seeded by ``seeds[i]``: what it draws depends neither on the other rows nor on
    torch's global state. ``network`` must be in ``ready_to_generate``.

    On a GPU many tokens are made by a CUDA graph; where the network cannot be captured, all are
    made eagerly, and ``on_fallback`` hears why.
    """
    from transformers import DynamicCache

    device = network.get_output_embeddings().weight.device
    rows, longest = len(prompts), max(map(len, prompts))
    total = longest + max(limits)
    ids = torch.zeros(rows, total, dtype=torch.int64)
    mask = torch.zeros(rows, total, dtype=torch.bool)
    for row, prompt in enumerate(prompts):  # padding on the left: the newest tokens are aligned
        ids[row, longest - len(prompt) : longest] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = True
    positions = (mask.cumsum(1) - 1).clamp_min(0).to(device)
    padding = (~mask).sum(1).to(device)
    padded = not bool(mask.all())
    ids, mask = ids.to(device), mask.to(device)
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    cache = DynamicCache(config=network.config)

    def forward(start: int, stop: int) -> Tensor:
        """The logits [rows, vocab] after the tokens from ``start`` up to ``stop``."""
        logits: Tensor = network(
            input_ids=ids[:, start:stop],
            # Without padding there is nothing to say, and attention may take its fast path.
            attention_mask=mask[:, :stop] if padded else None,
            position_ids=positions[:, start:stop],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        return logits

    open_rows = [limit > 0 for limit in limits]
    step: StaticStep | None = None
    logits = forward(0, longest)
    try:
        for stop in range(longest, total):
            if sampling.is_argmax:
                drawn = logits.argmax(dim=-1)
            else:
                drawn = torch.zeros(rows, dtype=torch.int64, device=device)
                for row in (row for row in range(rows) if open_rows[row]):
                    seen = ids[row, longest - len(prompts[row]) : stop]
                    drawn[row] = next_token(logits[row], seen, sampling, generators[row])
            ids[:, stop] = drawn
            tokens = drawn.tolist()  # the one wait for the device in a step
            yield [t if is_open else None for t, is_open in zip(tokens, open_rows, strict=True)]
            for row, token in enumerate(tokens):
                if token in ends or stop + 1 - longest >= limits[row]:
                    open_rows[row] = False
            if not any(open_rows):
                return
            if step is not None:
                logits = step(drawn)
            elif stop == longest and worth_capturing(device, max(limits)):
                from halfbyte.generate.captured import contents, static_step

                prefilled = contents(cache)
                logits = forward(stop, stop + 1)
                step = static_step(
                    network,
                    prefilled,
                    padding,
                    stop,
                    total,
                    tokens=drawn,
                    expected=logits,
                    on_fallback=on_fallback,
                )
                del prefilled
                if step is not None:
                    cache.layers.clear()  # what it held has been copied
            else:
                logits = forward(stop, stop + 1)
    finally:
        if step is not None:
            del logits  # which lie in the graph's memory
            step.release()


def worth_capturing(device: torch.device, new_tokens: int) -> bool:
    """Whether a graph is made for ``new_tokens`` tokens at most a row."""
    return device.type == "cuda" and new_tokens >= CAPTURED_FROM
