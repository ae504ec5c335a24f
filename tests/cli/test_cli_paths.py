"""Paths with separators of ours and of other programs: `+`, `=`, `:`, blanks, `%`, `#`, `?`, brackets, unicode."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tiny_models import save_adapter, tiny
from training_fixtures import GATE, TinyRun
from ultrafuser.evaluate.lm.load import name_of, split_name
from ultrafuser.recipe import load_recipe
from ultrafuser.specialists import ModelReference, parse_model_reference

NAMES = [
    "a+b",
    "k=v+",
    "p:q",
    "two words",
    "ünï 数",
    "50%20",
    "c #d",
    "q?x&y",
    "[bold]x[/b]",
    "a@b",
    "{y}",
    "a: b",
    "*star",
]


@pytest.fixture
def columns() -> str:
    return "400"


# ---------------------------------------------------------------- BASE+ADAPTER and NAME=MODEL


@pytest.mark.parametrize("adapter_name", NAMES)
@pytest.mark.parametrize("base_name", NAMES)
def test_a_base_and_an_adapter_are_told_apart(base_name, adapter_name, tmp_path):
    base, adapter = tmp_path / base_name / "base", tmp_path / adapter_name / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir(parents=True)
    pairs = [
        (str(base), str(adapter)),
        ("org/base", str(adapter)),
        (str(base), "me/adapter"),
        ("package:m/f.gguf", str(adapter)),
    ]
    for model, lora in pairs:
        text = f"{model}+{lora}"
        assert parse_model_reference(text) == ModelReference(model, lora)
        assert split_name(f"mine={text}") == ("mine", text)
        assert name_of(text) == "adapter"
    assert parse_model_reference(str(base)) == ModelReference(str(base))


def test_what_is_missing_is_named_whole(tmp_path):
    (tmp_path / "a+b").mkdir()
    assert parse_model_reference(f"{tmp_path}/a+b/gone") == ModelReference(f"{tmp_path}/a+b/gone")
    assert parse_model_reference(f"{tmp_path}/a+b+{tmp_path}/gone") == ModelReference(
        f"{tmp_path}/a+b", f"{tmp_path}/gone"
    )
    assert parse_model_reference(f"{tmp_path}/gone+{tmp_path}/a+b") == ModelReference(
        f"{tmp_path}/gone", f"{tmp_path}/a+b"
    )


def test_a_relative_path_with_an_equals_sign_has_no_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1" / "base").mkdir(parents=True)
    assert split_name("lr=1/base") == (None, "lr=1/base")
    assert split_name("lr=1/base+me/adapter") == (None, "lr=1/base+me/adapter")
    assert split_name("x=lr=1/base") == ("x", "lr=1/base")
    assert name_of("lr=1/c++") == "c"


@pytest.mark.parametrize("name", NAMES)
def test_an_override_that_is_a_path_is_taken_as_it_stands(name, tiny_run):
    fields = tiny_run.fields("unused")
    assert load_recipe(fields, [f"output=/tmp/{name}/run"]).output == f"/tmp/{name}/run"
    assert load_recipe(fields, [f"specialists.text.model=/tmp/{name}"]).specialists[0].model == f"/tmp/{name}"
    assert load_recipe(fields, [f"output='/tmp/{name}'"]).output == f"/tmp/{name}", "quotes of YAML still work"
    assert load_recipe(fields, ["specialists.text.revision=null"]).specialists[0].revision is None


def test_a_file_with_glob_characters_beside_the_recipe_is_found(tiny_run, tmp_path):
    shutil.copy(tiny_run.folder / "text.jsonl", tmp_path / "rows [1]*.jsonl")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_run.fields("unused", data={"train": ["rows [1]*.jsonl"]})))
    assert load_recipe(recipe).data.train[0].path == str(tmp_path / "rows [1]*.jsonl")


# ---------------------------------------------------------------- every command


@pytest.fixture(params=["a+b=c @d", "p:q #é%20", "[b]?*{x}&数"])
def folder(request, tmp_path: Path) -> Path:
    folder = tmp_path / request.param
    folder.mkdir()
    return folder


def test_every_command_takes_such_paths(folder, run, tiny_run: TinyRun):
    pytest.importorskip("matplotlib")
    base = tiny(seed=0, vocab_size=len(tiny_run.tokenizer), max_position_embeddings=192, tie_word_embeddings=False)
    shutil.copytree(tiny_run.folder / "text", folder / "base")
    shutil.copy(tiny_run.folder / "held-out.jsonl", folder / "rows.jsonl")
    adapters = {
        name: save_adapter(base, folder / f"{name}+lora", seed=seed) for seed, name in enumerate(("one", "two"))
    }

    def works(*words: Any) -> str:
        result = run(*words)
        assert result.code == 0, result.err
        return result.out

    options = [f"--specialist={name}={folder / 'base'}+{adapter}" for name, adapter in adapters.items()]
    works("fuse", *options, "-o", folder / "fused")
    assert str(adapters["one"]) in works("info", folder / "fused")
    works("generate", folder / "fused", "-p", "hi", "--max-new-tokens", "2")
    works(
        "inspect",
        folder / "fused",
        "-p",
        "hi",
        "--max-new-tokens",
        "2",
        "--html",
        folder / "a.html",
        "--png",
        folder / "a.png",
    )
    assert (folder / "a.html").is_file() and (folder / "a.png").is_file()
    recipe = folder / "recipe.yaml"
    fields = tiny_run.fields(
        "unused", [GATE | {"steps": 1}], fused=str(folder / "fused"), data={"train": ["rows.jsonl"]}
    )
    fields.pop("specialists")
    fields.pop("gate")
    recipe.write_text(yaml.safe_dump(fields))
    works("train", recipe, f"output={folder / 'run'}", "cache_features=true")
    works("train", recipe, f"output={folder / 'run'}", "cache_features=true", "--resume")
    models = [folder / "run" / "fused", f"lora={folder / 'base'}+{adapters['two']}", folder / "base"]
    works("eval", *models, "--tasks", "loss", "--data", folder / "rows.jsonl", "-o", folder / "eval")
    results = json.loads((folder / "eval" / "results.json").read_text())
    assert set(results["models"]) == {"fused", "lora", "base"}
    assert results["models"]["lora"]["loss"] != results["models"]["base"]["loss"], "the adapter counts"
    works("data", "convert", folder / "rows.jsonl", "-o", folder / "rows.csv")
    works("data", "split", folder / "rows.csv", "--exact-only", "-p", "a=0.5", "-p", "b=0.5", "-o", folder / "parts")
    works("data", "stats", folder / "parts" / "a.jsonl", folder / "parts" / "b.jsonl")
    works(
        "data",
        "decontaminate",
        folder / "rows.csv",
        "-a",
        folder / "parts",
        "-o",
        folder / "c.parquet",
        "--report",
        folder / "r.json",
    )
    works("data", "map", folder / "rows.csv", "-m", f"{folder / 'base'}+{adapters['one']}", "-o", folder / "map.html")
    assert not list(folder.parent.rglob("*.tmp"))


def test_such_paths_merge(folder):
    from ultrafuser.compare.systems.merge import find_program, merge

    pytest.importorskip("mergekit")
    assert find_program()
    for seed, name in enumerate(("one", "two")):
        tiny(seed=seed).save_pretrained(folder / name)
    merge([folder / "one", folder / "two"], None, "linear", folder / "merged")
    assert (folder / "merged" / "config.json").is_file()
