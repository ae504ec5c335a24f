"""A run survives torn files and full disks, and two runs do not share a folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from disks import file_limit, fill, small_disk
from training_fixtures import GATE, JOINT, Interruption, RecordingProgress, StopAt, TinyRun, metrics, trained_weights
from ultrafuser.data.locking import exclusive_lock
from ultrafuser.errors import DataError, DiskError, TrainingError
from ultrafuser.train.checkpoints import find_problem
from ultrafuser.train.metrics import append_metrics, read_metrics, truncate_metrics

OFTEN = {"save_every": 1}


@pytest.fixture(scope="module")
def complete(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.train(tmp_path_factory.mktemp("disk") / "whole", **OFTEN)


@pytest.fixture(scope="module")
def stopped(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was interrupted after its third step, with checkpoints of the first two."""
    output = tmp_path_factory.mktemp("disk") / "run"
    with pytest.raises(Interruption):
        tiny_run.train(output, progress=StopAt("gate", 3), **OFTEN)
    return output


@pytest.fixture
def copy(stopped: Path, tmp_path: Path) -> Path:
    """The interrupted run in its folder, which is restored after the test, since the recipe names it."""
    shutil.copytree(stopped, tmp_path / "saved")
    yield stopped
    shutil.rmtree(stopped)
    shutil.copytree(tmp_path / "saved", stopped)


def assert_equal_runs(output: Path, reference: Path) -> None:
    assert metrics(output) == metrics(reference)
    weights, expected = trained_weights(output), trained_weights(reference)
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in weights)


def tear(file: Path, how: str) -> None:
    content = file.read_bytes()
    sizes = {"empty": 0, "half": len(content) // 2, "one byte short": len(content) - 1}
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(content[: sizes[how]])


# ---------------------------------------------------------------- metrics.jsonl


@pytest.mark.parametrize(
    "tail", ['{"stage": "ga', '{"stage": "gate", "step": 3, "loss": 1.0}', "\0\0\0", "\n\n", '{"a":\n']
)
def test_a_torn_last_line_of_the_metrics_is_cut_on_resume(tail, tiny_run, copy, complete):
    with (copy / "metrics.jsonl").open("a") as file:
        file.write(tail)
    tiny_run.train(copy, resume=True, **OFTEN)
    assert_equal_runs(copy, complete)
    lines = (copy / "fused" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def test_a_last_line_that_is_not_utf8_is_cut(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"stage": "gate", "step": 1}\n{"stage": "\xc3')
    assert read_metrics(file) == [{"stage": "gate", "step": 1}]
    truncate_metrics(file)
    append_metrics(file, {"stage": "gate", "step": 2})
    assert [row["step"] for row in read_metrics(file)] == [1, 2]


@pytest.mark.parametrize(
    "line", ['{"stage": "ga', "[1]", '{"loss": 1.0}', "\xff", '{"stage": "gate", "st{"stage": "gate"}']
)
def test_a_torn_line_in_the_middle_is_an_error_with_its_number(line, tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(f'{{"stage": "gate", "step": 1}}\n{line}\n{{"stage": "gate", "step": 3}}\n', encoding="latin-1")
    with pytest.raises(TrainingError, match=r"metrics.jsonl:2: not a row of metrics, expected .* Correct or delete"):
        read_metrics(file)


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("how", ["empty", "half", "one byte short", "missing"])
@pytest.mark.parametrize(
    "name", ["trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
)
def test_a_checkpoint_with_a_torn_file_is_incomplete(name, how, stopped, tmp_path):
    assert find_problem(stopped / "1-gate" / "checkpoint-2") is None
    checkpoint = shutil.copytree(stopped / "1-gate" / "checkpoint-2", tmp_path / "checkpoint-2")
    tear(checkpoint / name, how)
    if (name, how) == ("trainer_state.json", "one byte short"):  # the last byte ends the line
        assert find_problem(checkpoint) is None
    else:
        assert find_problem(checkpoint) == f"{name} is {'missing' if how == 'missing' else 'torn'}"


@pytest.mark.parametrize(
    ("torn", "source"),
    [(["checkpoint-2"], "checkpoint-1"), (["checkpoint-1", "checkpoint-2"], "the start of the stage")],
)
def test_a_run_resumes_from_the_checkpoint_before_a_torn_one_and_says_so(torn, source, tiny_run, copy, complete):
    for name in torn:
        tear(copy / "1-gate" / name / "trainer_state.json", "empty")
    progress = RecordingProgress()
    tiny_run.train(copy, resume=True, progress=progress, **OFTEN)
    assert_equal_runs(copy, complete)
    said = [text for text in progress.news if "incomplete" in text]
    assert said == [
        f"{copy / '1-gate' / name}: incomplete (trainer_state.json is torn), removed. Resuming from {source}"
        for name in torn
    ]


def test_weights_of_a_finished_stage_appear_whole(tiny_run, tmp_path, monkeypatch):
    """A process that is killed while it writes them leaves no file that the next run would load."""
    from ultrafuser.train import stages

    real = stages.save_trainable

    def stop(model, file, state):
        real(model, file, state)
        assert not (tmp_path / "run" / "1-gate" / "finished.safetensors").exists()
        raise Interruption

    monkeypatch.setattr(stages, "save_trainable", stop)
    with pytest.raises(Interruption):
        tiny_run.train(tmp_path / "run", [GATE | {"steps": 1}])
    assert not list((tmp_path / "run" / "1-gate").glob("*finished*"))


# ---------------------------------------------------------------- full disks


@pytest.mark.parametrize("resource", ["features", "checkpoint"])
def test_a_disk_that_fills_is_one_error_and_the_run_resumes(resource, tiny_run, tmp_path):
    stages = [GATE, JOINT]
    whole = tiny_run.train(tmp_path / "whole", stages, cache_features=resource == "features", **OFTEN)
    settings = {"cache_features": resource == "features"} | OFTEN
    words = {
        "features": r"run/features/train: the feature cache needs 0.0 GB: the file is larger .*, or set cache_features",
        "checkpoint": r"run/1-gate/checkpoint-1: could not be written: ",
    }
    with file_limit(9_000), pytest.raises((TrainingError, DiskError), match=words[resource]):
        tiny_run.train(tmp_path / "run", stages, **settings)
    assert not list((tmp_path / "run").glob("*/checkpoint-*")), "no half checkpoint is left"
    tiny_run.train(tmp_path / "run", stages, resume=True, **settings)
    assert_equal_runs(tmp_path / "run", whole)


def test_a_disk_that_is_full_when_metrics_are_appended(tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        append_metrics(disk / "metrics.jsonl", {"stage": "gate", "step": 1})
        fill(disk)
        with pytest.raises(DiskError, match="metrics.jsonl: could not be written: the disk is full. Free space"):
            for step in range(2, 200):
                append_metrics(disk / "metrics.jsonl", {"stage": "gate", "step": step, "text": "x" * 100})
        rows = read_metrics(disk / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))


def test_memory_maps_of_the_features_have_their_blocks(tiny_run, tmp_path, monkeypatch):
    """Blocks that were allocated cannot be missing when the map is written, which would be SIGBUS."""
    from ultrafuser.train import features

    def check(model, store, missing, progress):
        for file in store.folder.glob("*.bin"):
            assert file.stat().st_blocks * 512 >= file.stat().st_size > 0
        raise Interruption

    monkeypatch.setattr(features, "_compute", check)
    with pytest.raises(Interruption):
        tiny_run.train(tmp_path / "run", cache_features=True)


@pytest.mark.parametrize("how", ["empty", "half", "one byte short", "missing"])
@pytest.mark.parametrize("pattern", ["states-1.bin", "read.bin", "log-probs-*.bin", "scored-*.bin", "identity.json"])
def test_torn_files_of_the_feature_cache_are_computed_again(pattern, how, tiny_run, tmp_path):
    from ultrafuser.data.templates import Renderer
    from ultrafuser.specialists import fuse
    from ultrafuser.train.features import FeatureStore
    from ultrafuser.train.rows import read_sources

    recipe = tiny_run.recipe(tmp_path)
    model, tokenizer = fuse(recipe)
    rows = read_sources(
        recipe.data.train, Renderer(tokenizer, model.config.chat_templates, 128), RecordingProgress(), ""
    )
    first = FeatureStore.build(model, rows, tmp_path / "cache")
    states, log_probs = [tensor.clone() for tensor in first.states], first.log_probs.clone()
    del first
    [file] = (tmp_path / "cache").glob(pattern)
    tear(file, how)
    again = FeatureStore.build(model, rows, tmp_path / "cache")
    assert torch.equal(again.log_probs, log_probs)
    assert all(torch.equal(*pair) for pair in zip(again.states, states, strict=True))


# ---------------------------------------------------------------- locks and drafts


def test_a_second_run_in_the_folder_is_refused(tiny_run, tmp_path):
    (tmp_path / "run").mkdir()
    words = "run: another training run is running in this folder. Wait until it ends, or choose another folder"
    with exclusive_lock(tmp_path / "run", "training run", "train.lock"):
        for resume in (False, True):
            (tmp_path / "run" / "recipe.yaml").write_text("{}")
            with pytest.raises(DataError, match=words):
                tiny_run.train(tmp_path / "run", resume=resume)


def test_the_lock_is_held_until_the_end_and_no_longer(tiny_run, tmp_path, monkeypatch):
    from ultrafuser.train import run

    def check(*args, **kwargs):
        with pytest.raises(DataError, match="another training run"):
            tiny_run.train(tmp_path / "run")
        raise Interruption

    monkeypatch.setattr(run, "save_fused_folder", check)
    with pytest.raises(Interruption):
        tiny_run.train(tmp_path / "run", [GATE | {"steps": 1}])
    monkeypatch.undo()
    tiny_run.train(tmp_path / "run", [GATE | {"steps": 1}], resume=True)


def test_drafts_of_a_killed_run_are_removed_by_the_next(tiny_run, copy):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    drafts = [copy / f".{name}.{process.pid}.tmp" for name in ("recipe.yaml", "metrics.jsonl", "fused")]
    drafts[0].write_text("half")
    drafts[1].write_text("half")
    drafts[2].mkdir()
    stage = copy / "1-gate" / f".finished.safetensors.{process.pid}.tmp"
    stage.write_text("half")
    tiny_run.train(copy, resume=True, **OFTEN)
    assert not [draft for draft in (*drafts, stage) if draft.exists()]
