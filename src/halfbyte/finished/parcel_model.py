"""Parcels of whole models: a merged one in transformers' format, and GGUF files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halfbyte.errors import RunError
from halfbyte.events.log import FILE_NAME as EVENTS_FILE
from halfbyte.export.card.derived_card import DerivedKind, bare_card, derived_card
from halfbyte.export.card.metadata import read_metadata
from halfbyte.export.card.text import hub_name
from halfbyte.export.elsewhere.folder import FILE
from halfbyte.finished.found import find_adapter
from halfbyte.finished.parcel_files import CARD, Parcel, chosen_files, inside, is_text, own_card
from halfbyte.foreign_json import read_json

EXPORTS = "export"  # in a run folder
_BESIDE = (".json", ".Modelfile")  # that an export leaves beside a GGUF file
# By the format that an export's record names.
_KINDS: dict[str, DerivedKind] = {"mlx": "mlx", "gptq": "compressed", "awq": "compressed"}
_OF_A_CARD = ("base_model", "library_name", "license", "pipeline_tag", "tags")


def pack_model(folder: Path, repo: str, base: str | None) -> Parcel:
    """A merged model with its tokenizer and card. Raises RunError where nothing says what it is."""
    files, left = chosen_files(folder, "model")
    card, said = folder / CARD, []
    if is_text(card):
        files[CARD] = own_card(inside(card, folder), repo, base)
    else:
        name = _require_base(folder / CARD, base)
        record = _record(folder / FILE)
        kind = _KINDS.get(str(record.get("format")), "merge")
        subject = f"{folder.resolve().name} {_compared_on(record)}"
        files[CARD] = bare_card(kind, name, _facts(record), subject, repo, None).encode()
        said.append(f"It had no {CARD}, so that a short card was made.")
    return Parcel("model", folder, dict(sorted(files.items())), left, said)


def gguf_folder(folder: Path) -> Path:
    """``folder``, or of a run without GGUF files of its own the folder of its exports."""
    below = folder / EXPORTS
    return below if any(below.glob("*.gguf")) and not any(folder.glob("*.gguf")) else folder


def pack_gguf(path: Path, repo: str, base: str | None) -> Parcel:
    """One GGUF file, or all in a folder, each with the record and the Modelfile beside it.

    The card is ``FILE.md`` beside a single ``FILE.gguf``, or the folder's; where there is none, one
    is made, of the run where the folder is that of its exports, else of the export's record.
    Raises RunError where that says no base model.
    """
    folder = gguf_folder(path) if path.is_dir() else path.parent
    files, left = chosen_files(folder, "gguf")
    names = [name for name in files if name.endswith(".gguf")]
    if path.is_file():  # this one alone of its folder
        left += [name for name in names if name != path.name]
        names = [path.name]
    stems = [name.removesuffix(".gguf") for name in names]
    own = {f"{stem}{ending}" for stem in stems for ending in _BESIDE}
    for name in list(files):
        if name.endswith((".gguf", *_BESIDE)) and name not in (*names, *own):
            del files[name]
    for name in sorted(own - files.keys()):
        if (folder / name).is_file():
            files[name] = inside(folder / name, folder)
    left = sorted({name for name in left if name not in files and name != f"{stems[0]}.md"})
    said = []
    card = _card_of(path, folder, stems)
    if card is not None:
        files[CARD] = own_card(inside(card, folder), repo, base)
    elif folder.name == EXPORTS and (folder.parent / EVENTS_FILE).exists():
        found = find_adapter(folder.parent, base)
        facts = _facts(_record(folder / f"{stems[0]}.json"))
        card_text = derived_card(found, "quantized", facts, place=repo, file=names[0])
        files[CARD] = card_text.encode()
    else:
        record = _record(folder / f"{stems[0]}.json")
        stated = record.get("base")
        of_record = stated if isinstance(stated, str) and hub_name(stated) else None
        name = _require_base(folder / CARD, base or of_record)
        subject = f"{folder.resolve().name} {names[0]} {_compared_on(record)}"
        made = bare_card("quantized", name, _facts(record), subject, repo, names[0])
        files[CARD] = made.encode()
        said.append("There was no card, so that a short one was made.")
    return Parcel("gguf", path, dict(sorted(files.items())), left, said)


def _require_base(card: Path, base: str | None) -> str:
    if base is None:
        raise RunError(
            f"there is no {card}, and a model without a card tells nobody what it is; write one "
            "there, or name the base model with --base, so that a short one can be made."
        )
    return base


def _card_of(path: Path, folder: Path, stems: list[str]) -> Path | None:
    beside = folder / f"{stems[0]}.md"
    if len(stems) == 1 and is_text(beside):
        return beside
    card = folder / CARD
    if not is_text(card):
        return None
    # The folder of a single file may be anything, and its README about anything.
    return card if path.is_dir() or _is_of_a_model(card) else None


def _is_of_a_model(card: Path) -> bool:
    try:
        fields = read_metadata(card.read_text("utf-8", errors="replace"))
    except ValueError:
        return False
    return any(key in fields for key in _OF_A_CARD)


def _record(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _compared_on(record: Mapping[str, Any]) -> str:
    compared = record.get("compared_on")
    source = compared.get("source") if isinstance(compared, dict) else None
    return source if isinstance(source, str) else ""


def _facts(record: Mapping[str, Any]) -> dict[str, str]:
    """What an export's record says of its file."""
    found = {}
    for key, name in (("type", "weights"), ("onto", "merged onto")):
        if isinstance(record.get(key), str):
            found[name] = record[key]
    check = record.get("with_its_weights")
    if isinstance(check, dict) and isinstance(check.get("kl"), float):
        found["distance from the weights it was made of"] = (
            f"KL {check['kl']:.2g} nats in the mean, the same most likely token in "
            f"{check.get('top1', float('nan')):.1%}"
            if isinstance(check.get("top1"), float)
            else f"KL {check['kl']:.2g} nats in the mean"
        )
    return found
