"""`ultrafuser push`, to a hub on this machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import ultrafuser
from fake_hub import FakeHub
from tiny_models import save_adapter, shake_gate, tiny, tokens
from training_fixtures import GATE, JOINT, NAMES, TinyRun
from ultrafuser.model.card import MARK
from ultrafuser.recipe import load_recipe
from ultrafuser.specialists import fuse

IDS = tokens(2, 7)
REPOSITORY = "acme/fused"


@pytest.fixture
def referring(hub: FakeHub, tmp_path: Path, tokenizer: Any) -> Path:
    """A fused folder: a model and an adapter on it, both on the hub."""
    base = tiny(vocab_size=len(tokenizer), max_position_embeddings=192)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    adapter = save_adapter(base, tmp_path / "lora", 1)
    (adapter / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    hub.push("acme/base", tmp_path / "base")
    hub.push("acme/lora", adapter)
    specialists = [{"name": "a", "model": "acme/base"}, {"name": "b", "model": "acme/base", "adapter": "acme/lora"}]
    return write(load_recipe({"specialists": specialists, "device": "cpu", "gate": {"hidden_size": 16}}), tmp_path)


def write(recipe: Any, folder: Path) -> Path:
    model, tokenizer = fuse(recipe)
    shake_gate(model).save_pretrained(folder / "fused")
    tokenizer.save_pretrained(folder / "fused")
    return folder / "fused"


@pytest.fixture
def local(tiny_run: TinyRun, tmp_path: Path) -> Path:
    """A fused folder that refers to models of this machine."""
    for name in NAMES:
        shutil.copytree(tiny_run.folder / name, tmp_path / name)
    fields = tiny_run.fields("unused")
    for specialist in fields["specialists"]:
        specialist["model"] = str(tmp_path / specialist["name"])
    return write(load_recipe(fields), tmp_path)


def stored(hub: FakeHub, branch: str = "main") -> dict[str, bytes]:
    """The files of the repository."""
    return hub.commits[REPOSITORY, hub.branches[REPOSITORY, branch]]


def front_matter(card: bytes) -> dict[str, Any]:
    return yaml.safe_load(card.decode().split("---\n")[1])


def logits(folder: Path | str) -> torch.Tensor:
    model, _ = ultrafuser.load(folder, device_map="cpu")
    with torch.no_grad():
        return model(IDS).logits


# ---------------------------------------------------------------- what arrives


def test_specialists_on_the_hub_stay_references(run, hub, referring):
    before = logits(referring)
    hub.commits_before = len(hub.commits)
    result = run("push", referring, REPOSITORY)
    assert result.code == 0, result.err
    assert f"pushed: {hub.url}/{REPOSITORY}\ncommit: {hub.branches[REPOSITORY, 'main']}\n" in result.out
    assert f"ultrafuser chat {REPOSITORY}, ultrafuser serve {REPOSITORY}, vllm serve {REPOSITORY}" in result.out
    assert len(hub.commits) == hub.commits_before + 2, "the repository, and one commit"
    sources = [spec["source"] for spec in json.loads(stored(hub)["config.json"])["specialists"]]
    assert [source["model"] for source in sources] == ["acme/base"] * 2 and sources[1]["adapter"] == "acme/lora"
    assert sources[1]["adapter_revision"] == hub.branches["acme/lora", "main"]
    assert not [path for path in stored(hub) if path.startswith(("specialists/", "bases/"))]
    assert torch.equal(logits(REPOSITORY), before)
    plain = AutoModelForCausalLM.from_pretrained(REPOSITORY)
    with torch.no_grad():
        assert torch.equal(plain(IDS).logits, before)
    shutil.rmtree(referring)
    verified = run("info", REPOSITORY, "--verify")
    assert verified.code == 0 and "all checksums match, hub models are pinned to commits" in verified.out
    for words in (["generate", "-p", "hi"], ["inspect", "-p", "hi"]):
        answered = run(words[0], REPOSITORY, *words[1:], "--max-new-tokens", "3")
        assert answered.code == 0, answered.err
    assert "a 0." in run("chat", REPOSITORY, "--max-new-tokens", "3", stdin="hi\n").out


def test_the_card_names_base_models_licence_and_commands(run, hub, referring):
    run("push", referring, REPOSITORY)
    card = stored(hub)["README.md"]
    assert front_matter(card) == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["ultrafuser", "model-fusion"],
        "base_model": ["acme/base", "acme/lora"], "base_model_relation": "merge", "license": "apache-2.0",
    }  # fmt: skip
    text, commit = card.decode(), hub.branches["acme/base", "main"]
    assert f"| b | b | `acme/base` at `{commit}` | `acme/lora` at `" in text
    for command in ("vllm serve", "ultrafuser serve", "ultrafuser chat"):
        assert f"{command} {REPOSITORY} " in text
    assert f'ultrafuser.load("{REPOSITORY}")' in text and "## Training" not in text


def test_licences_that_differ_are_not_named(run, hub, referring, tmp_path):
    (tmp_path / "lora" / "README.md").write_text("---\nlicense: mit\n---\n")
    hub.push("acme/lora", tmp_path / "lora")
    run("push", referring, REPOSITORY)
    assert "license" not in front_matter(stored(hub)["README.md"])


def test_specialists_of_this_machine_are_refused_or_copied(run, hub, local, tmp_path):
    result = run("push", local, REPOSITORY)
    assert (
        result.code == 2
        and f"specialist 'text': only this machine has {tmp_path / 'text'}. Upload its weights with --copy"
        in result.err
    )
    assert hub.requests == [], "nothing was asked of the hub"
    before = logits(local)
    assert run("push", local, REPOSITORY, "--copy").code == 0
    files = stored(hub)
    assert {f"specialists/{name}/model.safetensors" for name in NAMES} <= set(files)
    assert str(tmp_path).encode() not in files["config.json"] + files["README.md"]
    assert "base_model" not in front_matter(files["README.md"])
    for name in (*NAMES, "fused"):
        shutil.rmtree(tmp_path / name)
    assert torch.equal(logits(REPOSITORY), before)
    assert "all checksums match" in run("info", REPOSITORY, "--verify").out


def test_an_adapter_and_the_base_that_it_shares_are_copied_once(run, hub, tiny_run, tmp_path):
    specialists = tiny_run.adapter_recipe(tmp_path, save_adapter)
    folder = write(load_recipe(tiny_run.fields("unused") | {"specialists": specialists}), tmp_path)
    before = logits(folder)
    assert run("push", folder, REPOSITORY, "--copy").code == 0
    weights = [path for path in stored(hub) if path.endswith(".safetensors")]
    assert weights == [
        "bases/text/model.safetensors", "model.safetensors",
        *(f"specialists/{name}/adapter_model.safetensors" for name in ("code", "math", "text")),
    ]  # fmt: skip
    assert torch.equal(logits(REPOSITORY), before)


def test_a_trained_folder_brings_its_metrics_and_a_figure(run, hub, tiny_run, tmp_path):
    output = tiny_run.train(
        tmp_path / "run",
        [GATE, JOINT],
        data={"validation": [str(tiny_run.folder / "held-out.jsonl")]},
    )
    result = run("push", output / "fused", REPOSITORY, "--copy")
    assert result.code == 0, result.err
    assert "recipe.yaml names paths of this machine, which everybody will see" in result.err
    files = stored(hub)
    card = files["README.md"].decode()
    assert "gate: 4 steps" in card and "| stage | code | math | text |" in card and "specialists/text" in card
    assert {"recipe.yaml", "metrics.jsonl"} <= set(files)
    if "the card has no figure" in result.err:  # without matplotlib
        assert "pip install" in result.err and "training.png" not in files
    else:
        assert files["training.png"].startswith(b"\x89PNG") and "(training.png)" in card


# ---------------------------------------------------------------- options


def test_a_dry_run_lists_the_files_without_a_network(run, hub, local):
    (local / "notes.txt").write_text("mine")
    (local / ".env").write_text("HF_TOKEN=hf_secret")
    (local / "specialists").mkdir()
    (local / "specialists" / ".secret").write_text("x")
    result = run("push", local, REPOSITORY, "--copy", "--dry-run")
    assert result.code == 0 and "Nothing was uploaded" in result.out
    assert "no part of the model, left out: notes.txt" in result.out and ".env" not in result.out
    facts = json.loads(run("push", local, REPOSITORY, "--copy", "--dry-run", "--json").out)
    sizes = {file["path"]: file["size_bytes"] for file in facts["files"]}
    assert sizes["model.safetensors"] == (local / "model.safetensors").stat().st_size
    assert facts["left_out"] == ["notes.txt"] and "commit" not in facts
    assert hub.requests == []
    assert run("push", local, REPOSITORY, "--copy").code == 0
    uploaded = {path: len(data) for path, data in stored(hub).items()}
    assert uploaded == sizes, "the dry run told the truth"


def test_private_branch_pull_request_and_message(run, hub, referring):
    facts = json.loads(run("push", referring, REPOSITORY, "--private", "--revision", "v2", "-m", "First", "--json").out)
    assert hub.created[0].get("private") or hub.created[0].get("visibility") == "private"
    assert facts["commit"] == hub.branches[REPOSITORY, "v2"] and hub.messages[facts["commit"]] == ("First", False)
    assert stored(hub, "main") == {}
    result = run("push", referring, REPOSITORY, "--create-pr")
    assert f"pushed: {hub.url}/{REPOSITORY}/discussions/1" in result.out and stored(hub, "main") == {}
    assert hub.messages[hub.branches[REPOSITORY, "refs/pr/1"]] == ("Upload a fused model", True)


def test_a_second_push_replaces_the_first(run, hub, local, referring):
    run("push", local, REPOSITORY, "--copy")
    commits = len(hub.commits)
    assert run("push", referring, REPOSITORY).code == 0
    assert len(hub.commits) == commits + 1
    assert not [path for path in stored(hub) if path.startswith("specialists/")], "those of the first are gone"
    assert torch.equal(logits(REPOSITORY), logits(referring))


# ---------------------------------------------------------------- cards of people


def test_a_card_that_a_person_wrote_stays(run, hub, referring):
    (referring / "README.md").write_text("My own words")
    result = run("push", referring, REPOSITORY)
    assert (
        stored(hub)["README.md"] == b"My own words" and "README.md was written by hand, and goes as it is" in result.err
    )
    (referring / "README.md").unlink()
    result = run("push", referring, REPOSITORY)
    assert stored(hub)["README.md"] == b"My own words" and "the README.md on the hub was written by hand" in result.err
    hub.commit(REPOSITORY, stored(hub) | {"README.md": f"{MARK} old".encode()})
    run("push", referring, REPOSITORY)
    assert b"# fused: a, b fused" in stored(hub)["README.md"]


# ---------------------------------------------------------------- refusals


def test_a_hub_that_refuses(run, hub, referring, monkeypatch):
    hub.branches[REPOSITORY, "main"] = hub.commit(REPOSITORY, {})
    hub.tokens[REPOSITORY] = "hf_other"
    monkeypatch.setenv("HF_TOKEN", "hf_mango12345")
    result = run("push", referring, REPOSITORY)
    assert result.code == 2 and result.err.count("\n") == 1 and "hf_" not in result.err
    assert f"{REPOSITORY}: the hub did not take the model: " in result.err and "Nothing was committed" in result.err
    assert "HF_TOKEN or `hf auth login` gives a token that may write there" in result.err


def test_a_model_without_a_commit_is_refused(run, hub, referring):
    facts = json.loads((referring / "config.json").read_text())
    facts["specialists"][0]["source"]["revision"] = "main"
    (referring / "config.json").write_text(json.dumps(facts))
    result = run("push", referring, REPOSITORY)
    assert result.code == 2 and "specialist 'a': acme/base has no recorded commit" in result.err


WRONG = {
    "name": (["{folder}", "fused"], "'fused': expected the name of a repository on the hub, such as owner/name"),
    "nowhere": (["{tmp}/nowhere", REPOSITORY], "no such folder"),
    "no fused folder": (["{tmp}", REPOSITORY], "config.json"),
    "no branch": (["{folder}", REPOSITORY, "--revision", " "], "--revision is empty"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_words_are_one_line(run, hub, local, tmp_path, case):
    words, message = WRONG[case]
    result = run("push", *[word.format(folder=local, tmp=tmp_path) for word in words], "--copy")
    assert result.code == 2 and message in result.err and result.err.count("\n") == 1, result.err


@pytest.mark.parametrize("file", ["fused/model.safetensors", "text/model.safetensors"])
def test_a_damaged_folder_is_refused(run, hub, local, tmp_path, file):
    data = bytearray((tmp_path / file).read_bytes())
    data[-1] ^= 1
    (tmp_path / file).write_bytes(data)
    result = run("push", local, REPOSITORY, "--copy")
    assert result.code == 2 and "is not the recorded one. It is corrupted" in result.err and hub.requests == []
