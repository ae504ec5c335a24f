"""Losses by domain equal those of plain transformers, and the intervals cover what they should."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tiny_models import save_adapter, shake_gate
from training_fixtures import NAMES, RecordingProgress, TinyRun
from ultrafuser.data.collate import collate_rows
from ultrafuser.data.templates import Renderer
from ultrafuser.errors import CheckpointError
from ultrafuser.evaluate.intervals import Stratum, difference, estimate
from ultrafuser.evaluate.losses import (
    RowLoss,
    by_stratum,
    fused_losses,
    group_losses,
    specialist_losses,
)
from ultrafuser.specialists import fuse
from ultrafuser.train.features import FeatureStore
from ultrafuser.train.rows import read_sources


@pytest.fixture(scope="module")
def rows_and_model(tiny_run: TinyRun, tmp_path_factory) -> tuple[Any, list, FeatureStore]:
    folder = tmp_path_factory.mktemp("losses")
    recipe = tiny_run.recipe(folder)
    model, tokenizer = fuse(recipe)
    shake_gate(model, scale=3.0)
    renderer = Renderer(tokenizer, model.config.chat_templates, 128)
    rows = read_sources(recipe.data.train, renderer, RecordingProgress(), "test")
    return model, rows, FeatureStore.build(model, rows, folder / "features")


def oracle(plain: Any, rows: list, template: int) -> list[RowLoss]:
    """Row by row, with transformers alone."""
    out = []
    for row in rows:
        with torch.no_grad():
            logits = plain(torch.tensor([row.input_ids[template]])).logits[0, list(row.response_index[template])]
        nats = torch.nn.functional.cross_entropy(logits.double(), torch.tensor(row.labels), reduction="sum").item()
        out.append(RowLoss(row.domain, nats, len(row.labels)))
    return out


def assert_same(losses: list[RowLoss], expected: list[RowLoss]) -> None:
    assert [(r.domain, r.tokens) for r in losses] == [(r.domain, r.tokens) for r in expected]
    assert [r.nats for r in losses] == pytest.approx([r.nats for r in expected], rel=1e-4)


def test_each_specialist_alone_equals_plain_transformers(tiny_run, rows_and_model):
    model, rows, store = rows_and_model
    losses = specialist_losses(store, model.config.names)
    assert list(losses) == list(NAMES)
    for k, name in enumerate(NAMES):
        plain = AutoModelForCausalLM.from_pretrained(tiny_run.folder / name).eval()
        assert_same(losses[name], oracle(plain, rows, k))


@pytest.mark.parametrize("mixing", ["logits", "probabilities"])
def test_the_fused_model_from_features_equals_its_forward_pass(rows_and_model, mixing):
    model, rows, store = rows_and_model
    model.config.mixing = mixing
    losses, weights = fused_losses(model, store)
    for row, loss, mean in zip(rows, losses, weights, strict=True):
        with torch.no_grad():
            out = model(**collate_rows([row]), output_gate_weights=True)
        assert loss.nats == pytest.approx(out.token_loss.sum().item(), rel=1e-4)
        assert mean == pytest.approx(out.gate_weights[0].mean(0).tolist(), abs=1e-5)
        assert sum(mean) == pytest.approx(1, abs=1e-5)


def test_equal_weights_are_the_mean_of_the_probabilities(rows_and_model):
    model, rows, store = rows_and_model
    model.config.mixing = "probabilities"
    losses, weights = fused_losses(model, store, uniform=True)
    for item, loss in zip(store, losses, strict=True):
        assert loss.nats == pytest.approx(-item.log_probs.double().exp().mean(1).log().sum().item(), rel=1e-5)
    assert np.array(weights) == pytest.approx(1 / 3)


def test_one_plain_model_on_the_rows_of_a_template(tiny_run, rows_and_model):
    model, rows, _ = rows_and_model
    plain = AutoModelForCausalLM.from_pretrained(tiny_run.folder / "code").eval()
    for template in range(3):
        losses = group_losses(model.groups[1], rows, model.heads()[1], template=template, progress=RecordingProgress())
        assert_same(losses, oracle(plain, rows, template))


def test_the_bare_base_of_adapters(tiny_run, tmp_path):
    recipe = tiny_run.recipe(tmp_path, specialists=tiny_run.adapter_recipe(tmp_path, save_adapter))
    model, tokenizer = fuse(recipe)
    renderer = Renderer(tokenizer, model.config.chat_templates, 128)
    rows = read_sources(recipe.data.train, renderer, RecordingProgress(), "test")
    base = AutoModelForCausalLM.from_pretrained(tiny_run.folder / "text").eval()
    assert_same(group_losses(model.groups[0], rows, model.heads()[0]), oracle(base, rows, 0))
    store = FeatureStore.build(model, rows, tmp_path / "features")
    for name, losses in specialist_losses(store, NAMES).items():
        assert_same(losses, oracle(model.specialist(name), rows, 0))


# ---------------------------------------------------------------- means and intervals


def random_losses(count: int, mean: float, seed: int = 0) -> Stratum:
    """Nats and tokens of some rows."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, 80, size=count)
    nats = tokens * rng.normal(mean, 0.3, size=count)
    return Stratum(
        {str(i): float(n) for i, n in enumerate(nats)},
        {str(i): float(t) for i, t in enumerate(tokens)},
    )


def test_rows_weigh_by_their_tokens(rows_and_model):
    _, rows, _ = rows_and_model
    first, second, third = rows[0], rows[1], next(row for row in rows if row.domain != rows[0].domain)
    losses = [
        RowLoss(row.domain, nats, count)
        for row, nats, count in ((first, 10.0, 10), (second, 60.0, 30), (third, 5.0, 50))
    ]
    strata = by_stratum([first, second, third], losses)
    assert estimate([strata[first.domain]])["value"] == pytest.approx(70 / 40)
    assert strata[first.domain].weights == {first.row_id: 10, second.row_id: 30}
    assert estimate([strata[third.domain]]) == {"value": 0.1, "ci95": [0.1, 0.1]}


def test_intervals_cover_the_mean_and_shrink_with_the_rows():
    few, many = (estimate([random_losses(n, 2.0)]) for n in (20, 500))
    for cell in (few, many):
        assert cell["ci95"][0] < cell["value"] < cell["ci95"][1]
    assert many["ci95"][1] - many["ci95"][0] < 0.5 * (few["ci95"][1] - few["ci95"][0])


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    covered = 0
    for seed in range(100):
        low, high = estimate([random_losses(60, 2.0, seed)])["ci95"]
        covered += low < 2.0 < high
    assert 85 <= covered <= 100


def test_a_paired_difference_is_far_sharper_than_two_intervals():
    losses = random_losses(50, 2.0)
    better = Stratum({row: nats - 0.05 * losses.weights[row] for row, nats in losses.totals.items()}, losses.weights)
    pair = difference([better], [losses])
    assert pair["difference"] == pytest.approx(-0.05)
    assert pair["ci95"] == pytest.approx([-0.05, -0.05])
    assert difference([losses], [losses]) == {"difference": 0.0, "ci95": [0.0, 0.0]}


def test_intervals_are_seeded():
    losses = [random_losses(30, 1.0)]
    assert estimate(losses) == estimate(losses)
    assert estimate(losses, seed=1) != estimate(losses)


def test_a_loss_that_is_nan_names_its_row(rows_and_model):
    _, rows, store = rows_and_model
    losses = specialist_losses(store, NAMES)["text"]
    losses[3] = RowLoss(losses[3].domain, float("nan"), losses[3].tokens)
    with pytest.raises(CheckpointError, match=rf"the loss of row {rows[3].row_id} .* is NaN.*dtype float32"):
        by_stratum(rows, losses)
