"""``halfbyte push`` to a small hub of our own: what goes there, and what does not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from command_line import halfbyte
from mirror_hub_case import SIGNATURE, TOKEN, Repositories, environment, serving

REPO, BASE = "org/it", "maker/base-model"
SENT = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "base_chat_template.jinja",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def run(tiny_model: Path, tiny_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("push") / "run"
    settings = ["data.held_out=4", "training.epochs=1", "precision=fp32", "lora.r=4"]
    halfbyte(
        *("train", "--model", tiny_model, "--data", tiny_rows, "--out", folder),
        *(word for setting in settings for word in ("--set", setting)),
    )
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Repositories]:
    with serving() as (hub, address):
        for name, value in environment(address, tmp_path).items():
            monkeypatch.setenv(name, value)
        yield hub


def push(folder: Path, *words: str, repo: str = REPO, code: int = 0) -> str:
    """What the command says, in which no secret stands; without its line breaks."""
    done = halfbyte("push", folder, repo, *words, code=code)
    if code:
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("halfbyte: ")
    said = done.output + done.stderr
    for secret in (TOKEN, SIGNATURE, "127.0.0.1"):
        assert secret not in said
    return " ".join(said.split())


def whole(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_dry_run_shows_all_and_asks_nobody(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    before = whole(run)
    said = push(run, "--base", BASE, "--dry-run")
    assert whole(run) == before
    assert set(said.split()) >= SENT
    size = (run / "adapter" / "adapter_model.safetensors").stat().st_size
    assert f"adapter_model.safetensors {size / 1e3:.1f} kB" in said
    assert f"{REPO} (private)" in said
    assert f"base_model: {BASE}" in said
    assert "Not sent: checkpoints, events.jsonl" in said
    assert "Nothing was sent" in said


def test_an_adapter_goes_there_and_nothing_else_of_its_run(run: Path, hub: Repositories) -> None:
    before = whole(run)
    assert "Sent 7 files to org/it (made, private)" in push(run, "--base", BASE)
    assert hub.private == {REPO: True}
    files = hub.files(REPO)
    assert files.keys() == SENT | {".gitattributes"}
    assert len(hub.trees[REPO]) == 2  # empty, and one commit
    for name in SENT - {"README.md", "adapter_config.json"}:
        assert files[name] == (run / "adapter" / name).read_bytes()
    config = json.loads(files["adapter_config.json"])
    assert config.pop("base_model_name_or_path") == BASE
    ours = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config.items() <= ours.items()
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == BASE
    assert f'PeftModel.from_pretrained(base, "{REPO}")' in card.text
    assert str(run.parent) not in files["README.md"].decode()
    assert whole(run) == before

    # Once more: nothing is sent. What changed is, alone; and a card that somebody wrote is theirs.
    assert "All of it was in org/it already" in push(run, "--base", BASE)
    assert len(hub.trees[REPO]) == 2
    assert sum("PUT upload" in line for line in hub.asked) == 1
    readme = run / "adapter" / "README.md"
    readme.write_text(readme.read_text().replace("## Limits", "Mine.\n\n## Limits"))
    try:
        assert "Sent 1 file to org/it (private), 6 were there" in push(run, "--base", BASE)
        assert "Mine." in hub.files(REPO)["README.md"].decode()
        assert ModelCard(hub.files(REPO)["README.md"].decode()).data.base_model == BASE
    finally:
        readme.write_bytes(before["adapter/README.md"])

    said = push(run, "--base", BASE, "--report", "--revision", "with-report")
    assert "shows rows of the data" in said
    assert {"report.html", "report.md"} <= hub.files(REPO).keys()
    assert "events.jsonl" not in hub.files(REPO)
    assert hub.branches == {(REPO, "with-report")}


def test_half_an_upload_goes_on_where_it_stopped(run: Path, hub: Repositories) -> None:
    hub.fail = {f"{REPO}/commit": 400}
    said = push(run, "--base", BASE, code=2)
    assert f"{REPO} did not get all of it" in said
    assert "goes on where this one stopped" in said
    assert hub.files(REPO).keys() == {".gitattributes"}
    hub.fail = {}
    push(run, "--base", BASE)
    assert hub.files(REPO).keys() >= SENT
    assert sum("PUT upload" in line for line in hub.asked) == 1


@pytest.mark.parametrize(
    ("repo", "words", "says"),
    [
        ("it", [], "it is no repository of a hub; write OWNER/NAME"),
        ("org/../it", [], "is no repository"),
        (REPO, ["--what", "model"], "halfbyte merge"),
        (REPO, ["--base", "/models/base"], "--base /models/base is a path of this machine"),
        (REPO, ["--what", "gguf"], "halfbyte export"),
        (REPO, ["--what", "all"], "none of adapter, model and gguf"),
        (REPO, ["--revision", "../main"], "no name of a branch"),
        (REPO, ["--message", " "], "--message is empty"),
        ("another/it", [], "lets this log-in not write to another/it (403)"),
        ("org/open", [], "org/open is open to all"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    run: Path, hub: Repositories, repo: str, words: list[str], says: str
) -> None:
    hub.private["org/open"], hub.trees["org/open"] = False, [{}]
    assert says in push(run, "--base", BASE, *words, repo=repo, code=2)
    assert hub.trees == {"org/open": [{}]}


def test_a_hub_that_cannot_or_will_not(
    run: Path, hub: Repositories, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.refused_metadata = "library_name: peft"
    assert "takes no such metadata at the head of README.md" in push(run, "--base", BASE, code=2)
    hub.refused_metadata = None
    hub.ignored = {"tokenizer.json"}
    assert "tokenizer.json did not arrive" in push(run, "--base", BASE, code=2)
    with monkeypatch.context() as patch:
        patch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        assert "the hub cannot be reached" in push(run, "--base", BASE, code=2)
    with monkeypatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        assert "HF_HUB_OFFLINE is set" in push(run, "--base", BASE, code=2)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "wrong" * 7)
    assert "lets this log-in not write" in push(run, "--base", BASE, code=2)
    monkeypatch.delenv("HF_TOKEN")
    assert "log in with hf auth login" in push(run, "--base", BASE, code=2)


def test_an_open_repository_is_asked_for(run: Path, hub: Repositories) -> None:
    assert "made, open to all" in push(run, "--base", BASE, "--public", repo="org/open")
    assert hub.private == {"org/open": False}
    push(run, "--base", BASE)
    assert "is private; open it on the hub" in push(run, "--base", "maker/b", "--public")
    assert hub.private[REPO]


def test_a_folder_of_another_program(run: Path, hub: Repositories, tmp_path: Path) -> None:
    folder = shutil.copytree(run / "adapter", tmp_path / "checkpoint-20")
    for name in ("optimizer.pt", "training_args.bin", "trainer_state.json", "rows.jsonl"):
        (folder / name).write_bytes(b"not to be sent")
    (folder / "README.md").write_text(
        "---\nbase_model: /home/somebody/base\nlibrary_name: peft\n---\n\n# Theirs\n"
    )
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["name_or_path"] = "/home/somebody/base"
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert "names its base model by a path of this machine" in push(folder, code=2)
    said = push(folder, "--base", BASE)
    assert "Not sent: optimizer.pt, rows.jsonl, trainer_state.json, training_args.bin." in said
    assert hub.files(REPO).keys() == SENT | {".gitattributes"}
    assert b"somebody" not in b"".join(hub.files(REPO).values())
    assert ModelCard(hub.files(REPO)["README.md"].decode()).text.strip() == "# Theirs"

    (folder / "README.md").unlink()
    assert "a card was made" in push(folder, "--base", BASE, "--dry-run")
    (folder / "chat_template.jinja").write_text(f"{{# {TOKEN} #}}")
    assert "holds what looks like a password or token" in push(folder, "--base", BASE, code=2)
    (folder / "chat_template.jinja").unlink()
    (tmp_path / "secret").write_text("mine")
    (folder / "chat_template.jinja").symlink_to(tmp_path / "secret")
    assert "is a link to a file outside" in push(folder, "--base", BASE, code=2)


def test_merged_models_and_gguf_files(run: Path, hub: Repositories, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    merged.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (merged / name).write_bytes(b'{"_name_or_path": "/home/somebody/x"}')
    (merged / "pytorch_model.bin").write_bytes(b"no")
    assert "there is no" in push(merged, code=2)
    assert "a short card was made" in push(merged, "--base", BASE)
    sent = hub.files(REPO)
    assert sent.keys() == {".gitattributes", "README.md", *("config.json", "model.safetensors"),
                           "tokenizer.json"}  # fmt: skip
    assert json.loads(sent["config.json"]) == {"_name_or_path": "x"}
    card = ModelCard(sent["README.md"].decode())
    assert (card.data.base_model, card.data.library_name) == (BASE, "transformers")

    record = {"format": "mlx", "type": "q4", "notes": ["there is no /home/somebody/rows.jsonl"]}
    (merged / "halfbyte.json").write_text(json.dumps(record))
    assert "a short card was made" in push(merged, "--base", BASE, repo="org/mlx")
    sent = hub.files("org/mlx")
    assert json.loads(sent["halfbyte.json"])["notes"] == ["there is no rows.jsonl"]
    card = ModelCard(sent["README.md"].decode())
    assert (card.data.base_model_relation, card.data.library_name) == ("quantized", "mlx")
    assert "mlx_lm.chat --model org/mlx" in str(card)
    (merged / "halfbyte.json").unlink()

    # Of a folder that may hold anything one GGUF file takes along what its export left.
    for name in ("a.gguf", "b.gguf", "a.Modelfile", "b.Modelfile", "b.json"):
        (merged / name).write_bytes(b"{}")
    record = {"base": BASE, "type": "q8_0", "compared_on": {"source": "chatdoctor.json"}}
    record |= {"notes": ["there is no /home/somebody/rows.jsonl; see a/b and hf://org/x/y"]}
    (merged / "a.json").write_text(json.dumps(record))
    (merged / "README.md").write_text("# My project\n")
    assert "a short one was made" in push(merged / "a.gguf", repo="org/one")
    sent = hub.files("org/one")
    assert sent.keys() - {".gitattributes"} == {"README.md", "a.gguf", "a.json", "a.Modelfile"}
    assert json.loads(sent["a.json"]) == record | {
        "notes": ["there is no rows.jsonl; see a/b and hf://org/x/y"]
    }
    text = sent["README.md"].decode()
    assert ModelCard(text).data.base_model_relation == "quantized"
    for said in ("hf download org/one", "-f a.Modelfile", "| weights | q8\\_0 |", "no medical"):
        assert said in text
    exported = run / "export"
    exported.mkdir()
    shutil.copy(merged / "a.gguf", exported / "it.gguf")
    said = push(run, "--what", "gguf", "--base", BASE, "--dry-run")
    assert "name: held-out loss" in said  # the run's own card
    assert "it.gguf" in said
    shutil.rmtree(exported)
    (merged / "a.md").write_text("---\ntags: [gguf]\n---\n\n# Mine\n")
    push(merged / "a.gguf", repo="org/one")
    assert ModelCard(hub.files("org/one")["README.md"].decode()).text.strip() == "# Mine"
    push(merged, "--what", "gguf", repo="org/both")
    assert {"a.gguf", "b.gguf", "a.json", "b.json"} <= hub.files("org/both").keys()
    assert "model.safetensors" not in hub.files("org/both")
    assert hub.files("org/both")["README.md"] == b"# My project\n"
