"""Answers to rendered prompts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from halfbyte.generate.cached_attention import ready_to_generate
from halfbyte.generate.decoding import decode
from halfbyte.generate.prompt import end_ids, prompt_ids
from halfbyte.generate.sampling import Sampling
from halfbyte.generate.text_stream import TextStream
from halfbyte.model.source import context_length

# Rows and tokens of a batch: a weight is read once for all of its rows, and the cache of 16,384
# tokens takes 2 GB in an 8B model with 8 key-value heads.
ROWS_AT_ONCE = 16
TOKENS_AT_ONCE = 16_384


@dataclass(frozen=True)
class Answer:
    """What a model said to one prompt."""

    text: str  # special tokens left out
    tokens: int  # generated, the one that ended the answer included
    seconds: float  # from the start of the row's batch to its last token
    ended: bool  # by itself, not by the limit
    prompt_tokens: int  # as shown to the model
    prompt_cut: int  # tokens of the prompt that the model could not take


def answer(
    network: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    on_text: Callable[[int, str], None] | None = None,
    on_fallback: Callable[[str], None] | None = None,
) -> list[Answer]:
    """An answer to each of ``prompts``, in their order; greedy unless a temperature is given.

    ``network`` is a transformers causal LM, whatever its attention (it is given back as it was),
    and ``prompts`` are rendered whole, up to where the answer begins. Prompts are answered
    together in batches. The same ``seed`` gives the same answers; prompt i draws from ``seed + i``.
    ``on_text(i, piece)`` hears the text of prompt i as it comes, in complete characters;
    ``on_fallback(reason)`` hears why tokens are not made by a CUDA graph where they would be.

    A prompt too long for the model loses its beginning (but not the beginning-of-sequence token),
    which ``Answer.prompt_cut`` tells. Raises ValueError for a setting out of range and for a
    prompt of no tokens.
    """
    sampling = Sampling(temperature, top_p, top_k, repetition_penalty)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens {max_new_tokens} is not 1 or more")
    room = context_length(network.config)
    ends = end_ids(network, tokenizer)
    whole = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    if not all(whole):
        raise ValueError("a prompt has no tokens: there is nothing to go on from")
    shown = [_fit(ids, room, max_new_tokens, tokenizer.bos_token_id) for ids in whole]
    limits = [min(max_new_tokens, room - len(ids)) for ids in shown]
    writers = [_Writer(tokenizer, ends, limit) for limit in limits]
    with ready_to_generate(network):
        for rows in _batches(shown, max_new_tokens):
            began = time.perf_counter()
            steps = decode(
                network,
                [shown[row] for row in rows],
                limits=[limits[row] for row in rows],
                ends=ends,
                sampling=sampling,
                seeds=[seed + row for row in rows],
                on_fallback=on_fallback,
            )
            with closing(steps):
                for tokens in steps:
                    seconds = time.perf_counter() - began
                    for row, token in zip(rows, tokens, strict=True):
                        piece = "" if token is None else writers[row].write(token, seconds)
                        if piece and on_text is not None:
                            on_text(row, piece)
    return [
        Answer(
            text="".join(writer.pieces),
            tokens=writer.tokens,
            seconds=writer.seconds,
            ended=writer.ended,
            prompt_tokens=len(ids),
            prompt_cut=len(all_ids) - len(ids),
        )
        for writer, ids, all_ids in zip(writers, shown, whole, strict=True)
    ]


class _Writer:
    """An answer while it is written."""

    def __init__(self, tokenizer: Any, ends: set[int], limit: int) -> None:
        self._stream = TextStream(tokenizer)
        self._ends = ends
        self._limit = limit
        self.pieces: list[str] = []
        self.tokens = 0
        self.seconds = 0.0
        self.ended = False

    def write(self, token: int, seconds: float) -> str:
        """Take the next token; returns the text that is complete with it."""
        self.tokens += 1
        self.seconds = seconds
        self.ended = token in self._ends
        piece = "" if self.ended else self._stream.push(token)
        if self.ended or self.tokens == self._limit:
            piece += self._stream.end()
        self.pieces.append(piece)
        return piece


def room_for_prompt(context: int, max_new_tokens: int) -> int:
    """Tokens that a prompt may have of ``context``; at most half is kept for the answer."""
    return context - min(max_new_tokens, context // 2)


def _fit(ids: list[int], room: int, max_new_tokens: int, bos: int | None) -> list[int]:
    """The end of a prompt that is too long, with its beginning-of-sequence token."""
    keep = room_for_prompt(room, max_new_tokens)
    if len(ids) <= keep:
        return ids
    head = ids[:1] if ids[0] == bos else []
    return head + ids[len(ids) - keep + len(head) :]


def _batches(shown: Sequence[list[int]], max_new_tokens: int) -> Iterator[list[int]]:
    """Numbers of prompts to answer together: those of similar length, so that little is padded."""
    group: list[int] = []
    for row in sorted(range(len(shown)), key=lambda row: len(shown[row])):
        tokens = (len(group) + 1) * (len(shown[row]) + max_new_tokens)
        if group and (len(group) == ROWS_AT_ONCE or tokens > TOKENS_AT_ONCE):
            yield group
            group = []
        group.append(row)
    if group:
        yield group
