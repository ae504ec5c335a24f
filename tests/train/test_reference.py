"""The joint stage with `kl_coef`: specialists are held to what they predicted before, where they were right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tiny_models import save_adapter
from training_fixtures import (
    GATE,
    JOINT,
    Interruption,
    RecordingProgress,
    StopAt,
    TinyRun,
    losses,
    metrics,
    trained_weights,
)
from ultrafuser.data.collate import collate_rows
from ultrafuser.data.templates import Renderer
from ultrafuser.errors import RecipeError
from ultrafuser.model import loss as loss_module
from ultrafuser.model.loss import Head, select_responses
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.recipe import load_recipe
from ultrafuser.specialists import fuse
from ultrafuser.train import reference
from ultrafuser.train.reference import weighted_kl
from ultrafuser.train.rows import read_sources

FULL = {"name": "joint", "steps": 3, "samples_per_domain": 2, "specialists": "full", "lr": 0.005}


def states_of(model: UltraFuserForCausalLM, rows: list) -> tuple[list[torch.Tensor], torch.Tensor]:
    inputs = collate_rows(rows)
    states = model.specialist_states(inputs["specialist_input_ids"])
    labelled = inputs["labels"] != -100
    return select_responses(states, inputs["response_index"], labelled), inputs["labels"][labelled]


@torch.no_grad()
def divergence(before: UltraFuserForCausalLM, after: UltraFuserForCausalLM, rows: list) -> float:
    """Mean over tokens of sum_k q_k(y) KL(q_k || p_k), without any trick."""
    total = 0.0
    (old_states, labels), (new_states, _) = states_of(before, rows), states_of(after, rows)
    for old, new, old_head, new_head in zip(old_states, new_states, before.heads(), after.heads(), strict=True):
        q, p = old_head.logits(old).softmax(-1), new_head.logits(new).softmax(-1)
        kl = (q * (q.log() - p.log())).sum(-1)
        total += float((q.gather(1, labels[:, None])[:, 0] * kl).sum())
    return total / len(labels)


@pytest.mark.parametrize("chunk", [8, 10**6])
@pytest.mark.parametrize("shape", [(1.0, None, 1.0), (0.5, 3.0, 0.7)])
def test_value_and_gradients_are_those_of_plain_autograd(monkeypatch, chunk, shape):
    monkeypatch.setitem(loss_module._CHUNK_VALUES, "cpu", chunk)
    torch.manual_seed(0)
    n, width, size = 7, 4, 6
    state, before = torch.randn(n, width, dtype=torch.float64, requires_grad=True), torch.randn(n, width).double()
    table = torch.randn(size, width, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(size, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([0.5, 0.0, 1.0, 0.009, 0.011, 0.3, 0.9], dtype=torch.float64)
    head = Head(table, bias, *shape)
    old = Head(torch.randn(size, width).double(), None, *shape)
    scale, softcap, temperature = shape

    def log_p(h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | float) -> torch.Tensor:
        z = scale * (h @ weight.T + bias)
        return ((softcap * torch.tanh(z / softcap) if softcap else z) / temperature).log_softmax(-1)

    q = log_p(before, old.weight, 0.0)
    kl = (q.exp() * (q - log_p(state, table, bias))).sum(-1)
    expected = (torch.where(weights >= 0.01, weights, 0.0) * kl).sum()
    value = weighted_kl(state, head, before, old, weights)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    leaves = [state, table, bias]
    for gradient, plain in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(gradient, plain, atol=1e-6, rtol=1e-6)


def test_no_token_counts():
    state = torch.randn(3, 4, requires_grad=True)
    head = Head(torch.randn(6, 4))
    value = weighted_kl(state, head, torch.randn(3, 4), head, torch.zeros(3))
    assert float(value) == 0
    assert not torch.autograd.grad(value, state)[0].any()


@pytest.mark.parametrize(
    ("stage", "mixing"), [(JOINT, "probabilities"), (FULL, "logits")], ids=["lora-probabilities", "full-logits"]
)
def test_specialists_stay_nearer_to_what_they_were(tiny_run: TinyRun, tmp_path: Path, stage: dict, mixing: str) -> None:
    """`kl` in the metrics is the divergence on the rows of the step, zero at the first, and a larger coefficient lowers it."""
    recipe = tiny_run.recipe(tmp_path / "before", [GATE], mixing=mixing)
    before, tokenizer = fuse(recipe)
    renderer = Renderer(tokenizer, before.config.chat_templates, recipe.data.max_length)
    rows = list(read_sources(recipe.data.train, renderer, RecordingProgress(), "training"))
    moved, first = {}, {}
    for coefficient in (0, 2000):  # large, since these models give every label about 1/72
        steps = stage | {"steps": 6, "kl_coef": coefficient, "samples_per_domain": 5}  # all rows in each step
        output = tiny_run.train(tmp_path / str(coefficient), [GATE | {"calibrate": False}, steps], mixing=mixing)
        after = UltraFuserForCausalLM.from_pretrained(output / "fused")
        moved[coefficient] = divergence(before, after, rows)
        first[coefficient] = [row for row in metrics(output) if row["stage"] == "joint"]
    assert first[0][0]["loss"] == pytest.approx(first[2000][0]["loss"], abs=1e-6)
    assert "kl" not in first[0][0]
    assert first[2000][0]["kl"] == pytest.approx(0, abs=1e-6)
    assert first[2000][-1]["kl"] > 1e-5
    assert moved[2000] < moved[0] / 2


def test_the_logged_divergence_is_the_plain_one(tiny_run: TinyRun, tmp_path: Path, monkeypatch) -> None:
    """The last step's value belongs to the weights before it: those of a run that is one step shorter at a constant rate."""
    monkeypatch.setattr(reference, "_MIN_PROBABILITY", 0.0)
    stage = JOINT | {"kl_coef": 1, "samples_per_domain": 5, "schedule": "constant"}
    outputs = {
        steps: tiny_run.train(tmp_path / str(steps), [GATE | {"calibrate": False}, stage | {"steps": steps}])
        for steps in (2, 3)
    }
    recipe = tiny_run.recipe(tmp_path / "before", [GATE])
    before, tokenizer = fuse(recipe)
    renderer = Renderer(tokenizer, before.config.chat_templates, recipe.data.max_length)
    rows = list(read_sources(recipe.data.train, renderer, RecordingProgress(), "training"))
    after = UltraFuserForCausalLM.from_pretrained(outputs[2] / "fused")
    logged = metrics(outputs[3])[-1]["kl"]
    assert logged == pytest.approx(divergence(before, after, rows), rel=1e-3)


def test_accumulation_gives_one_trajectory(tiny_run: TinyRun, tmp_path: Path) -> None:
    runs = {
        size: metrics(tiny_run.train(tmp_path / str(size), [GATE, JOINT | {"kl_coef": 2, "rows_per_device": size}]))
        for size in (1, 2, None)
    }
    for size in (1, 2):
        for row, whole in zip(runs[size], runs[None], strict=True):
            assert row["loss"] == pytest.approx(whole["loss"], abs=1e-5)
            assert row.get("kl", 0) == pytest.approx(whole.get("kl", 0), abs=1e-5)


def test_a_resumed_run_keeps_its_reference(tiny_run: TinyRun, tmp_path: Path) -> None:
    specialists = tiny_run.adapter_recipe(tmp_path, save_adapter)  # which the stage changes in place
    stages, changes = [GATE, JOINT | {"kl_coef": 2}], {"save_every": 1, "keep_best": False, "specialists": specialists}
    whole = tiny_run.train(tmp_path / "whole", stages, **changes)
    with pytest.raises(Interruption):
        tiny_run.train(tmp_path / "stopped", stages, progress=StopAt("joint", 3), **changes)
    resumed = tiny_run.train(tmp_path / "stopped", stages, resume=True, **changes)
    assert losses(resumed) == losses(whole)
    expected = trained_weights(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trained_weights(resumed).items())


def test_validation_rows_need_no_reference(tiny_run: TinyRun, tmp_path: Path) -> None:
    data = {"validation": [str(tiny_run.folder / "held-out.jsonl")]}
    output = tiny_run.train(tmp_path / "run", [GATE, JOINT | {"kl_coef": 1}], data=data, cache_features=False)
    assert any("eval_loss" in row for row in metrics(output))
    assert not (output / "features" / "validation").exists()


def test_divided_weights_are_refused(tiny_run: TinyRun, tmp_path: Path) -> None:
    fields = tiny_run.fields(tmp_path, [GATE, JOINT | {"kl_coef": 1}], parallel={"shard": True})
    with pytest.raises(
        RecipeError, match=r"got both 'kl_coef' and 'parallel.shard', expected one of them. Set kl_coef to 0"
    ):
        load_recipe(fields)
