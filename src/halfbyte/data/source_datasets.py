"""Folders that the library `datasets` saved, and datasets of the hub."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from halfbyte.data.source_arrow import add_arrow_rows
from halfbyte.data.source_json import columns_of
from halfbyte.data.table import SUFFIXES, CellStore, Table
from halfbyte.errors import DataError
from halfbyte.foreign_json import read_json
from halfbyte.recipe.data_schema import SourceRecipe

ROWS_AT_ONCE = 1024
_STATE, _SPLITS = "state.json", "dataset_dict.json"
# What `datasets` reads as tables; others, as its archives of samples, decode what lies in them.
_KINDS = ("arrow", "csv", "json", "parquet", "text")


def read_saved(path: Path, split: str, limit: int | None) -> Table:
    """The first ``limit`` rows of a folder made by ``save_to_disk``.

    Of a folder with several splits the one named ``split`` is read. Its Arrow files are read here,
    not by `datasets`, and only those that lie in the folder itself.
    """
    if not any((path / name).is_file() for name in (_STATE, _SPLITS)):
        there = sorted(f.name for f in path.iterdir() if f.name.lower().endswith(SUFFIXES))
        hint = f" (there is {', '.join(there[:3])})" if there else ""
        raise DataError(
            f"{path} is a folder that `datasets` did not save; name the data file in it{hint}, or "
            f"several by a pattern such as {path / '*.jsonl'}."
        )
    try:
        folder = _of_split(path, split)
        files = [folder / _own_name(f["filename"]) for f in _state(folder)["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} cannot be read as what `datasets` saves: {_first_line(error)}."
        ) from error
    rows = CellStore()
    columns: dict[str, None] = {}
    for file in files:
        columns |= dict.fromkeys(add_arrow_rows(file, rows, limit))
        if len(rows) == limit:
            break
    return Table(list(columns), rows, typed=True)


def _of_split(path: Path, split: str) -> Path:
    """The folder of the split, or ``path`` where it is that of rows without splits."""
    if not (path / _SPLITS).is_file():
        return path
    splits = [_own_name(name) for name in read_json(path / _SPLITS)["splits"]]
    if split not in splits:
        raise DataError(
            f"{path} has no split {split}; data.split takes one of {', '.join(splits)}."
        )
    return path / split


def _state(folder: Path) -> Any:
    return read_json(folder / _STATE)


def _own_name(name: Any) -> str:
    """``name`` if it is of something in the folder that names it, else ValueError."""
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
        raise ValueError(f"it names {name!r}, which is no file of its own folder")
    return name


def read_hub(source: SourceRecipe, limit: int | None) -> Table:
    """The first ``limit`` rows of a hub dataset, or all of them.

    With a limit the rows are streamed, so that no more is fetched than they need. Code that a
    dataset brings along is never executed.
    """
    import datasets

    try:
        _require_reachable(source)
        builder = datasets.load_dataset_builder(
            source.path, name=source.subset, revision=source.revision
        )
        if builder.name not in _KINDS:
            raise DataError(
                f"the dataset {source.path} is of the kind {builder.name}, and hub datasets are "
                f"read as {', '.join(_KINDS)}; convert it to Parquet or JSONL and give the file."
            )
        if limit is None:
            builder.download_and_prepare()
            found = builder.as_dataset(split=source.split)
        else:
            found = builder.as_streaming_dataset(split=source.split)
        rows = _rows(found, None) if limit is None else CellStore(islice(found, limit))
    except DataError:
        raise
    except Exception as error:  # several libraries raise kinds of their own, all about the dataset
        raise DataError(_why(source, error)) from error
    return Table(list(found.column_names or columns_of(rows)), rows, typed=True)


def _require_reachable(source: SourceRecipe) -> None:
    """Raise what the hub has against it at once: `datasets` would try for half a minute."""
    import huggingface_hub

    # Offline by the user's own setting, `datasets` takes what was fetched before.
    if not huggingface_hub.constants.HF_HUB_OFFLINE:
        api = huggingface_hub.HfApi()
        api.dataset_info(source.path, revision=source.revision, timeout=10, expand=["gated"])


def _rows(dataset: Any, limit: int | None) -> CellStore:
    # Arrow tables give cells as stored, where the library would decode images and sounds.
    tables: Iterable[Any] = dataset.with_format("arrow").iter(batch_size=ROWS_AT_ONCE)
    each = (row for table in tables for row in table.to_pylist())
    return CellStore(islice(each, limit))


def _why(source: SourceRecipe, error: Exception) -> str:
    """One sentence on why a hub dataset did not come, by what the libraries raise."""
    chain = _chain(error)
    text = " ".join(str(e) for e in chain)
    names = {kind.__name__ for e in chain for kind in type(e).__mro__}
    page = f"https://huggingface.co/datasets/{source.path}"
    if "GatedRepoError" in names or "gated" in text.lower():
        return (
            f"the dataset {source.path} is gated; accept its terms at {page} and log in with "
            "`hf auth login` or set HF_TOKEN."
        )
    if "RevisionNotFoundError" in names:
        return f"the dataset {source.path} has no revision {source.revision}; see {page}/commits."
    if "scripts are no longer supported" in text or "trust_remote_code" in text:
        return (
            f"the dataset {source.path} is made by code of its own, which is not executed; convert "
            "it to Parquet or JSONL and give the file."
        )
    if isinstance(error, ValueError) and "split" in text.lower():
        return f"the dataset {source.path} has no split {source.split} ({_first_line(error)})."
    if isinstance(error, ValueError):
        return f"the dataset {source.path} cannot be read: {_first_line(error)}."
    if names & {"RepositoryNotFoundError", "DatasetNotFoundError"} and not _offline(names):
        return (
            f"there is no file or folder {source.path} here and no dataset of this name on the hub "
            "that you may read; check the name, and log in with `hf auth login` if it is private."
        )
    if _offline(names):
        return (
            f"there is no file or folder {source.path} here, and the hub cannot be reached to look "
            "for a dataset of this name; connect to the network or give a local file."
        )
    return f"the dataset {source.path} cannot be read: {_first_line(error)}."


# Names of the exceptions, or of their bases, that mean that nothing was reached.
_OFFLINE = {
    "ConnectionError",
    "LocalEntryNotFoundError",
    "OfflineModeIsEnabled",
    "TimeoutError",
    "TransportError",
}


def _offline(names: set[str]) -> bool:
    return bool(names & _OFFLINE)


def _chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in chain:
        chain.append(at)
        at = at.__cause__ or at.__context__
    return chain


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
