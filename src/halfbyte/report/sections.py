"""The eight sections between page one and the appendices."""

from __future__ import annotations

from collections.abc import Mapping

from halfbyte.events.types import Audited, Environment, Evaluated
from halfbyte.recipe import Recipe
from halfbyte.recipe.learned import learned_words
from halfbyte.report import figures
from halfbyte.report.alternatives import loss_alt
from halfbyte.report.blocks import (
    Answers,
    Block,
    Code,
    Facts,
    Heading,
    Paragraph,
    Picture,
    Sample,
    Section,
    Table,
    Verbatim,
)
from halfbyte.report.cleaning import funnel
from halfbyte.report.evaluation import judged
from halfbyte.report.findings import findings
from halfbyte.report.page_one import is_cut, shown_in_full
from halfbyte.report.side_by_side import side_by_side
from halfbyte.report.story import Story
from halfbyte.report.tasks import tasks
from halfbyte.report.techniques import key_techniques
from halfbyte.report.verdicts import epoch_means
from halfbyte.report.watching import watching

FRAMEWORKS = ("halfbyte", "torch", "transformers")
TABLE_STEPS = 8


def sections(story: Story) -> list[Section]:
    """In this order and under these names, whatever the run."""
    return [
        Section("Objective", "objective", _objective(story)),
        Section("Environment", "environment", _environment(story)),
        Section("Model", "model", _model(story)),
        Section("Dataset", "dataset", _dataset(story)),
        Section("Hyperparameters", "hyperparameters", [_hyperparameters(story)]),
        Section("Key techniques used", "techniques", key_techniques(story)),
        Section("Results", "results", _results(story)),
        Section("Saved artifacts", "artifacts", _artifacts(story)),
    ]


def objective(story: Story) -> str:
    return story.recipe.objective or "Not stated in the recipe."


def _objective(story: Story) -> list[Block]:
    data = story.recipe.data
    learned = learned_words(data.loss_on, data.template)
    return [
        *(Paragraph(text) for text in objective(story).split("\n\n") if text.strip()),
        Paragraph(
            f"To that end {story.model_name} was to learn {learned}, by a LoRA adapter beside its "
            "frozen weights, which are kept in 4 bits (QLoRA)."
        ),
    ]


def _environment(story: Story) -> list[Block]:
    if not story.environments:
        return [Paragraph("Not recorded.")]
    blocks: list[Block] = []
    for number, environment in enumerate(story.environments, 1):
        if len(story.environments) > 1:
            blocks.append(Heading(f"Machine {number}, in the order of use"))
        blocks.append(Facts(_machine(environment)))
    return blocks


def _machine(e: Environment) -> list[tuple[str, str]]:
    pairs = [
        ("platform", e.platform),
        ("processor", f"{e.cpu}, {figures.many(e.cpu_threads, 'thread')}"),
        ("main memory", figures.gib(e.memory_bytes)),
    ]
    if e.gpu is None:
        pairs.append(("GPU", "none used; trained on the processor"))
    else:
        memory = f", {figures.gib(e.gpu_memory_bytes)}" if e.gpu_memory_bytes else ""
        capability = f", compute capability {e.gpu_capability}" if e.gpu_capability else ""
        pairs.append(("GPU", f"{e.gpu}{memory}{capability}"))
        if e.cuda or e.driver:
            pairs.append(("CUDA, driver", f"{e.cuda or '?'}, {e.driver or '?'}"))
    versions = [f"{n} {e.packages[n]}" for n in FRAMEWORKS if n in e.packages]
    if versions:
        pairs.append(("framework", ", ".join(versions)))
    pairs.append(("Python", e.python))
    return pairs


def _model(story: Story) -> list[Block]:
    m = story.model
    if m is None:
        return [Facts([("base", Code(story.recipe.model.name))])]
    template = "has one of its own" if m.template_of_base else "has none"
    return [
        Facts(
            [
                ("base", Code(m.name)),
                ("architecture", f"{m.architecture}, {figures.many(m.layers, 'layer')}"),
                ("parameters of the base", figures.count(m.parameters_base)),
                (
                    "total parameters",
                    f"{figures.count(m.parameters_base + m.parameters_trainable)} with the adapter",
                ),
                ("read from", m.source_format),
                ("chat template", f"the base {template}"),
                ("licence of the base", m.licence or "not stated in its files"),
            ]
        )
    ]


def _dataset(story: Story) -> list[Block]:
    a = story.audit
    if a is None:
        return [Facts([("name", Code(story.recipe.data.name))])]
    blocks: list[Block] = [
        Facts(
            [
                ("name", Code(a.source)),
                (
                    "examples used",
                    f"{figures.count(a.rows_used)} to train, {figures.count(a.rows_held_out)} "
                    f"held out, of {figures.count(a.rows_read)} read",
                ),
                ("format", _format(a)),
                ("columns", ", ".join(f"{role}: {c}" for role, c in a.columns.items()) or "–"),
                ("loss on", learned_words(a.loss_on, a.template)),
                (
                    "tokens in an epoch",
                    f"{figures.count(a.tokens)}, of which {figures.count(a.labels)} "
                    f"({figures.percentage(a.labels, a.tokens)}) carry loss",
                ),
                ("longest row allowed", figures.many(a.max_length, "token")),
            ]
        )
    ]
    blocks += funnel(story)
    if a.template == "custom":
        blocks += [Paragraph("The format of a row:"), Verbatim(story.recipe.data.template)]
    blocks += findings(story)
    if a.sample:
        blocks.append(Heading("A sample as trained"))
        blocks.append(
            Sample(
                [(str(text), bool(carries)) for text, carries in a.sample],
                f"Row {figures.count(a.sample_row + 1)} as the model saw it.",
            )
        )
    return blocks


def _format(a: Audited) -> str:
    return {
        "chat": "the model's own chat template",
        "custom": "a text of the recipe's own (below)",
    }.get(a.template, f"template {a.template}")


def _adapter_variants(recipe: Recipe) -> list[tuple[str, str]]:
    """What makes the adapter another than plain LoRA; nothing of what was not asked for."""
    lora, ratio = recipe.lora, recipe.training.loraplus_lr_ratio
    excluded = lora.exclude_modules
    found = {
        "layers left out": excluded if isinstance(excluded, str) else ", ".join(excluded),
        "ranks of their own": _by_name(lora.rank_pattern),
        "alpha of their own": _by_name(lora.alpha_pattern),
        "scale": "alpha / √r (rsLoRA)" if lora.use_rslora else "",
        "magnitudes": "learned apart (DoRA)" if lora.use_dora else "",
        "start of the adapter": "" if lora.init == "kaiming" else lora.init,
        "trained whole": ", ".join(lora.modules_to_save),
        "new tokens, trained": ", ".join(recipe.model.new_tokens),
        "rate of B": f"{ratio:g} times that of A (LoRA+)" if ratio is not None else "",
    }
    return [(name, text) for name, text in found.items() if text]


def _by_name(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name}: {value:g}" for name, value in values.items())


def _hyperparameters(story: Story) -> Table:
    r, t = story.recipe, story.recipe.training
    quantization = f"NF4, blocks of {r.quantization.block_size}, " + (
        "double quantization" if r.quantization.double_quant else "single quantization"
    )
    accumulation = t.gradient_accumulation
    packs = story.plan.packs if story.plan else None
    counted = "packs" if r.data.packing else "rows"
    rows: list[tuple[str, str]] = [
        ("rank r", figures.setting(r.lora.r)),
        ("LoRA alpha", figures.setting(r.lora.lora_alpha)),
        ("LoRA dropout", figures.setting(r.lora.lora_dropout)),
        ("adapted layers", figures.setting(r.lora.target_modules)),
        *_adapter_variants(r),
        ("base weights", quantization),
        ("precision", figures.setting(r.precision)),
        ("learning rate (peak)", figures.setting(t.learning_rate)),
        (
            "schedule",
            f"{t.lr_scheduler}{'' if t.lr_scheduler == 'constant' else ' to 0'}, "
            f"{_warmup(t.warmup_steps)}",
        ),
        ("optimizer", t.optimizer),
        ("Adam β₁, β₂, ε", f"{t.adam_beta1:g}, {t.adam_beta2:g}, {t.adam_epsilon:g}"),
        ("weight decay", figures.setting(t.weight_decay)),
        (
            "gradient norm clipped at",
            figures.setting(t.max_grad_norm) if t.max_grad_norm else "not clipped",
        ),
        (f"{counted} in a forward pass", figures.setting(t.batch_size)),
        ("forward passes in a step", figures.setting(accumulation)),
        ("epochs", figures.setting(t.epochs)),
        ("steps", figures.count(story.planned_steps)),
        ("longest row", _tokens(r.data.max_length)),
        ("gradient checkpointing", figures.setting(t.gradient_checkpointing)),
        ("logged", f"mean of {figures.many(t.logging_steps, 'step')}"),
        ("adapter kept", f"the {r.evaluation.keep}"),
        ("seed", str(r.seed)),
    ]
    if isinstance(t.batch_size, int) and isinstance(accumulation, int):
        rows.insert(14, (f"{counted} in a step", figures.count(t.batch_size * accumulation)))
    if packs is not None:
        rows.insert(12, ("packs in an epoch", figures.count(packs)))
    return Table(("setting", "value"), rows, "ll")


def _warmup(steps: int | str) -> str:
    return "no warm-up" if steps == 0 else f"warm-up over {steps} steps"


def _tokens(length: int | str) -> str:
    return figures.many(length, "token") if isinstance(length, int) else length


def _results(story: Story) -> list[Block]:
    blocks: list[Block] = [Heading("Parameter efficiency"), *_efficiency(story)]
    blocks.append(Heading("Loss"))
    if not story.steps:
        blocks.append(Paragraph("No step was made, so there is no loss to show."))
    else:
        blocks += [_loss_table(story), _loss_picture(story)]
    means = epoch_means(story)
    if means:
        blocks.append(
            Table(
                ("epoch", "steps", "mean training loss"),
                [
                    (
                        str(m.epoch),
                        f"{figures.count(m.first)}–{figures.count(m.last)}",
                        figures.loss(m.loss),
                    )
                    for m in means
                ],
                "rrr",
                "Mean over all tokens with loss of each whole pass over the rows.",
            )
        )
    blocks += _evaluations(story)
    blocks += judged(story)
    blocks += tasks(story)
    blocks += side_by_side(story.side_by_side)
    blocks += watching(story)
    if story.answers and is_cut(story):
        blocks += [
            Heading("Held-out prompts and answers in full"),
            Answers(shown_in_full(story.answers)),
        ]
    return blocks


def _efficiency(story: Story) -> list[Block]:
    m = story.model
    if m is None:
        return [Paragraph("The model was not recorded.")]
    total = m.parameters_base + m.parameters_trainable
    parts = [("trainable", m.parameters_trainable), ("frozen", m.parameters_base), ("total", total)]
    rows = [(name, figures.count(n), figures.percentage(n, total)) for name, n in parts]
    return [Table(("parameters", "number", "share"), rows, "lrr", total=True)]


def table_steps(story: Story) -> list[int]:
    """The steps of the loss table: those that the recipe names, or eight over the run."""
    named = story.recipe.report.loss_at_steps
    if named != "auto":
        return sorted(set(named))
    every, last = story.recipe.training.logging_steps, story.last_step
    logged = [*range(every, last + 1, every)]
    if not logged or logged[-1] != last:
        logged.append(last)
    if len(logged) <= TABLE_STEPS:
        return logged
    spread = [round(i * (len(logged) - 1) / (TABLE_STEPS - 1)) for i in range(TABLE_STEPS)]
    return [logged[i] for i in spread]


def _loss_table(story: Story) -> Table:
    every = story.recipe.training.logging_steps
    held_out = {e.step: e.loss for e in story.evaluations}
    epochs = {s.step: s.epoch for s in story.steps}
    rows = []
    for step in table_steps(story):
        value = story.windowed_loss(step)
        rows.append(
            (
                figures.count(step),
                f"{epochs[step]:.2f}" if step in epochs else figures.NONE,
                "not reached" if value is None else figures.loss(value),
                figures.loss(held_out.get(step)),
            )
        )
    mean = "the step's own" if every == 1 else f"the mean of the {every} steps up to and with it"
    return Table(
        ("step", "epoch", "training loss", "held-out loss"),
        rows,
        "rrrr",
        f"Training loss is {mean}; held-out loss stands where it was measured at that very step.",
    )


def _loss_picture(story: Story) -> Picture:
    return Picture(
        "loss",
        loss_alt(story),
        "Training loss (each step, and the mean as logged) and held-out loss, in nats per token.",
    )


def _evaluations(story: Story) -> list[Block]:
    rows: list[tuple[str, str, str, str, str]] = []

    def add(what: str, e: Evaluated) -> None:
        rows.append(
            (
                what,
                figures.count(e.step),
                figures.loss(e.loss),
                figures.count(e.labels),
                figures.duration(e.seconds),
            )
        )

    if story.base:
        add("base", story.base)
    if story.quantized_base:
        add("base in 4 bits", story.quantized_base)
    for e in story.evaluations:
        add("adapter, kept" if story.kept and story.kept.step == e.step else "adapter", e)
    if not rows:
        return []
    table = Table(("model", "step", "held-out loss", "tokens", "took"), rows, "lrrrr")
    return [Heading("Every measurement on held-out rows"), table]


_WHAT_FOR = {
    "adapter_model.safetensors": "the adapter's weights",
    "adapter_config.json": "how it was attached, for PEFT and others",
    "tokenizer.json": "the tokenizer",
    "tokenizer_config.json": "its settings",
    "special_tokens_map.json": "its special tokens",
    "chat_template.jinja": "the format that was trained; prompt with it",
    "base_chat_template.jinja": "the base model's own format",
    "README.md": "the model card",
    "recipe.yaml": "every setting, to run it again",
}


def _artifacts(story: Story) -> list[Block]:
    blocks: list[Block] = []
    if story.artifacts:
        blocks.append(
            Table(
                ("file", "size", "what it is"),
                [
                    (Code(a.path), figures.size(a.bytes), _WHAT_FOR.get(a.path.split("/")[-1], ""))
                    for a in story.artifacts
                ],
                "lrl",
            )
        )
    else:
        blocks.append(Paragraph("No adapter has been saved: that is done when a run finishes."))
    beside = "Beside them in the run folder: events.jsonl, the record that this report is made of"
    if story.checkpoints:
        beside += f", and {story.checkpoints[-1].path}, the last checkpoint"
    blocks.append(Paragraph(beside + "."))
    if story.finished is None and story.checkpoints:
        go_on = f"To go on from there: halfbyte train --resume, with the run folder {story.name}."
        blocks.append(Paragraph(go_on))
    return blocks
