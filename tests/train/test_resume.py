"""A run that was interrupted and goes on equals the one that was not."""

from __future__ import annotations

import datetime
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
import yaml

import ultrafuser
from training_fixtures import (
    GATE,
    JOINT,
    NAMES,
    Interruption,
    RecordingProgress,
    StopAt,
    TinyRun,
    metrics,
    trained_weights,
)
from ultrafuser.data import collate
from ultrafuser.data.templates import Renderer
from ultrafuser.errors import DataError, TrainingError
from ultrafuser.specialists import fuse
from ultrafuser.train.features import FeatureStore
from ultrafuser.train.rows import read_sources
from ultrafuser.train.trainer import FusionTrainer

# Dropout draws random numbers, which a resumed run must draw alike.
STAGES = [GATE, JOINT | {"lora": JOINT["lora"] | {"dropout": 0.3}}]


def options(tiny_run: TinyRun) -> dict[str, Any]:
    return {"save_every": 1, "eval_every": 2, "data": {"validation": [str(tiny_run.folder / "held-out.jsonl")]}}


@pytest.fixture(scope="module")
def uninterrupted(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.train(tmp_path_factory.mktemp("resume") / "whole", STAGES, **options(tiny_run))


def assert_equal_runs(output: Path, reference: Path) -> None:
    assert metrics(output) == metrics(reference)
    weights, expected = trained_weights(output), trained_weights(reference)
    assert weights.keys() == expected.keys()
    assert [name for name in weights if not torch.equal(weights[name], expected[name])] == []
    assert (output / "fused" / "model.safetensors").read_bytes() == (
        reference / "fused" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(("stage", "step"), [("gate", 1), ("gate", 3), ("joint", 1), ("joint", 3)])
def test_a_resumed_run_equals_the_uninterrupted_one(tiny_run, tmp_path, uninterrupted, stage, step):
    with pytest.raises(Interruption):
        tiny_run.train(tmp_path, STAGES, progress=StopAt(stage, step), **options(tiny_run))
    assert not (tmp_path / "fused").exists()
    tiny_run.train(tmp_path, STAGES, resume=True, **options(tiny_run))
    assert_equal_runs(tmp_path, uninterrupted)


@pytest.mark.parametrize("method", ["_save_checkpoint", "_save_rng_state"], ids=["before-save", "mid-save"])
def test_an_interruption_around_saving_is_survived(tiny_run, tmp_path, uninterrupted, method, monkeypatch):
    """Logged but not saved: the row of metrics must not come twice. Half saved: the checkpoint must not be used."""
    real = getattr(FusionTrainer, method)

    def stop(self, *args, **kwargs):
        if self.state.global_step == 2:
            raise Interruption(method)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(FusionTrainer, method, stop)
    with pytest.raises(Interruption):
        tiny_run.train(tmp_path, STAGES, **options(tiny_run))
    monkeypatch.undo()
    tiny_run.train(tmp_path, STAGES, resume=True, **options(tiny_run))
    assert_equal_runs(tmp_path, uninterrupted)


def test_an_interruption_before_the_first_checkpoint_leaves_no_double_rows(tiny_run, tmp_path):
    complete = tiny_run.train(tmp_path / "whole")
    with pytest.raises(Interruption):
        tiny_run.train(tmp_path / "run", progress=StopAt("gate", 3))
    assert metrics(tmp_path / "run")
    tiny_run.train(tmp_path / "run", resume=True)
    assert_equal_runs(tmp_path / "run", complete)


def test_an_interruption_between_a_stages_end_and_the_next(tiny_run, tmp_path, uninterrupted, monkeypatch):
    def stop(model, file, *args):
        raise Interruption("save_trainable")

    monkeypatch.setattr("ultrafuser.train.stages.save_trainable", stop)
    with pytest.raises(Interruption):
        tiny_run.train(tmp_path, STAGES, **options(tiny_run))
    monkeypatch.undo()
    tiny_run.train(tmp_path, STAGES, resume=True, **options(tiny_run))
    assert_equal_runs(tmp_path, uninterrupted)


def test_an_interruption_while_writing_the_checkpoint(tiny_run, tmp_path, uninterrupted, monkeypatch):
    def stop(*args, **kwargs):
        raise Interruption("card")

    monkeypatch.setattr("ultrafuser.train.run.write_card", stop)
    with pytest.raises(Interruption):
        tiny_run.train(tmp_path, STAGES, **options(tiny_run))
    monkeypatch.undo()
    assert not (tmp_path / "fused").exists()
    progress = RecordingProgress()
    tiny_run.train(tmp_path, STAGES, resume=True, progress=progress, **options(tiny_run))
    assert_equal_runs(tmp_path, uninterrupted)
    assert [text for text in progress.news if "finished before" in text] == [
        "stage gate: finished before", "stage joint: finished before",
    ]  # fmt: skip


def test_checkpoints_are_saved_between_validations(tiny_run, tmp_path):
    """Keeping the best must not cost the checkpoints that `save_every` asks for."""
    settings = {"save_every": 1, "eval_every": 4, "data": {"validation": [str(tiny_run.folder / "held-out.jsonl")]}}
    with pytest.raises(Interruption):
        tiny_run.train(tmp_path, progress=StopAt("gate", 3), **settings)
    assert sorted(path.name for path in (tmp_path / "1-gate").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert not [row for row in metrics(tmp_path) if "eval_loss" in row], "the stage's end alone is validated"


def test_resume_with_accumulation_and_metrics_every_other_step(tiny_run, tmp_path):
    stage, often = GATE | {"rows_per_device": 2}, {"save_every": 1, "log_every": 2}
    complete = tiny_run.train(tmp_path / "whole", [stage], **often)
    with pytest.raises(Interruption):
        tiny_run.train(tmp_path / "run", [stage], progress=StopAt("gate", 3), **often)
    tiny_run.train(tmp_path / "run", [stage], resume=True, **often)
    assert_equal_runs(tmp_path / "run", complete)


def test_early_stopping_remembers_how_long_it_waited(tiny_run, tmp_path):
    wild = GATE | {"lr": 3.0, "steps": 30, "schedule": "constant", "max_grad_norm": 0}
    settings = options(tiny_run) | {"eval_every": 1, "early_stop_patience": 3, "cache_features": True}
    complete = tiny_run.train(tmp_path / "whole", [wild], **settings)
    last = max(row["step"] for row in metrics(complete))
    assert last < 30
    with pytest.raises(Interruption):
        tiny_run.train(tmp_path / "run", [wild], progress=StopAt("gate", last), **settings)
    tiny_run.train(tmp_path / "run", [wild], resume=True, **settings)
    assert_equal_runs(tmp_path / "run", complete)


def test_full_training_of_mixed_and_tied_architectures_resumes(tiny_run, tmp_path):
    specialists = [{"name": "llama", "model": str(tiny_run.folder / "text"), "chat_template": "chatml"}]
    for seed, (kind, changes) in enumerate({"gpt2": {"n_embd": 24, "n_positions": 192}, "gemma": {}}.items()):
        folder = tiny_run.specialist(f"{kind}-tied", kind, seed, tie_word_embeddings=True, **changes)
        specialists.append({"name": kind, "model": str(folder), "chat_template": "plain"})
    stages = [GATE, {"name": "joint", "steps": 3, "samples_per_domain": 2, "specialists": "full", "lr": 1e-3}]
    settings = {"save_every": 1, "specialists": specialists}
    complete = tiny_run.train(tmp_path / "whole", stages, **settings)
    with pytest.raises(Interruption):
        tiny_run.train(tmp_path / "run", stages, progress=StopAt("joint", 2), **settings)
    tiny_run.train(tmp_path / "run", stages, resume=True, **settings)
    assert_equal_runs(tmp_path / "run", complete)
    ids = torch.tensor([[5, 6, 7, 8]])
    first, second = (ultrafuser.load(run / "fused", device_map="cpu")[0] for run in (complete, tmp_path / "run"))
    with torch.no_grad():
        assert torch.equal(first(ids).logits, second(ids).logits)


# ---------------------------------------------------------------- refusals


def test_nothing_to_resume(tiny_run, tmp_path):
    with pytest.raises(
        TrainingError, match=r"run: no run to resume there \(no recipe.yaml\). Start it without --resume"
    ):
        tiny_run.train(tmp_path / "run", resume=True)


def test_another_recipe_is_not_resumed(tiny_run, tmp_path):
    tiny_run.train(tmp_path / "run", [GATE | {"steps": 1}])
    with pytest.raises(TrainingError, match=r"has another recipe \(differs in: steps: 2\)"):
        tiny_run.train(tmp_path / "run", [GATE | {"steps": 2}], resume=True)


def test_a_run_of_an_older_version_is_resumed(tiny_run, tmp_path):
    """Its recipe lacks the fields that came later, which have their defaults."""
    tiny_run.train(tmp_path / "run", [GATE | {"steps": 1}])
    saved = tmp_path / "run" / "recipe.yaml"
    fields = yaml.safe_load(saved.read_text())
    del fields["stages"][0]["features_per_row"], fields["parallel"]
    saved.write_text(yaml.safe_dump(fields))
    tiny_run.train(tmp_path / "run", [GATE | {"steps": 1}], resume=True)
    del fields["stages"][0]["calibrate"]
    saved.write_text(yaml.safe_dump(fields))
    with pytest.raises(TrainingError, match=r"has another recipe \(differs in: calibrate: false\)"):
        tiny_run.train(tmp_path / "run", [GATE | {"steps": 1, "calibrate": False}], resume=True)


def test_a_recipe_with_a_field_of_a_newer_version_is_not_resumed(tiny_run, tmp_path):
    tiny_run.train(tmp_path / "run", [GATE | {"steps": 1}])
    with (tmp_path / "run" / "recipe.yaml").open("a") as file:
        file.write("later: 1\n")
    with pytest.raises(TrainingError, match=r"has another recipe \(differs in: later: 1\)"):
        tiny_run.train(tmp_path / "run", [GATE | {"steps": 1}], resume=True)


def test_a_run_is_not_overwritten(tiny_run, tmp_path):
    tiny_run.train(tmp_path / "run", [GATE | {"steps": 1}])
    with pytest.raises(
        TrainingError, match=r"holds a run already. Continue it with --resume, or choose another output="
    ):
        tiny_run.train(tmp_path / "run", [GATE | {"steps": 1}])


def test_a_recipe_that_failed_before_training_can_be_mended_and_run(tiny_run, tmp_path):
    with pytest.raises(DataError):
        tiny_run.train(tmp_path / "run", data={"train": [str(tmp_path / "typo.jsonl")]})
    tiny_run.train(tmp_path / "run", [GATE | {"steps": 1}])


# ---------------------------------------------------------------- the feature cache


def test_an_interrupted_computation_of_features_goes_on(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setitem(collate.TOKENS_PER_BATCH, "cpu", 1)  # row by row
    with pytest.raises(Interruption):
        tiny_run.train(tmp_path / "run", progress=StopReading(after=6), cache_features=True)
    progress = RecordingProgress()
    output = tiny_run.train(tmp_path / "run", resume=True, progress=progress, cache_features=True)
    whole_progress = RecordingProgress()
    complete = tiny_run.train(tmp_path / "whole", progress=whole_progress, cache_features=True)
    [remaining], [total] = (
        [size for label, size in recording.started if "read the rows" in label]
        for recording in (progress, whole_progress)
    )
    assert 0 < remaining < total
    assert_equal_runs(output, complete)


class StopReading(RecordingProgress):
    def __init__(self, after: int) -> None:
        super().__init__()
        self.after, self.rows = after, 0

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.rows += 1
        if self.rows > self.after:
            raise Interruption("reading")


def test_features_are_computed_once_and_again_when_specialists_change(tiny_run, tmp_path):
    recipe = tiny_run.recipe(tmp_path)
    model, rows = _model_and_rows(tiny_run, recipe)
    first, second, third, fourth = RecordingProgress(), RecordingProgress(), RecordingProgress(), RecordingProgress()
    total = sum(row.num_tokens for row in rows)
    FeatureStore.build(model, rows, tmp_path / "f", progress=first)
    FeatureStore.build(model, rows, tmp_path / "f", progress=second)
    with torch.no_grad():
        model.groups[1].model.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    store = FeatureStore.build(model, rows, tmp_path / "f", progress=third)
    FeatureStore.build(model, rows[:4], tmp_path / "f", progress=fourth)
    assert [recording.started[0][1] for recording in (first, third)] == [total] * 2 and not second.started
    assert fourth.started[0][1] == sum(row.num_tokens for row in rows[:4])
    assert len(store) == len(rows)


def test_features_are_the_states_that_the_model_gives(tiny_run, tmp_path):
    model, rows = _model_and_rows(tiny_run, tiny_run.recipe(tmp_path))
    store = FeatureStore.build(model, rows, tmp_path / "f")
    assert [item.row.row_id for item in store] == [row.row_id for row in rows]
    assert store[-1].row is rows[-1] and len(store[-1].log_probs) == len(rows[-1].labels)
    for item in store:
        with torch.no_grad():
            for k, ids in enumerate(item.row.input_ids):
                out = model.groups[k].model(torch.tensor([ids]), output_hidden_states=True)
                positions = list(item.row.response_index[k])
                torch.testing.assert_close(item.states[k], out.hidden_states[-1][0, positions], atol=1e-4, rtol=1e-4)
                log_p = out.logits[0, positions].log_softmax(-1)[range(len(positions)), list(item.row.labels)]
                torch.testing.assert_close(item.log_probs[:, k], log_p, atol=1e-4, rtol=1e-4)


def test_features_of_several_ranks_fill_one_store(tiny_run, tmp_path):
    model, rows = _model_and_rows(tiny_run, tiny_run.recipe(tmp_path))
    alone = FeatureStore.build(model, rows, tmp_path / "alone")
    progress = [RecordingProgress(), RecordingProgress()]
    barrier = Barrier(2, timeout=60)

    def build(rank: int) -> FeatureStore:
        ranks = {"rank": rank, "num_ranks": 2, "local_rank": rank, "num_local_ranks": 2}
        return FeatureStore.build(model, rows, tmp_path / "two", **ranks, barrier=barrier.wait, progress=progress[rank])

    with ThreadPoolExecutor(2) as pool:
        stores = list(pool.map(build, range(2)))
    assert all(store.read.all() and store.scored.all() for store in stores)
    assert sum(tokens for recording in progress for _, tokens in recording.started) == sum(r.num_tokens for r in rows)
    torch.testing.assert_close(stores[1].log_probs, alone.log_probs)


def test_a_node_without_the_files_of_the_others_computes_all_features(tiny_run, tmp_path):
    model, rows = _model_and_rows(tiny_run, tiny_run.recipe(tmp_path))
    alone = FeatureStore.build(model, rows, tmp_path / "alone")
    for rank in range(2):  # two machines with one process each
        store = FeatureStore.build(model, rows, tmp_path / f"disk-{rank}", rank=rank, num_ranks=2)
        torch.testing.assert_close(store.log_probs, alone.log_probs)


def test_features_that_are_missing_in_the_end_are_an_error(tiny_run, tmp_path):
    """The other process of this machine writes to another disk."""
    model, rows = _model_and_rows(tiny_run, tiny_run.recipe(tmp_path))
    ranks = {"rank": 0, "num_ranks": 2, "local_rank": 0, "num_local_ranks": 2}
    with pytest.raises(TrainingError, match=r"lacks 7 of 15 rows after .* cache_features: false"):
        FeatureStore.build(model, rows, tmp_path / "half", **ranks)


def test_a_disk_too_small_for_the_features_is_an_error(tiny_run, tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(
        TrainingError, match=r"the feature cache needs .* GB: the disk is full\. Free space, .* cache_features: false"
    ):
        tiny_run.train(tmp_path / "run", cache_features=True)


def test_auto_caches_only_what_is_read_more_than_once(tiny_run, tmp_path):
    once, often = RecordingProgress(), RecordingProgress()
    tiny_run.train(tmp_path / "once", [GATE | {"steps": 2}], progress=once)  # 12 rows drawn of 15
    output = tiny_run.train(tmp_path / "often", [GATE | {"steps": 3}], progress=often)  # 18
    assert [label for label, _ in once.started] == ["stage gate"]
    assert [label for label, _ in often.started] == ["specialists read the rows", "stage gate"]
    assert not (output / "features").exists(), "a finished run does not keep them"


def _model_and_rows(tiny_run: TinyRun, recipe: Any) -> tuple[Any, list]:
    model, tokenizer = fuse(recipe)
    renderer = Renderer(tokenizer, model.config.chat_templates, 128)
    assert model.config.names == list(NAMES)
    return model, read_sources(recipe.data.train, renderer, RecordingProgress(), "training")


def test_templates_that_read_the_clock_see_the_day_of_the_start(tiny_run, tmp_path, monkeypatch):
    """A run that goes on after midnight reads the same tokens."""
    from ultrafuser import specialists, typed_yaml
    from ultrafuser.train import run

    class LeapDay(datetime.date):
        @classmethod
        def today(cls):
            return cls(2024, 2, 29)

    def interrupt(*arguments, **options):
        raise Interruption

    dated = "Today is {{ strftime_now('%Y-%m-%d') }}. " + tiny_run.tokenizer.chat_template
    models = [{"name": name, "model": str(tiny_run.folder / name), "chat_template": dated} for name in NAMES]
    seen = []
    read = run.read_sources
    monkeypatch.setattr(run, "read_sources", lambda *a, **k: seen.append(read(*a, **k)) or seen[-1])
    with monkeypatch.context() as context:
        context.setattr(specialists.datetime, "date", LeapDay)
        context.setattr(run, "save_fused_folder", interrupt)
        with pytest.raises(Interruption):
            tiny_run.train(tmp_path / "run", specialists=models)
    recorded = typed_yaml.parse((tmp_path / "run" / "recipe.yaml").read_text(), "recipe")
    assert recorded["date"] == "2024-02-29"
    tiny_run.train(tmp_path / "run", specialists=models, resume=True)
    first, resumed = seen[0], seen[-1]
    assert [row.input_ids for row in first] == [row.input_ids for row in resumed]
    assert "2024-02-29" in tiny_run.tokenizer.decode(list(first[0].input_ids[0]))
    assert json.loads((tmp_path / "run" / "fused" / "config.json").read_text())["date"] == "2024-02-29"
