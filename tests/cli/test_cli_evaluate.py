"""`ultrafuser eval` and `ultrafuser compare` from the command line: what they print, and their one clear line on bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tiny_models import save_adapter, tiny
from ultrafuser.data.schema import parse_row
from ultrafuser.data.sources import write_rows

VOCAB = {"vocab_size": 320, "max_position_embeddings": 512}


@pytest.fixture
def model(tmp_path: Path, tokenizer: Any) -> Path:
    tiny("llama", 0, **VOCAB).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    rows = [
        parse_row({"instruction": f"{d} {i}?", "output": f"the fox {i}", "id": f"{d}{i}"}, "here", d)
        for d in ("text", "code")
        for i in range(3)
    ]
    write_rows(rows, tmp_path / "rows.jsonl")
    return tmp_path / "rows.jsonl"


@pytest.fixture
def comparison(tmp_path: Path, model: Path, rows: Path) -> Path:
    base = tiny("llama", 0, **VOCAB)
    specialists = [
        {"name": n, "model": str(model), "adapter": str(save_adapter(base, tmp_path / n, seed=seed))}
        for seed, n in enumerate(("text", "code"), 1)
    ]
    stage = {"name": "gate", "steps": 2, "samples_per_domain": 1}
    training = {"specialists": specialists, "data": {"train": [str(rows)]}, "stages": [stage]}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(training))
    recipe = {
        "recipe": "train.yaml",
        "test": ["rows.jsonl"],
        "systems": ["base", {"kind": "static", "name": "uniform"}],
        "decode": {"prompts": 1, "new_tokens": 2, "repeats": 1},
        "output": str(tmp_path / "out"),
    }
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path / "compare.yaml"


def test_eval_skips_bad_rows_on_request(run, model, rows, tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n" + rows.read_text())
    words = ["eval", model, "--data", tmp_path / "rows.jsonl", "--output", tmp_path / "out", "--json"]
    assert json.loads(run(*words, "--on-bad-row", "skip").out)["models"]["base"]["loss"]["code"]["samples"] == 3
    [line] = (tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines()
    assert json.loads(line)["where"] == f"{tmp_path}/rows.jsonl:1"


def test_eval_prints_a_table_and_json(run, model, rows, tmp_path):
    words = ["eval", model, "--data", rows, "--output", tmp_path / "out"]
    result = run(*words)
    assert result.code == 0
    assert "base" in result.out and "text" in result.out and "results.json" in result.out
    tree = json.loads(run(*words, "--json").out)
    assert tree == json.loads((tmp_path / "out" / "results.json").read_text())
    assert tree["models"]["base"]["loss"]["code"]["samples"] == 3
    assert f"{tree['models']['base']['loss']['code']['nll']:.4f}" in result.out


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--suite", "papers"], "unknown suite 'papers'. There are: quick"),
        (["--tasks", "gsm9k"], "unknown task 'gsm9k'. Did you mean 'gsm8k'?"),
        (["--tasks", "gsm8k", "--data-dir", "/nowhere"], "/nowhere"),
        (["--tasks", "mt_bench"], "mt_bench needs a judge. Give --judge"),
        (["--suite", "mt-bench", "--judge", "m@ftp://x"], "expected"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--tasks", "gsm8k", "--include-path", "/nowhere"], "/nowhere: no such folder"),
    ],
)
def test_bad_input_is_one_line(run, model, tmp_path, words, problem):
    result = run("eval", model, *words, "--output", tmp_path / "out")
    assert result.code == 2
    assert result.err.startswith("ultrafuser: error: ") and result.err.count("\n") == 1
    assert problem in result.err


def test_a_task_of_ones_own(run, model, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps({"q": f"{i}?", "a": str(i)}) + "\n" for i in range(3)))
    task = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": [], "max_gen_toks": 3},
        "metric_list": [{"metric": "exact_match"}],
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(task))
    words = ["--tasks", "mine", "--include-path", folder, "--output", tmp_path / "out", "--json"]
    tree = json.loads(run("eval", model, *words).out)
    assert tree["models"]["base"]["tasks"]["mine"]["samples"] == 3


def test_compare_shows_what_is_to_be_done(run, comparison):
    result = run("compare", comparison, "--dry-run")
    assert result.code == 0
    assert result.out.splitlines() == ["base: base, to be built", "uniform: static, to be built"]


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("systems=[]", "'systems' is empty"),
        ("systems=[fuse]", "systems"),
        ("limits=3", "limits"),
        ("recipe=nowhere.yaml", "nowhere.yaml: no such file"),
    ],
)
def test_bad_recipes_are_one_line(run, comparison, override, problem):
    result = run("compare", comparison, override)
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert problem in result.err


def test_compare_end_to_end_in_processes_of_their_own(run, comparison, tmp_path):
    result = run("compare", comparison, "systems=[base, {kind: fused, set: ['data.train=[gone.jsonl]']}]")
    assert result.code == 2
    assert "fused failed, see the report" in result.err
    assert "base" in result.out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["systems"]["base"]["status"] == "done"
    assert "gone.jsonl" in results["systems"]["fused"]["error"]
    assert (tmp_path / "out" / "report.html").is_file()
