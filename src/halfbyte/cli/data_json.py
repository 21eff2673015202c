"""What ``halfbyte data --json`` prints."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halfbyte.run.look import Look


def data_json(look: Look, rows: int) -> str:
    """One object: the audit, its findings, and ``rows`` rows with their tokens."""
    prepared = look.prepared
    audit = asdict(prepared.audit) | {"source": look.source}
    del audit["sample"], audit["sample_row"]
    found: dict[str, Any] = {
        "model": look.recipe.model.name,
        "audit": audit,
        "findings": [asdict(one) | {"stops": one.stops} for one in prepared.findings],
        "warnings": prepared.warnings,
        "chosen": [asdict(choice) for choice in prepared.choices],
        "cleaning": None if prepared.funnel is None else asdict(prepared.funnel),
        "lengths": [asdict(one) for one in look.lengths()],
        "rows": [asdict(row) for row in look.rows(rows)],
    }
    # Half a surrogate pair, which a row can hold, stays JSON's escape.
    return json.dumps(found, ensure_ascii=True)
