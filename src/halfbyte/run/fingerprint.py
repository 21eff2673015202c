"""What must be the same for a run to go on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from importlib.metadata import version

from halfbyte.data.batch import TokenizedRow
from halfbyte.recipe import Recipe


def fingerprint(recipe: Recipe, rows: Iterable[TokenizedRow]) -> str:
    """SHA-256 of the recipe's parts that decide the weights, and of the ``rows`` that train."""
    beside = ("title", "author", "objective", "report", "device", "checkpoints", "evaluation")
    deciding = recipe.model_dump(exclude={**dict.fromkeys(beside, True), "data": {"cache"}})
    digest = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode())
    for row in rows:
        digest.update(row.input_ids.tobytes())
        digest.update(row.loss_mask.tobytes())
    return digest.hexdigest()


def package_versions() -> dict[str, str]:
    """Versions that decide a run's bits."""
    return {name: version(name) for name in ("torch", "transformers", "halfbyte")}
