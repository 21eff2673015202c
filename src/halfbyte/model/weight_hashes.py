"""SHA-256 of a base model's files, made while its weights are read.

A file that has been hashed on this machine is known again by its path, size, time and inode, in the
user's own cache directory: hashing the 2.2 GB of TinyLlama takes a second or two of one core, and
the 140 GB of a 70B model minutes.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from halfbyte.data.text_file import sha256_of
from halfbyte.foreign_json import parse_json
from halfbyte.user_cache import private_folder

_FOLDER, _FILE = "hashes", "models.json"
_OF_MODEL = "model file "
_MOST_KNOWN = 2000  # files; the earliest are forgotten


class WeightHashes:
    """The hashes of ``files``, made by a thread that begins at once.

    The thread reads what the loading of the model reads as well, so that the disk is asked once.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files
        self._hashes: dict[str, str] = {}
        self._thread = threading.Thread(target=self._run, name="hashes", daemon=True)
        self._thread.start()

    def result(self) -> dict[str, str]:
        """SHA-256 of each file, once all are there; one that cannot be read is absent."""
        self._thread.join()
        return dict(self._hashes)

    def _run(self) -> None:
        known = _read_known()
        new = {}
        for path in self._files:
            with suppress(OSError):
                key = _key(path)
                if key not in known:
                    new[key] = sha256_of(path)
                    if _key(path) != key:  # written to meanwhile
                        continue
                self._hashes[f"{_OF_MODEL}{path.name}"] = known.get(key) or new[key]
        if new:
            _write_known(new)


def of_model(hashes: Mapping[str, str]) -> dict[str, str]:
    """Those of ``hashes`` that are of a base model's files."""
    return {name: digest for name, digest in hashes.items() if name.startswith(_OF_MODEL)}


def _key(path: Path) -> str:
    found = path.resolve().stat()
    return f"{path.resolve()}|{found.st_size}|{found.st_mtime_ns}|{found.st_ino}"


def _read_known() -> dict[str, str]:
    try:
        raw = parse_json((private_folder(_FOLDER) / _FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(raw, dict):
        return {}
    return {key: value for key, value in raw.items() if isinstance(value, str)}


def _write_known(new: dict[str, str]) -> None:
    """Add ``new`` to what is known; where the cache cannot be written, nothing is."""
    with suppress(OSError):
        folder = private_folder(_FOLDER)
        both = list((_read_known() | new).items())[-_MOST_KNOWN:]
        partial = folder / f".{_FILE}.{os.getpid()}"
        partial.write_text(json.dumps(dict(both), indent=1) + "\n", encoding="utf-8")
        partial.replace(folder / _FILE)
