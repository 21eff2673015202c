"""Rows as they lie in a file, a folder or on the hub: finding the reader."""

from __future__ import annotations

import difflib
import re
import zlib
from pathlib import Path

from halfbyte.data.table import SUFFIXES, Table
from halfbyte.errors import DataError
from halfbyte.recipe.schema import DataRecipe

# NAME or OWNER/NAME, as the hub spells them.
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def read_rows(data: DataRecipe, limit: int | None = None) -> Table:
    """The first ``limit`` rows of ``data.path`` (all if None).

    Local files and folders are recognized by what they are and by their names' endings, and what
    is not on this machine is looked for on the hub. No more is read than ``limit`` needs, except
    that a file's SHA-256 is of the whole file. No code that comes with a dataset is executed.
    Raises DataError, in one sentence, for whatever is wrong; a source without rows is wrong.
    """
    path = Path(data.path).expanduser()
    if path.is_file():
        table = _read_file(path, limit)
    elif path.is_dir():
        from halfbyte.data.source_datasets import read_saved

        table = read_saved(path, data.split, limit)
    elif _may_be_hub_name(data.path):
        from halfbyte.data.source_datasets import read_hub

        table = read_hub(data, limit)
    else:
        raise DataError(f"there is no data file {data.path}{_nearest(path)}.")
    if not table.rows:
        raise DataError(f"{data.path} holds no rows.")
    return table


def _read_file(path: Path, limit: int | None) -> Table:
    from halfbyte.data import source_csv, source_json, source_parquet

    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = (
        suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else "".join(suffixes[-1:])
    )
    try:
        if kind == ".json":
            return source_json.read_json(path, limit)
        if kind in (".jsonl", ".ndjson"):
            return source_json.read_jsonl(path, limit)
        if kind in (".csv", ".tsv"):
            return source_csv.read_csv(path, limit, delimiter="\t" if kind == ".tsv" else None)
        if kind == ".parquet":
            return source_parquet.read_parquet(path, limit)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (EOFError, zlib.error) as error:
        raise DataError(f"{path} holds compressed data that is damaged or cut off.") from error
    raise DataError(
        f"{path} is of no kind that is read here; the name of a data file ends in .json, .jsonl, "
        ".csv, .tsv (each also with .gz) or .parquet."
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
