"""What a written folder holds beside its weights: the trained tokenizer, template and ends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from halfbyte.errors import ModelError
from halfbyte.export.beside import PAPERS, TOKENIZER
from halfbyte.export.merged_folder import GENERATION
from halfbyte.foreign_json import read_json
from halfbyte.model.wording import reason

FILE = "halfbyte.json"  # what the check found
_CONFIG = "config.json"
_BESIDE = (GENERATION, *TOKENIZER, *PAPERS)
# Of a configuration, what quantizing changes. The rest stays as it was: a package writes it in the
# words of the transformers that it has, which programs of another time may not know.
_CHANGED = ("quantization", "quantization_config", "tie_word_embeddings", "dtype", "torch_dtype")


def complete(written: Path, model: Path, ends: Iterable[int]) -> None:
    """Put beside the weights in ``written`` what lies beside those of the folder ``model``.

    ``ends`` are the tokens that end an answer, which the generation settings then name. Raises
    ModelError for settings that cannot be read.
    """
    for path in sorted(model.iterdir()):
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in _BESIDE):
            shutil.copyfile(path, written / path.name)
    made, settings = _read(written / _CONFIG), _read(model / _CONFIG)
    for key in _CHANGED:
        settings.pop(key, None)
    settings |= {key: made[key] for key in _CHANGED if key in made}
    _write(written / _CONFIG, settings)
    generation = _read(written / GENERATION) if (written / GENERATION).is_file() else {}
    stated = generation.get("eos_token_id", settings.get("eos_token_id"))
    both = list(dict.fromkeys([*([stated] if isinstance(stated, int) else stated or []), *ends]))
    if both:
        generation["eos_token_id"] = both[0] if len(both) == 1 else both
        _write(written / GENERATION, generation)
    for path in written.iterdir():
        if path.is_file():
            path.chmod((model / _CONFIG).stat().st_mode & 0o777)  # safetensors' are the owner's


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(read_json(path))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path} cannot be read: {reason(error)}.") from error


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
