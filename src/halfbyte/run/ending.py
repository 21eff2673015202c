"""What follows the last step: choose, save, read again, answer, measure."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch

import halfbyte
from halfbyte.data.batching import make_batch
from halfbyte.data.template import reference
from halfbyte.evaluate.held_out import unquantized_loss
from halfbyte.events import read_events
from halfbyte.events.types import (
    Answered,
    Artifact,
    Checked,
    Evaluated,
    Fallback,
    Kept,
    ModelLoaded,
)
from halfbyte.export.adapter_folder import write_adapter_folder
from halfbyte.export.card.adapter_notes import adapter_notes
from halfbyte.export.card.model_card import model_card
from halfbyte.generate.answer import answer
from halfbyte.model.adapter_files import read_adapter
from halfbyte.model.experts import mistaken_for_experts
from halfbyte.run.adapter_start import put_saved, saved_adapter
from halfbyte.run.assembly import Assembly
from halfbyte.run.record import RunRecord
from halfbyte.run.setup import Trainer
from halfbyte.run.watch import Watch


def end_run(
    assembly: Assembly, trainer: Trainer, watch: Watch, record: RunRecord, folder: Path, last: int
) -> None:
    """Keep an adapter, save and check it, answer prompts with and without it; ``last`` is the
    step that the run ended with."""
    kept = _keep(assembly, trainer, watch, last)
    record(kept)
    if assembly.data.held_out and assembly.recipe.evaluation.base_loss:
        with record.phase("base loss"), record.timed() as seconds:
            base = unquantized_loss(
                trainer.model,
                assembly.data.held_out,
                assembly.source.read,
                after_batch=record.work.mark,
            )
        record(Evaluated(0, "base", base.loss, base.labels, base.rows, seconds()))
    with record.phase("save"):
        _save(assembly, trainer, folder, kept)
    record(_read_again(assembly, trainer, folder))
    with record.phase("answers"):
        _answer_prompts(assembly, trainer, record)
    for path in sorted([*(folder / "adapter").rglob("*"), folder / "recipe.yaml"]):
        if path.is_file():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            record(Artifact(str(path.relative_to(folder)), path.stat().st_size, digest))


def _keep(assembly: Assembly, trainer: Trainer, watch: Watch, last: int) -> Kept:
    """Put the weights that the run keeps into the model."""
    if assembly.recipe.evaluation.keep == "last" or watch.best_adapter is None:
        loss = watch.last_loss(last)
        asked = assembly.recipe.evaluation.keep == "last"
        why = "the last one, as the recipe says" if asked else "the last one: none was measured"
        return Kept(last, why, loss)
    assert watch.best_step is not None
    trainer.load_adapter(watch.best_adapter)
    why = "the lowest held-out loss" + (
        ", which was the last step" if watch.best_step == last else ""
    )
    return Kept(watch.best_step, why, watch.best_loss)


def _save(assembly: Assembly, trainer: Trainer, folder: Path, kept: Kept) -> None:
    recipe, model = assembly.recipe, trainer.model
    layers, lora = saved_adapter(recipe.lora, model)
    events = [r.event for r in read_events(folder)]
    card = model_card(
        recipe,
        model=[e for e in events if isinstance(e, ModelLoaded)][-1],
        audit=assembly.data.audit,
        evaluations=[e for e in events if isinstance(e, Evaluated)],
        kept=kept,
        version=halfbyte.__version__,
        notes=adapter_notes(
            recipe, assembly.source.new_tokens, mistaken_for_experts(model.network, model.lora)
        ),
    )
    write_adapter_folder(
        folder / "adapter",
        layers,
        lora=lora,
        base_name=assembly.source.name,
        tokenizer=assembly.source.tokenizer,
        chat_template=assembly.data.template.chat_template(),
        card=card,
    )


@torch.no_grad()
def _read_again(assembly: Assembly, trainer: Trainer, folder: Path) -> Checked:
    """The adapter from disk must give the logits of the one in memory, bit for bit."""
    model = trainer.model
    model.network.eval()
    batch = make_batch((assembly.data.held_out or assembly.data.train)[:1])
    before = model.logits(batch)
    in_memory = {n: p.detach().clone() for n, p in model.lora_parameters().items()}
    # So that a layer missing from the file shows: it would otherwise be there from training.
    for parameter in model.lora_parameters().values():
        parameter.fill_(torch.nan)
    put_saved(model, read_adapter(folder / "adapter"))
    after = model.logits(batch)
    for name, parameter in model.lora_parameters().items():
        parameter.copy_(in_memory[name])
    apart = (before - after).abs().max().item()
    return Checked(
        "the saved adapter read again gives the same logits",
        apart == 0.0,
        f"largest difference {apart:g} over {before.shape[0]} positions × "
        f"{before.shape[1]:,} logits",
    )


def _answer_prompts(assembly: Assembly, trainer: Trainer, record: RunRecord) -> None:
    """A few held-out prompts, drawn by the seed, answered by the base and by the adapter."""
    recipe, data = assembly.recipe, assembly.data
    count = min(recipe.evaluation.prompts, len(data.held_out_rows))
    if count == 0:
        return
    generator = np.random.default_rng(recipe.seed)
    drawn = sorted(generator.choice(len(data.held_out_rows), count, replace=False).tolist())
    tokenizer, template = assembly.source.tokenizer, data.template
    prompts = [template.prompt(data.held_out_rows[i]) for i in drawn]
    eager: set[str] = set()
    for when in ("before", "after"):
        with trainer.model.adapter_on(when == "after"):
            answers = answer(
                trainer.model.network,
                tokenizer,
                prompts,
                max_new_tokens=recipe.evaluation.max_new_tokens,
                on_fallback=eager.add,
            )
        for i, given in zip(drawn, answers, strict=True):
            row = data.held_out_rows[i]
            record(
                Answered(
                    row=row.row,
                    when=when,
                    prompt=template.question(row),
                    text=given.text,
                    reference=reference(row),
                    tokens=given.tokens,
                    seconds=given.seconds,
                    source=row.source if len(recipe.data.sources) > 1 else 0,
                )
            )
    for reason in sorted(eager):
        record(Fallback("answers launched kernel by kernel, in place of a CUDA graph", reason))
