"""The page of ``halfbyte data``: what training will see, row by row and token by token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from halfbyte.data.audit.lengths import Bin
from halfbyte.data.audit.sample import Piece, RowAsTrained
from halfbyte.data.example import counted
from halfbyte.events.types import Audited, Choice, Found, Funnel
from halfbyte.report import figures
from halfbyte.report.blocks import (
    Bar,
    Bars,
    Block,
    Code,
    Document,
    Facts,
    Items,
    Legend,
    Section,
    Table,
    Tiles,
    Token,
    Tokens,
)
from halfbyte.report.cleaning import funnel_table
from halfbyte.report.findings import shown
from halfbyte.report.html import to_html

# Of a longer row the beginning and the end are shown.
MOST_TOKENS = 1500


@dataclass(frozen=True)
class DataSeen:
    """What the page is made of."""

    name: str  # of the recipe's file
    model: str
    audit: Audited
    findings: Sequence[Found]
    warnings: Sequence[str]
    choices: Sequence[Choice]
    funnel: Funnel | None
    lengths: Sequence[Bin]
    rows: Sequence[RowAsTrained]


def data_page(seen: DataSeen) -> str:
    """One HTML file that holds all it needs; private data stay hidden as they are in ``rows``."""
    sections = [
        Section("What the audit found", "findings", [shown(seen.findings)]),
        Section("The data", "data", _facts(seen)),
        Section("Lengths", "lengths", [_lengths(seen)]),
    ]
    if seen.funnel is not None:
        sections.append(Section("Cleaning", "cleaning", [funnel_table(seen.funnel)]))
    if seen.rows:
        rows = [Legend(), *(_row(row) for row in seen.rows)]
        sections.append(Section("Rows as trained", "rows", rows))
    document = Document(
        title=f"What training will see: {seen.audit.source}",
        kicker="Data audit",
        facts=[seen.name, f"for {seen.model}"],
        state=_state(seen.findings),
        objective="",
        page_one=[Section("At a glance", "glance", [_tiles(seen.audit)])],
        sections=sections,
        contents=False,
        good=not any(one.stops for one in seen.findings),
    )
    return to_html(document, {})


def _state(findings: Sequence[Found]) -> str:
    """``2 errors, 1 warning``."""
    found = Counter("accepted error" if one.accepted else one.severity for one in findings)
    words = [
        figures.many(found[name], name)
        for name in ("error", "accepted error", "warning", "note")
        if found[name]
    ]
    return ", ".join(words) or "nothing found"


def _tiles(audit: Audited) -> Tiles:
    dropped = sum(audit.rows_dropped.values())
    share = figures.percentage(audit.labels, audit.tokens)
    return Tiles(
        [
            ("rows that train", figures.count(audit.rows_used), f"{dropped:,} dropped"),
            ("rows held out", figures.count(audit.rows_held_out), "to measure with"),
            ("tokens an epoch", figures.count(audit.tokens), f"{share} of them carry loss"),
            (
                "longest row",
                figures.count(audit.max_length),
                f"tokens; {figures.many(audit.rows_shortened, 'row')} cut",
            ),
        ]
    )


def _facts(seen: DataSeen) -> list[Block]:
    audit = seen.audit
    dropped = [f"{n:,} ({why})" for why, n in audit.rows_dropped.items() if n]
    blocks: list[Block] = [
        Facts(
            [
                ("source", Code(audit.source)),
                ("rows read", figures.count(audit.rows_read)),
                ("left out", ", ".join(dropped) or "none"),
                ("columns", ", ".join(f"{k}: {v}" for k, v in audit.columns.items()) or "–"),
                ("template", audit.template),
                ("loss on", audit.loss_on),
            ]
        )
    ]
    if seen.choices:
        blocks.append(
            Table(
                ("setting", "chosen", "because"),
                [(Code(c.key), str(c.value), c.reason) for c in seen.choices],
                "lll",
            )
        )
    if seen.warnings:
        blocks.append(Items(list(seen.warnings)))
    return blocks


def _lengths(seen: DataSeen) -> Bars:
    most = max((one.rows for one in seen.lengths), default=0)
    total = sum(one.rows for one in seen.lengths)
    words = {"0": "shortest", "50": "median", "90": "90 % up to", "99": "99 % up to"}
    percentiles = seen.audit.length_percentiles
    said = [f"{word} {percentiles[p]:,}" for p, word in words.items() if p in percentiles]
    said.append(f"longest {percentiles['100']:,}")
    limit = seen.audit.max_length
    return Bars(
        ("tokens", "rows", "share"),
        [
            Bar(
                bin_label(one),
                figures.count(one.rows),
                figures.percentage(one.rows, total),
                one.rows / most if most else 0.0,
                strong=one.first > limit,
            )
            for one in seen.lengths
        ],
        f"Of the rows that train, before they are cut to {limit:,} tokens: {', '.join(said)}.",
    )


def bin_label(one: Bin) -> str:
    """``120–139``; ``from 260`` for the last one, where it has no end."""
    if one.last is None:
        return f"from {one.first:,}"
    return f"{one.first:,}" if one.first == one.last else f"{one.first:,}–{one.last:,}"


def _row(row: RowAsTrained) -> Tokens:
    learned = sum(piece.learned for piece in row.pieces)
    cut = f"; {row.cut:,} more were cut off" if row.cut else ""
    count = len(row.pieces)
    head, tail = row.pieces, []
    if count > MOST_TOKENS:
        head, tail = row.pieces[: MOST_TOKENS * 2 // 3], row.pieces[-MOST_TOKENS // 3 :]
    return Tokens(
        title=f"Row {counted(row.row, row.source)}",
        note=f"{figures.many(count, 'token')}, {learned:,} with loss{cut}",
        head=[_token(piece) for piece in head],
        left_out=count - len(head) - len(tail),
        tail=[_token(piece) for piece in tail],
    )


def _token(piece: Piece) -> Token:
    return Token(piece.id, piece.text, piece.learned)
