"""Temperatures of specialists: found where they were planted, kept where there is little to go by, and what follows of them."""

from __future__ import annotations

import json

import pytest
import torch
from test_stages import fused_and_rows
from typer.testing import CliRunner

from tiny_models import VOCAB, fuse, naive_mix, tiny, tokens
from training_fixtures import GATE, JOINT, NAMES, RecordingProgress, losses, trained_weights
from ultrafuser.cli.main import app
from ultrafuser.data.templates import Rendered
from ultrafuser.errors import CheckpointError, RecipeError
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.recipe import JointStage, load_recipe
from ultrafuser.specialists import load
from ultrafuser.train import calibrate as module
from ultrafuser.train.calibrate import calibrate
from ultrafuser.train.features import FeatureStore
from ultrafuser.train.run import train
from ultrafuser.train.stages import MEASURED, StageRun, run_stage

PLANTED = {"text": 1.3, "code": 0.8, "math": 1.0}


def opinionated() -> UltraFuserForCausalLM:
    """Three tiny specialists that are sure of what they say."""
    models = [tiny(seed=seed) for seed in range(3)]
    for model in models:
        model.get_output_embeddings().weight.data *= 12
    return fuse(models, NAMES)


@torch.no_grad()
def planted_rows(
    model: UltraFuserForCausalLM, domain: str, temperature: float, rows: int = 48, length: int = 48
) -> list[Rendered]:
    """Answers that the specialist of a domain draws at a temperature."""
    k, generator = NAMES.index(domain), torch.Generator().manual_seed(7)
    group, head = model.groups[k], model.heads()[k]
    ids = tokens(rows, 4, seed=k)
    for _ in range(length):
        z = head.logits(group(ids[None])[0][:, -1])
        ids = torch.cat([ids, torch.multinomial((z / temperature).softmax(-1), 1, generator=generator)], -1)
    return [
        Rendered(f"{domain}-{i}", domain, (tuple(row[:-1]),) * 3, (tuple(range(3, len(row) - 1)),) * 3, tuple(row[4:]))
        for i, row in enumerate(ids.tolist())
    ]


def test_each_specialist_gets_the_temperature_at_which_its_domain_was_written():
    model = opinionated()
    rows = [row for domain, temperature in PLANTED.items() for row in planted_rows(model, domain, temperature)]
    temperatures = calibrate(model, rows)
    assert temperatures == pytest.approx(list(PLANTED.values()), rel=0.06)
    assert temperatures == calibrate(model, rows)
    assert not model.training and model.config.temperatures == [1.0] * 3  # nothing is set here


def test_it_is_the_minimum_of_the_loss():
    model = opinionated()
    rows = planted_rows(model, "text", 1.3)
    best = calibrate(model, rows)[0]

    def loss(temperature: float) -> float:
        model.config.set_temperatures([temperature, 1.0, 1.0])
        states, labels = module.response_states(model.groups[0], rows, 0, [0])
        return -model.specialist_log_probs([states] * 3, labels)[:, 0].mean().item()

    with torch.no_grad():
        assert loss(best) < min(loss(1.0), loss(best * 1.1), loss(best / 1.1))


def test_specialists_without_rows_of_their_domain_or_with_few_tokens_keep_1():
    model = opinionated()
    rows = planted_rows(model, "text", 1.3)
    progress = RecordingProgress()
    assert calibrate(model, rows, progress=progress) == [pytest.approx(1.3, rel=0.06), 1.0, 1.0]
    assert progress.news == ["temperature 1 for code, math: fewer than 256 response tokens of their domains"]
    few = rows[: module.FEWEST_TOKENS // 48]
    assert sum(len(row.labels) for row in few) < module.FEWEST_TOKENS
    assert calibrate(model, few) == [1.0] * 3


def test_no_more_rows_are_read_than_needed(monkeypatch):
    monkeypatch.setattr(module, "MOST_TOKENS", 100)
    assert len(module._sample_rows(planted_rows(opinionated(), "text", 1.0), "text", 0)) == 3  # of 48 tokens each


@pytest.mark.parametrize("losses, expected", [
    ([9, 8, 7, 6, 5, 4, 3, 2, 1], 2.0), ([1, 2, 3, 4, 5, 6, 7, 8, 9], 0.5),  # beyond what is tried
    ([16, 9, 4, 1, 0, 1, 4, 9, 16], 1.0), ([20.25, 12.25, 6.25, 2.25, 0.25, 0.25, 2.25, 6.25, 12.25], 2**0.125),
    ([2, 2, 2, 2, 1, 1, 2, 2, 2], 2**0.125),
])  # fmt: skip
def test_between_those_tried_the_loss_is_a_parabola(losses, expected):
    assert module._parabola_minimum(losses) == pytest.approx(expected, abs=1e-3)


# ---------------------------------------------------------------- what follows of them


@pytest.mark.parametrize("mixing", ["logits", "probabilities"])
def test_logits_are_divided_by_them_before_they_are_mixed(mixing):
    model = fuse([tiny(seed=seed) for seed in range(2)], mixing=mixing)
    ids = tokens(2, 6)
    states = model.specialist_states(ids)
    log_w = model.gate(states)
    plain = [head.logits(tensor) for tensor, head in zip(states, model.heads(), strict=True)]
    model.config.set_temperatures([0.5, 2.0])
    cold, hot = plain[0] / 0.5, plain[1] / 2.0
    expected = naive_mix([cold, hot], log_w.exp(), mixing).float()
    torch.testing.assert_close(model(input_ids=ids).logits, expected)
    loss = model(input_ids=ids, labels=ids).loss
    by_hand = -expected.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).mean()
    torch.testing.assert_close(loss, by_hand)


def test_a_checkpoint_keeps_them(tiny_run, tmp_path):
    folder = train(tiny_run.recipe(tmp_path / "run"))
    model, _ = load(folder)
    assert model.config.temperatures == [1.0] * 3  # too few tokens to tell
    model.config.set_temperatures([1.25, 1.0, 0.8])
    model.save_pretrained(tmp_path / "again")
    reloaded = UltraFuserForCausalLM.from_pretrained(tmp_path / "again")
    assert reloaded.config.temperatures == [1.25, 1.0, 0.8]
    torch.testing.assert_close(reloaded(input_ids=tokens(1, 5)).logits, model(input_ids=tokens(1, 5)).logits)


def test_info_and_the_model_card_show_them(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FEWEST_TOKENS", 1)
    folder = train(tiny_run.recipe(tmp_path / "run"))
    temperatures = load(folder)[0].config.temperatures
    printed = CliRunner().invoke(app, ["info", str(folder)]).output
    pairs = ", ".join(f"{name} {value:g}" for name, value in zip(NAMES, temperatures, strict=True))
    assert f"temperatures: {pairs}\n" in printed
    card = (folder / "README.md").read_text()
    assert all(f"| {value:g} |\n" in card for value in temperatures)


@pytest.mark.parametrize("bad", [0, -1.0, float("inf"), "warm", None, True])
def test_a_temperature_is_a_number_above_zero(bad):
    model = fuse([tiny(seed=seed) for seed in range(2)], ["a", "b"])
    with pytest.raises(CheckpointError, match=r"specialist b: temperature is .*, expected a number above 0"):
        model.config.set_temperatures([1.0, bad])


def test_the_gate_stage_sets_them_unless_it_is_told_not_to(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FEWEST_TOKENS", 1)
    model, rows, recipe = fused_and_rows(tiny_run, tmp_path)
    run_stage(StageRun(model, recipe.stages[0], recipe, rows, [], tmp_path / "1-gate"))
    set_here = model.config.temperatures
    assert set_here == json.loads((tmp_path / "1-gate" / MEASURED).read_text()) != [1.0] * 3
    model, rows, recipe = fused_and_rows(tiny_run, tmp_path, stages=[GATE | {"calibrate": False}])
    run_stage(StageRun(model, recipe.stages[0], recipe, rows, [], tmp_path / "2-gate"))
    assert model.config.temperatures == [1.0] * 3


def test_a_temperature_at_the_limit_is_pointed_out(tiny_run, tmp_path, monkeypatch):
    temperatures = iter([[1.1, 0.9, 1.0], [0.5, 1.0, 2.0]])
    monkeypatch.setattr("ultrafuser.train.stages.calibrate", lambda *args, **options: next(temperatures))
    for name in ("plain", "odd"):
        spoken = RecordingProgress()
        tiny_run.train(tmp_path / name, progress=spoken)
        notes = [line for line in spoken.news if "at the limit of the temperatures tried" in line]
        assert [note.partition(":")[0] for note in notes] == ([] if name == "plain" else ["text, math"])


def test_what_a_stage_began_with_is_not_measured_again(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FEWEST_TOKENS", 1)
    uninterrupted = tiny_run.train(tmp_path / "whole", [GATE, JOINT])
    expected = load(uninterrupted / "fused")[0].config.temperatures
    assert expected != [1.0] * 3

    def once_more(*args, **options):
        raise AssertionError("measured again")

    cut = tmp_path / "cut"
    (cut / "1-gate").mkdir(parents=True)
    (cut / "1-gate" / MEASURED).write_text(json.dumps(expected))
    monkeypatch.setattr("ultrafuser.train.stages.calibrate", once_more)
    tiny_run.train(cut, [GATE, JOINT])
    assert losses(cut) == losses(uninterrupted)
    assert all(
        torch.equal(tensor, trained_weights(cut)[name]) for name, tensor in trained_weights(uninterrupted).items()
    )


@pytest.mark.parametrize("mixing", ["logits", "probabilities"])
def test_the_cache_changes_nothing_at_other_temperatures(tiny_run, tmp_path, monkeypatch, mixing):
    monkeypatch.setattr(module, "FEWEST_TOKENS", 1)
    cached = tiny_run.train(tmp_path / "cached", mixing=mixing, cache_features=True)
    plain = tiny_run.train(tmp_path / "plain", mixing=mixing, cache_features=False)
    for (*_, ours), (*_, theirs) in zip(losses(cached), losses(plain), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_a_feature_cache_serves_all_temperatures(tmp_path, monkeypatch):
    model = opinionated()
    rows = [row for domain in NAMES for row in planted_rows(model, domain, 1.0, rows=3, length=12)]
    plain = FeatureStore.build(model, rows, tmp_path / "f")
    log_probs_before = plain.log_probs.clone()
    model.config.set_temperatures([1.5, 1.0, 0.7])
    monkeypatch.setattr(model, "specialist_states", None)  # no specialist runs again
    warm = FeatureStore.build(model, rows, tmp_path / "f")
    assert torch.equal(FeatureStore.build(model, rows, tmp_path / "f").log_probs, warm.log_probs)
    monkeypatch.undo()
    fresh = FeatureStore.build(model, rows, tmp_path / "g")
    torch.testing.assert_close(warm.log_probs, fresh.log_probs)
    assert torch.equal(plain.log_probs, log_probs_before) and not torch.equal(warm.log_probs, log_probs_before)
    assert torch.equal(warm.log_probs[:, 1], log_probs_before[:, 1])


def test_the_joint_stage_does_not_measure_them():
    with pytest.raises(RecipeError, match="calibrate: unknown key for name 'joint'. 'gate' would take it"):
        load_recipe({"stages": [{"name": "joint", "calibrate": True}]})
    assert "calibrate" not in JointStage(name="joint").model_dump()


def test_vocabularies_are_read_without_padding_rows():
    """Padding rows of an embedding table are no tokens: they must not take part in the softmax."""
    model = opinionated()
    assert {head.weight.shape[0] for head in model.heads()} == {VOCAB}
    rows = planted_rows(model, "text", 1.3)
    table = model.groups[0].model.get_output_embeddings()
    expected = calibrate(model, rows)[0]
    table.weight.data = torch.cat([table.weight.data, torch.full((8, table.weight.shape[1]), 50.0)])
    assert calibrate(model, rows)[0] == pytest.approx(expected)
