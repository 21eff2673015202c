"""The assembly of a run from a recipe."""

from halfbyte.run.assembly import Rehearsal, rehearse
from halfbyte.run.folder import latest_run
from halfbyte.run.inference import load_for_inference
from halfbyte.run.outcome import Run
from halfbyte.run.training import train

__all__ = ["Rehearsal", "Run", "latest_run", "load_for_inference", "rehearse", "train"]
