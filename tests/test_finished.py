"""A finished adapter is opened as it was trained, and its held-out rows are those of the run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from command_line import halfbyte
from halfbyte.checkpoint.files import load_checkpoint
from halfbyte.data.batching import make_batch
from halfbyte.errors import DataError, ModelError, RunError
from halfbyte.evaluate.held_out import held_out_loss
from halfbyte.events import read_events
from halfbyte.events.types import Evaluated
from halfbyte.finished.found import find_adapter, open_base
from halfbyte.finished.opened import OpenedAdapter, open_adapter
from halfbyte.finished.rows import held_out_rows
from halfbyte.finished.variants import use_variant, variant_names


@pytest.fixture(scope="module")
def run(tiny_model: Path, tiny_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    settings = ["data.held_out=5", "training.epochs=2", "training.learning_rate=0.02"]
    settings += ["checkpoints.every_steps=2", "checkpoints.keep_last=2", "precision=fp32"]
    settings += ["training.batch_size=4", "evaluation.keep=last"]
    halfbyte(
        *("train", "--model", tiny_model, "--data", tiny_rows, "--out", folder),
        *(word for setting in settings for word in ("--set", setting)),
    )
    return folder


@pytest.fixture(scope="module")
def opened(run: Path) -> OpenedAdapter:
    return open_adapter(run, device="cpu")


def last_loss(run: Path) -> float:
    events = [r.event for r in read_events(run)]
    return [e for e in events if isinstance(e, Evaluated) and e.what == "adapter"][-1].loss


def test_held_out_rows_are_those_that_the_run_measured(run: Path, opened: OpenedAdapter) -> None:
    found = held_out_rows(opened.found, opened.source)
    assert len(found.rows) == 5
    assert [found.rows[place].row for place in found.row_of] == [p.row for p in found.pieces]
    assert held_out_loss(opened.qlora, found.pieces).loss == last_loss(run)
    assert [r.row for r in held_out_rows(opened.found, opened.source, limit=2).rows] == [
        r.row for r in found.rows[:2]
    ]


def test_rows_of_a_file_are_all_taken(opened: OpenedAdapter, tiny_rows: Path) -> None:
    found = held_out_rows(opened.found, opened.source, data=str(tiny_rows))
    assert [row.row for row in found.rows] == list(range(24))
    of_run = {row.row: piece for row, piece in zip(found.rows, found.pieces, strict=True)}
    for piece in held_out_rows(opened.found, opened.source).pieces:
        assert (piece.input_ids == of_run[piece.row].input_ids).all()
        assert (piece.loss_mask == of_run[piece.row].loss_mask).all()


def test_rows_that_are_no_longer_the_same_are_refused(
    run: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    rows = tmp_path / "rows.jsonl"
    lines = tiny_rows.read_text().splitlines()
    rows.write_text("\n".join(lines[1:] + lines[:1]) + "\n")
    recipe = copy / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(tiny_rows), str(rows)))
    found = find_adapter(copy)
    with pytest.raises(DataError, match="no longer what it was"):
        held_out_rows(found, open_base(found))


def test_variants_are_the_states_that_the_checkpoints_hold(
    run: Path, opened: OpenedAdapter
) -> None:
    names = variant_names(opened.found)
    assert names[0] == "base"
    assert names[-1] == "adapter"
    assert len(names) == 4
    batch = make_batch(held_out_rows(opened.found, opened.source).pieces[:2])

    @torch.no_grad()
    def logits(name: str) -> torch.Tensor:
        with use_variant(opened, name):
            return opened.qlora.logits(batch)

    final, first = logits("adapter"), logits(names[1])
    assert not torch.equal(final, first)
    assert torch.equal(final, logits(names[2]))  # the run kept its last step
    assert torch.equal(final, logits("adapter"))
    _, state = load_checkpoint(run / "checkpoints" / names[1])
    with use_variant(opened, names[1]):
        for key, parameter in opened.qlora.lora_parameters().items():
            assert torch.equal(parameter, state[f"adapter.{key}"])
    with opened.qlora.adapter_on(False), torch.no_grad():
        assert torch.equal(logits("base"), opened.qlora.logits(batch))
    with pytest.raises(RunError, match="no variant step-9"), use_variant(opened, "step-9"):
        pass


def test_the_adapter_alone_is_what_it_is_in_its_run(run: Path, opened: OpenedAdapter) -> None:
    alone = open_adapter(run / "adapter", device="cpu")
    assert alone.found.run is None
    assert not alone.single_turn
    batch = make_batch(held_out_rows(opened.found, opened.source).pieces[:2])
    with torch.no_grad():
        ours, theirs = alone.qlora.logits(batch), opened.qlora.logits(batch)
    # On a processor that multiplies bf16 an adapter from elsewhere is opened in it.
    torch.testing.assert_close(ours, theirs)


def test_what_is_no_adapter_is_said(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    for folder, words in [
        (tmp_path / "none", "there is no folder"),
        (tmp_path, "neither a run folder nor an adapter"),
        (run.parent, "holds no adapter itself; did you mean"),
    ]:
        with pytest.raises(RunError, match=words):
            find_adapter(folder if folder != run.parent else _above(run, tmp_path / "above"))
    moved = shutil.copytree(run / "adapter", tmp_path / "moved")
    config = json.loads((moved / "adapter_config.json").read_text())
    for name, words in [(None, "names no base model"), ("/gone/model", "not on this machine")]:
        config["base_model_name_or_path"] = name
        (moved / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError, match=words) as error:
            open_base(find_adapter(moved))
        assert "--base" in str(error.value)
    found = find_adapter(moved, base=str(tiny_model))
    assert open_base(found).name == str(tiny_model)


def _above(run: Path, folder: Path) -> Path:
    shutil.copytree(run / "adapter", folder / "checkpoint-20")
    return folder


def test_an_adapter_of_another_base_is_refused(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    for changed, words in [
        ({"num_hidden_layers": 1}, "layers.1"),
        ({"intermediate_size": 48}, "mlp"),
        ({"num_key_value_heads": 4}, "k_proj"),
    ]:
        other = shutil.copytree(tiny_model, tmp_path / next(iter(changed)))
        config = AutoConfig.from_pretrained(tiny_model, **changed)
        AutoModelForCausalLM.from_config(config).save_pretrained(other)
        with pytest.raises(ModelError, match=words) as error:
            open_base(find_adapter(run / "adapter", base=str(other)))
        assert "of another base model" in str(error.value)
