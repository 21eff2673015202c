"""Segments to tokens, and to the mask of those that are learned.

A row is tokenized whole and once: its pieces alone would give other tokens (Llama's tokenizer
puts a space before the first piece, and merges cross borders). Which segment a token belongs to
follows from the characters that the tokenizer says it covers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from typing import Any

import numpy as np

from halfbyte.data.batch import Segment, TokenizedRow
from halfbyte.errors import DataError, gave_up

# Rows in one call: enough that the tokenizer's threads have work, and few enough that the last
# call, which nothing is done beside, is short.
ROWS_AT_ONCE = 1024

Progress = Callable[[int, int], None]

_HALF = re.compile("[\ud800-\udfff]")


def tokenize_rows(
    tokenizer: Any, rows: Sequence[Sequence[Segment]], numbers: Sequence[int]
) -> list[TokenizedRow]:
    """One TokenizedRow for each of ``rows``, uncut; ``numbers`` are theirs in the source.

    For the rest see :func:`tokenized`.
    """
    return list(chain.from_iterable(tokenized(tokenizer, zip(rows, numbers, strict=True))))


def tokenized(
    tokenizer: Any, rows: Iterable[tuple[Sequence[Segment], int]]
) -> Iterator[list[TokenizedRow]]:
    """The rows, each given by its segments and its number in the source, in chunks.

    The beginning-of-sequence token stands where the tokenizer adds it, once: a chat template may
    have written it already. What else a tokenizer adds at the end is left off, since the segments
    hold the end-of-sequence token themselves. Raises DataError for a tokenizer without offsets.
    """
    if not tokenizer.is_fast:
        raise DataError(
            "the model's tokenizer gives no character offsets (it is not a fast one), so labels "
            "cannot be placed; add its tokenizer.json to the model's folder."
        )
    lead = leading_ids(tokenizer)
    # transformers around it makes a list of every row's offsets, which took half of the time.
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    for chunk, encodings in _encoded(backend, rows):
        yield [
            _row(segments, encoding, number, lead)
            for (segments, number), encoding in zip(chunk, encodings, strict=True)
        ]


_Chunk = list[tuple[Sequence[Segment], int]]


def _encoded(
    backend: Any, rows: Iterable[tuple[Sequence[Segment], int]]
) -> Iterator[tuple[_Chunk, list[Any]]]:
    """Chunks of rows with their encodings; while one chunk's are used, the next one is encoded.

    The tokenizer's threads need no Python for it, so that ``rows`` are made meanwhile too.
    """

    def encode(chunk: _Chunk) -> list[Any]:
        texts = ["".join(segment.text for segment in segments) for segments, _ in chunk]
        try:
            encodings: list[Any] = backend.encode_batch(texts, add_special_tokens=False)
        except TypeError:  # what it says of a text that UTF-8 cannot hold
            whole = [whole_characters(text) for text in texts]
            encodings = backend.encode_batch(whole, add_special_tokens=False)
        except BaseException as error:
            if not gave_up(error):
                raise
            raise DataError(
                f"the model's tokenizer gives up on one of these {len(texts):,} rows ({error}); "
                "its tokenizer.json is damaged, or made to take for ever: use another model."
            ) from None
        return encodings

    iterator = iter(rows)
    with ThreadPoolExecutor(1) as ahead:
        before: tuple[_Chunk, Future[list[Any]]] | None = None
        while chunk := list(islice(iterator, ROWS_AT_ONCE)):
            coming = chunk, ahead.submit(encode, chunk)
            if before is not None:
                yield before[0], before[1].result()
            before = coming
        if before is not None:
            yield before[0], before[1].result()


def _row(segments: Sequence[Segment], encoding: Any, number: int, lead: list[int]) -> TokenizedRow:
    ids, learned = encoding.ids, _learned(segments, encoding)
    if lead and ids[:1] != lead[:1]:
        ids = [*lead, *ids]
        learned = np.concatenate([np.zeros(len(lead), dtype=bool), learned])
    learned[:1] = False
    return TokenizedRow(np.array(ids, dtype=np.int32), learned, number)


def _learned(segments: Sequence[Segment], encoding: Any) -> np.ndarray:
    """Bool [tokens]: whether the segment that holds a token's last character is learned.

    So a token across a border belongs to the later segment. Its end decides, not its start: a
    byte-level tokenizer may report a token of spaces as lying at its own end with no length.
    """
    learned = np.zeros(len(encoding), dtype=bool)
    last = sum(len(segment.text) for segment in segments)
    border = first = 0
    for segment in segments:
        border += len(segment.text)
        after = len(learned)
        if border < last:
            token = _first_ending_behind(encoding, border)
            if token is None:
                return _learned_by_offsets(segments, encoding.offsets)
            after = token
        learned[first:after] = segment.learn
        first = max(first, after)
    return learned


def _first_ending_behind(encoding: Any, border: int) -> int | None:
    """The first token whose end lies behind ``border``; None where it cannot be told at once."""
    token = encoding.char_to_token(border)
    if token is None or (token > 0 and encoding.token_to_chars(token - 1)[1] > border):
        return None
    return int(token)


def _learned_by_offsets(
    segments: Sequence[Segment], offsets: Sequence[tuple[int, int]]
) -> np.ndarray:
    """The same by looking at every token."""
    ends = np.cumsum([len(segment.text) for segment in segments])
    learn = np.array([segment.learn for segment in segments], dtype=bool)
    flat = np.fromiter(chain.from_iterable(offsets), dtype=np.int64, count=2 * len(offsets))
    token_ends = flat[1::2]
    owner = np.searchsorted(ends, token_ends, side="left")
    return learn[np.minimum(owner, len(segments) - 1)]


def whole_characters(text: str) -> str:
    """``text`` with U+FFFD for each half of a surrogate pair, which JSON can hold and UTF-8 not."""
    return _HALF.sub("\ufffd", text)


def leading_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text by itself: most often the BOS token, or nothing."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return list(whole[:start])
    return []


def leading_text(tokenizer: Any, text: str) -> str:
    """A Jinja expression for what stands before ``text`` so that its tokens, without special ones
    added, are those of ``text`` with what the tokenizer puts in front; empty if nothing is needed.

    Programs that render a chat template tokenize its text without adding special tokens. Some
    tokenizers put a space before the first piece of a text but not before one that follows a
    special token, so the space is then written.
    """
    if tokenizer is None:
        return ""
    lead = leading_ids(tokenizer)
    bare = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not lead or bare[:1] == lead[:1]:
        return ""
    bos = tokenizer.bos_token or ""
    for before, expression in ((bos, "bos_token"), (bos + " ", "bos_token + ' '")):
        if list(tokenizer(before + text, add_special_tokens=False)["input_ids"]) == lead + bare:
            return expression
    written = tokenizer.convert_ids_to_tokens(lead)
    return " + ".join(repr(token) for token in written)
