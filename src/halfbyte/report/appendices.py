"""The appendices: what somebody needs who checks the run or makes it again."""

from __future__ import annotations

from halfbyte.report import figures
from halfbyte.report.alternatives import rate_alt, speed_alt
from halfbyte.report.blocks import (
    Block,
    Code,
    Facts,
    Heading,
    Items,
    Paragraph,
    Picture,
    Section,
    Table,
    Verbatim,
)
from halfbyte.report.cleaning import rows_shown
from halfbyte.report.parts import parts
from halfbyte.report.settings import settings
from halfbyte.report.story import Story
from halfbyte.report.verdicts import verdicts


def appendices(story: Story) -> list[Section]:
    return [
        Section("Settings as asked and as effective", "settings", _settings(story)),
        Section("Data audit", "audit", _audit(story)),
        Section("Learning rate and gradient norm", "rates", _rates(story)),
        Section("Speed and memory over time", "speed", _speed(story)),
        Section("SHA-256 of the artifacts", "digests", _digests(story)),
        Section("Parts of the run", "parts", parts(story)),
        Section("Versions", "versions", _versions(story)),
        Section("Warnings and fallbacks", "warnings", _warnings(story)),
        Section("Verdicts", "verdicts", _verdicts(story)),
    ]


def _settings(story: Story) -> list[Block]:
    blocks: list[Block] = []
    if story.missing:
        blocks.append(
            Paragraph("The recipe as it was written is not in the folder, so only choices show it.")
        )
    rows = [(Code(s.key), s.asked, s.effective, s.reason) for s in settings(story)]
    return [*blocks, Table(("setting", "asked", "effective", "why"), rows, "llll")]


def _audit(story: Story) -> list[Block]:
    a = story.audit
    if a is None:
        return [Paragraph("The rows were not recorded.")]
    rows = [
        ("rows read", figures.count(a.rows_read)),
        ("rows that train", figures.count(a.rows_used)),
        ("rows held out", figures.count(a.rows_held_out)),
        ("rows shortened", figures.count(a.rows_shortened)),
        *([("tokens cut off them", figures.count(a.tokens_cut))] if a.tokens_cut else []),
        *(
            [
                ("rows split", figures.count(a.rows_split)),
                ("pieces of them that train", figures.count(a.pieces)),
                ("pieces with nothing to learn", figures.count(a.pieces_dropped)),
            ]
            if a.rows_split
            else []
        ),
        *((f"rows dropped: {why}", figures.count(n)) for why, n in a.rows_dropped.items()),
        ("tokens in an epoch", figures.count(a.tokens)),
        (
            "of those with loss",
            f"{figures.count(a.labels)} ({figures.percentage(a.labels, a.tokens)})",
        ),
    ]
    if not a.rows_dropped:
        rows.insert(4, ("rows dropped", "0"))
    blocks: list[Block] = [Table(("of the data", "number"), rows, "lr")]
    if a.length_percentiles:
        names = {"0": "shortest", "50": "median", "100": "longest"}
        parts = a.length_percentiles.items()
        blocks.append(
            Table(
                [names.get(p, f"{p}th percentile") for p, _ in parts],
                [[figures.count(n) for _, n in parts]],
                "r" * len(parts),
                "Length of a row in tokens, before cutting.",
            )
        )
    blocks += rows_shown(story)
    if a.sha256:
        blocks.append(Facts([("SHA-256 of the data file", Code(a.sha256))]))
    return blocks


def _rates(story: Story) -> list[Block]:
    if not story.steps:
        return [Paragraph("No step was made.")]
    caption = "Learning rate, and the gradient's norm before it is clipped, at each step."
    blocks: list[Block] = [Picture("learning_rate", rate_alt(story), caption)]
    clip = story.recipe.training.max_grad_norm
    if clip:
        above = sum(s.grad_norm > clip for s in story.steps)
        blocks.append(
            Paragraph(
                f"The norm was above {clip:g}, and so clipped, at {figures.count(above)} of "
                f"{figures.many(len(story.steps), 'step')}."
            )
        )
    return blocks


def _speed(story: Story) -> list[Block]:
    blocks: list[Block] = []
    if story.phases:
        rows = [(p.name, figures.duration(p.seconds)) for p in story.phases]
        if story.steps:
            rows.append(("training steps", figures.duration(sum(s.seconds for s in story.steps))))
        measured = [story.base, story.quantized_base, *story.evaluations]
        seconds = sum(e.seconds for e in measured if e is not None)
        if seconds:
            rows.append(("held-out loss", figures.duration(seconds)))
        blocks.append(Table(("phase", "took"), rows, "lr"))
    if not story.steps:
        return [*blocks, Paragraph("No step was made.")]
    tokens, seconds = sum(s.tokens for s in story.steps), sum(s.seconds for s in story.steps)
    slowest = max(story.steps, key=lambda s: s.seconds)
    peak = max(s.memory_bytes for s in story.steps)
    reserved = max((s.reserved_bytes or 0 for s in story.steps), default=0)
    blocks.append(
        Facts(
            [
                ("tokens trained", figures.count(tokens)),
                ("of those with loss", figures.count(sum(s.labels for s in story.steps))),
                ("speed over all steps", figures.speed(tokens, seconds)),
                ("seconds a step", f"{seconds / len(story.steps):.4g} on average"),
                (
                    "slowest step",
                    f"{figures.duration(slowest.seconds)} (step {figures.count(slowest.step)})",
                ),
                ("memory in use, highest", figures.gib(peak)),
                *([("memory taken for it, highest", figures.gib(reserved))] if reserved else []),
            ]
        )
    )
    caption = "Tokens a second, and memory in use, at each step."
    return [*blocks, Picture("speed", speed_alt(story), caption)]


def _digests(story: Story) -> list[Block]:
    if not story.artifacts:
        return [Paragraph("No artifact has been saved.")]
    rows = [(Code(a.path), figures.count(a.bytes), Code(a.sha256)) for a in story.artifacts]
    return [Table(("file", "bytes", "SHA-256"), rows, "lrl")]


def _versions(story: Story) -> list[Block]:
    blocks: list[Block] = []
    for number, e in enumerate(story.environments, 1):
        if len(story.environments) > 1:
            blocks.append(Heading(f"Machine {number}"))
        rows = [("Python", e.python), *sorted(e.packages.items())]
        rows += [(n, v) for n, v in (("CUDA", e.cuda), ("GPU driver", e.driver)) if v]
        blocks.append(Table(("package", "version"), rows, "ll"))
    for number, process in enumerate(story.processes, 1):
        s = process.started
        resumed = "" if s.resumed_from is None else f", from step {figures.count(s.resumed_from)}"
        text = f"Process {number}, halfbyte {s.version}, {figures.moment(process.begin)}{resumed}:"
        blocks += [Paragraph(text), Verbatim(" ".join(s.command) or "(not recorded)")]
    if story.packages:
        blocks += [
            Heading("Bill of materials"),
            Paragraph(
                "What halfbyte needs, what its extras brought, and the base model, as in sbom.json "
                "(CycloneDX). A licence is what a package says of itself."
            ),
            Table(("package", "version", "licence"), story.packages, "lll"),
        ]
    return blocks or [Paragraph("Not recorded.")]


def _warnings(story: Story) -> list[Block]:
    if not story.warnings and not story.fallbacks:
        return [Paragraph("None.")]
    blocks: list[Block] = []
    if story.warnings:
        texts = [
            w.text if w.step is None else f"Step {figures.count(w.step)}: {w.text}"
            for w in story.warnings
        ]
        blocks += [Heading("Warnings"), Items(texts)]
    if story.fallbacks:
        blocks += [Heading("Fallbacks"), Items([f"{f.what}: {f.reason}" for f in story.fallbacks])]
    return blocks


def _verdicts(story: Story) -> list[Block]:
    rows = [(v.word, v.name, v.detail) for v in verdicts(story)]
    text = (
        "Each is computed from the run's records and would read “failed” if it were so; what the "
        "run gives nothing to judge by is not applicable."
    )
    return [Paragraph(text), Table(("verdict", "what", "figures"), rows, "lll")]
