"""A finished adapter and its base model, found: no weight of the base is read here."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from halfbyte.data.chat_template import own_template
from halfbyte.errors import ModelError, RunError
from halfbyte.events.log import FILE_NAME as EVENTS_FILE
from halfbyte.foreign_json import read_small
from halfbyte.model.adapter_files import CONFIG, SavedAdapter, read_adapter
from halfbyte.model.adapter_fit import OTHER_BASE, adaptable_shapes, require_layers_fit
from halfbyte.model.new_tokens import NewTokens
from halfbyte.model.package import PREFIX
from halfbyte.model.skeleton import build_skeleton
from halfbyte.model.source import ModelSource, open_model
from halfbyte.model.tokenizer import LONGEST_TEMPLATE, load_tokenizer, require_usable
from halfbyte.model.trained_rows import EMBEDDING, HEAD
from halfbyte.model.wording import reason
from halfbyte.recipe import Recipe
from halfbyte.recipe.load import load_recipe
from halfbyte.recipe.schema import ModelRecipe
from halfbyte.run.folder import require_run

TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class FoundAdapter:
    """An adapter folder that has been read, and where its base model is."""

    folder: Path  # as named: a run folder, or one in PEFT's format
    adapter: Path  # the folder in PEFT's format
    run: Path | None  # the run folder; None: the adapter comes from elsewhere
    recipe: Recipe | None  # the run's, effective
    base: ModelRecipe
    saved: SavedAdapter  # tensors on the CPU


def find_adapter(folder: Path, base: str | None = None) -> FoundAdapter:
    """The adapter of the run in ``folder``, or the one that lies there in PEFT's format.

    ``base`` is where the base model is, if not where the recipe or the adapter's configuration
    says. Raises RunError where there is no adapter, ModelError where its files cannot be used or
    name no base model.
    """
    if (folder / EVENTS_FILE).exists():
        return _of_run(folder, base)
    if not (folder / CONFIG).exists():
        raise RunError(_no_adapter(folder))
    saved = read_adapter(folder)
    named = saved.config.get("base_model_name_or_path")
    if base is None and not (isinstance(named, str) and named.strip()):
        raise ModelError(f"{folder / CONFIG} names no base model; name it with --base.")
    revision = saved.config.get("revision")
    model = ModelRecipe(
        name=base or str(named),
        revision=revision if base is None and isinstance(revision, str) else None,
    )
    return FoundAdapter(folder, folder, None, None, model, saved)


def _of_run(folder: Path, base: str | None) -> FoundAdapter:
    require_run(folder)
    adapter = folder / "adapter"
    if not (adapter / CONFIG).exists():
        raise RunError(
            f"{folder} holds no adapter yet; go on with halfbyte train --resume {folder}."
        )
    recipe = load_recipe(folder / "recipe.yaml")
    if base is not None:
        model = recipe.model.model_copy(update={"name": base, "revision": None})
        recipe = recipe.model_copy(update={"model": model})
    return FoundAdapter(folder, adapter, folder, recipe, recipe.model, read_adapter(adapter))


def _no_adapter(folder: Path) -> str:
    if not folder.is_dir():
        return f"there is no folder {folder}; name a run folder, or an adapter in PEFT's format."
    below = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    if below:
        return f"{folder} holds no adapter itself; did you mean {below[-1]}?"
    return (
        f"{folder} is neither a run folder nor an adapter in PEFT's format (it has no {CONFIG}); "
        "name one that is."
    )


def open_base(found: FoundAdapter) -> ModelSource:
    """The base model of ``found``, of which the tokenizer is the adapter's where it has one.

    The tokenizer has the chat template that was trained: the adapter's, or where it has none the
    base's. ``chat_template`` of the result is the base's own. Where the adapter was trained with
    more rows of embedding and head than the base has, the source has them too. Raises ModelError
    where the base cannot be found, or has not the layers that the adapter is of.
    """
    source = _open(found)
    base_template = source.chat_template
    if found.run is None:
        source = _with_vocabulary(_with_tokenizer(found, source), found)
    written = _template(found)
    if written is not None:
        source.tokenizer.chat_template = written
    require_usable(source.tokenizer, f"the adapter in {found.folder}")
    _require_rows(found, source)
    _require_fit(found, source)
    return replace(source, chat_template=base_template)


def _open(found: FoundAdapter) -> ModelSource:
    name = found.base.name
    path = Path(name).expanduser()
    written = path.is_absolute() or name.startswith(".") or "\\" in name or name.count("/") > 1
    if written and not name.startswith(PREFIX) and not path.exists():
        raise ModelError(
            f"the base model of {found.folder} was {name}, which is not on this "
            "machine; name where it is with --base."
        )
    return open_model(found.base)


def _with_tokenizer(found: FoundAdapter, source: ModelSource) -> ModelSource:
    """``source`` with the tokenizer of the adapter's folder, which may have more tokens."""
    if not any((found.adapter / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        return source
    tokenizer = load_tokenizer(
        found.adapter, f"the adapter in {found.folder}", source.config.model_type
    )
    if own_template(tokenizer) is None:
        tokenizer.chat_template = source.tokenizer.chat_template
    return replace(source, tokenizer=tokenizer)


def _with_vocabulary(source: ModelSource, found: FoundAdapter) -> ModelSource:
    """``source`` with as many rows of embedding and head as the adapter was trained with."""
    text = source.config.get_text_config()
    rows = int(text.vocab_size)
    modules = found.saved.modules
    wanted = {
        len(modules[name]) for name in modules if name.rpartition(".")[2] in (EMBEDDING, HEAD)
    }
    wanted |= {max(ids) + 1 for ids in found.saved.token_ids().values() if max(ids) >= rows}
    if not wanted or wanted == {rows}:
        return source
    most = max(wanted)
    if len(wanted) > 1 or most < rows:
        raise ModelError(
            f"the adapter in {found.folder} was trained with {most:,} rows of embedding or head, "
            f"and {source.name} has {rows:,}: {OTHER_BASE}."
        )
    config = copy.deepcopy(source.config)
    config.get_text_config().vocab_size = most
    return replace(source, config=config, new_tokens=NewTokens(rows, most - rows, rows, most))


def _template(found: FoundAdapter) -> str | None:
    """The template beside the adapter; None where an adapter from elsewhere has none there."""
    path = found.adapter / TEMPLATE
    if found.run is None and not path.exists():
        return None
    try:
        return read_small(path, 4 * LONGEST_TEMPLATE).decode("utf-8")
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {reason(error)}.") from error


def require_template(found: FoundAdapter, tokenizer: Any) -> None:
    """Raise ModelError where nothing says how the adapter is to be prompted."""
    if own_template(tokenizer) is None:
        raise ModelError(
            f"neither the adapter in {found.folder} nor its base model has a chat template, so "
            f"nothing says how it is prompted; put the one that was trained there as {TEMPLATE}."
        )


def _require_rows(found: FoundAdapter, source: ModelSource) -> None:
    """Each token has a row of the embedding, but for one that only fills up batches."""
    rows = int(source.config.get_text_config().vocab_size)
    tokenizer = source.tokenizer
    ids = set(tokenizer.get_vocab().values()) - {tokenizer.pad_token_id}
    if found.run is None and max(ids) >= rows:
        raise ModelError(
            f"the tokenizer in {found.adapter} has {max(ids) + 1:,} tokens, and {source.name} has "
            f"{rows:,} rows of embedding, of which the adapter adds none; save it again with "
            "PEFT's save_embedding_layers=True, or name another base model with --base."
        )


def _require_fit(found: FoundAdapter, source: ModelSource) -> None:
    """Each layer of the adapter is one of the base's, with its shape."""
    skeleton = build_skeleton(source.config, source.name)
    require_layers_fit(
        found.saved.layers, adaptable_shapes(skeleton), f"in {found.folder}", source.name
    )
