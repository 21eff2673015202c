"""Folders that the library `datasets` saved, and datasets of the hub."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from halfbyte.data.source_json import columns_of
from halfbyte.data.table import SUFFIXES, CellStore, Table
from halfbyte.errors import DataError
from halfbyte.recipe.data_schema import SourceRecipe

ROWS_AT_ONCE = 1024


def read_saved(path: Path, split: str, limit: int | None) -> Table:
    """The first ``limit`` rows of a folder made by ``save_to_disk``.

    Of a folder with several splits the one named ``split`` is read.
    """
    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        files = sorted(f.name for f in path.iterdir() if f.name.lower().endswith(SUFFIXES))
        hint = f" (there is {', '.join(files[:3])})" if files else ""
        raise DataError(
            f"{path} is a folder that `datasets` did not save; name the data file in it{hint}, or "
            f"several by a pattern such as {path / '*.jsonl'}."
        )
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} cannot be read: {_first_line(error)}.") from error
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise DataError(
                f"{path} has no split {split}; data.split takes one of {', '.join(saved)}."
            )
        saved = saved[split]
    return Table(list(saved.column_names), _rows(saved, limit), typed=True)


def read_hub(source: SourceRecipe, limit: int | None) -> Table:
    """The first ``limit`` rows of a hub dataset, or all of them.

    With a limit the rows are streamed, so that no more is fetched than they need. Code that a
    dataset brings along is never executed.
    """
    import datasets

    try:
        _require_reachable(source)
        found = datasets.load_dataset(
            source.path,
            name=source.subset,
            split=source.split,
            revision=source.revision,
            streaming=limit is not None,
        )
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
