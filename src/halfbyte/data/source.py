"""Rows as they lie in files, in a folder or on the hub: finding the reader."""

from __future__ import annotations

import difflib
import glob
import hashlib
import re
import zlib
from pathlib import Path

from halfbyte.data.table import ARROW_SUFFIXES, PACKED, SUFFIXES, CellStore, Table
from halfbyte.errors import DataError
from halfbyte.recipe.data_schema import SourceRecipe

# NAME or OWNER/NAME, as the hub spells them.
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def read_rows(source: SourceRecipe, limit: int | None = None) -> Table:
    """The first ``limit`` rows of a source (all if None, or its own limit if that is less).

    Local files and folders are recognized by what they are and by their names' endings, and what
    is not on this machine is looked for on the hub. A pattern stands for its files in the order of
    their names. No more is read than ``limit`` needs, except that a file's SHA-256 is of the whole
    file. No code that comes with a dataset is executed. Raises DataError, in one sentence, for
    whatever is wrong; a source without rows is wrong.
    """
    if source.limit is not None:
        limit = source.limit if limit is None else min(limit, source.limit)
    path = Path(source.path).expanduser()
    if path.is_file():
        table = _read_file(path, limit)
    elif path.is_dir():
        from halfbyte.data.source_datasets import read_saved

        table = read_saved(path, source.split, limit)
    elif is_pattern(source.path):
        files = files_of(source.path)
        if not files:
            raise DataError(f"no file matches {source.path}; check the folder and the ending.")
        table = _read_files(files, limit)
    elif _may_be_hub_name(source.path):
        from halfbyte.data.source_datasets import read_hub

        table = read_hub(source, limit)
    else:
        raise DataError(f"there is no data file {source.path}{_nearest(path)}.")
    if not table.rows:
        raise DataError(f"{source.path} holds no rows.")
    return table


def is_pattern(path: str) -> bool:
    """Whether ``path`` stands for several files: it holds ``*``, ``?`` or ``[…]``."""
    return glob.has_magic(path)


def files_of(pattern: str) -> list[Path]:
    """The files that a pattern stands for, by name; ``**`` is any number of folders."""
    found = glob.glob(str(Path(pattern).expanduser()), recursive=True)
    return sorted(path for path in map(Path, found) if path.is_file())


def is_here(path: str, folder: Path | None = None) -> bool:
    """Whether a source, seen from ``folder``, is on this machine."""
    there = str((folder or Path()) / Path(path).expanduser())
    return Path(there).exists() or (is_pattern(path) and bool(files_of(there)))


def _read_files(paths: list[Path], limit: int | None) -> Table:
    """The rows of several files, one after another; a row lacks the columns of other files."""
    rows = CellStore()
    columns: dict[str, None] = {}
    starts: list[tuple[int, str]] = []
    digests: list[str] = []
    warnings: list[str] = []
    typed = False
    for path in paths:
        if limit is not None and len(rows) >= limit:
            break
        table = _read_file(path, None if limit is None else limit - len(rows))
        starts.append((len(rows), str(path)))
        rows.extend(table.rows)
        columns |= dict.fromkeys(table.columns)
        digests.append(table.sha256 or "")
        warnings += table.warnings
        typed = typed or table.typed
    digest = hashlib.sha256("".join(f"{d}\n" for d in digests).encode()).hexdigest()
    return Table(list(columns), rows, digest, warnings, starts, typed)


def _read_file(path: Path, limit: int | None) -> Table:
    from halfbyte.data import source_arrow, source_csv, source_json, source_parquet

    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] != [] and suffixes[-1] in PACKED
    kind = suffixes[-2] if packed and len(suffixes) > 1 else "".join(suffixes[-1:])
    try:
        if kind == ".json":
            return source_json.read_json(path, limit)
        if kind in (".jsonl", ".ndjson"):
            return source_json.read_jsonl(path, limit)
        if kind in (".csv", ".tsv"):
            return source_csv.read_csv(path, limit, delimiter="\t" if kind == ".tsv" else None)
        if kind == ".parquet" and not packed:
            return source_parquet.read_parquet(path, limit)
        if kind in ARROW_SUFFIXES and not packed:
            return source_arrow.read_arrow(path, limit)
    except OSError as error:
        if suffixes[-1:] == [".zst"] and error.errno is None:
            raise DataError(
                f"{path} holds compressed data that is damaged or cut off, or is not Zstandard."
            ) from error
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (EOFError, zlib.error) as error:
        raise DataError(f"{path} holds compressed data that is damaged or cut off.") from error
    raise DataError(
        f"{path} is of no kind that is read here; the name of a data file ends in .json, .jsonl, "
        ".csv, .tsv (each also with .gz or .zst), .parquet, .arrow or .feather."
    )


def _may_be_hub_name(name: str) -> bool:
    return bool(_HUB_NAME.fullmatch(name)) and not name.lower().endswith(SUFFIXES)


def _nearest(path: Path) -> str:
    """``; did you mean …`` for a file in the same folder with a similar name."""
    folder = path.parent
    if not folder.is_dir():
        return f", nor a folder {folder}"
    names = [entry.name for entry in folder.iterdir()]
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return f"; did you mean {folder / near[0]}" if near else ""
