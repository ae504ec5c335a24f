"""Two stages: what moves, what stays, and that no way of running them changes the trajectory."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import ultrafuser
from tiny_models import save_adapter
from training_fixtures import GATE, JOINT, NAMES, RecordingProgress, TinyRun, losses, metrics, trained_weights
from ultrafuser.data.templates import Renderer
from ultrafuser.errors import DataError, RecipeError, TrainingError
from ultrafuser.recipe import JointStage, load_recipe
from ultrafuser.specialists import fuse
from ultrafuser.train.features import FeatureStore, Int8States, estimate_size_bytes
from ultrafuser.train.rows import read_sources
from ultrafuser.train.run import train
from ultrafuser.train.stages import StageRun, prepare_gate, prepare_joint, run_stage

FULL = {key: value for key, value in JOINT.items() if key != "lora"} | {"specialists": "full", "lr": 1e-3}


def by_name(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def fused_and_rows(tiny_run: TinyRun, output: Path, stages: Any = (GATE,), **changes: Any) -> tuple[Any, list, Any]:
    recipe = tiny_run.recipe(output, stages, **changes)
    model, tokenizer = fuse(recipe)
    renderer = Renderer(tokenizer, model.config.chat_templates, recipe.data.max_length)
    return model, read_sources(recipe.data.train, renderer, RecordingProgress(), "training"), recipe


def assert_close(a: list, b: list, atol: float = 1e-5) -> None:
    assert [row[:2] for row in a] == [row[:2] for row in b]
    for (*location, loss), (*_, expected) in zip(a, b, strict=True):
        assert loss == pytest.approx(expected, abs=atol, rel=atol), location


# ---------------------------------------------------------------- a sample of the tokens


def test_a_sample_of_each_rows_tokens_trains_alike_with_and_without_a_cache(tiny_run, tmp_path):
    stage = GATE | {"features_per_row": 3, "calibrate": False}
    validation = {"data": {"validation": [str(tiny_run.folder / "held-out.jsonl")]}}
    runs = {
        cache: losses(tiny_run.train(tmp_path / str(cache), [stage], cache_features=cache, **validation))
        for cache in (True, False)
    }
    assert_close(runs[True], runs[False])
    whole = losses(tiny_run.train(tmp_path / "whole", [stage | {"features_per_row": 99}], **validation))
    assert whole != runs[True]
    assert_close(whole, losses(tiny_run.train(tmp_path / "all", [stage | {"features_per_row": None}], **validation)))


def test_the_cache_holds_the_sample_alone(tiny_run, tmp_path):
    model, rows, recipe = fused_and_rows(tiny_run, tmp_path, [GATE | {"features_per_row": 3}])
    run = StageRun(model, recipe.stages[0], recipe, rows, rows, tmp_path / "1-gate")
    run_stage(run)
    sizes = {name: (tmp_path / "features" / name / "states-0.bin").stat().st_size for name in ("train", "validation")}
    assert sizes["train"] == sum(min(3, len(row.labels)) for row in rows) * model.groups[0].width * 4
    assert sizes["validation"] == sum(len(row.labels) for row in rows) * model.groups[0].width * 4


@pytest.mark.parametrize(
    ("kind", "nearly", "per_value"), [("bfloat16", 2e-3, 2), ("int8", 5e-3, 1 + 4 / 32)], ids=["bfloat16", "int8"]
)
def test_states_of_fewer_bytes_train_nearly_alike(tiny_run, tmp_path, kind, nearly, per_value):
    model, rows, recipe = fused_and_rows(tiny_run, tmp_path / "run", [GATE | {"feature_dtype": kind}])
    width = model.groups[0].width
    run_stage(StageRun(model, recipe.stages[0], recipe, rows, rows, tmp_path / "run" / "1-gate"))
    tokens = sum(len(row.labels) for row in rows)
    features = tmp_path / "run" / "features" / "train"
    assert sum(file.stat().st_size for file in features.glob("s*-0.bin")) == pytest.approx(tokens * width * per_value)
    assert estimate_size_bytes(model, rows, kind) == 3 * tokens * (width * per_value + 4)
    whole, rows, recipe = fused_and_rows(tiny_run, tmp_path / "whole")
    run_stage(StageRun(whole, recipe.stages[0], recipe, rows, rows, tmp_path / "whole" / "1-gate"))
    got, expected = losses(tmp_path / "run"), losses(tmp_path / "whole")
    assert got != expected
    assert_close(got, expected, atol=nearly)


def test_int8_states_have_a_scale_for_each_block():
    """One large value costs precision in its block alone, and zeros stay zeros."""
    torch.manual_seed(0)
    states = torch.randn(5, 150)
    states[1, 3], states[2] = 1000.0, 0.0
    width, block = states.shape[1], Int8States.BLOCK
    stored = Int8States(torch.zeros(9, width, dtype=torch.int8), torch.zeros(9, 3), torch.float32)
    stored[2:7] = states
    assert stored[:2].eq(0).all()
    assert torch.equal(stored[torch.tensor([3])][0], stored[2:7][1])
    error = (stored[2:7] - states).abs()
    bounds = torch.nn.functional.pad(states, (0, 42)).unflatten(-1, (3, block)).abs().amax(-1) / 127 / 2
    assert (error <= bounds.repeat_interleave(block, -1)[:, :width] * 1.001 + 1e-7).all()
    assert error[1, block:].max() < 0.02
    assert error[2].eq(0).all()


def test_a_cache_of_another_type_is_computed_again(tiny_run, tmp_path):
    model, rows, _ = fused_and_rows(tiny_run, tmp_path)
    for kind in ("auto", "int8", "bfloat16", "auto"):
        progress = RecordingProgress()
        store = FeatureStore.build(model, rows, tmp_path / "features", precision=kind, progress=progress)
        assert [label for label, _ in progress.started] == ["specialists read the rows"]
    again = RecordingProgress()
    FeatureStore.build(model, rows, tmp_path / "features", progress=again)
    assert not again.started
    assert store[0].states[0].dtype == torch.float32


# ---------------------------------------------------------------- what moves


@pytest.mark.parametrize("cache", [True, False], ids=["cached", "uncached"])
def test_stage_1_moves_the_gate_and_leaves_the_specialists_bitwise_unchanged(tiny_run, tmp_path, cache):
    model, rows, recipe = fused_and_rows(tiny_run, tmp_path, cache_features=cache)
    initial = by_name(model)
    run_stage(StageRun(model, recipe.stages[0], recipe, rows, [], tmp_path / "1-gate"))
    after = by_name(model)
    assert {name for name in initial if not torch.equal(initial[name], after[name])} == {
        name for name in initial if name.startswith("gate.")
    }
    assert {name for name, p in model.named_parameters() if p.grad is not None or p.requires_grad} <= {
        name for name in initial if name.startswith("gate.")
    }


def test_stage_1_keeps_the_specialists_in_eval_mode(tiny_run, tmp_path):
    """Dropout in a frozen specialist would feed the gate noise, and the cache would give other losses than none."""
    for seed, name in enumerate(NAMES):
        tiny_run.specialist(f"{name}-dropout", seed=seed, attention_dropout=0.9)
    specialists = [{"name": n, "model": str(tiny_run.folder / f"{n}-dropout")} for n in NAMES]
    runs = {
        cache: losses(tiny_run.train(tmp_path / str(cache), cache_features=cache, specialists=specialists))
        for cache in (True, False)
    }
    assert_close(runs[True], runs[False])


def test_stage_2_lora_moves_adapters_and_gate_and_nothing_else(tiny_run, tmp_path):
    model, rows, recipe = fused_and_rows(tiny_run, tmp_path, stages=[JOINT])
    stage = recipe.stages[0]
    prepare_joint(model, stage)  # creates the adapters
    initial = by_name(model)
    run_stage(StageRun(model, stage, recipe, rows, [], tmp_path / "1-joint"))
    after = by_name(model)
    moved = {name for name in initial if not torch.equal(initial[name], after[name])}
    assert moved == {name for name in initial if name.startswith("gate.") or "lora_" in name}
    assert any("lora_" in name for name in moved)


def test_stage_2_full_moves_all_weights(tiny_run, tmp_path):
    model, rows, recipe = fused_and_rows(tiny_run, tmp_path, stages=[FULL])
    initial = by_name(model)
    run_stage(StageRun(model, recipe.stages[0], recipe, rows, [], tmp_path / "1-joint"))
    assert not [name for name, parameter in model.named_parameters() if torch.equal(initial[name], parameter)]


def test_stage_2_moves_the_adapters_of_a_shared_base_and_not_the_base(tiny_run, tmp_path):
    specialists = tiny_run.adapter_recipe(tmp_path, save_adapter)
    model, rows, recipe = fused_and_rows(tiny_run, tmp_path / "run", stages=[JOINT], specialists=specialists)
    initial = by_name(model)
    run_stage(StageRun(model, recipe.stages[0], recipe, rows, [], tmp_path / "run" / "1-joint"))
    after = by_name(model)
    moved = {name for name in initial if not torch.equal(initial[name], after[name])}
    assert moved == {name for name in initial if name.startswith("gate.") or "lora_" in name}


def test_stage_2_full_on_a_shared_base_is_refused(tiny_run, tmp_path):
    specialists = tiny_run.adapter_recipe(tmp_path, save_adapter)
    with pytest.raises(TrainingError, match=r"text, code, math share one base.*specialists=lora.*share_base=false"):
        tiny_run.train(tmp_path / "run", [FULL], specialists=specialists)


def test_stage_2_full_with_copies_of_the_base_trains(tiny_run, tmp_path):
    specialists = tiny_run.adapter_recipe(tmp_path, save_adapter)
    output = tiny_run.train(tmp_path / "run", [FULL | {"steps": 1}], specialists=specialists, share_base=False)
    model, _ = ultrafuser.load(output / "fused", device_map="cpu")
    assert not model.groups[0].loras
    assert all((output / "fused" / "specialists" / name / "model.safetensors").is_file() for name in NAMES)


def test_specialists_have_a_learning_rate_of_their_own(tiny_run, tmp_path):
    model, rows, recipe = fused_and_rows(
        tiny_run, tmp_path, stages=[JOINT | {"specialist_lr": 1e-12, "lr": 0.01, "schedule": "constant"}]
    )
    prepare_joint(model, recipe.stages[0])
    initial = by_name(model)
    run_stage(StageRun(model, recipe.stages[0], recipe, rows, [], tmp_path / "1-joint"))
    for name, parameter in model.named_parameters():
        distance = (parameter - initial[name]).abs().max()
        assert distance > 1e-3 if name.startswith("gate.") else distance < 1e-10, name


def test_prepare_gate_undoes_prepare_joint(tiny_run, tmp_path):
    model, *_ = fused_and_rows(tiny_run, tmp_path)
    prepare_joint(model, JointStage(**FULL))
    prepare_gate(model)
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {"gate"}


def test_adapters_learn_in_float32_on_a_bfloat16_model(tiny_run, tmp_path):
    output = tiny_run.train(tmp_path / "run", [GATE, JOINT], dtype="bfloat16")
    weights = trained_weights(output)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    model, _ = ultrafuser.load(output / "fused", dtype="bfloat16", device_map="cpu")
    assert model.groups[0].model.dtype == torch.bfloat16


# ---------------------------------------------------------------- one trajectory


@pytest.mark.parametrize("mixing", ["logits", "probabilities"])
def test_the_feature_cache_does_not_change_a_loss(tiny_run, tmp_path, mixing):
    progress = {True: RecordingProgress(), False: RecordingProgress()}
    runs = [
        tiny_run.train(
            tmp_path / f"{cache}", progress=progress[cache], mixing=mixing, cache_features=cache, eval_every=2,
            data={"validation": [str(tiny_run.folder / "held-out.jsonl")]},
        )
        for cache in (True, False)
    ]  # fmt: skip
    # With the cache, training and validation rows are read once.
    assert len(progress[True].started) == 3 and len(progress[False].started) == 1
    assert_close(losses(runs[0]), losses(runs[1]))
    weights, expected = (trained_weights(run) for run in runs)
    for name, tensor in weights.items():
        if not name.endswith("score.bias"):  # the softmax cancels it: its gradient is rounding alone
            torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("case", ["cached", "uncached", "joint"])
def test_accumulation_gives_one_trajectory(tiny_run, tmp_path, case):
    stage = (JOINT if case == "joint" else GATE) | {"steps": 3}
    runs = {
        size: losses(
            tiny_run.train(tmp_path / str(size), [stage | {"rows_per_device": size}], cache_features=case == "cached")
        )
        for size in (1, 2, None)
    }
    assert_close(runs[1], runs[None])
    assert_close(runs[2], runs[None])


def test_the_same_seed_gives_the_same_run_and_another_one_does_not(tiny_run, tmp_path):
    dropout = JOINT | {"lora": JOINT["lora"] | {"dropout": 0.5}}
    first, second, third = (
        tiny_run.train(tmp_path / name, [GATE, dropout], seed=seed) for name, seed in [("a", 0), ("b", 0), ("c", 1)]
    )
    assert metrics(first) == metrics(second)
    assert all(torch.equal(tensor, trained_weights(second)[name]) for name, tensor in trained_weights(first).items())
    assert metrics(first) != metrics(third)


def test_joint_training_from_the_start_and_unbalanced_batches_are_switches(tiny_run, tmp_path):
    output = tiny_run.train(tmp_path / "run", [JOINT], balanced=False)
    assert [row["stage"] for row in metrics(output)] == ["joint"] * JOINT["steps"]


# ---------------------------------------------------------------- the loss is right


def test_a_logged_loss_is_the_mean_over_response_tokens_of_plain_transformers(tiny_run, tmp_path):
    """The oracle: each specialist by itself in transformers, mixed by hand, over the rows of the first batch."""
    stage = {**GATE, "steps": 1, "samples_per_domain": 5}  # every row once
    model, rows, recipe = fused_and_rows(tiny_run, tmp_path, stages=[stage])
    plain = [AutoModelForCausalLM.from_pretrained(tiny_run.folder / name).eval() for name in NAMES]
    gate, nats, tokens = copy.deepcopy(model.gate), {}, {}
    with torch.no_grad():
        for row in rows:
            outs = [
                m(torch.tensor([ids]), output_hidden_states=True) for m, ids in zip(plain, row.input_ids, strict=True)
            ]
            states = [
                out.hidden_states[-1][0, list(positions)]
                for out, positions in zip(outs, row.response_index, strict=True)
            ]
            logits = [out.logits[0, list(positions)] for out, positions in zip(outs, row.response_index, strict=True)]
            w = gate(states).exp()
            p = sum(w[:, k, None] * specialist_logits.softmax(-1) for k, specialist_logits in enumerate(logits))
            label_p = p[range(len(row.labels)), list(row.labels)]
            nats[row.domain] = nats.get(row.domain, 0) - label_p.log().sum().item()
            tokens[row.domain] = tokens.get(row.domain, 0) + len(row.labels)
    run_stage(StageRun(model, recipe.stages[0], recipe, rows, [], tmp_path / "1-gate"))
    [logged] = metrics(tmp_path)
    assert logged["loss"] == pytest.approx(sum(nats.values()) / sum(tokens.values()), rel=1e-5)
    for name in NAMES:
        assert logged[f"loss/{name}"] == pytest.approx(nats[name] / tokens[name], rel=1e-5)


def test_a_row_of_metrics_holds_what_is_promised(tiny_run, tmp_path):
    output = tiny_run.train(
        tmp_path / "run", eval_every=2, data={"validation": [str(tiny_run.folder / "held-out.jsonl")]}
    )
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in lines if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    for row in steps:
        assert {f"loss/{n}" for n in NAMES} | {f"gate_weight/{n}" for n in NAMES} <= set(row)
        assert sum(row[f"gate_weight/{n}"] for n in NAMES) == pytest.approx(1, abs=1e-5)
        assert 0 <= row["gate_entropy"] <= 1.0987
        assert row["tokens_per_s"] > 0
    evaluations = [row for row in lines if "eval_loss" in row]
    assert [row["step"] for row in evaluations] == [2, 4]
    for row in evaluations:
        assert row["eval_loss"] == pytest.approx(sum(row[f"eval_loss/{n}"] for n in NAMES) / 3)
    assert (output / "fused" / "metrics.jsonl").read_text() == (output / "metrics.jsonl").read_text()


def test_rows_of_metrics_cover_all_steps_since_the_last_one(tiny_run, tmp_path):
    every = tiny_run.train(tmp_path / "every")
    second = tiny_run.train(tmp_path / "second", log_every=2)
    each, pairs = metrics(every), metrics(second)
    assert [row["step"] for row in pairs] == [2, 4]
    assert pairs[0]["loss"] == pytest.approx((each[0]["loss"] + each[1]["loss"]) / 2, rel=1e-5)


# ---------------------------------------------------------------- validation, best checkpoint, early stop


def test_the_best_checkpoint_is_kept(tiny_run, tmp_path):
    """A learning rate so high that validation gets worse and worse: the first evaluation is the best."""
    wild = GATE | {"lr": 3.0, "steps": 6, "schedule": "constant", "max_grad_norm": 0}
    options = {"cache_features": True, "data": {"validation": [str(tiny_run.folder / "held-out.jsonl")]}}
    progress = RecordingProgress()
    output = tiny_run.train(tmp_path / "run", [wild], eval_every=1, progress=progress, **options)
    evaluations = {row["step"]: row["eval_loss"] for row in metrics(output) if "eval_loss" in row}
    best = min(evaluations, key=evaluations.get)
    assert best < 6 and f"stage gate: kept step {best} of 6, validation loss {evaluations[best]:.4f}" in progress.news
    repeated = tiny_run.train(tmp_path / "again", [wild | {"steps": best}], **options)
    for name, tensor in trained_weights(repeated).items():
        assert torch.equal(tensor, trained_weights(output)[name]), name


def test_without_keep_best_the_last_weights_count(tiny_run, tmp_path):
    wild = GATE | {"lr": 3.0, "schedule": "constant", "max_grad_norm": 0}
    validation = {"validation": [str(tiny_run.folder / "held-out.jsonl")]}
    last = tiny_run.train(tmp_path / "last", [wild], eval_every=1, keep_best=False, data=validation)
    plain = tiny_run.train(tmp_path / "plain", [wild])
    for name, tensor in trained_weights(last).items():
        assert torch.equal(tensor, trained_weights(plain)[name]), name


@pytest.mark.parametrize("keep_best", [True, False])
def test_a_stage_stops_early_when_validation_gets_no_better(tiny_run, tmp_path, keep_best):
    wild = GATE | {"lr": 3.0, "steps": 30, "schedule": "constant", "max_grad_norm": 0}
    output = tiny_run.train(
        tmp_path / "run", [wild], eval_every=1, early_stop_patience=2, keep_best=keep_best,
        data={"validation": [str(tiny_run.folder / "held-out.jsonl")]},
    )  # fmt: skip
    evaluations = [row["eval_loss"] for row in metrics(output) if "eval_loss" in row]
    assert 3 <= len(evaluations) < 30
    assert min(evaluations[-2:]) >= min(evaluations[:-2])


def test_early_stop_without_validation_rows_is_an_error(tiny_run, tmp_path):
    with pytest.raises(TrainingError, match=r"early_stop_patience.*validation"):
        tiny_run.train(tmp_path / "run", early_stop_patience=2)


# ---------------------------------------------------------------- a loss that is no number


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_batch(tiny_run, tmp_path, monkeypatch):
    from ultrafuser.train.trainer import FusionTrainer

    real = FusionTrainer.compute_loss

    def broken(self, model, inputs, *args, **kwargs):
        if self.state.global_step == 2:
            with torch.no_grad():
                self.model.gate.score.bias.fill_(float("nan"))
        return real(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(FusionTrainer, "compute_loss", broken)
    with pytest.raises(TrainingError, match=r"stage 'gate', step 2: the loss is nan on the rows .*--resume") as caught:
        tiny_run.train(tmp_path / "run", save_every=1)
    [file] = (tmp_path / "run" / "1-gate").glob("not-finite*.safetensors")
    assert str(file) in str(caught.value)
    with safe_open(file, "pt") as kept:
        row_ids = json.loads(kept.metadata()["row_ids"])
        assert kept.get_tensor("labels").shape[0] == len(row_ids) == 6
    assert all(row_id in str(caught.value) for row_id in row_ids)

    monkeypatch.setattr(FusionTrainer, "compute_loss", real)
    tiny_run.train(tmp_path / "run", save_every=1, resume=True)
    plain = tiny_run.train(tmp_path / "plain", save_every=1)
    assert metrics(tmp_path / "run") == metrics(plain)


# ---------------------------------------------------------------- rows


def test_a_domain_whose_rows_are_all_too_long_is_an_error(tiny_run, tmp_path):
    file = tmp_path / "long.jsonl"
    messages = [{"role": "user", "content": "many " * 200}, {"role": "assistant", "content": "ok"}]
    file.write_text(json.dumps({"domain": "long", "messages": messages}) + "\n")
    with pytest.raises(DataError, match=r"domain 'long' has no training row left.*max_length=128"):
        tiny_run.train(tmp_path / "run", data={"train": [str(tiny_run.folder / "text.jsonl"), str(file)]})


def test_no_data_is_an_error(tiny_run, tmp_path):
    with pytest.raises(DataError, match="names no training data.*data.train"):
        tiny_run.train(tmp_path / "run", data={"train": []})


def test_truncation_is_reported(tiny_run, tmp_path):
    progress = RecordingProgress()
    file = tmp_path / "long.jsonl"
    messages = [{"role": "user", "content": "many"}, {"role": "assistant", "content": "fox " * 200}]
    file.write_text(json.dumps({"domain": "text", "messages": messages}) + "\n")
    tiny_run.train(
        tmp_path / "run", data={"train": [str(tiny_run.folder / "text.jsonl"), str(file)]}, progress=progress
    )
    [news] = [text for text in progress.news if text.startswith("training rows")]
    assert "6 text" in news
    assert "1 of them truncated" in news


def test_rows_longer_than_a_specialists_context_are_cut_to_it(tiny_run, tmp_path):
    """max_length defaults to 1024; a context of 192 must not break a run in its middle."""
    progress = RecordingProgress()
    file = tmp_path / "long.jsonl"
    messages = [{"role": "user", "content": "many"}, {"role": "assistant", "content": "fox " * 300}]
    file.write_text(json.dumps({"domain": "text", "messages": messages}) + "\n")
    tiny_run.train(
        tmp_path / "run", [GATE | {"steps": 1}], data={"train": [str(file)], "max_length": 1024}, progress=progress
    )
    assert any("1 of them truncated" in text for text in progress.news)


# ---------------------------------------------------------------- what is left behind


def test_the_fused_folder_is_a_whole_checkpoint(tiny_run, tmp_path):
    output = tiny_run.train(
        tmp_path / "run", [GATE, JOINT], data={"validation": [str(tiny_run.folder / "held-out.jsonl")]}
    )
    fused = output / "fused"
    assert {"README.md", "recipe.yaml", "metrics.jsonl", "tokenizer.json", "config.json", "model.safetensors"} <= {
        file.name for file in fused.iterdir()
    }
    assert all((fused / "specialists" / name / "adapter_model.safetensors").is_file() for name in NAMES)
    model, renderer = ultrafuser.load(fused, device_map="cpu")
    assert getattr(model.config, "use_cache", True), "the Trainer's use_cache=False must not stay in the checkpoint"
    weights = trained_weights(output)
    for name, tensor in model.gate.state_dict().items():
        assert torch.equal(tensor, weights[f"2-joint/gate.{name}"])
    card = (fused / "README.md").read_text()
    assert "Validation loss" in card and "joint: 3 steps" in card
    assert [list(map(len, renderer.prompt([{"role": "user", "content": "hi"}])))]


def test_a_stage_1_result_references_its_specialists(tiny_run, tmp_path):
    fused = tiny_run.train(tmp_path / "run") / "fused"
    assert not (fused / "specialists").exists()
    assert (fused / "model.safetensors").stat().st_size < 20_000


def from_fused(tiny_run: TinyRun, output: Path, fused: Path, **changes: Any) -> Any:
    fields = tiny_run.fields(output, [JOINT], fused=str(fused), **changes)
    return load_recipe({key: fields[key] for key in fields if key not in ("specialists", "gate")})


def test_training_goes_on_from_a_fused_folder(tiny_run, tmp_path):
    first = tiny_run.train(tmp_path / "first", mixing="logits")
    train(from_fused(tiny_run, tmp_path / "second", first / "fused"))
    both = tiny_run.train(tmp_path / "both", [GATE, JOINT], mixing="logits")
    joint_losses = [row for row in losses(both) if row[0] == "joint"]
    assert_close(joint_losses, losses(tmp_path / "second"))
    written = load_recipe(tmp_path / "second" / "recipe.yaml")
    assert (written.mixing, written.gate.hidden_size) == ("logits", 16), "what the folder has, not the defaults"
    train(written, resume=True)


@pytest.mark.parametrize(("key", "value"), [("mixing", "logits"), ("share_base", False), ("gate", {"hidden_size": 8})])
def test_a_fused_folder_keeps_its_own_settings(tiny_run, tmp_path, key, value):
    fused = tmp_path / "fused"
    model, tokenizer = fuse(tiny_run.recipe("unused"))
    model.save_pretrained(fused)
    tokenizer.save_pretrained(fused)
    fields = {"fused": str(fused), "output": str(tmp_path / "run"), key: value}
    with pytest.raises(
        RecipeError, match=rf"{key}: the fused folder {fused} has .*, the recipe says .*\. Leave it out"
    ):
        train(load_recipe(fields))


def test_full_training_of_bfloat16_weights_learns_in_float32(tiny_run, tmp_path):
    """At this learning rate, below the spacing of most bfloat16 weights, training in bfloat16 would move few of them."""
    stage = FULL | {"lr": 1e-4, "schedule": "constant", "steps": 8}
    model, rows, recipe = fused_and_rows(tiny_run, tmp_path, stages=[stage], dtype="bfloat16")
    initial = by_name(model)
    run_stage(StageRun(model, recipe.stages[0], recipe, rows, [], tmp_path / "1-joint"))
    assert {group.model.dtype for group in model.groups} == {torch.bfloat16}
    for name, tensor in trained_weights(tmp_path).items():
        name = name.removeprefix("1-joint/")
        assert tensor.dtype == torch.float32 and not torch.equal(tensor, initial[name].float()), name
    repeated, *_ = fused_and_rows(tiny_run, tmp_path, stages=[stage], dtype="bfloat16")
    # The stage is finished: this loads its weights.
    run_stage(StageRun(repeated, recipe.stages[0], recipe, rows, [], tmp_path / "1-joint"))
    assert all(torch.equal(tensor, by_name(repeated)[name]) for name, tensor in by_name(model).items())


def test_tensorboard_gets_the_metrics(tiny_run, tmp_path):
    if not os.environ.get("CI"):
        pytest.importorskip("tensorboard", reason="the dev extra is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = tiny_run.train(tmp_path / "run", report_to=["tensorboard"])
    files = list(output.rglob("events.out.tfevents.*"))
    assert files, sorted(output.rglob("*"))
    events = EventAccumulator(str(files[0].parent))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert "train/loss" in tags and "train/loss/text" in tags and "train/gate_entropy" in tags
