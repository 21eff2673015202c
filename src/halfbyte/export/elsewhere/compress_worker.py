"""What llmcompressor is asked, in a process of its own, by a Python that has it and perhaps no
halfbyte.

Run by worker_frame.py.
"""

from __future__ import annotations

from typing import Any

PACKAGE = "llmcompressor"


def write(job: dict[str, Any]) -> None:
    """The model in the folder ``model``, its linear layers but for the head rounded by ``method``
    to ``bits`` in groups of ``group`` weights, written into the folder ``out``.

    ``rows`` of ids are what it is calibrated with; ``in_fp32`` whether the model is calculated in
    fp32 meanwhile.
    """
    import torch
    from llmcompressor import oneshot
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype="auto", trust_remote_code=False
    )
    stored = model.dtype
    if job["in_fp32"]:
        # 5 minutes in place of 13 for 135M weights on two cores that only emulate bf16.
        model.to(torch.float32)
    head = model.get_output_embeddings()
    ignored = [name for name, module in model.named_modules() if module is head]
    rows: Any = [
        {"input_ids": torch.tensor(row), "attention_mask": torch.ones(len(row), dtype=torch.int64)}
        for row in job["rows"]
    ]
    if not torch.accelerator.is_available():
        without_pinned_memory()
    oneshot(
        model=model,
        dataset=DataLoader(rows, batch_size=1),
        recipe=recipe(job, ignored),
        num_calibration_samples=len(rows),
    )
    if job["in_fp32"]:
        round_to(model, stored)
    model.save_pretrained(job["out"], save_compressed=True)


def round_to(model: Any, dtype: Any) -> None:
    """All that is stored as it is, scales among it, in ``dtype``.

    Not the matrices that are packed: they are multiples of their scales, and rounded by themselves
    they might be packed as other ones.
    """
    for module in model.modules():
        packed = getattr(module, "quantization_scheme", None) is not None
        for name, values in module.named_parameters(recurse=False):
            if values.is_floating_point() and not (packed and name == "weight"):
                values.data = values.data.to(dtype)
    model.config.dtype = dtype


def without_pinned_memory() -> None:
    """AWQ pins what it keeps, for faster copies to an accelerator; without one that is an error."""
    from llmcompressor.pipelines.cache import IntermediatesCache

    def stay(self: Any, *_: Any, **__: Any) -> None:
        pass

    IntermediatesCache.pin_memory = stay


def recipe(job: dict[str, Any], ignored: list[str]) -> list[Any]:
    """The steps of ``method``. AWQ has a zero point for each group, as its authors have."""
    weights = {
        "num_bits": job["bits"],
        "type": "int",
        "symmetric": job["method"] == "gptq",
        "strategy": "group",
        "group_size": job["group"],
    }
    settings = {
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ignored,
    }
    if job["method"] == "gptq":
        from llmcompressor.modifiers.gptq import GPTQModifier

        return [GPTQModifier(**settings)]
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    return [AWQModifier(duo_scaling="both"), QuantizationModifier(**settings)]


def ask(job: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What transformers loads of the folder ``model``: tokens of ``texts``, logits of ``rows`` of
    ids, into the file ``logits`` (npz), template, ends of an answer, and which layers have
    groups."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(job["model"], trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype="auto", trust_remote_code=False
    ).to(device)
    logits = {}
    with torch.no_grad():
        for number, row in enumerate(job["rows"]):
            ids = torch.tensor([row], device=device)
            found = model(input_ids=ids, use_cache=False).logits[0]
            logits[str(number)] = found.float().cpu().numpy()
    np.savez(job["logits"], **logits)
    ends = model.generation_config.eos_token_id
    head = model.get_output_embeddings()
    matrices = {
        name: getattr(module, "quantization_scheme", None) is not None
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    return tokenizer, {
        "template": tokenizer.chat_template,
        "ends": [ends] if isinstance(ends, int) else list(ends or ()),
        "quantized": sum(matrices.values()),
        "kept": [name for name, quantized in matrices.items() if not quantized],
    }
