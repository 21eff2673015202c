"""A finished adapter, or a merged model, written for llama.cpp and Ollama."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

import halfbyte
from halfbyte.data.batch import TokenizedRow
from halfbyte.data.batching import make_batch
from halfbyte.data.chat_render import ChatRender, TemplateFailed
from halfbyte.data.chat_template import own_template
from halfbyte.errors import ModelError
from halfbyte.export.agreement import Agreement, compare_logits
from halfbyte.export.disk import require_new
from halfbyte.export.gguf.architecture import Architecture, architecture_of
from halfbyte.export.gguf.check import FileCheck, check_file
from halfbyte.export.gguf.llama_cpp import Quantizer, find_python
from halfbyte.export.gguf.lora import require_plain, write_lora
from halfbyte.export.gguf.model import Weights, Written, model_bytes, write_model
from halfbyte.export.gguf.modelfile import NO_TEMPLATE, Modelfile, go_template
from halfbyte.export.gguf.template import FileTemplate, choose_template
from halfbyte.export.gguf.turn_format import find_turn_format
from halfbyte.export.gguf.types import TYPES, WeightType
from halfbyte.export.gguf.vocabulary import Vocabulary, vocabulary_of
from halfbyte.export.merged_weights import BaseWeights, MergedWeights
from halfbyte.export.new_file import new_file
from halfbyte.export.streamed_network import streamed_logits
from halfbyte.finished.exportable import Exportable, ids_to_show, rows_to_compare
from halfbyte.finished.merging import Progress, quantization_of, start_of
from halfbyte.finished.opened import open_adapter
from halfbyte.generate.prompt import end_ids
from halfbyte.model.saved_scale import saved_scales
from halfbyte.model.skeleton import build_skeleton
from halfbyte.model.source import ModelSource, open_model
from halfbyte.plan.device import find_device
from halfbyte.recipe.schema import ModelRecipe
from halfbyte.run.folder import write_whole

# What the products of a run in 16 bits may add to the distance of its logits, mean KL in nats.
_ROUGH = 2e-2


@dataclass(frozen=True)
class Export:
    """A GGUF file that agrees with its model; ``trained`` is its distance from the adapter in
    memory, on the 4-bit weights that were trained (None for a whole model)."""

    file: Path
    beside: tuple[Path, ...]
    nbytes: int
    written: Written
    check: FileCheck
    trained: Agreement | None
    compared_on: str
    notes: tuple[str, ...]


def export_gguf(
    what: Exportable,
    out: Path,
    *,
    type: WeightType,
    onto: BaseWeights = "4bit",
    quantizer: Quantizer | None = None,
    device: str = "auto",
    data: str | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Export:
    """Write ``out``, a GGUF file, with a record and a Modelfile beside it.

    The adapter is merged ``onto`` the 4-bit weights that were trained, or the original ones. The
    file is read again and compared, in tokens and logits, before it gets its name. ``quantizer``
    makes the types that are llama.cpp's. Raises RunError where ``out`` exists or the disk is full,
    ModelError for what GGUF has no place for, and for a file that is not the model it was made of.
    """
    source, tokenizer = what.source, what.source.tokenizer
    beside = out.with_suffix(".json"), out.with_suffix(".Modelfile")
    for path in (out, *beside):
        require_new(path)
    on = find_device(device)
    weights = _weights(what, onto, on.kind)
    config = _config(source, weights)
    architecture = architecture_of(config, what.name)
    ends = end_ids(build_skeleton(config, what.name), tokenizer)
    vocabulary = vocabulary_of(tokenizer, int(config.vocab_size), ends, what.name)
    chosen = choose_template(
        tokenizer, own_template(tokenizer), vocabulary, texts=what.trained_on == "text"
    )
    rows, compared_on, notes = rows_to_compare(what, data)
    shown = ids_to_show(rows, int(config.vocab_size))
    first = TYPES["f16"] if type.by_llama_cpp else type
    size = model_bytes(architecture, weights, first, what.name)
    with new_file(out, size * 2 if type.by_llama_cpp else size) as partial:
        written = _write(partial, what, weights, architecture, chosen, type, quantizer, progress)
        progress("checking", 0, 1)
        merged = cast(ModelSource, _AsSource(what.name, config, weights))
        reference = streamed_logits(merged, shown, device=on.kind, dtype=torch.float32)
        file = open_model(ModelRecipe(name=str(partial)))
        check, logits = check_file(
            file,
            partial,
            rows,
            shown,
            reference,
            written.probes,
            type=type,
            vocabulary=chosen.vocabulary,
            tokenizer=tokenizer,
            device=on.kind,
            python=find_python(),
        )
        trained = _trained(what, shown, logits, device)
        if trained is not None and onto == "4bit":
            _require_trained(trained, type)
        modelfile, more = _modelfile(what, out, chosen)
        export = Export(
            file=out,
            beside=beside,
            nbytes=partial.stat().st_size,
            written=written,
            check=check,
            trained=trained,
            compared_on=compared_on,
            notes=(
                *(architecture.notes + vocabulary.notes + chosen.notes),
                *(notes + more + _of_start(what, onto)),
            ),
        )
        record = json.dumps(_record(what, export, type, onto), indent=2, ensure_ascii=False)
        write_whole(beside[0], record + "\n")
        write_whole(beside[1], modelfile.text())
    return export


def export_lora(what: Exportable, out: Path, *, type: str = "f32") -> float:
    """Write the adapter alone, as llama.cpp takes it beside its base; returns its alpha.

    Raises ModelError for a whole model, DoRA and trained embeddings.
    """
    if what.found is None:
        raise ModelError(
            f"{what.folder} is a whole model and no adapter; export it with --to gguf."
        )
    saved = what.found.saved
    require_plain(saved)
    architecture = architecture_of(what.source.config, what.name)
    size = sum(4 * (a.numel() + b.numel()) for a, b in saved.layers.values())
    with new_file(out, size) as partial:
        return write_lora(
            partial,
            saved,
            saved_scales(saved),
            architecture,
            type=type,
            described=what.described(),
        )


@dataclass(frozen=True)
class _AsSource:
    """Weights as the part of a ModelSource that a network is made of."""

    name: str
    config: Any
    weights: Weights

    def names(self) -> list[str]:
        return self.weights.names()

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return self.weights.read(name, dtype or torch.float32)


def _weights(what: Exportable, onto: BaseWeights, device: str) -> Weights:
    if what.found is None:
        if what.source.stored_nf4 is not None:
            raise ModelError(
                f"{what.folder} holds 4-bit weights of bitsandbytes; export the run, or a model "
                "that was merged from it."
            )
        return what.source
    return MergedWeights(
        what.source,
        what.found.saved,
        onto=onto,
        quantization=quantization_of(what.found),
        start=start_of(what.found),
        device=device,
    )


def _config(source: ModelSource, weights: Weights) -> Any:
    """The configuration, without the tie of embedding and head where merging has cut it."""
    config = copy.deepcopy(source.config)
    if isinstance(weights, MergedWeights):
        config.tie_word_embeddings = weights.tied
    return config


def _write(
    partial: Path,
    what: Exportable,
    weights: Weights,
    architecture: Architecture,
    chosen: FileTemplate,
    type: WeightType,
    quantizer: Quantizer | None,
    progress: Progress,
) -> Written:
    first = partial.with_name(f"{partial.name}.f16") if type.by_llama_cpp else partial
    try:
        written = write_model(
            first,
            weights,
            architecture,
            chosen.vocabulary,
            type=TYPES["f16"] if type.by_llama_cpp else type,
            described=what.described(),
            chat_template=chosen.template,
            each=lambda done, total: progress("writing", done, total),
        )
        if not type.by_llama_cpp:
            return written
        assert quantizer is not None
        progress("quantizing", 0, 1)
        quantizer.quantize(first, partial, type)
    finally:
        if first != partial:
            first.unlink(missing_ok=True)
    return written.by_llama_cpp(partial)


def _trained(
    what: Exportable, shown: Sequence[Tensor], ours: Sequence[Tensor], device: str
) -> Agreement | None:
    """How far the file is from the adapter in memory, on the 4-bit weights that were trained."""
    if what.found is None:
        return None
    qlora = open_adapter(what.found, device=device, copies=False, source=what.source).qlora
    rows = [
        TokenizedRow(ids.numpy().astype(np.int32), np.zeros(len(ids), dtype=bool), number)
        for number, ids in enumerate(shown)
    ]
    with torch.no_grad():
        whole = qlora.logits(make_batch(rows)).float().cpu()
    return compare_logits(ours, whole.split([len(row) for row in rows]))


def _of_start(what: Exportable, onto: BaseWeights) -> tuple[str, ...]:
    recipe = what.found.recipe if what.found is not None else None
    if recipe is None or recipe.lora.init != "loftq" or onto == "4bit":
        return ()
    return (
        "the adapter began as what 4 bits lose (LoftQ), which on the original weights is an error "
        "that is not there: --onto 4bit is the model that was trained",
    )


def _require_trained(found: Agreement, type: WeightType) -> None:
    most = type.largest_kl + _ROUGH
    if not found.kl <= most:
        raise ModelError(
            f"the file's logits are {found.kl:.2g} nats from those of the adapter in memory, where "
            f"{type.name} and rounding explain {most:g}: the file is not kept."
        )


def _modelfile(
    what: Exportable, out: Path, chosen: FileTemplate
) -> tuple[Modelfile, tuple[str, ...]]:
    tokenizer, vocabulary = what.source.tokenizer, chosen.vocabulary
    stop = [vocabulary.tokens[end] for end in vocabulary.ends]
    go = None if chosen.template is None else _go(chosen.template, tokenizer, vocabulary)
    notes: tuple[str, ...] = () if go is not None else (NO_TEMPLATE,)
    if go is not None and chosen.template is not None and " in question -%}" in chosen.template:
        notes = (
            "Ollama's templates cannot look into a message: a question with its input gets the "
            "frame of those without there",
        )
    return Modelfile(out.name, go, stop, what.system), notes


def _go(template: str, tokenizer: Any, vocabulary: Vocabulary) -> str | None:
    chat = ChatRender(template, tokenizer)
    bos = tokenizer.bos_token if vocabulary.add_bos else None

    def render(messages: Any) -> str:
        try:
            [text] = chat([messages], generate=True)
        except TemplateFailed as failed:
            raise ValueError(str(failed)) from failed
        # Ollama has llama.cpp put it there.
        return text.removeprefix(bos) if bos else text

    found = find_turn_format(render)
    return None if found is None else go_template(found)


def _record(
    what: Exportable, export: Export, type: WeightType, onto: BaseWeights
) -> dict[str, Any]:
    check = export.check
    return {
        "halfbyte": halfbyte.__version__,
        "file": export.file.name,
        "bytes": export.nbytes,
        "type": type.name,
        "base": what.base,
        "onto": None if what.found is None else onto,
        "tensors": export.written.tensors,
        "kept_in_f16": list(export.written.kept),
        "compared_on": {"source": export.compared_on, "rows": check.rows},
        "rows_in_other_tokens": check.different,
        "largest_error_of_a_tensor": {"relative": check.error, "tensor": check.tensor},
        "with_its_weights": asdict(check.logits),
        "with_the_adapter": None if export.trained is None else asdict(export.trained),
        "by_llama_cpp": None if check.llama_cpp is None else asdict(check.llama_cpp),
        "notes": list(export.notes),
    }
