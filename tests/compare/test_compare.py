"""`ultrafuser compare` on tiny adapters: every kind of system, failures that stop no other, and skipped finished systems."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tiny_models import save_adapter, tiny
from ultrafuser.compare import run, system
from ultrafuser.compare.recipe import CompareRecipe, dump_compare_recipe, load_compare_recipe
from ultrafuser.compare.results import Measurement, SystemResult, compare_systems
from ultrafuser.compare.run import compare, system_states, tables
from ultrafuser.compare.systems import merge as merging
from ultrafuser.data.schema import parse_row
from ultrafuser.data.sources import write_rows
from ultrafuser.errors import DataError, MissingExtraError
from ultrafuser.evaluate.scoring import TaskScores
from ultrafuser.report.data import check_comparison

VOCAB = {"vocab_size": 320, "max_position_embeddings": 512}


@pytest.fixture
def training(tmp_path: Path, tokenizer: Any) -> dict[str, Any]:
    """A training recipe over two adapters on one base, with a few rows of two domains and a mixed one."""
    base = tiny("llama", 0, **VOCAB)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    specialists = [
        {
            "name": name,
            "model": str(tmp_path / "base"),
            "adapter": str(save_adapter(base, tmp_path / f"{name}-lora", seed=seed)),
        }
        for seed, name in enumerate(("text", "code"), 1)
    ]
    words = {"text": "the quick fox", "code": "return a + b", "mixed": "fox + dog"}
    rows = [
        parse_row({"instruction": f"{d} {i}?", "output": f"{text} {i}", "id": f"{d}{i}"}, "here", d)
        for d, text in words.items()
        for i in range(4)
    ]
    write_rows(rows, tmp_path / "rows.jsonl")
    recipe = {
        "specialists": specialists,
        "data": {"train": [str(tmp_path / "rows.jsonl")], "max_length": 128},
        "stages": [
            {"name": "gate", "steps": 3, "samples_per_domain": 2, "lr": 0.01},
            {"name": "joint", "steps": 2, "samples_per_domain": 1, "lr": 0.001},
        ],
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(recipe))
    return {
        "recipe": str(tmp_path / "train.yaml"),
        "test": [str(tmp_path / "rows.jsonl")],
        "decode": {"prompts": 1, "new_tokens": 2, "repeats": 1},
        "output": str(tmp_path / "out"),
    }


def load(training: dict[str, Any], systems: list[Any], **fields: Any) -> CompareRecipe:
    return load_compare_recipe(training | {"systems": systems} | fields)


def measured(folder: Path, name: str) -> Measurement:
    """What a system of a comparison measured."""
    recipe = load_compare_recipe(folder / system.RECIPE)
    measurement = system.read_measured(recipe, recipe.system(name))
    assert measurement is not None
    return measurement


EVERY_KIND = [
    "base",
    "specialist",
    "oracle",
    {"kind": "static", "name": "uniform"},
    {"kind": "static", "name": "searched", "weights": "searched"},
    {"kind": "tuned", "specialist": "text"},
    "router",
    "best_of",
    "btx",
    {"kind": "fused", "name": "stage1", "stages": ["gate"]},
    {"kind": "fused", "name": "joint", "after": "stage1", "versus": "stage1"},
    {"kind": "fused", "name": "logits", "mixing": "logits"},
]


def test_every_kind_side_by_side(training, in_process, tmp_path):
    results = compare(load(training, EVERY_KIND, main="joint"))
    systems = results.systems
    assert {name: s.error for name, s in systems.items() if s.status != "done"} == {}
    assert results.domains == ["text", "code", "mixed"]
    assert systems["best_of-log_prob"].loss is None
    for name, entry in systems.items():
        if name not in ("best_of-log_prob", "oracle"):
            assert entry.loss["text"].samples == 4
            assert entry.tokens_per_s.median > 0 and entry.peak_memory_mb > 0
    # the oracle is the best specialist of each column, and everyone is compared with that one
    for domain in results.domains:
        best = min(("text", "code"), key=lambda name: systems[name].loss[domain].nll)
        assert systems["oracle"].loss[domain].nll == systems[best].loss[domain].nll
        pair = systems["joint"].paired["best_specialist"].get(domain)
        assert pair.versus == best
        expected = systems["joint"].loss[domain].nll - systems[best].loss[domain].nll
        assert pair.difference == pytest.approx(expected)
        # a router gives each row to one of the specialists
        nats = {n: measured(tmp_path / "out", n).losses[domain].totals for n in ("text", "code", "router")}
        for row, value in nats["router"].items():
            assert any(value == pytest.approx(nats[name][row], rel=1e-4) for name in ("text", "code"))
    sizes = {name: entry.parameters for name, entry in systems.items() if entry.parameters}
    # each system against the main one, and against what its line names
    assert systems["joint"].paired["main"] == {} and systems["base"].paired["main"]["mean"].versus == "joint"
    assert systems["joint"].paired["versus"]["code"].versus == "stage1" and "versus" not in systems["base"].paired
    assert sizes["base"].trained == sizes["uniform"].trained == 0
    assert sizes["searched"].trained == 2
    assert sizes["joint"].trained > sizes["stage1"].trained > 0
    assert set(results.gate_weights) == {"uniform", "searched", "stage1", "joint", "logits"}
    assert results.gate_weights["uniform"]["text"] == pytest.approx({"text": 0.5, "code": 0.5})
    assert {row["stage"] for row in results.training["joint"]} == {"joint"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "stage1" in page
    assert check_comparison(json.loads((tmp_path / "out" / "results.json").read_text())) == results
    assert [len(table.rows) for table in tables(results)] == [len(systems) - 1]  # whole answers alone have no losses


def test_finished_systems_are_skipped_and_changed_ones_rebuilt(training, in_process):
    systems = [{"kind": "static", "name": "uniform"}, {"kind": "fused", "stages": ["gate"], "name": "stage1"}]
    first = compare(load(training, systems))
    assert in_process == [("build", "uniform"), ("measure", "uniform"), ("build", "stage1"), ("measure", "stage1")]
    in_process.clear()
    second = compare(load(training, systems))
    assert in_process == []
    assert second.systems == first.systems
    changed = [
        systems[0],
        systems[1] | {"set": ["stages.gate.steps=4"]},
        {"kind": "fused", "name": "more", "after": "stage1"},
    ]
    assert system_states(load(training, changed)) == {
        "uniform": "static, done",
        "stage1": "fused, to be built",
        "more": "fused, to be built",
    }
    compare(load(training, changed))
    assert [name for _, name in in_process] == ["stage1", "stage1", "more", "more"]
    in_process.clear()
    compare(load(training, changed, decode={"prompts": 1, "new_tokens": 3, "repeats": 1}))
    assert {step for step, _ in in_process} == {"measure"}


def test_a_system_that_fails_stops_no_other(training, in_process, tmp_path):
    systems = [
        {"kind": "fused", "name": "broken", "stages": ["gate"], "set": ["data.train=[nowhere.jsonl]"]},
        {"kind": "fused", "name": "heir", "after": "broken"},
        "base",
    ]
    results = compare(load(training, systems))
    assert results.systems["broken"].status == results.systems["heir"].status == "failed"
    assert "nowhere.jsonl: no such file" in results.systems["broken"].error
    assert "comes after 'broken', which failed" in results.systems["heir"].error
    assert results.systems["base"].status == "done"
    assert "nowhere.jsonl: no such file" in (tmp_path / "out" / "report.html").read_text()


def test_no_measured_system_is_an_error(training, in_process):
    with pytest.raises(DataError, match="no system could be measured. The first error: DataError: .*nowhere"):
        compare(load(training, [{"kind": "fused", "set": ["data.train=[nowhere.jsonl]"]}]))


def test_full_specialists_have_no_base(training, in_process, tmp_path):
    text = Path(training["recipe"]).read_text()
    recipe = yaml.safe_load(text)
    for seed, specialist in enumerate(recipe["specialists"]):
        specialist.pop("adapter")
        specialist["model"] = str(tmp_path / f"full{seed}")
        tiny("llama", seed, **VOCAB).save_pretrained(tmp_path / f"full{seed}")
        for file in (tmp_path / "base").glob("*token*"):
            (tmp_path / f"full{seed}" / file.name).write_bytes(file.read_bytes())
        specialist["chat_template"] = "chatml"
    Path(training["recipe"]).write_text(yaml.safe_dump(recipe))
    results = compare(load(training, ["base", "specialist", "router"]))
    assert "Name the model that they were trained from as 'base'" in results.systems["base"].error
    assert results.systems["router"].status == "done"


def test_full_specialists_have_the_named_base(training, in_process, tmp_path):
    pytest.importorskip("mergekit", reason="the merge extra is not installed")
    recipe = yaml.safe_load(Path(training["recipe"]).read_text())
    for seed, specialist in enumerate(recipe["specialists"], 1):
        specialist |= {"model": str(tmp_path / specialist["name"]), "adapter": None, "chat_template": "chatml"}
        tiny("llama", seed, **VOCAB).save_pretrained(specialist["model"])
        for file in (tmp_path / "base").glob("*token*"):
            (tmp_path / specialist["name"] / file.name).write_bytes(file.read_bytes())
    Path(training["recipe"]).write_text(yaml.safe_dump(recipe))
    systems = ["base", "specialist", {"kind": "merge", "method": "task_arithmetic", "weight": 1.0}]
    results = compare(load(training, systems, base=str(tmp_path / "base")))
    assert {name: s.error for name, s in results.systems.items() if s.error} == {}
    folder = tmp_path / "out" / "systems" / "task_arithmetic" / "model"
    weights = [
        load_file(checkpoint / "model.safetensors")
        for checkpoint in (folder, *(tmp_path / name for name in ("base", "text", "code")))
    ]
    for key, merged in weights[0].items():  # the base and both differences
        base, text, code = (value[key] for value in weights[1:])
        torch.testing.assert_close(merged, text + code - base, atol=1e-5, rtol=1e-4)
    state = system_states(load(training, systems, base=str(tmp_path / "text")))
    assert {name for name, value in state.items() if "to be built" in value} == {"base", "task_arithmetic"}


def test_tasks_and_answers_are_shared(training, in_process, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    questions = [{"question": f"{i} + 1 = ?", "answer": f"#### {i + 1}"} for i in range(3)]
    (folder / "gsm8k_test.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    recipe = load(
        training, ["specialist", "best_of", "router"], tasks=["gsm8k"], data_dir=str(folder), max_new_tokens=3, test=[]
    )
    results = compare(recipe)
    assert {name: s.error for name, s in results.systems.items() if s.error} == {}
    for entry in results.systems.values():
        assert entry.tasks["gsm8k"].samples == 3
    answers = {
        name: measured(tmp_path / "out", name).tasks["gsm8k"].answers
        for name in ("text", "code", "best_of-log_prob", "router")
    }
    for document in ("0", "1", "2"):
        both = [answers["text"][document], answers["code"][document]]
        assert answers["best_of-log_prob"][document] in both and answers["router"][document] in both
    assert len(list((tmp_path / "out" / "answers").glob("*.sqlite"))) == 4  # no specialist was asked a second time


def test_a_model_from_elsewhere(training, in_process, tmp_path):
    """The same adapter as a specialist has its losses. Another one in its folder is measured again."""
    base, adapter = tiny("llama", 0, **VOCAB), tmp_path / "elsewhere"
    save_adapter(base, adapter, seed=1)
    systems = ["specialist", {"kind": "model", "name": "all", "adapter": str(adapter)}]
    results = compare(load(training, systems)).systems
    assert results["all"].error is None and results["all"].kind_label == "one model"
    assert results["all"].loss["mean"].nll == pytest.approx(results["text"].loss["mean"].nll, rel=1e-5)
    save_adapter(base, adapter, seed=3)
    assert system_states(load(training, systems))["all"] == "model, to be built"
    results = compare(load(training, systems)).systems
    assert results["all"].loss["mean"].nll != pytest.approx(results["text"].loss["mean"].nll, rel=1e-5)
    whole = {"kind": "model", "name": "whole", "model": str(tmp_path / "base")}
    results = compare(load(training, ["base", whole])).systems
    assert results["whole"].loss["mean"].nll == pytest.approx(results["base"].loss["mean"].nll, rel=1e-5)


def test_the_mean_of_the_benchmarks():
    """A plain mean, with an interval over the documents of all. Ratings have no mean with shares."""

    def system(name: str, *scores: list[float]) -> SystemResult:
        tasks = {
            f"t{i}": TaskScores("acc", "1", dict(zip("abcdefgh", values, strict=False)))
            for i, values in enumerate(scores)
        }
        return SystemResult(name, "fused", Measurement(tasks=tasks))

    systems = [system("x", [1, 0, 1, 1], [0, 1]), system("y", [0, 0, 1, 0], [0, 1]), system("z", [1, 1, 1, 1])]
    results = compare_systems(systems, title="", specialists=[], main="x").systems
    mean = results["x"].task_mean
    assert mean.value == pytest.approx((0.75 + 0.5) / 2) and mean.samples == 6
    assert 0 <= mean.ci95[0] < 0.625 < mean.ci95[1] <= 1
    assert results["z"].task_mean is None, "it ran one of the two"
    pair = results["y"].paired["main"]["task/mean"]
    assert pair.difference == pytest.approx(-0.25) and pair.ci95[0] < -0.25 < pair.ci95[1] <= 0
    results = compare_systems([system("x", [1, 0], [7.5, 8])], title="", specialists=[], main=None).systems
    assert results["x"].task_mean is None


def test_a_change_rebuilds_only_the_systems_that_depend_on_it(training, in_process):
    systems = [
        "base",
        "specialist",
        "router",
        {"kind": "static", "name": "uniform"},
        {"kind": "tuned", "specialist": "text"},
        {"kind": "fused", "name": "stage1", "stages": ["gate"]},
        {"kind": "fused", "name": "joint", "after": "stage1"},
    ]
    compare(load(training, systems))
    changed = system_states(load(training, systems, set=["stages.joint.steps=3"]))
    assert {name for name, state in changed.items() if "to be built" in state} == {"tuned-text", "joint"}
    changed = system_states(load(training, systems, set=["balanced=false"]))
    assert {name for name, state in changed.items() if "to be built" in state} == {"tuned-text", "stage1", "joint"}
    relabelled = [*systems[:-1], systems[-1] | {"versus": "stage1", "label": "the second stage"}]
    assert {state.rpartition(", ")[2] for state in system_states(load(training, relabelled)).values()} == {"done"}
    changed = system_states(load(training, systems, decode={"new_tokens": 5}))
    assert set(changed.values()) == {
        f"{kind}, built, to be measured" for kind in ("base", "specialist", "router", "static", "tuned", "fused")
    }
    with Path(training["test"][0]).open("a") as rows:
        rows.write(json.dumps({"instruction": "one more?", "output": "fox", "domain": "text"}) + "\n")
    changed = system_states(load(training, systems))
    assert {name for name, state in changed.items() if "to be measured" in state} == {"base", "text", "code", "uniform"}


def test_logit_mixing_all_through(training, in_process):
    results = compare(
        load(training, ["specialist", "router", {"kind": "fused", "stages": ["gate"]}], set=["mixing=logits"])
    )
    assert {name: s.error for name, s in results.systems.items() if s.error} == {}


def test_rows_with_the_same_id_are_all_counted(training, in_process, tmp_path):
    row = json.dumps({"instruction": "why?", "output": "the fox", "domain": "text", "id": "7"})
    (tmp_path / "twice.jsonl").write_text(f"{row}\n{row}\n")
    results = compare(
        load(training, ["base", {"kind": "static", "name": "uniform"}], test=[str(tmp_path / "twice.jsonl")])
    )
    assert {s.loss["text"].samples for s in results.systems.values()} == {2}


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"tasks": ["gsm8kk"]}, "unknown task 'gsm8kk'. Did you mean 'gsm8k'"),
        ({"tasks": ["gsm8k"], "data_dir": "/nowhere"}, "/nowhere"),
        ({"tasks": ["mt_bench"]}, "mt_bench"),
        ({"tasks": ["loss"]}, "'loss' is no benchmark here. List its rows under 'test'"),
    ],
)
def test_tasks_are_checked_before_any_system(training, in_process, fields, problem):
    recipe = load(training, ["base"], output=str(training["output"]) + "/new/run", **fields)
    with pytest.raises(DataError, match=problem):
        compare(recipe)
    assert in_process == [] and not Path(recipe.output).parent.exists()


def test_packages_are_checked_before_any_system(training, in_process, monkeypatch):
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"matplotlib.*ultrafuser\[report\]"):
        compare(load(training, ["base"]))
    monkeypatch.undo()
    monkeypatch.setattr(merging, "PROGRAM", "no-such-program")
    with pytest.raises(MissingExtraError, match=r"mergekit.*ultrafuser\[merge\]"):
        compare(load(training, ["base", "merge"]))
    assert in_process == []


def test_two_comparisons_in_one_folder_are_refused(training, in_process, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another comparison is running in this folder"):
            compare(load(training, ["base"]))


def test_a_child_ends_with_its_parent(tmp_path):
    script = (
        "import threading, time; from ultrafuser.compare.system import _end_with_parent; "
        "threading.Thread(target=_end_with_parent, daemon=True).start(); print('up', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"up\n"
    child.stdin.close()  # as the end of the parent does
    assert child.wait(30) == 1


def test_a_real_process_reports_its_error_and_its_death(training, tmp_path):
    recipe = load(training, [{"kind": "fused", "set": ["data.train=[nowhere.jsonl]"]}])
    out = tmp_path / "out"
    out.mkdir()
    (out / system.RECIPE).write_text(dump_compare_recipe(recipe))
    assert "nowhere.jsonl: no such file" in system.start(out, "fused", "build")
    (tmp_path / "dies.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    (tmp_path / "fails.py").write_text("import sys; sys.exit(3)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        assert "SIGKILL, probably out of memory" in system.start(out, "fused", "build", module="dies")
        assert "ended with status 3" in system.start(out, "fused", "build", module="fails")
