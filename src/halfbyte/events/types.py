"""The events of a run: what ``events.jsonl`` holds, and all that a report is made of.

Each event is a frozen dataclass with a ``kind``; one line of the file is
``{"kind": …, "time": unix seconds, …fields}``. A reader ignores kinds and fields it does not know,
so that an older program reads a newer file.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar


@dataclass(frozen=True)
class Event:
    """Base of all events."""

    kind: ClassVar[str] = ""


@dataclass(frozen=True)
class RunStarted(Event):
    """A process began (or, with ``resumed_from``, went on) working on this run."""

    kind: ClassVar[str] = "run_started"
    version: str  # of halfbyte
    command: list[str]  # as typed
    folder: str  # the run folder, as it was given or made
    resumed_from: int | None = None  # the step of the checkpoint; 0 if there was none yet
    run_id: str = ""  # drawn when the run began
    machine: str = ""  # tells machines apart, and says nothing of them


@dataclass(frozen=True)
class Environment(Event):
    """The machine and the software."""

    kind: ClassVar[str] = "environment"
    platform: str
    python: str
    cpu: str
    cpu_threads: int
    memory_bytes: int
    device: str  # "cpu" or "cuda"
    gpu: str | None = None
    gpu_memory_bytes: int | None = None
    gpu_capability: str | None = None  # "9.0"
    cuda: str | None = None
    driver: str | None = None
    packages: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice(Event):
    """A setting that was decided for the user (asked "auto"), or stated and commented on."""

    kind: ClassVar[str] = "choice"
    key: str  # "training.learning_rate"
    asked: Any  # what the recipe says: "auto", or a value
    value: Any  # what is done
    reason: str


@dataclass(frozen=True)
class Changed(Event):
    """A setting that is another one since the run went on, as somebody allowed by name."""

    kind: ClassVar[str] = "changed"
    key: str
    before: str
    now: str


@dataclass(frozen=True)
class Warned(Event):
    """Something the user should know; shown on the screen and in the report."""

    kind: ClassVar[str] = "warning"
    text: str
    step: int | None = None


@dataclass(frozen=True)
class Fallback(Event):
    """A slower or different path was taken, and why."""

    kind: ClassVar[str] = "fallback"
    what: str
    reason: str


@dataclass(frozen=True)
class PhaseStarted(Event):
    """A phase began: for those who watch, the record keeps its end alone."""

    kind: ClassVar[str] = "phase_started"
    name: str


@dataclass(frozen=True)
class PhaseProgress(Event):
    """How many of ``total`` are ``done``: for those who watch, the record keeps none."""

    kind: ClassVar[str] = "phase_progress"
    name: str
    done: int
    total: int
    of: str = "rows"


@dataclass(frozen=True)
class Phase(Event):
    """A phase before or after the steps ended ("download", "quantize", "tokenize", …)."""

    kind: ClassVar[str] = "phase"
    name: str
    seconds: float


@dataclass(frozen=True)
class RowShown:
    """A row that a filter dropped or changed, and the text that shows why."""

    row: int  # in its source, from 0
    text: str
    source: int = 0


@dataclass(frozen=True)
class Filtered:
    """What one filter of the recipe did."""

    name: str  # "exact_duplicates"
    settings: str  # those that are not the defaults, in words: "by question"
    rows_in: int
    dropped: int
    changed: int  # rows that stay, with another text
    examples: list[RowShown]  # the first few of both


@dataclass(frozen=True)
class Funnel(Event):
    """What cleaning left of the rows, filter by filter."""

    kind: ClassVar[str] = "cleaning"
    rows_in: int
    rows_out: int  # to train or to be held out
    filters: list[Filtered]

    def __post_init__(self) -> None:
        # A line of the record holds plain groups.
        filters = [f if isinstance(f, Filtered) else _filtered(f) for f in self.filters]
        object.__setattr__(self, "filters", filters)

    @property
    def dropped(self) -> int:
        """Rows that all filters dropped."""
        return self.rows_in - self.rows_out


def _filtered(plain: dict[str, Any]) -> Filtered:
    known = {f.name: plain[f.name] for f in fields(Filtered) if f.name != "examples"}
    names = {f.name for f in fields(RowShown)}
    shown = [{key: e[key] for key in e if key in names} for e in plain["examples"]]
    return Filtered(**known, examples=[RowShown(**e) for e in shown])


@dataclass(frozen=True)
class Audited(Event):
    """The data as it will be trained."""

    kind: ClassVar[str] = "audit"
    source: str  # path or hub name as in the recipe
    rows_read: int
    rows_used: int  # rows that train
    rows_held_out: int
    rows_shortened: int
    rows_dropped: dict[str, int]  # reason: rows
    template: str  # its name, "custom" for a text of the recipe's own
    loss_on: str
    max_length: int
    tokens: int  # in the rows that train, one epoch
    labels: int  # of those with loss, after the shift
    length_percentiles: dict[str, int]  # "0", "50", "90", "99", "100" in tokens, before cutting
    sample: list[tuple[str, bool]]  # one row as trained: text of a run of tokens, carries loss
    sample_row: int
    columns: dict[str, str] = field(default_factory=dict)  # role: column
    sha256: str | None = None  # of a local data file
    tokens_cut: int = 0  # taken off the rows that were shortened
    rows_split: int = 0
    pieces: int = 0  # that train of the rows that were split
    pieces_dropped: int = 0  # of them, since they have nothing to learn


@dataclass(frozen=True)
class Found(Event):
    """Something in the data that spoils a run, or that the user may not expect."""

    kind: ClassVar[str] = "found"
    name: str  # "end-not-learned", as data.accept takes it; docs/audit.md lists them
    severity: str  # "error", "warning" or "note"
    text: str  # what is so, a clause without its full stop
    todo: str  # what to do about it, likewise
    count: int = 0  # rows that it concerns; 0 where it is no matter of single rows
    of: int = 0  # rows looked at
    rows: list[int] = field(default_factory=list)  # the first few, numbers in the source from 0
    sources: list[int] = field(default_factory=list)  # of these rows; empty where there is one
    examples: list[str] = field(default_factory=list)  # pieces of them, private data hidden
    accepted: bool = False  # an error that the recipe accepts by name

    @property
    def sentence(self) -> str:
        """What is so and what to do."""
        return f"{self.text}; {self.todo}."

    @property
    def places(self) -> list[str]:
        """``rows`` as a person counts them, from 1."""
        if not self.sources:
            return [f"{row + 1:,}" for row in self.rows]
        pairs = zip(self.rows, self.sources, strict=True)
        return [f"{row + 1:,} of source {source + 1}" for row, source in pairs]

    @property
    def stops(self) -> bool:
        """Whether a run must not begin."""
        return self.severity == "error" and not self.accepted


@dataclass(frozen=True)
class ModelLoaded(Event):
    """The base model and its adapter."""

    kind: ClassVar[str] = "model"
    name: str
    architecture: str  # "LlamaForCausalLM"
    parameters_base: int  # frozen, counted in the shapes before packing
    parameters_trainable: int
    layers: int
    bytes_before: int  # of the weights that are now 4-bit, at 16 bits each
    bytes_after: int  # of the same in NF4, scales included
    bytes_other: int  # norms, embeddings, head, as kept
    bytes_copy: int  # of a dequantized copy kept for speed; 0 if none
    quantized_modules: int
    lora_modules: dict[str, int]  # module's last name: how many carry an adapter
    source_format: str  # "safetensors" or "gguf"
    template_of_base: bool  # the base has a chat template of its own
    licence: str | None = None


@dataclass(frozen=True)
class Technique(Event):
    """What a technique did in this run, in figures."""

    kind: ClassVar[str] = "technique"
    name: str  # "gradient checkpointing", "mixed precision", "optimizer", …
    on: bool
    text: str  # one sentence
    figures: dict[str, float] = field(default_factory=dict)  # "bytes saved": 1.2e8


@dataclass(frozen=True)
class TrainingStarted(Event):
    """Everything is resolved; step 1 follows."""

    kind: ClassVar[str] = "training_started"
    rows: int
    batch_size: int  # rows, or packs of them
    gradient_accumulation: int
    steps: int
    steps_per_epoch: int
    epochs: float
    device: str
    precision: str
    packs: int | None = None  # that the rows are put into in an epoch
    watched: bool = False  # what is noticed of the steps is recorded


@dataclass(frozen=True)
class Step(Event):
    """One optimizer step."""

    kind: ClassVar[str] = "step"
    step: int  # from 1
    epoch: float  # passes over the rows finished after this step
    loss: float  # mean over the labelled tokens of the step
    learning_rate: float
    grad_norm: float  # before clipping
    tokens: int
    labels: int
    seconds: float
    memory_bytes: int  # peak of the device memory in use; resident memory of the process on a CPU
    skipped: bool = False  # no update: the gradient was not finite, or the batch is left out
    reserved_bytes: int | None = None  # peak of what PyTorch had taken of a GPU's memory
    left_out: bool = False  # a batch that a rollback leaves out: nothing was computed


@dataclass(frozen=True)
class Evaluated(Event):
    """Held-out loss."""

    kind: ClassVar[str] = "evaluation"
    step: int
    what: str  # "base" (before quantization), "quantized base", "adapter"
    loss: float  # mean over labelled tokens
    labels: int
    rows: int
    seconds: float


@dataclass(frozen=True)
class Answered(Event):
    """A held-out prompt answered by the base (``before``) or the kept adapter (``after``)."""

    kind: ClassVar[str] = "answer"
    row: int
    when: str  # "before" or "after"
    prompt: str  # what the user would have asked (no template around it)
    text: str
    reference: str
    tokens: int
    seconds: float
    source: int = 0  # of several, the one that the row is numbered in


@dataclass(frozen=True)
class Checkpointed(Event):
    """A checkpoint was finished."""

    kind: ClassVar[str] = "checkpoint"
    step: int
    path: str  # relative to the run folder
    held_out_loss: float | None = None
    seconds: float = 0.0  # that writing it took, beside the steps
    stood_still: float = 0.0  # that the steps waited for it to be copied aside


@dataclass(frozen=True)
class Mirrored(Event):
    """A checkpoint (without ``step`` what the run made) is whole in the mirror."""

    kind: ClassVar[str] = "mirrored"
    step: int | None
    where: str
    seconds: float


@dataclass(frozen=True)
class Kept(Event):
    """Which adapter the run keeps."""

    kind: ClassVar[str] = "kept"
    step: int
    why: str
    held_out_loss: float | None = None


@dataclass(frozen=True)
class Energy(Event):
    """Energy of the device over the steps, where it reports it."""

    kind: ClassVar[str] = "energy"
    joules: float
    source: str


@dataclass(frozen=True)
class Checked(Event):
    """A check that can fail, made on what was saved."""

    kind: ClassVar[str] = "check"
    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Artifact(Event):
    """A file that the run leaves behind."""

    kind: ClassVar[str] = "artifact"
    path: str  # relative to the run folder
    bytes: int
    sha256: str


@dataclass(frozen=True)
class StopAsked(Event):
    """A signal asked the run to end after the step it is in: for those who watch."""

    kind: ClassVar[str] = "stop_asked"
    signal: str


@dataclass(frozen=True)
class Interrupted(Event):
    """The user or the system asked the run to stop; a checkpoint holds the step."""

    kind: ClassVar[str] = "interrupted"
    step: int
    signal: str


@dataclass(frozen=True)
class Diverged(Event):
    """The loss or the weights were no longer finite, and the run stopped."""

    kind: ClassVar[str] = "diverged"
    step: int
    reason: str  # "the loss of step 7 is NaN"
    rows: list[int]  # numbers in the source, from 0, of the step's batches
    checkpoint: str | None = None  # the last good one, relative to the run folder
    sources: list[int] = field(default_factory=list)  # of each row, where there are several


@dataclass(frozen=True)
class Noticed(Event):
    """Something that the watching of the steps noticed."""

    kind: ClassVar[str] = "noticed"
    name: str  # "loss_spike", as the recipe's section watch has it; docs/watching.md lists them
    severity: str  # "error", "warning" or "note"
    step: int
    text: str  # what is so, a clause without its full stop
    todo: str  # what to do about it, likewise
    action: str = "say"  # what the recipe says to do: "say", "stop", "lower_rate" or "rollback"
    rows: list[int] = field(default_factory=list)  # of the step's batch, numbers from 0
    sources: list[int] = field(default_factory=list)  # of these rows; empty where there is one

    @property
    def sentence(self) -> str:
        """What is so and what to do."""
        return f"{self.text}; {self.todo}."


@dataclass(frozen=True)
class RolledBack(Event):
    """The batch of a step is left out from now on, and what came of it is undone.

    What the record says of the steps after ``to`` is done again; nothing is where ``to`` is
    ``step``, whose update was not made.
    """

    kind: ClassVar[str] = "rolled_back"
    step: int  # whose batch is left out
    to: int  # the step whose checkpoint the run goes on from; 0 is the start
    why: str  # the name of what was noticed


@dataclass(frozen=True)
class RateLowered(Event):
    """The learning rate of all steps from one on is multiplied."""

    kind: ClassVar[str] = "rate_lowered"
    step: int  # after which it was decided
    first: int  # the first step with the lower rate
    factor: float
    why: str  # the name of what was noticed


@dataclass(frozen=True)
class StoppedEarly(Event):
    """The held-out loss fell no more, so that the steps ended before the last one planned."""

    kind: ClassVar[str] = "stopped_early"
    step: int
    patience: int  # evaluations in a row without a new lowest loss
    best_step: int | None  # None where no loss was finite
    best_loss: float | None


@dataclass(frozen=True)
class Heartbeat(Event):
    """The process lives, although nothing else has been written for a while."""

    kind: ClassVar[str] = "heartbeat"
    doing: str  # "step 12", "evaluation", "save"
    since: float  # seconds since the work last got further: a row read, a batch done, a step begun
    cpu_seconds: float  # that the process has taken of the processor so far


@dataclass(frozen=True)
class Finished(Event):
    """The last step was done and the adapter is saved."""

    kind: ClassVar[str] = "finished"
    step: int
    seconds: float  # from the process's start to here


EVENTS: dict[str, type[Event]] = {event.kind: event for event in Event.__subclasses__()}
