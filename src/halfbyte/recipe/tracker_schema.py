"""Where a run is told of while it goes on, beside its own folder."""

from __future__ import annotations

import re

from pydantic import Field, field_validator

from halfbyte.recipe.section import Name, Section, rule

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


class WandbRecipe(Section):
    """Weights & Biases."""

    project: Name | None = Field(
        default=None,
        description="Project to log into; nothing is logged if empty. The client's own variables "
        "hold (`WANDB_API_KEY`, `WANDB_MODE=offline`, `WANDB_ENTITY`).",
    )


class MlflowRecipe(Section):
    """MLflow."""

    experiment: Name | None = Field(
        default=None,
        description="Experiment to log into; nothing is logged if empty. The client's own "
        "variables hold (`MLFLOW_TRACKING_URI`, `MLFLOW_TRACKING_TOKEN`).",
    )


class WebhookRecipe(Section):
    """A message when the run ends."""

    url_env: Name | None = Field(
        default=None,
        description="Name of the environment variable that holds the URL (which is often a "
        "secret) to which a JSON object is posted when the run ends, however it does.",
    )

    @field_validator("url_env")
    @classmethod
    def _name(cls, value: str | None) -> str | None:
        if value is not None and not _VARIABLE.match(value):
            raise rule(
                "trackers.webhook.url_env",
                "must be the name of an environment variable that holds the URL, not the URL "
                "itself, since a recipe is copied and such a URL is often a secret; write "
                "HALFBYTE_WEBHOOK and set that variable.",
            )
        return value


class TrackerRecipe(Section):
    """Where the run is told of while it goes on (docs/trackers.md)."""

    tensorboard: bool = Field(
        default=False, description="Write files for TensorBoard into `tensorboard/` of the run."
    )
    wandb: WandbRecipe = Field(default_factory=WandbRecipe)
    mlflow: MlflowRecipe = Field(default_factory=MlflowRecipe)
    webhook: WebhookRecipe = Field(default_factory=WebhookRecipe)
