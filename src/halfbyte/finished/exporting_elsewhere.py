"""A finished adapter, or a merged model, in a format that another package writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import halfbyte
from halfbyte.data.prepare import prepare
from halfbyte.errors import DataError, ModelError
from halfbyte.events import read_events
from halfbyte.events.types import Audited
from halfbyte.export.agreement import Agreement
from halfbyte.export.card.derived_card import derived_card
from halfbyte.export.disk import require_new
from halfbyte.export.elsewhere.calibration import FEW, ROWS, calibration_ids
from halfbyte.export.elsewhere.check import FolderCheck, check_folder
from halfbyte.export.elsewhere.folder import FILE, complete
from halfbyte.export.elsewhere.groups import choose_group
from halfbyte.export.elsewhere.types import ElsewhereType
from halfbyte.export.elsewhere.workers import Workshop
from halfbyte.export.gguf.check import Row
from halfbyte.export.merged_weights import BaseWeights
from halfbyte.export.new_folder import new_folder
from halfbyte.export.streamed_network import streamed_logits
from halfbyte.finished.exportable import Exportable, ids_to_show, rows_to_compare
from halfbyte.finished.found import FoundAdapter
from halfbyte.finished.merging import Merge, Progress, merge_adapter
from halfbyte.finished.rows import held_out_rows
from halfbyte.generate.prompt import end_ids
from halfbyte.model.skeleton import build_skeleton
from halfbyte.model.source import context_length, open_model
from halfbyte.plan.device import find_device
from halfbyte.recipe.schema import ModelRecipe
from halfbyte.run.folder import write_whole

# Rows of --data: of an adapter from elsewhere one in four is compared, and the others calibrate.
_COMPARED_OF = 4


@dataclass(frozen=True)
class ElsewhereExport:
    """A folder that agrees with its model. ``merge`` is how the adapter was merged, None for a
    whole model; ``calibrated`` how many rows it was made with."""

    folder: Path
    nbytes: int
    group: int | None
    check: FolderCheck
    merge: Merge | None
    compared_on: str
    calibrated: int
    notes: tuple[str, ...]

    @property
    def merged(self) -> Agreement | None:
        """The merged weights beside the adapter."""
        return None if self.merge is None else self.merge.check.logits


@dataclass(frozen=True)
class _Rows:
    """``compared`` rows, what to call them, and ids to calibrate with, which are none of them."""

    compared: list[Row]
    source: str
    calibration: list[list[int]]
    notes: tuple[str, ...]


def export_elsewhere(
    what: Exportable,
    out: Path,
    *,
    workshop: Workshop,
    type: ElsewhereType,
    onto: BaseWeights = "4bit",
    device: str = "auto",
    data: str | None = None,
    progress: Progress = lambda what, done, total: None,
) -> ElsewhereExport:
    """Write the new folder ``out`` in the format of ``workshop``, with a record in it.

    The adapter is merged ``onto`` the 4-bit weights that were trained, or the original ones, into a
    folder that goes again. Formats that are calibrated get rows that trained. The folder is loaded
    by the package that wrote it, in a process of its own, and compared in tokens, template, ends
    and logits before it gets its name. Raises RunError where ``out`` exists or the disk is full,
    ModelError for what the package does not take, and for a folder that is not the model it was
    made of; DataError where the rows that trained are no longer there.
    """
    require_new(out)
    source, target = what.source, workshop.target
    if what.found is None and source.stored_nf4 is not None:
        raise ModelError(
            f"{what.folder} holds 4-bit weights of bitsandbytes; export the run, or a model that "
            "was merged from it."
        )
    network = build_skeleton(source.config, what.name)
    ends = end_ids(network, source.tokenizer)
    group, of_group = choose_group(network, target, type)
    rows = _rows(what, data, calibrated=target.calibrated)
    shown = ids_to_show(rows.compared, int(source.config.get_text_config().vocab_size))
    weights = sum(parameter.numel() for parameter in network.parameters())
    size = weights * (type.bits or 16) // 8 + (0 if what.found is None else 2 * weights)
    with new_folder(out, size, f"the model for {target.name}") as partial:
        with _in_transformers_format(what, out, type, onto, device, progress) as (model, merge):
            progress("writing", 0, 1)
            workshop.write(model, partial, type, group, rows.calibration)
            (partial / "README.md").unlink(missing_ok=True)  # mlx-lm's, which knows nothing
            complete(partial, model, sorted(ends))
            progress("checking", 0, 1)
            reference = streamed_logits(
                open_model(ModelRecipe(name=str(model))),
                shown,
                device=find_device(device).kind,
                dtype=torch.float32,
            )
        check = check_folder(
            workshop,
            partial,
            rows.compared,
            shown,
            reference,
            type=type,
            template=source.tokenizer.chat_template,
            ends=ends,
        )
        warning = () if merge is None or merge.warning is None else (merge.warning,)
        export = ElsewhereExport(
            folder=out,
            nbytes=sum(path.stat().st_size for path in partial.glob("*.safetensors")),
            group=group,
            check=check,
            merge=merge,
            compared_on=rows.source,
            calibrated=len(rows.calibration),
            notes=(*rows.notes, *of_group, *_of_kept(check, type), *warning),
        )
        record = json.dumps(_record(what, export, workshop, type), indent=2, ensure_ascii=False)
        write_whole(partial / FILE, record + "\n")
        if what.found is not None:
            facts = _facts(export, workshop, type)
            card = derived_card(what.found, "compressed" if target.calibrated else "mlx", facts)
            (partial / "README.md").write_text(card, encoding="utf-8")
    return export


@contextmanager
def _in_transformers_format(
    what: Exportable,
    out: Path,
    type: ElsewhereType,
    onto: BaseWeights,
    device: str,
    progress: Progress,
) -> Iterator[tuple[Path, Merge | None]]:
    """A folder of the whole model in 16 bits: its own, or one beside ``out`` that goes again."""
    if what.found is None:
        yield what.folder, None
        return
    merged = out.with_name(f".{out.name}.merged")
    shutil.rmtree(merged, ignore_errors=True)  # of one that was killed
    try:
        merge = merge_adapter(
            what.found, merged, onto=onto, dtype=type.dtype, device=device, progress=progress
        )
        yield merged, merge
    finally:
        shutil.rmtree(merged, ignore_errors=True)


def _rows(what: Exportable, data: str | None, *, calibrated: bool) -> _Rows:
    found = what.found
    if calibrated and found is None:
        raise ModelError(
            f"{what.folder} is a whole model, and nothing says which rows it trained, with which "
            "such a format is calibrated; export the run or the adapter, or choose --to mlx."
        )
    if calibrated and found is not None and found.run is None and data is None:
        raise DataError(
            f"{found.folder} is no run, so there are no rows that trained, with which such a "
            "format is calibrated; name some with --data."
        )
    compared, source, notes = rows_to_compare(what, data)
    if not calibrated:
        return _Rows(compared, source, [], notes)
    assert found is not None
    if found.run is not None:
        pieces = _trained(what, found)
    else:
        pieces = held_out_rows(found, what.source, data=data, limit=ROWS + len(compared)).pieces
        compared = compared[: max(1, min(len(compared), len(pieces) // _COMPARED_OF))]
    ids = calibration_ids(pieces, [row.ids for row in compared])
    if not ids:
        raise DataError(
            f"{source} has no row to calibrate with beside those that are compared; name a file "
            "of more rows with --data."
        )
    if len(ids) < FEW:
        notes = (*notes, f"calibrated with {len(ids)} rows, where {FEW} and more are usual")
    return _Rows(compared, source, ids, notes)


def _trained(what: Exportable, found: FoundAdapter) -> Any:
    """The run's rows of training, tokenized as they trained."""
    assert found.recipe is not None
    assert found.run is not None
    tokenizer = what.source.tokenizer
    own = tokenizer.chat_template
    tokenizer.chat_template = what.source.chat_template  # that the rows were rendered by
    try:
        prepared = prepare(found.recipe, tokenizer, context_length(what.source.config))
    finally:
        tokenizer.chat_template = own
    audits = [r.event for r in read_events(found.run) if isinstance(r.event, Audited)]
    if audits and audits[-1].sha256 != prepared.audit.sha256:
        raise DataError(
            f"{prepared.audit.source} is no longer what {found.folder} trained with, so there is "
            "nothing to calibrate with; bring the file back, or choose --to mlx."
        )
    return prepared.train


def _of_kept(check: FolderCheck, type: ElsewhereType) -> tuple[str, ...]:
    if type.bits is None or not check.kept:
        return ()
    count = len(check.kept)
    which, are = ("matrix", "is") if count == 1 else ("matrices", "are")
    return (f"{count} {which} that {type.name} does not fit {are} kept in 16 bits",)


def _facts(export: ElsewhereExport, workshop: Workshop, type: ElsewhereType) -> dict[str, str]:
    check, logits, target = export.check, export.check.logits, workshop.target
    groups = "" if export.group is None else f" in groups of {export.group}"
    head = "; the head is in 16 bits" if target.calibrated else ""
    facts = {
        "weights": (
            f"{type.name} by {target.name.upper()}{groups}, written by {target.package} "
            f"{check.version}{head}"
        )
    }
    if export.calibrated:
        facts["calibrated with"] = f"{export.calibrated} rows that trained"
    return facts | {
        "compared with the model before that": (
            f"{logits.positions:,} places of {export.compared_on}: mean KL {logits.kl:.1e} nats, "
            f"same likeliest token {logits.top1:.1%}"
        ),
    }


def _record(
    what: Exportable, export: ElsewhereExport, workshop: Workshop, type: ElsewhereType
) -> dict[str, Any]:
    check, merge = export.check, export.merge
    return {
        "halfbyte": halfbyte.__version__,
        "by": f"{workshop.target.package} {check.version}",
        "format": workshop.target.name,
        "type": type.name,
        "group": export.group,
        "bytes": export.nbytes,
        "base": what.base,
        "onto": None if merge is None else merge.onto,
        "matrices": {type.name: check.quantized, "kept_in_16_bits": list(check.kept)}
        if type.bits is not None
        else {type.name: len(check.kept)},
        "calibrated_with_rows": export.calibrated,
        "compared_on": {"source": export.compared_on, "rows": check.rows},
        "rows_in_other_tokens": check.different,
        "with_its_weights": asdict(check.logits),
        "its_weights_with_the_adapter": None if merge is None else asdict(merge.check.logits),
        "notes": list(export.notes),
    }
