"""What is done where a run goes wrong, and when it ends early."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from halfbyte.recipe.section import PositiveInt, Section

Action = Literal["say", "stop", "lower_rate", "rollback"]
Say = Literal["say", "stop"]
SayOrLower = Literal["say", "stop", "lower_rate"]


class WatchRecipe(Section):
    """What is done where something is noticed while the run trains (docs/watching.md)."""

    loss_not_finite: Action = Field(
        default="stop",
        description="The loss of a step is NaN or infinite. `rollback` leaves the step's batch out "
        "and undoes what came of it; `say` goes on, as the update of such a step is not made.",
    )
    gradient_not_finite: SayOrLower = Field(
        default="say",
        description="The gradient of a step is not finite and its loss is, so that no update was "
        "made; not told of in fp16, where that is how the loss scale is found. Twenty in a row end "
        "the run whatever stands here.",
    )
    loss_spike: Action = Field(
        default="say",
        description="The loss of a step is far above those of the steps before it. `rollback` goes "
        "back to the last checkpoint and leaves the step's batch out, `lower_rate` goes on with a "
        "lower learning rate.",
    )
    loss_zero: Say = Field(
        default="say", description="The loss of a step is exactly 0: nothing was learned from it."
    )
    gradient_clipped: Say = Field(
        default="say",
        description="The gradient's norm was at `training.max_grad_norm` or above for a hundred "
        "steps in a row.",
    )
    no_learning: Say = Field(
        default="say",
        description="The training loss is no lower at the end of a span of steps than at the "
        "beginning of the run.",
    )
    overfitting: Say = Field(
        default="say",
        description="The held-out loss rises while the training loss falls.",
    )
    rate_factor: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.5,
        description="What `lower_rate` multiplies the learning rate of all steps to come with.",
    )
    max_rollbacks: PositiveInt = Field(
        default=3,
        description="So many batches may be left out by `rollback`; one more ends the run.",
    )


class EarlyStoppingRecipe(Section):
    """When the run ends before its last step, since the held-out loss falls no more."""

    patience: PositiveInt | None = Field(
        default=None,
        description="End after so many evaluations in a row without a new lowest held-out loss; "
        "empty: never.",
    )
    min_delta: Annotated[float, Field(ge=0)] = Field(
        default=0.0,
        description="A held-out loss counts as a new lowest one if it is lower by more than this, "
        "in nats per token.",
    )
