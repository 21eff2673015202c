"""Which trackers a recipe asks for, and whether they can be had."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec

from halfbyte.errors import RecipeError
from halfbyte.recipe.tracker_schema import TrackerRecipe
from halfbyte.redaction import remember

TENSORBOARD, WANDB, MLFLOW, WEBHOOK = "tensorboard", "wandb", "mlflow", "webhook"


@dataclass(frozen=True)
class Chosen:
    """A tracker by its name, and the one thing that the recipe says of it."""

    name: str
    target: str  # project, experiment, or the name of the variable with the URL


def choose(asked: TrackerRecipe) -> list[Chosen]:
    """The trackers of the section ``trackers``, none of them imported.

    Raises RecipeError where a package is not installed or the webhook's variable is not set.
    """
    wanted = [
        (TENSORBOARD, "tensorboard" if asked.tensorboard else None),
        (WANDB, asked.wandb.project),
        (MLFLOW, asked.mlflow.experiment),
        (WEBHOOK, asked.webhook.url_env),
    ]
    chosen = [Chosen(name, target) for name, target in wanted if target]
    for tracker in chosen:
        if tracker.name == WEBHOOK:
            _look_at_url(tracker.target)
        elif find_spec(tracker.name) is None:
            raise RecipeError(
                f"trackers.{tracker.name} needs a package that is not installed; "
                f"pip install 'halfbyte[{tracker.name}]', or leave it out."
            )
    return chosen


def _look_at_url(variable: str) -> None:
    url = os.environ.get(variable, "").strip()
    if not url:
        raise RecipeError(
            f"trackers.webhook.url_env names the environment variable {variable}, which is not "
            "set; set it to the URL, or leave the webhook out."
        )
    remember(url)
    if not url.startswith(("http://", "https://")):
        raise RecipeError(
            f"the environment variable {variable} of trackers.webhook.url_env does not begin with "
            "https:// or http://; set it to the URL to post to."
        )
