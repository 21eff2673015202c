"""MLflow, by its own client (the package ``mlflow-skinny`` has it)."""

from __future__ import annotations

import json
from typing import Any

_STATUS = {"finished": "FINISHED", "interrupted": "KILLED"}  # whatever else: FAILED
_AT_ONCE = 100  # parameters in one request
_LONGEST_VALUE = 500  # characters of a parameter that every version of a server takes
_LONGEST_TAG = 5_000


def open_tracker(opening: dict[str, Any]) -> tuple[Mlflow, dict[str, Any]]:
    """The run in the experiment ``target``: a new one, or the one kept before a resume.

    Raises what the client raises, such as for a server that does not answer.
    """
    from mlflow import MlflowClient
    from mlflow.entities import Param

    client = MlflowClient()
    kept = opening["kept"] or {}
    if "id" in kept:
        client.update_run(kept["id"], status="RUNNING")
        return Mlflow(client, kept["id"]), kept
    experiment = client.get_experiment_by_name(opening["target"])
    at = experiment.experiment_id if experiment else client.create_experiment(opening["target"])
    run = client.create_run(
        at,
        run_name=opening["run"],
        tags={"mlflow.source.name": "halfbyte", "mlflow.source.type": "LOCAL"},
    )
    parameters = [Param(key, _short(value)) for key, value in opening["config"].items()]
    for first in range(0, len(parameters), _AT_ONCE):
        client.log_batch(run.info.run_id, params=parameters[first : first + _AT_ONCE])
    return Mlflow(client, run.info.run_id), {"id": run.info.run_id}


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"


class Mlflow:
    """Logs into one run."""

    def __init__(self, client: Any, run: str) -> None:
        self._client, self._run = client, run
        self._warnings: list[str] = []

    def metrics(self, rows: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

        found = [
            Metric(name, float(value), int(row["time"] * 1_000), row["step"])
            for row in rows
            for name, value in row["metrics"].items()
        ]
        for first in range(0, len(found), 1_000):  # the most that a server takes
            self._client.log_batch(self._run, metrics=found[first : first + 1_000])

    def text(self, step: int, time: float, text: str) -> None:
        """The tool's place for texts is a tag."""
        self._warnings.append(text if not step else f"step {step}: {text}")
        self._client.set_tag(self._run, "warnings", "\n".join(self._warnings)[-_LONGEST_TAG:])

    def back(self, step: int, time: float) -> None:
        """Nothing: the steps done again are logged again, each with its later time."""

    def end(self, message: dict[str, Any]) -> None:
        self._client.set_tag(self._run, "outcome", message["text"][:_LONGEST_TAG])
        self._client.set_terminated(self._run, _STATUS.get(message["outcome"], "FAILED"))
