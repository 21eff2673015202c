"""Base model and adapter written as one model, and compared with the adapter before it is kept."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import halfbyte
from halfbyte.data.batch import TokenizedRow
from halfbyte.errors import DataError, ModelError, RunError
from halfbyte.export.agreement import tokens_to_show
from halfbyte.export.card.derived_card import derived_card
from halfbyte.export.card.text import public_name
from halfbyte.export.merged_folder import MergedFolder
from halfbyte.export.merged_weights import BaseWeights, MergedWeights
from halfbyte.export.new_folder import new_folder
from halfbyte.finished.found import FoundAdapter, open_base
from halfbyte.finished.merge_check import MergeCheck, check_merge
from halfbyte.finished.opened import open_adapter
from halfbyte.finished.rows import held_out_rows
from halfbyte.generate.prompt import end_ids
from halfbyte.model.adapter_files import read_adapter
from halfbyte.model.lora_init import Pair
from halfbyte.model.skeleton import build_skeleton
from halfbyte.model.source import ModelSource
from halfbyte.plan.device import find_device
from halfbyte.recipe.schema import QuantizationRecipe
from halfbyte.run.adapter_start import FOLDER as START

FILE = "merge.json"
# Told what is done now, and how many of how many are.
Progress = Callable[[str, int, int], None]
# Shown to both models at most: rows, tokens of one, and of all.
_ROWS, _LONGEST, _MOST_TOKENS = 16, 512, 2048
# Where there are no rows.
_TEXTS = (
    "Water boils at a lower temperature on a mountain than at the sea, because the air above it "
    "weighs less. Whoever cooks there waits longer for an egg.",
    "Question: My brother has had a headache for three days, and light hurts his eyes. What "
    "should he do?\nAnswer: He should see a doctor soon, and at once if his neck is stiff.",
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n"
    "    return total / len(values)\n",
    "The harbour was empty when they came, but for one boat; and its lamp was lit.",
)


@dataclass(frozen=True)
class Compared:
    """What both models are shown."""

    rows: list[TokenizedRow]
    texts: list[str]  # of which both tokenizers make tokens
    source: str
    fallback: str | None = None  # why these, if they are not the run's own


@dataclass(frozen=True)
class Merge:
    """A merged model that agrees with its adapter."""

    folder: Path
    onto: BaseWeights
    dtype: torch.dtype
    nbytes: int
    files: int
    tied: bool
    check: MergeCheck
    compared: Compared
    seconds: float
    warning: str | None = None  # what should be thought over


def merge_adapter(
    found: FoundAdapter,
    out: Path,
    *,
    onto: BaseWeights = "4bit",
    dtype: torch.dtype = torch.bfloat16,
    shard_bytes: int = 5_000_000_000,
    device: str = "auto",
    data: str | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Merge:
    """Write base model and adapter into the new folder ``out``, as transformers' models lie there.

    Weights go from disk to disk a tensor at a time. ``onto`` is what the adapter is added to, see
    :mod:`halfbyte.export.merged_weights`. Before ``out`` has its name the model is read again and
    compared with the adapter, on the run's held-out rows or the rows of ``data``. ``progress``
    hears what goes on ("merging", "checking"), how many are done and how many there are.

    Raises RunError where ``out`` exists or the disk is full, ModelError where the adapter does not
    fit its base, or the merged model disagrees with it.
    """
    began = time.perf_counter()
    on = find_device(device)
    source = open_base(found)
    compared = _compared(found, source, data)
    merged = MergedWeights(
        source,
        found.saved,
        onto=onto,
        quantization=quantization_of(found),
        start=start_of(found),
        device=on.kind,
    )
    plan = MergedFolder(merged, dtype, shard_bytes)
    with new_folder(out, plan.nbytes, "the merged model") as folder:
        plan.write_weights(folder, lambda done, total: progress("merging", done, total))
        ends = end_ids(build_skeleton(source.config, source.name), source.tokenizer)
        plan.write_settings(folder, source.tokenizer, sorted(ends))
        check = check_merge(
            folder,
            lambda: open_adapter(found, device=device, copies=False, source=source),
            onto,
            dtype,
            compared.rows,
            compared.texts,
            lambda done, total: progress("checking", done, total),
        )
        merge = Merge(
            folder=out,
            onto=onto,
            dtype=dtype,
            nbytes=plan.nbytes,
            files=len(plan.shards),
            tied=merged.tied,
            check=check,
            compared=compared,
            seconds=time.perf_counter() - began,
            warning=_warning(found, onto),
        )
        about = json.dumps(_record(found, merge), indent=2, ensure_ascii=False)
        (folder / FILE).write_text(about + "\n", encoding="utf-8")
        card = derived_card(found, "merge", merge_facts(merge))
        (folder / "README.md").write_text(card, encoding="utf-8")
    return merge


def quantization_of(found: FoundAdapter) -> QuantizationRecipe:
    """How the base's weights are quantized beside this adapter."""
    return found.recipe.quantization if found.recipe is not None else QuantizationRecipe()


def start_of(found: FoundAdapter) -> dict[str, Pair] | None:
    """A and B that a run of PiSSA began with, which its 4-bit weights lack; None for others."""
    if found.run is None or found.recipe is None or not found.recipe.lora.init.startswith("pissa"):
        return None
    return read_adapter(found.run / START).layers


def _warning(found: FoundAdapter, onto: BaseWeights) -> str | None:
    if onto == "4bit" or found.recipe is None or found.recipe.lora.init != "loftq":
        return None
    return (
        "the adapter was trained with LoftQ and makes good what 4 bits lose, which the original "
        "weights have not lost: merged onto these it adds an error; leave --onto original out"
    )


def merge_facts(merge: Merge) -> dict[str, str]:
    """For the card: onto what, and how well it agrees."""
    logits = merge.check.logits
    facts = {
        "merged onto": (
            "the weights rounded to 4 bits (NF4), which are those that were trained on"
            if merge.onto == "4bit"
            else "the base's original weights; trained was on those rounded to 4 bits"
        ),
        "numbers": type_name(merge.dtype),
        "compared with the adapter": (
            f"{logits.positions:,} places of {merge.compared.source}: mean KL {logits.kl:.1e} "
            f"nats, largest difference of a logit {logits.largest:.2g}, same likeliest token "
            f"{logits.top1:.1%}"
        ),
    }
    trained = merge.check.trained
    if trained is not None:
        facts["compared with the 4-bit model"] = (
            f"mean KL {trained.kl:.1e} nats, same likeliest token {trained.top1:.1%}"
        )
    return facts


def type_name(dtype: torch.dtype) -> str:
    """bf16, fp16 or fp32."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "fp32")


def _record(found: FoundAdapter, merge: Merge) -> dict[str, Any]:
    check = merge.check
    return {
        "halfbyte": halfbyte.__version__,
        "base": public_name(found.base.name),
        "revision": found.base.revision,
        "adapter": found.folder.resolve().name,
        "onto": merge.onto,
        "dtype": type_name(merge.dtype),
        "bytes": merge.nbytes,
        "files": merge.files,
        "compared_on": {"source": merge.compared.source, "rows": len(merge.compared.rows)},
        "with_adapter": asdict(check.logits),
        "with_4bit_model": None if check.trained is None else asdict(check.trained),
        "adapter_with_base": asdict(check.base),
        "tensors": asdict(check.tensors),
    }


def _compared(found: FoundAdapter, source: ModelSource, data: str | None) -> Compared:
    """The rows that both models are shown; those that are named must be there."""
    vocabulary = int(source.config.get_text_config().vocab_size)
    budget = min(_MOST_TOKENS, tokens_to_show(vocabulary))
    if found.run is None and data is None:
        return _built_in(source, budget, None)
    try:
        held_out = held_out_rows(found, source, data=data, limit=4 * _ROWS)
    except (DataError, RunError) as error:
        if data is not None:
            raise
        return _built_in(source, budget, str(error))
    rows = _within(held_out.pieces, budget)
    texts = [held_out.template.prompt(row) for row in held_out.rows[:_ROWS]]
    return Compared(rows, texts, held_out.source)


def _built_in(source: ModelSource, budget: int, why: str | None) -> Compared:
    ids = [source.tokenizer(text)["input_ids"] for text in _TEXTS]
    rows = [
        TokenizedRow(np.array(row, dtype=np.int32), np.zeros(len(row), dtype=bool), number)
        for number, row in enumerate(ids)
    ]
    return Compared(_within(rows, budget), list(_TEXTS), "texts that halfbyte brings", why)


def _within(rows: Sequence[TokenizedRow], budget: int) -> list[TokenizedRow]:
    """The first few of ``rows``, so many that padded to the longest they fit into ``budget``."""
    found: list[TokenizedRow] = []
    longest = 0
    for row in rows:
        cut = min(len(row), _LONGEST, budget)
        wider = max(longest, cut)
        if len(found) == _ROWS or wider * (len(found) + 1) > budget:
            continue
        found.append(TokenizedRow(row.input_ids[:cut], row.loss_mask[:cut], row.row))
        longest = wider
    if not found:
        raise ModelError("there is no row with a token, so the merged model cannot be compared.")
    return found
