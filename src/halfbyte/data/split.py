"""Which rows train and which are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from halfbyte.data.cleaning.picked import Picked
from halfbyte.data.example import Example
from halfbyte.data.example_store import ExampleStore
from halfbyte.data.formats.format import Origin, examples
from halfbyte.data.formats.recognise import Recognised, recognise
from halfbyte.data.mixing import mix
from halfbyte.data.source import read_rows
from halfbyte.data.table import Table
from halfbyte.errors import DataError
from halfbyte.events.types import Choice
from halfbyte.recipe.data_schema import DataRecipe, SourceRecipe

SHARE = 20  # one row in so many is held out
MOST = 200  # an evaluation costs time, and so many rows tell a loss to about a hundredth

# Of rows set apart, so many more are read than are held out: some may have nothing to learn.
SPARE = 50


@dataclass
class Rows:
    """First the rows that may train, source after source, then those that only may be held out.

    ``source`` int32 [rows] is the number of each one's source.
    ``apart`` is how many rows at the end cannot train; ``wanted`` how many are to be held out,
    None to decide once the usable rows are known.
    ``times`` is how often each row stands in an epoch, int64 [rows], None where each does once.
    ``columns`` are by their role, ``origins`` by the number of the source; ``texts`` says that no
    row that trains is anything but a text.
    """

    rows: Picked = field(default_factory=lambda: Picked(ExampleStore()))
    source: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    columns: dict[str, str] = field(default_factory=dict)
    formats: list[str] = field(default_factory=list)
    texts: bool = True
    origins: list[Origin] = field(default_factory=list)
    sha256: str | None = None
    apart: int = 0
    wanted: int | None = None
    times: np.ndarray | None = None
    choices: list[Choice] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def at(self, example: Example) -> str:
        """Where a row stands, for a message about it: ``a.csv, row 3``."""
        return self.origins[example.source].at(example.row)

    def places_of(self, some: Picked) -> np.ndarray:
        """Where ``some`` of the rows stand among them, int64."""
        return np.searchsorted(np.asarray(self.rows.places), np.asarray(some.places))

    def keep(self, places: np.ndarray, mended: Picked | None = None) -> None:
        """Keep the rows at ``places``, which ascend, as ``mended`` has them."""
        kept = np.asarray(self.rows.places)[places]
        self.rows = (self.rows if mended is None else mended).left(kept.tolist())
        self.source = self.source[places]

    def in_an_epoch(self, places: np.ndarray) -> np.ndarray:
        """``places`` of rows, each as often as the row stands in an epoch."""
        return places if self.times is None else np.repeat(places, self.times[places])


def read_split(data: DataRecipe) -> Rows:
    """Read what ``data`` names, no further than its limit and its held-out rows need."""
    wanted = None if data.held_out == "auto" else int(data.held_out)
    follow = data.held_out_path is None and data.held_out_from == "after"
    if follow and wanted is None and data.limit is not None:
        wanted = automatic_held_out(data.limit)
    spare = wanted + SPARE if follow and wanted else 0
    if data.cleaning:  # which leaves a part of them, seldom less than a quarter
        spare *= 4
    read = Rows(wanted=wanted)
    digests: list[str | None] = []
    for number, source in enumerate(data.all_sources):
        limit = None if source.limit is None else source.limit + spare
        table, found = _read(data, source.model_copy(update={"limit": limit}), read)
        digests.append(table.sha256)
        read.texts = read.texts and found.texts
        _tell(data, source, found, number, read)
    read.sha256 = digest_of(digests)
    if data.held_out_path is not None and wanted != 0:
        before = len(read.rows)
        names = set(read.formats)
        _read(data, _held_out_source(data, data.held_out_path), read)
        read.apart = len(read.rows) - before
        other = read.formats.pop()
        if other not in names:
            read.warnings.append(
                f"the held-out rows of {data.held_out_path} are of the format {other}, those that "
                f"train of the format {' or '.join(sorted(names))}."
            )
    elif follow:
        _set_apart(data, read)
    return read


def mix_rows(data: DataRecipe, read: Rows, seed: int) -> None:
    """Leave of ``read.rows`` those that an epoch takes of each source, and say how often.

    Rows that are set apart stay. What is dropped before counts as not there, so that the shares
    are those of the rows that are left.
    """
    if not data.sources:
        return
    may_train = len(read.rows) - read.apart
    counts = np.bincount(read.source[:may_train], minlength=len(data.sources)).tolist()
    mixed = mix(data.sources, counts, seed)
    read.choices += mixed.choices
    read.warnings += mixed.warnings
    times = np.concatenate([mixed.times, np.ones(read.apart, dtype=np.int64)])
    read.keep(np.flatnonzero(times))
    read.times = times[times > 0] if times.max(initial=0) > 1 else None


def digest_of(digests: Sequence[str | None]) -> str | None:
    """The one digest, or the SHA-256 of several, one a line; None where one is not known."""
    if len(digests) == 1 or None in digests:
        return digests[0] if len(digests) == 1 else None
    return hashlib.sha256("".join(f"{digest}\n" for digest in digests).encode()).hexdigest()


def _held_out_source(data: DataRecipe, path: str) -> SourceRecipe:
    """The file of held-out rows, read as ``data.path`` is; beside several sources by its looks."""
    if data.path is None:
        return SourceRecipe(path=path)
    return data.all_sources[0].model_copy(update={"path": path, "limit": None})


def _read(data: DataRecipe, source: SourceRecipe, read: Rows) -> tuple[Table, Recognised]:
    """Add the rows of ``source`` to ``read``."""
    table = read_rows(source)
    found = recognise(
        source,
        table,
        fixed_instruction=data.instruction is not None,
        merge_turns=data.merge_turns,
    )
    number = len(read.origins)
    origin = Origin(source.path, number, table.files, table.typed)
    store = read.rows.source
    store.extend(examples(found.format, table.rows, origin))
    read.rows = Picked(store)
    added = len(store) - len(read.source)
    read.source = np.concatenate([read.source, np.full(added, number, np.int32)])
    read.origins.append(origin)
    read.formats.append(found.format.name)
    read.warnings += [*table.warnings, *found.warnings, *origin.warnings(len(table.rows))]
    return table, found


def _tell(
    data: DataRecipe, source: SourceRecipe, found: Recognised, number: int, read: Rows
) -> None:
    """The format and the columns of a source, as choices and for the audit."""
    several = len(data.sources) > 1
    key = f"data.sources[{number + 1}]" if data.sources else "data"
    if found.why is not None:
        read.choices.append(Choice(f"{key}.format", "auto", found.format.name, found.why))
    roles = found.format.by_role()
    for role, reason in found.format.reason.items():
        if role in roles:
            read.choices.append(Choice(f"{key}.columns.{role}", None, roles[role], reason))
    for role, column in roles.items():
        read.columns[f"{role} of {source.path}" if several else role] = column


def _set_apart(data: DataRecipe, read: Rows) -> None:
    """Let the rows after the limit, or the last ones, be those that do not train."""
    count = len(read.rows)
    if read.wanted is None:
        read.wanted = automatic_held_out(count)
    if data.limit is not None:
        read.apart = max(0, count - data.limit)
        if read.wanted and not read.apart:
            raise DataError(
                f"data.held_out_from: after, but {data.name} has {count:,} rows and data.limit "
                f"takes {data.limit:,}, so that none follows; lower data.limit or state "
                "held_out_from: random."
            )
    else:
        read.apart = min(read.wanted, count)


def choose_held_out(
    data: DataRecipe, read: Rows, usable: np.ndarray, seed: int
) -> tuple[np.ndarray, int]:
    """The rows to hold out and how many of ``read.rows`` were considered for anything.

    ``usable`` is bool [rows]: those with something to learn. Rows set apart are held out from the
    first on; where none are, the seed draws, of several sources from each in the share that it has
    of the usable rows. Only usable rows are taken, so that the same count always takes the same
    ones. Appends to ``read.choices`` and ``read.warnings``.
    """
    count = len(read.rows)
    first_apart = count - read.apart
    held_out = np.zeros(count, dtype=bool)
    if read.apart or read.wanted == 0:
        candidates = first_apart + np.flatnonzero(usable[first_apart:])
        wanted = min(MOST, len(candidates)) if read.wanted is None else read.wanted
        _say(data, read, wanted, len(candidates), "the first usable ones of those set apart")
        taken = candidates[:wanted]
        held_out[taken] = True
        if len(candidates) > wanted:  # what lies behind was only read in case
            return held_out, int(taken[-1]) + 1 if wanted else first_apart
        return held_out, count
    candidates = np.flatnonzero(usable)
    wanted = automatic_held_out(len(candidates)) if read.wanted is None else read.wanted
    if wanted and wanted >= len(candidates):
        raise DataError(
            f"data.held_out: {wanted:,} rows are to be held out and there are {len(candidates):,}, "
            "so that none would train; hold out fewer."
        )
    _say(data, read, wanted, len(candidates), "drawn by the seed")
    groups = [candidates]
    if len(data.sources) > 1:
        source = read.source[candidates]
        groups = [candidates[source == number] for number in range(len(data.sources))]
    rng = np.random.default_rng(seed)
    for group, share in zip(groups, shares_of(wanted, [*map(len, groups)]), strict=True):
        held_out[group[rng.choice(len(group), share, replace=False)]] = True
    return held_out, count


def shares_of(wanted: int, counts: Sequence[int]) -> list[int]:
    """``wanted`` divided as ``counts`` are, to the nearest row (largest remainders)."""
    total = max(1, sum(counts))
    shares = [wanted * count // total for count in counts]
    remainders = sorted(range(len(counts)), key=lambda i: (-(wanted * counts[i] % total), i))
    for i in remainders[: wanted - sum(shares)]:
        shares[i] += 1
    return shares


def automatic_held_out(rows: int) -> int:
    """5 % of the rows, at most 200; none below 20 rows."""
    return min(rows // SHARE, MOST)


def _say(data: DataRecipe, read: Rows, wanted: int, candidates: int, how: str) -> None:
    if data.held_out == "auto":
        if data.held_out_path is not None:
            reason = f"of the {candidates:,} rows of {data.held_out_path}, at most {MOST}"
        elif wanted:
            reason = f"5 % of the rows, at most {MOST}, {how}"
        else:
            reason = f"fewer than {SHARE} rows are too few to hold one out"
        read.choices.append(Choice("data.held_out", "auto", wanted, reason))
    elif wanted > candidates:
        read.warnings.append(
            f"data.held_out asks for {wanted:,} rows and only {candidates:,} are there."
        )
