"""What will be trained, counted before step 1."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from halfbyte.data.batch import Segment, TokenizedRow
from halfbyte.data.example import Example
from halfbyte.data.tokenize import leading_ids, tokenize_rows

PERCENTILES = (0, 50, 90, 99, 100)

# From these shares of the rows on, the user is told.
MANY_SHORTENED = 0.05
MANY_EQUAL = 0.05
MANY_CROSSED = 0.05


def percentile(lengths: Sequence[int], percent: float) -> int:
    """The smallest of ``lengths`` that at least ``percent`` % of them do not exceed."""
    return int(np.percentile(np.asarray(lengths), percent, method="inverted_cdf"))


def length_percentiles(lengths: Sequence[int]) -> dict[str, int]:
    """Percentiles by their number, as the audit holds them."""
    return {str(percent): percentile(lengths, percent) for percent in PERCENTILES}


def sample_of(
    tokenizer: Any, segments: Sequence[Segment], row: TokenizedRow
) -> list[tuple[str, bool]]:
    """A row as the model sees it: runs of text, and whether their tokens carry loss.

    Joined, the runs are the text that was tokenized, special tokens included, up to where the row
    was cut.
    """
    text = "".join(segment.text for segment in segments)
    ends = [
        end
        for _, end in tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )["offset_mapping"]
    ]
    lead = len(row) + row.cut - len(ends)
    runs: list[tuple[str, bool]] = []
    if lead > 0:
        begin = "".join(tokenizer.convert_ids_to_tokens(leading_ids(tokenizer)))
        runs.append((begin, False))
    mask = row.loss_mask[max(0, lead) :].tolist()
    ends = ends[: len(mask)]
    if row.cut == 0 and ends:
        ends[-1] = len(text)  # what the tokenizer passed over at the end is shown too
    start = 0
    for end, learned in zip(ends, mask, strict=True):
        piece = text[start : max(start, end)]
        if runs and (runs[-1][1] == learned or not piece):
            # A second token of the same character has no text of its own.
            runs[-1] = (runs[-1][0] + piece, runs[-1][1])
        else:
            runs.append((piece, learned))
        start = max(start, end)
    return runs


def warnings_of(
    rows: Sequence[Example],
    held_out: Sequence[Example],
    tokenized: Sequence[TokenizedRow],
    tokenizer: Any,
    *,
    max_length: int,
    reads: frozenset[str],
) -> list[str]:
    """Sentences on what in the training rows (``rows``, ``tokenized``) the user may not expect."""
    found: list[str] = []
    count = len(rows)
    shortened = sum(row.cut > 0 for row in tokenized)
    if shortened >= MANY_SHORTENED * count:
        tokens = sum(row.cut for row in tokenized)
        share = tokens / (tokens + sum(map(len, tokenized)))
        found.append(
            f"{shortened:,} of {count:,} rows are longer than {max_length:,} tokens and lose the "
            f"end of their answer ({share:.1%} of all tokens); raise data.max_length or shorten "
            "the rows."
        )
    same = _duplicates(rows)
    if same >= max(2, MANY_EQUAL * count):
        found.append(f"{same:,} of {count:,} rows that train are copies of an earlier one.")
    seen = {_content(row) for row in rows} if held_out else set()
    known = sum(_content(row) in seen for row in held_out)
    if known:
        found.append(
            f"{known:,} of {len(held_out):,} held-out rows are also among the rows that train, so "
            "the held-out loss looks better than it is; remove the copies from the data."
        )
    if tokenizer.eos_token_id is None:
        found.append(
            "the tokenizer names no end-of-sequence token, so the model does not learn to end its "
            "answers."
        )
    asked_nothing = sum(not any(_part(row, field).strip() for field in reads) for row in rows)
    if asked_nothing:
        found.append(f"{asked_nothing:,} of {count:,} rows have an answer and no question.")
    for field in ("instruction", "input"):
        left_out = 0 if field in reads else sum(bool(_part(row, field)) for row in rows)
        if left_out:
            found.append(
                f"{left_out:,} of {count:,} rows have an {field}, for which the template has no "
                "place: it is left out."
            )
    found += _special_tokens_in(rows, tokenizer)
    return found


def border_warning(
    tokenizer: Any, prompts: Sequence[str], tokenized: Sequence[TokenizedRow]
) -> list[str]:
    """Whether prompts, tokenized alone as they are after training, begin their rows.

    They do not where the prompt's last characters and the answer's first make one token: the
    answer would have to begin with a token that was never trained there. ``tokenized`` are the
    rows of ``prompts``.
    """
    alone = tokenize_rows(
        tokenizer, [[Segment(prompt, False)] for prompt in prompts], range(len(prompts))
    )
    crossed = sum(
        prompt.input_ids.tolist() != row.input_ids[: len(prompt)].tolist()
        for prompt, row in zip(alone, tokenized, strict=True)
        if len(prompt) < len(row)
    )
    if crossed < max(1, MANY_CROSSED * len(prompts)):
        return []
    return [
        f"in {crossed:,} of {len(prompts):,} rows looked at the end of the prompt and the start of "
        "the answer make one token, so that what is prompted later is not what was trained; end "
        "the text before {output} in data.template with a line break rather than a space, and "
        "have answers start without one."
    ]


def _content(row: Example) -> tuple[str | None, ...]:
    """All that makes two rows copies of one another."""
    return (row.text, row.instruction, row.input, *(f"{m.role} {m.content}" for m in row.messages))


def _part(row: Example, field: str) -> str:
    part = row.instruction if field == "instruction" else row.input
    return part or ""


def _duplicates(rows: Sequence[Example]) -> int:
    counts = Counter(hash(_content(row)) for row in rows)
    return sum(number - 1 for number in counts.values())


def _special_tokens_in(rows: Sequence[Example], tokenizer: Any) -> list[str]:
    """The rows' own text must not hold what ends or begins a turn."""
    special = [token for token in tokenizer.all_special_tokens if token]
    if not special:
        return []
    pattern = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))
    hits = [
        match[0]
        for row in rows
        if (
            match := pattern.search(
                f"{row.asked}\n{row.answer}".removesuffix(tokenizer.eos_token or "")
            )
        )
    ]
    if not hits:
        return []
    return [
        f"{len(hits):,} of {len(rows):,} rows hold the text of a special token ({hits[0]}), which "
        "the model takes for the token itself; remove it from the data unless it is meant so."
    ]
