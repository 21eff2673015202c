"""TensorBoard: event files in ``tensorboard/`` of the run's folder."""

from __future__ import annotations

import json
import os
import sys
from types import ModuleType
from typing import Any


def open_tracker(opening: dict[str, Any]) -> tuple[TensorBoard, None]:
    """A writer into the run's folder; what it keeps for a resume are its files."""
    # Where TensorFlow is installed, TensorBoard would import it, and it takes the GPU's memory.
    sys.modules["tensorboard.compat.notf"] = ModuleType("tensorboard.compat.notf")
    tracker = TensorBoard(os.path.join(opening["folder"], "tensorboard"))
    if opening["done"] is not None:
        tracker.back(opening["done"], None)
    rows = "\n".join(f"| {k} | `{json.dumps(v)}` |" for k, v in opening["config"].items())
    tracker.text(
        opening["done"] or 0, None, f"| setting | value |\n| --- | --- |\n{rows}", "recipe"
    )
    return tracker, None


class TensorBoard:
    """Writes scalars and texts in the format that TensorBoard's own summaries have."""

    def __init__(self, folder: str) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, types_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2, summary_pb2
        self._tensor, self._types = tensor_pb2, types_pb2
        self._writer: Any = EventFileWriter(folder, max_queue_size=1_000, flush_secs=5)

    def metrics(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            values = [
                self._summary.Summary.Value(tag=name, simple_value=value)
                for name, value in row["metrics"].items()
            ]
            self._add(row["step"], row["time"], summary=self._summary.Summary(value=values))

    def text(self, step: int, time: float | None, text: str, tag: str = "warnings") -> None:
        plugin = self._summary.SummaryMetadata.PluginData(plugin_name="text")
        tensor = self._tensor.TensorProto(
            dtype=self._types.DT_STRING,
            string_val=[text.encode()],
            tensor_shape={"dim": [{"size": 1}]},
        )
        value = self._summary.Summary.Value(
            tag=tag,
            metadata=self._summary.SummaryMetadata(plugin_data=plugin),
            tensor=tensor,
        )
        self._add(step, time, summary=self._summary.Summary(value=[value]))

    def back(self, step: int, time: float | None) -> None:
        """A session that starts after ``step``: readers then drop what was there beyond it."""
        log = self._event.SessionLog(status=self._event.SessionLog.START)
        self._add(step + 1, time, session_log=log)

    def end(self, message: dict[str, Any]) -> None:
        self.text(message.get("step", 0), None, message["text"], "outcome")
        self._writer.flush()
        self._writer.close()

    def _add(self, step: int, at: float | None, **what: Any) -> None:
        import time

        self._writer.add_event(
            self._event.Event(step=step, wall_time=time.time() if at is None else at, **what)
        )
