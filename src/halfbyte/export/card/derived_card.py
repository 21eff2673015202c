"""The model card of what is made of an adapter: a merged model, a GGUF file, a combination."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, Protocol

import halfbyte
from halfbyte.errors import HalfbyteError
from halfbyte.events import read_events
from halfbyte.events.types import Audited, Evaluated, Kept, ModelLoaded
from halfbyte.export.card.loading import loading_lines
from halfbyte.export.card.model_card import NOTES, assemble, model_card
from halfbyte.export.card.text import escape, public_name
from halfbyte.foreign_json import read_small
from halfbyte.model.adapter_files import SavedAdapter
from halfbyte.model.folder import read_licence
from halfbyte.recipe import Recipe
from halfbyte.recipe.schema import ModelRecipe
from halfbyte.recipe.subject import is_medical

DerivedKind = Literal["adapter", "merge", "quantized", "compressed", "mlx", "combination"]


class Found(Protocol):
    """What a card is made of; an adapter as ``find_adapter`` gives it has all of it."""

    @property
    def adapter(self) -> Path: ...
    @property
    def run(self) -> Path | None: ...
    @property
    def recipe(self) -> Recipe | None: ...
    @property
    def base(self) -> ModelRecipe: ...
    @property
    def saved(self) -> SavedAdapter: ...


def derived_card(
    found: Found,
    kind: DerivedKind,
    facts: Mapping[str, str],
    *,
    place: str | None = None,
    file: str | None = None,
) -> str:
    """The card (Markdown with the hub's metadata) of a model made of the adapter ``found``.

    ``facts`` are told in its table as they stand, name and value: what the weights were merged
    onto, the type of a quantization, the error of a combination. They are text, and cannot mark up
    anything. ``place`` is the repository of the hub that it goes to (None: this folder), ``file``
    the name of the GGUF file. Of an adapter from elsewhere the card tells what its files do.
    """
    if found.run is not None and found.recipe is not None:
        records = _records(found.run)
        if records is not None:
            model, audit, evaluations, kept = records
            model = replace(model, name=found.base.name)
            return model_card(
                found.recipe,
                model=model,
                audit=audit,
                evaluations=evaluations,
                kept=kept,
                version=halfbyte.__version__,
                notes=_notes(found.adapter) if kind == "adapter" else (),
                run=found.run,
                kind=kind,
                facts=facts,
                place=place,
                file=file,
            )
    return _from_files(found, kind, facts, place, file)


def _notes(adapter: Path) -> list[str]:
    """What the card beside an adapter of a run says must be known to load it."""
    try:
        card = read_small(adapter / "README.md").decode("utf-8")
    except (OSError, ValueError):
        return []
    _, there, after = card.partition(f"\n{NOTES}\n")
    paragraphs = after.partition("\n## ")[0].split("\n\n") if there else []
    return [text for paragraph in paragraphs if (text := paragraph.strip())]


def _records(run: Path) -> tuple[ModelLoaded, Audited, list[Evaluated], Kept | None] | None:
    """What a run's record says; None where the record is none of a run that got so far."""
    try:
        events = [record.event for record in read_events(run)]
    except (OSError, HalfbyteError):
        return None
    models = [e for e in events if isinstance(e, ModelLoaded)]
    audits = [e for e in events if isinstance(e, Audited)]
    if not models or not audits:
        return None
    kept = [e for e in events if isinstance(e, Kept)]
    evaluations = [e for e in events if isinstance(e, Evaluated)]
    return models[-1], audits[-1], evaluations, kept[-1] if kept else None


def _from_files(
    found: Found, kind: DerivedKind, facts: Mapping[str, str], place: str | None, file: str | None
) -> str:
    config, base = found.saved.config, found.base.name
    targets = sorted({name.rpartition(".")[2] for name in found.saved.layers})
    kinds = [
        name
        for name, key in (("rsLoRA", "use_rslora"), ("DoRA", "use_dora"))
        if config.get(key) is True
    ]
    ranks = sorted({pair[0].shape[0] for pair in found.saved.layers.values()})
    rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    shape = f"{''.join(f'{name}, ' for name in kinds)}r {rank}, on {', '.join(targets)}"
    pairs = [("base model", escape(public_name(base))), ("adapter", escape(shape))]
    pairs += [(escape(name), escape(value)) for name, value in facts.items()]
    medical = is_medical(f"{base} {found.adapter.resolve().name}")
    return _plain(kind, base, pairs, place, file, read_licence(found.adapter), medical)


def bare_card(
    kind: DerivedKind,
    base: str,
    facts: Mapping[str, str],
    subject: str,
    place: str,
    file: str | None,
) -> str:
    """The card of a model of which little is known but its base model; ``subject`` are words that
    may speak of medicine."""
    pairs = [("base model", escape(public_name(base)))]
    pairs += [(escape(name), escape(value)) for name, value in facts.items()]
    return _plain(kind, base, pairs, place, file, None, is_medical(f"{base} {subject}"))


def _plain(
    kind: DerivedKind,
    base: str,
    pairs: list[tuple[str, str]],
    place: str | None,
    file: str | None,
    licence: str | None,
    medical: bool,
) -> str:
    folder = Path(base).expanduser()
    return assemble(
        kind,
        title=f"{public_name(base).rpartition('/')[2]}, fine-tuned with LoRA",
        base=base,
        datasets=(),
        index=None,
        licence=(read_licence(folder) if folder.is_dir() else None) or licence,
        data_licence=None,
        objective=None,
        pairs=pairs,
        notes=(),
        loading=loading_lines(kind, base, None, place, file),
        results=(),
        recipe=(),
        medical=medical,
        trained_with=None,
        version=halfbyte.__version__,
    )
