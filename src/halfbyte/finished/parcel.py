"""What goes to a hub: an adapter, a merged model or a GGUF file, each with its card.

A parcel is made of files by name: what loads the model, its tokenizer and template, its card and
licence. Anything else in the folder stays here, so that no row, record, checkpoint or optimizer
state is sent because it happens to lie there.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from halfbyte.errors import RunError
from halfbyte.events import read_events
from halfbyte.events.log import FILE_NAME as EVENTS_FILE
from halfbyte.events.types import Artifact
from halfbyte.export.card.derived_card import derived_card
from halfbyte.finished.found import find_adapter
from halfbyte.finished.parcel_files import (
    CARD,
    Parcel,
    What,
    chosen_files,
    inside,
    is_text,
    own_card,
)
from halfbyte.finished.parcel_model import gguf_folder, pack_gguf, pack_model
from halfbyte.foreign_json import read_json
from halfbyte.model.adapter_files import CONFIG
from halfbyte.model.package import PREFIX
from halfbyte.redaction import redact

_REPORT = ("report.html", "report.md", "report.pdf", "plots/*.png", "plots/*.svg")
# Texts that a person or a program of ours writes, and that are looked at for secrets.
_LOOKED_AT = (".json", ".jinja", ".md", ".html", "Modelfile")
_WITH_PATHS = ("config.json", "tokenizer_config.json")
_PATH_KEYS = ("_name_or_path", "name_or_path", "tokenizer_file", "vocab_file", "merges_file")
_RECORDS = ("merge.json", "halfbyte.json")
_FOLDERS = re.compile(r"(?<![\w:/.~])~?/(?:[^\s/:;,]+/)*(?=[^\s/:;,])")  # of a path from the root
_VOCABULARY = ("tokenizer.json", "vocab.json")  # tens of megabytes of words


def pack(
    path: Path,
    repo: str,
    *,
    what: What | None = None,
    base: str | None = None,
    report: bool = False,
) -> Parcel:
    """What of ``path`` goes to ``repo``; nothing is changed here, and no network is asked.

    ``path`` is a run (of which the adapter goes), a folder in PEFT's format, a merged model, a
    folder with GGUF files or one such file. ``base`` names the base model in what is sent, where it
    has another name here. Raises RunError where there is nothing of the kind ``what``, where a file
    is a link out of its folder or holds a secret; ModelError for an adapter that cannot be read.
    """
    kind = _kind(path, what)
    if report and not (path / EVENTS_FILE).exists():
        raise RunError(f"--report sends the report of a run, and {path} is none; leave it out.")
    if kind == "adapter":
        packed = _adapter(path, repo, base)
    elif kind == "model":
        packed = pack_model(path, repo, base)
    else:
        packed = pack_gguf(path, repo, base)
    parcel = _without_paths(packed)
    if report:
        parcel = _with_report(parcel, path)
    _refuse_secrets(parcel)
    return parcel


def _kind(path: Path, asked: What | None) -> What:
    there = _kinds(path)
    if asked is None and there:
        return there[0]
    if asked is not None and asked in there:
        return asked
    if not path.exists():
        raise RunError(f"there is no {path}; name a run, or the folder of an adapter or a model.")
    if asked is None:
        raise RunError(
            f"{path} holds no run, adapter, merged model or GGUF file; name a folder that does."
        )
    make = {
        "adapter": "name a run or a folder with adapter_config.json",
        "model": f"make one with halfbyte merge {path} --out FOLDER, and push FOLDER",
        "gguf": f"make one with halfbyte export {path} --to gguf, and push that",
    }
    names = {"adapter": "adapter", "model": "merged model", "gguf": "GGUF file"}
    raise RunError(f"{path} holds no {names[asked]}; {make[asked]}.")


def _kinds(path: Path) -> list[What]:
    if path.is_file():
        return ["gguf"] if path.suffix == ".gguf" else []
    found: list[What] = []
    if (path / EVENTS_FILE).exists() or (path / CONFIG).exists():
        found.append("adapter")
    elif (path / "config.json").exists() and any(path.glob("model*.safetensors")):
        found.append("model")
    if any(gguf_folder(path).glob("*.gguf")):
        found.append("gguf")
    return found


def _adapter(path: Path, repo: str, base: str | None) -> Parcel:
    found = find_adapter(path, base)
    files, left = chosen_files(found.adapter, "adapter")
    said = []
    config = dict(found.saved.config)
    named = config.get("base_model_name_or_path")
    if base is not None and _is_path(base):
        raise RunError(
            f"--base {base} is a path of this machine, which nobody else has; write OWNER/NAME, "
            "the base model's name on the hub."
        )
    if base is None and isinstance(named, str) and _is_path(named):
        raise RunError(
            f"the adapter in {path} names its base model by a path of this machine ({named}), "
            "which nobody else has; add --base OWNER/NAME, its name on the hub."
        )
    if base is not None and base != named:
        config |= {"base_model_name_or_path": base, "revision": None}
        files[CONFIG] = (json.dumps(config, indent=2) + "\n").encode()
        said.append(f"{CONFIG} and the card name the base model {base}.")
    card = found.adapter / CARD
    made_here = found.run is not None and _is_as_written(found.run, card)
    if made_here or not is_text(card):
        files[CARD] = derived_card(found, "adapter", {}, place=repo).encode()
        if found.run is None:
            said.append(f"It had no {CARD}, so that a card was made of its files.")
    else:
        files[CARD] = own_card(inside(card, found.adapter), repo, base or str(named))
    if found.run is not None:
        left += sorted(p.name for p in found.run.iterdir() if p != found.adapter)
    return Parcel("adapter", path, dict(sorted(files.items())), left, said)


def _is_as_written(run: Path, card: Path) -> bool:
    """Whether the card is the one that the run wrote, and nobody has changed it since."""
    if not is_text(card):
        return False
    digest = hashlib.sha256(card.read_bytes()).hexdigest()
    artifacts = [r.event for r in read_events(run) if isinstance(r.event, Artifact)]
    written = [a.sha256 for a in artifacts if a.path == f"adapter/{CARD}"]
    return written[-1:] == [digest]


def _with_report(parcel: Parcel, run: Path) -> Parcel:
    found: dict[str, Path | bytes] = {}
    for pattern in _REPORT:
        for path in sorted(run.glob(pattern)):
            found[path.relative_to(run).as_posix()] = inside(path, run)
    if "report.html" not in found:
        raise RunError(f"{run} has no report; make it with halfbyte report {run}.")
    said = ["The report goes with it, and shows rows of the data to whoever may read there."]
    left = [name for name in parcel.left if name not in found and name != "plots"]
    return Parcel(parcel.what, parcel.folder, parcel.files | found, left, parcel.said + said)


def _without_paths(parcel: Parcel) -> Parcel:
    """Without the paths of this machine that tokenizers and records keep: their last part stays."""
    files, said = dict(parcel.files), list(parcel.said)
    for name, content in parcel.files.items():
        ours = name in _RECORDS or (parcel.what == "gguf" and name.endswith(".json"))
        if not isinstance(content, Path) or not (ours or name in _WITH_PATHS):
            continue
        try:
            value = read_json(content)
        except (OSError, ValueError) as error:
            raise RunError(f"{content} cannot be read as JSON ({error}); make it again.") from error
        short = _shortened(value, ours)
        if short != value:
            files[name] = (json.dumps(short, indent=2, ensure_ascii=False) + "\n").encode()
            said.append(f"Of paths of this machine in {name} the last part alone is sent.")
    return replace(parcel, files=files, said=said)


def _shortened(value: Any, anywhere: bool, key: str = "") -> Any:
    if isinstance(value, dict):
        return {k: _shortened(inside, anywhere, str(k)) for k, inside in value.items()}
    if isinstance(value, list):
        return [_shortened(inside, anywhere, key) for inside in value]
    if isinstance(value, str) and anywhere:
        return _FOLDERS.sub("", value)
    if isinstance(value, str) and key in _PATH_KEYS and Path(value).is_absolute():
        return Path(value).name
    return value


def _refuse_secrets(parcel: Parcel) -> None:
    for name, content in parcel.files.items():
        if name in _VOCABULARY or not name.endswith(_LOOKED_AT):
            continue
        raw = content if isinstance(content, bytes) else content.read_bytes()
        text = raw.decode("utf-8", errors="replace")
        if redact(text) != text:
            raise RunError(
                f"{name} of {parcel.folder} holds what looks like a password or token, which would "
                "be sent; take it out first."
            )


def _is_path(name: str) -> bool:
    if name.startswith(PREFIX):
        return False
    return "\\" in name or Path(name).is_absolute() or name[:1] in ".~" or Path(name).exists()
