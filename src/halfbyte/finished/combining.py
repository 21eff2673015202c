"""Adapters made of adapters: several made one, or one of a lower rank."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import halfbyte
from halfbyte.errors import ModelError
from halfbyte.export.card.derived_card import derived_card
from halfbyte.export.card.text import public_name
from halfbyte.export.combine import Method, combine_layer
from halfbyte.export.new_folder import new_folder
from halfbyte.export.reduce import Errors, Factors, errors_of, reduced
from halfbyte.finished.found import FoundAdapter, open_base
from halfbyte.model.adapter_files import CONFIG, WEIGHTS, SavedAdapter, save_adapter
from halfbyte.model.lora_targets import saved_targets
from halfbyte.model.saved_scale import saved_scales
from halfbyte.model.skeleton import build_skeleton, quantized_linears
from halfbyte.model.source import ModelSource

FILE = "adapter_origin.json"
# What beside the weights belongs to an adapter, and is taken over from the first.
_TAKEN = ("token*", "*token*.json", "*.jinja", "vocab.*", "merges.txt", "spiece.model")
_Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class NewAdapter:
    """An adapter that has been written."""

    folder: Path
    ranks: dict[str, int]  # layer's full name: rank
    ranks_before: list[dict[str, int]]  # of each that it is made of
    errors: Errors | None  # of what was left out; None: nothing was
    layers: dict[str, float]  # layer's full name: relative error
    nbytes: int


@torch.no_grad()
def combine_adapters(
    adapters: Sequence[FoundAdapter],
    out: Path,
    *,
    method: Method,
    weights: Sequence[float] | None = None,
    density: float = 0.5,
    rank: int | None = None,
    seed: int = 0,
    progress: _Progress = lambda done, total: None,
) -> NewAdapter:
    """Write the combination of ``adapters`` into the new folder ``out``, in PEFT's format.

    ``weights`` are by default what makes a mean of all: 1/n each, and 1 where the method takes the
    mean itself. ``rank`` is by default the sum of the ranks for ``linear``, which loses nothing,
    and else the highest of them. Layers of which some adapters have none are combined of the
    others. Tokenizer and template are the first adapter's. Raises ModelError where an adapter is of
    another base model, or has what cannot be added up.
    """
    if weights is None:
        share = 1.0 / len(adapters) if method.endswith("linear") else 1.0
        weights = [share] * len(adapters)
    for found in adapters:
        _require_plain(found, combined=True)
    source = open_base(adapters[0])
    adapters = [_without_copies(found, source) for found in adapters]
    for found in adapters:
        _require_no_rows(found)
    first = adapters[0]
    for other in adapters[1:]:
        _require_same_base(other, first, source)
    scales = [saved_scales(found.saved) for found in adapters]
    linears = _linears(source)
    names = [n for n in linears if any(n in found.saved.layers for found in adapters)]
    if rank is None and method != "linear":
        rank = max(max(_ranks(found.saved).values()) for found in adapters)
    made: dict[str, Factors] = {}
    for number, name in enumerate(names):
        parts = [
            (found.saved.layers[name], scale[name]) if name in found.saved.layers else None
            for found, scale in zip(adapters, scales, strict=True)
        ]
        made[name] = combine_layer(
            parts,
            weights,
            method=method,
            density=density,
            rank=rank,
            generator=torch.Generator().manual_seed((seed << 32) + number),
        )
        progress(number + 1, len(names))
    how = _method_words(method, density, seed)
    of = ", ".join(
        f"{weight:g} × {found.folder.resolve().name}"
        for weight, found in zip(weights, adapters, strict=True)
    )
    facts = {"combined": f"{how} of {of}"}
    record = {
        "made": "combination",
        "method": method,
        "weights": list(weights),
        "density": None if method == "linear" else density,
        "seed": seed if method.startswith("dare") else None,
        "of": [_origin(found) for found in adapters],
    }
    return _write(out, first, adapters, source, made, facts, record, exact=method == "linear")


@torch.no_grad()
def reduce_adapter(
    found: FoundAdapter,
    out: Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    progress: _Progress = lambda done, total: None,
) -> NewAdapter:
    """Write the adapter ``found`` with a lower rank into the new folder ``out``, in PEFT's format.

    Of each layer ``rank`` ranks are kept, or as many as hold the share ``energy`` of the squares
    of its singular values. Trained rows of embedding and head stay what they are. Raises
    ModelError for DoRA.
    """
    _require_plain(found, combined=False)
    source = open_base(found)
    found = _without_copies(found, source)
    both = found.saved.modules.keys() & found.saved.layers.keys()
    if both:
        raise ModelError(
            f"{found.folder} has low ranks of {min(both)} and trained rows of it as well, which "
            "cannot be reduced; merge it into its base with halfbyte merge."
        )
    scales, layers = saved_scales(found.saved), found.saved.layers
    made: dict[str, Factors] = {}
    for number, (name, (a, b)) in enumerate(layers.items(), 1):
        made[name] = reduced(a, b, scales[name], rank=rank, energy=energy)
        progress(number, len(layers))
    asked = f"rank {rank} at most" if rank is not None else f"{energy:g} of the squares"
    facts = {"reduced": f"{found.folder.resolve().name} to {asked} of its singular values"}
    record = {"made": "reduction", "rank": rank, "energy": energy, "of": [_origin(found)]}
    return _write(out, found, [found], source, made, facts, record, exact=False)


def _write(
    out: Path,
    first: FoundAdapter,
    adapters: Sequence[FoundAdapter],
    source: ModelSource,
    made: Mapping[str, Factors],
    facts: dict[str, str],
    record: dict[str, Any],
    *,
    exact: bool,
) -> NewAdapter:
    errors = errors_of(made)
    lost = None if exact and errors.largest == 0.0 else errors
    if lost is not None:
        facts["error"] = error_words(lost)
    ranks = {name: one.rank for name, one in made.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in ranks.items() if rank != usual}
    saved = first.saved
    tied = bool(saved.config.get("ensure_weight_tying"))
    linears = list(_linears(source))
    nbytes = sum(4 * t.numel() for one in made.values() for t in one.pair)
    nbytes += sum(t.nbytes for t in (*saved.modules.values(), *saved.token_rows.values()))
    with new_folder(out, nbytes, "the adapter") as folder:
        save_adapter(
            folder,
            {name: one.pair for name, one in made.items()},
            base_name=str(saved.config.get("base_model_name_or_path") or first.base.name),
            r=usual,
            lora_alpha=usual,  # so that the factor is 1, whatever the rank
            lora_dropout=0.0,
            target_modules=saved_targets([n for n in linears if n in made], linears),
            rank_pattern=others,
            alpha_pattern={name: float(rank) for name, rank in others.items()},
            modules=saved.modules,
            token_rows=saved.token_rows,
            token_ids=saved.token_ids(),
            ensure_weight_tying=tied,
        )
        if first.base.revision is not None:
            _name_revision(folder / CONFIG, first.base.revision)
        _take_over(first, source, folder)
        about = {
            "halfbyte": halfbyte.__version__,
            **record,
            "errors": None if lost is None else asdict(lost),
            "layers": {name: {"rank": one.rank, "error": one.error} for name, one in made.items()},
        }
        text = json.dumps(about, indent=2, ensure_ascii=False)
        (folder / FILE).write_text(text + "\n", encoding="utf-8")
        new = SavedAdapter({n: one.pair for n, one in made.items()}, {})
        # What the first one's run says of its losses is not said of this one.
        origin = replace(first, run=None, recipe=None, saved=new)
        card = derived_card(origin, "combination", facts)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return NewAdapter(
        folder=out,
        ranks=ranks,
        ranks_before=[_ranks(found.saved) for found in adapters],
        errors=lost,
        layers={name: one.error for name, one in made.items()},
        nbytes=nbytes,
    )


def error_words(errors: Errors) -> str:
    """What was left out, in words."""
    return (
        f"relative, in the Frobenius norm: {errors.largest:.2%} at most (of {errors.layer}), "
        f"{errors.mean:.2%} in the mean of the layers"
    )


def _name_revision(path: Path, revision: str) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    config["revision"] = revision
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _take_over(first: FoundAdapter, source: ModelSource, folder: Path) -> None:
    """The first adapter's tokenizer and template; where it has none, those of its base."""
    for pattern in _TAKEN:
        for path in sorted(first.adapter.glob(pattern)):
            if path.is_file() and path.name not in (CONFIG, WEIGHTS):
                shutil.copyfile(path, folder / path.name)
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        source.tokenizer.save_pretrained(folder)


def _without_copies(found: FoundAdapter, source: ModelSource) -> FoundAdapter:
    """Without the base's own weight of a head that has low ranks, which PEFT saves beside them."""
    modules, there = dict(found.saved.modules), source.names()
    model = build_skeleton(source.config, source.name)
    embedding = next(
        n for n, module in model.named_modules() if module is model.get_input_embeddings()
    )
    for name in modules.keys() & found.saved.layers.keys():
        owner = name if f"{name}.weight" in there else embedding
        own = source.read(f"{owner}.weight", torch.float32)
        if own.shape == modules[name].shape and torch.equal(own, modules[name].float()):
            del modules[name]
    return replace(found, saved=replace(found.saved, modules=modules))


def _require_plain(found: FoundAdapter, *, combined: bool) -> None:
    if found.saved.magnitudes:
        raise ModelError(
            f"{found.folder} is a DoRA adapter, whose magnitudes belong to the product as it is "
            f"and have no {'sum' if combined else 'lower rank'}; merge it into its base with "
            "halfbyte merge."
        )


def _require_no_rows(found: FoundAdapter) -> None:
    trained = [*found.saved.modules, *found.saved.token_rows]
    if trained:
        raise ModelError(
            f"{found.folder} holds trained rows of {', '.join(trained)}, which cannot be combined "
            "with another adapter's; merge it into its base with halfbyte merge, and train the "
            "others on that."
        )


def _require_same_base(other: FoundAdapter, first: FoundAdapter, source: ModelSource) -> None:
    """The other is of the same base: by its name, and by its layers' shapes."""
    if other.base.name != first.base.name:
        raise ModelError(
            f"{other.folder} is of {other.base.name} and {first.folder} of {first.base.name}: only "
            "adapters of one base model can be combined; if it is one under two names, give it "
            "with --base."
        )
    linears = _linears(source)
    for name, (a, b) in other.saved.layers.items():
        shape = (len(b), a.shape[1])
        if name not in linears or tuple(linears[name].weight.shape) != shape:
            raise ModelError(
                f"{other.folder} has an adapter of {name} for {shape[0]} × {shape[1]} weights, "
                f"which {source.name} has not: it is of another base model."
            )


def _linears(source: ModelSource) -> dict[str, Any]:
    """The layers that can have an adapter, the head among them: others' adapters have it there."""
    model = build_skeleton(source.config, source.name)
    head = model.get_output_embeddings()
    ends = {name: head for name, module in model.named_modules() if module is head}
    return quantized_linears(model) | ends


def _ranks(saved: SavedAdapter) -> dict[str, int]:
    return {name: len(a) for name, (a, _) in saved.layers.items()}


def _origin(found: FoundAdapter) -> dict[str, Any]:
    return {
        "adapter": found.folder.resolve().name,
        "base": public_name(found.base.name),
        "ranks": sorted(set(_ranks(found.saved).values())),
    }


def _method_words(method: Method, density: float, seed: int) -> str:
    if method == "linear":
        return "the sum"
    words = {
        "ties": f"TIES (density {density:g})",
        "dare_linear": f"DARE (density {density:g}, seed {seed})",
        "dare_ties": f"DARE with TIES' signs (density {density:g}, seed {seed})",
    }
    return words[method]
