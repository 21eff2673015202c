"""Where a judgement is written: its figures, and each row's answers and scores."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from halfbyte.errors import RunError
from halfbyte.evaluate.results import ANSWERS, FOLDER, RESULTS, Results
from halfbyte.finished.found import FoundAdapter


def judged_folder(found: FoundAdapter, out: Path | None) -> Path:
    """``evaluation`` in the run's folder, or ``out``; of an adapter from elsewhere ``evaluation``.

    Raises RunError where it cannot be written, before minutes of work.
    """
    folder = out or (Path(FOLDER) if found.run is None else found.run / FOLDER)
    if out is None and folder.is_symlink():  # in a folder of somebody else's it may lead anywhere
        raise RunError(f"{folder} is a link to another folder; remove it, or name one by --out.")
    require_writable(folder)
    return folder


def require_writable(folder: Path) -> None:
    """Raise RunError where no file can be made in ``folder``, or the folder itself cannot be.

    What was not there is not there afterwards: it is made once there is something to keep.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    probe = folder / ".writable.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunError(
            f"{folder} cannot be written ({error.strerror}); name another place by --out, or mend "
            "its permissions."
        ) from error
    finally:
        for path in missing:
            if path.is_dir():
                path.rmdir()


def write_judged(
    folder: Path, results: Results, rows: Sequence[Mapping[str, Any]]
) -> tuple[Path, Path]:
    """Write ``results.json`` and ``answers.jsonl`` into ``folder``, both whole or neither.

    Raises RunError where they cannot be written.
    """
    texts = {
        ANSWERS: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        RESULTS: json.dumps(results.as_json(), indent=1, ensure_ascii=False) + "\n",
    }
    partials = {name: folder / f".{name}.partial" for name in texts}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            # Half a surrogate pair, which JSON can hold, is none that UTF-8 has.
            partials[name].write_text(text, encoding="utf-8", errors="replace")
        for name, partial in partials.items():
            os.replace(partial, folder / name)
    except OSError as error:
        raise RunError(
            f"{folder} cannot be written ({error.strerror}); free some space, or name another "
            "place by --out."
        ) from error
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)
    return folder / RESULTS, folder / ANSWERS
