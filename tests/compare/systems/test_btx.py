"""BTX against plain models and against its equation, its training and its files."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tiny_models import tiny, tokens
from training_fixtures import Interruption, StopAt, metrics
from ultrafuser.compare.systems.btx_model import (
    BALANCE_WEIGHT,
    BtxTrainer,
    RoutedMlp,
    as_fused,
    balance_loss,
    build_btx,
    load_btx,
    save_btx,
    train_btx,
)
from ultrafuser.data.balance import BalancedBatchSampler
from ultrafuser.data.templates import Rendered
from ultrafuser.errors import CheckpointError, UltraFuserError
from ultrafuser.evaluate.lm.parameters import count_parameters
from ultrafuser.evaluate.losses import group_losses
from ultrafuser.model.shared_base import SpecialistGroup
from ultrafuser.recipe import Recipe, load_recipe

IDS = tokens(2, 9)


def rows(number: int = 4) -> list[Rendered]:
    """Rows of two domains and unequal lengths. Each domain's answers are one token again and again."""
    out = []
    for d, domain in enumerate(("text", "code")):
        for i in range(number):
            prompt, answer = tokens(1, 3 + i, seed=i)[0].tolist(), [10 + d] * (2 + i)
            ids = (*prompt, *answer[:-1])
            index = tuple(range(len(prompt) - 1, len(ids)))
            out.append(Rendered(f"{domain}-{i}", domain, (ids,), (index,), tuple(answer)))
    return out


def three(kind: str = "llama", **changes: Any) -> list[Any]:
    return [tiny(kind, seed, **changes) for seed in range(3)]


def routed(model: Any) -> list[RoutedMlp]:
    return [layer.mlp for layer in model.model.layers]


class Scripted(nn.Module):
    """A router that gives the same scores to every token."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.scores = torch.tensor(scores)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scores.expand(len(x), -1)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "gemma"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_identical_specialists_are_the_plain_model_whatever_the_router(kind, size):
    plain = tiny(kind, 5)
    model = build_btx([tiny(kind, 5) for _ in range(size)], seed=1)
    for mlp in routed(model):
        nn.init.normal_(mlp.router.weight, std=3.0)
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, atol=1e-4, rtol=1e-4)
    actual, expected = (lm.generate(IDS, max_new_tokens=5, do_sample=False) for lm in (model, plain))
    assert torch.equal(actual, expected)


@torch.no_grad()
@pytest.mark.parametrize("k", [0, 1, 2])
def test_a_one_hot_router_gives_that_specialists_mlp(k):
    models = three()
    x = torch.randn(2, 5, 32)
    for i, mlp in enumerate(routed(build_btx(models))):
        mlp.router = Scripted([0.0 if j == k else -float("inf") for j in range(3)])
        torch.testing.assert_close(mlp(x), models[k].model.layers[i].mlp(x))


@torch.no_grad()
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_each_token_is_the_weighted_sum_of_its_chosen_mlps(top_k):
    """The equation, token by token."""
    mlp = routed(build_btx(three(), top_k=top_k))[0]
    nn.init.normal_(mlp.router.weight, std=1.0)
    x = torch.randn(3, 4, 32)
    actual = mlp(x)
    for b in range(3):
        for t in range(4):
            scores = mlp.router.weight @ x[b, t]
            best = scores.argsort(descending=True)[:top_k].tolist()
            weights = scores[best].softmax(0)
            expected = sum(w * mlp.mlps[k](x[b, t]) for w, k in zip(weights, best, strict=True))
            torch.testing.assert_close(actual[b, t], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_everything_but_the_mlps_is_the_mean():
    models = three(tie_word_embeddings=True)
    initial = [copy.deepcopy(lm.state_dict()) for lm in models]
    merged = build_btx(models)
    for name, parameter in merged.named_parameters():
        if ".mlp." not in name:
            torch.testing.assert_close(parameter, sum(state[name] for state in initial) / 3, msg=name)
    for i, mlp in enumerate(routed(merged)):
        for k in range(3):
            for name, parameter in mlp.mlps[k].named_parameters():
                assert torch.equal(parameter, initial[k][f"model.layers.{i}.mlp.{name}"])
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    for lm, state in zip(models, initial, strict=True):  # the specialists are left alone
        assert all(torch.equal(tensor, state[name]) for name, tensor in lm.state_dict().items())


def test_routers_are_seeded_and_independent_of_other_draws():
    torch.manual_seed(3)
    first = routed(build_btx(three(), seed=1))[1].router.weight
    second, third = (routed(build_btx(three(), seed=seed))[1].router.weight for seed in (1, 2))
    assert torch.equal(first, second) and not torch.equal(first, third)


def test_total_and_active_parameters():
    models = three()
    plain = count_parameters(models[0])
    assert plain["total"] == plain["active"] == sum(p.numel() for p in models[0].parameters())
    mlps, routers = 2 * 3 * 32 * 48, 2 * 3 * 32  # two layers, three matrices, three scores
    counts = count_parameters(build_btx(models))
    assert counts == {"total": plain["total"] + 2 * mlps + routers, "active": plain["total"] + mlps + routers}
    dense = count_parameters(build_btx(models, top_k=3))
    assert dense["active"] == dense["total"] == counts["total"]


def test_models_that_cannot_be_built_are_errors():
    with pytest.raises(UltraFuserError, match="specialist number 1 has other weights than the first"):
        build_btx([tiny(), tiny(intermediate_size=32)])
    with pytest.raises(UltraFuserError, match=r"GPT2LMHeadModel has no `model.layers\[i\].mlp`"):
        build_btx([tiny("gpt2")])


# ---------------------------------------------------------------- training


def test_balance_is_one_where_all_are_used_alike_and_more_where_not():
    model = build_btx(three()).train()
    mask = torch.ones_like(IDS, dtype=torch.bool)
    counts = {}
    for name, scores in {"one": [9.0, 0.0, -9.0], "alike": [0.0, 0.0, 0.0]}.items():
        for mlp in routed(model):
            mlp.router = Scripted(scores)
        model(IDS)
        counts[name] = balance_loss(model, mask).item()
    assert counts["one"] == pytest.approx(1.5, abs=0.01)  # two of three slots: 3 * (1/2 * 1)
    assert counts["alike"] == pytest.approx(1.0)


def test_balance_leaves_padding_out():
    model = build_btx(three()).train()
    longer = torch.cat([IDS, torch.full((2, 4), 7)], dim=1)
    mask = (torch.arange(longer.shape[1]) < IDS.shape[1]).expand(2, -1)
    model(IDS)
    alone = balance_loss(model, torch.ones_like(IDS, dtype=torch.bool))
    model(longer)
    torch.testing.assert_close(balance_loss(model, mask), alone)


def recipe(steps: int = 5, **stage: Any) -> Recipe:
    """The joint stage on all weights of one model."""
    fields = {"name": "joint", "steps": steps, "samples_per_domain": 2, "lr": 0.01, **stage}
    return load_recipe({"specialists": [{"name": "btx", "model": "none"}], "stages": [fields], "device": "cpu"})


def train(mixture: Any, folder: Path, recipe: Recipe, progress: Any = None, weight: float = BALANCE_WEIGHT) -> Any:
    """Train a mixture in place."""
    trainer = type("Trainer", (BtxTrainer,), {"balance_weight": weight})
    train_btx(as_fused(mixture), recipe, rows(), folder, progress, trainer)
    return mixture


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_training_moves_everything_and_lowers_the_loss(tmp_path):
    model = build_btx(three())
    initial = weights(model)
    group = SpecialistGroup(model, ["btx"])
    start = group_losses(group, rows(), group.head(72))
    train(model, tmp_path, recipe(steps=15))
    end = group_losses(group, rows(), group.head(72))
    assert sum(r.nats for r in end) < 0.5 * sum(r.nats for r in start)
    assert not [name for name, parameter in model.named_parameters() if torch.equal(parameter, initial[name])]
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 16)) and {line["stage"] for line in lines} == {"joint"}
    assert lines[-1]["loss"] < lines[0]["loss"]
    model.eval()
    with torch.no_grad():
        model(IDS)
    assert all(layer.scores is None for layer in routed(model))  # outside training nothing is kept


@pytest.mark.parametrize("rows_per_device", [8, 1])
def test_training_equals_a_plain_loop(tmp_path, rows_per_device):
    """Logits of transformers, cross entropy row by row, all rows of a batch at once, the balance loss of the batches."""
    mixture, oracle, data = build_btx(three()), build_btx(three()).train(), rows()
    train(mixture, tmp_path, recipe(rows_per_device=rows_per_device), weight=0.5)
    lengths = [row.num_tokens for row in data]
    sampler = BalancedBatchSampler([row.domain for row in data], 2, 5, rows_per_device=rows_per_device, lengths=lengths)
    batches = iter(sampler)
    optimizer = torch.optim.AdamW(oracle.parameters(), weight_decay=0.0)
    for step in range(5):
        optimizer.param_groups[0]["lr"] = 0.01 * 0.5 * (1 + math.cos(math.pi * step / 5))
        nats: dict[str, list[torch.Tensor]] = {"text": [], "code": []}
        balance = []
        for indices in (next(batches) for _ in range(sampler.num_accumulation)):
            micro = [data[i] for i in indices]
            longest = max(row.num_tokens for row in micro)
            ids = torch.tensor([[*row.input_ids[0], *[0] * (longest - row.num_tokens)] for row in micro])
            logits = oracle(ids).logits
            for row, row_logits in zip(micro, logits, strict=True):
                predicted = row_logits[list(row.response_index[0])]
                nats[row.domain].append(
                    nn.functional.cross_entropy(predicted, torch.tensor(row.labels), reduction="none")
                )
            mask = torch.tensor([[t < row.num_tokens for t in range(longest)] for row in micro])
            balance.append(balance_loss(oracle, mask))
        loss = torch.cat([values for domain in nats.values() for values in domain]).mean()
        optimizer.zero_grad()
        (loss + 0.5 * torch.stack(balance).mean()).backward()
        nn.utils.clip_grad_norm_(oracle.parameters(), 1.0)
        optimizer.step()
        line = metrics(tmp_path)[step]
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-4)
        for domain, values in nats.items():
            assert line[f"loss/{domain}"] == pytest.approx(torch.cat(values).mean().item(), rel=1e-4)
    for name, parameter in mixture.named_parameters():
        torch.testing.assert_close(parameter, dict(oracle.named_parameters())[name], atol=2e-3, rtol=1e-2, msg=name)


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, stop):
    """Dropout draws random numbers, which a resumed run must draw alike."""

    def fresh() -> Any:
        return build_btx(three(attention_dropout=0.3))

    saving = recipe().model_copy(update={"save_every": 2})
    uninterrupted = train(fresh(), tmp_path / "uninterrupted", saving)
    with pytest.raises(Interruption):
        train(fresh(), tmp_path / "resumed", saving, progress=StopAt("joint", stop))
    resumed = train(fresh(), tmp_path / "resumed", saving)
    actual, reference = weights(resumed), weights(uninterrupted)
    assert [name for name in actual if not torch.equal(actual[name], reference[name])] == []
    assert metrics(tmp_path / "resumed") == metrics(tmp_path / "uninterrupted")


def test_a_finished_run_is_loaded(tmp_path):
    first = train(build_btx(three()), tmp_path, recipe())
    lines = metrics(tmp_path)
    second = train(build_btx(three()), tmp_path, recipe(), progress=StopAt("joint", 1))
    actual, reference = weights(second), weights(first)
    assert [name for name in actual if not torch.equal(actual[name], reference[name])] == []
    assert metrics(tmp_path) == lines


def test_the_balance_loss_can_be_left_out(tmp_path):
    routers = {}
    for weight in (0.0, 0.01):
        model = train(build_btx(three()), tmp_path / str(weight), recipe(steps=2), weight=weight)
        routers[weight] = routed(model)[0].router.weight
    assert not torch.equal(routers[0.0], routers[0.01])


def test_the_weights_keep_their_type(tmp_path):
    """They are trained in float32, since AdamW's small steps vanish in bfloat16."""
    model = build_btx(three()).to(torch.bfloat16)
    initial = weights(model)
    train(model, tmp_path, recipe(steps=1))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert any(not torch.equal(parameter, initial[name]) for name, parameter in model.named_parameters())


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("tied", [True, False])
def test_saving_is_exact(tmp_path, tied):
    model = build_btx(three(tie_word_embeddings=tied))
    save_btx(model, tmp_path / "btx")
    loaded = load_btx(tmp_path / "btx")
    expected = dict(loaded.named_parameters())
    assert list(expected) == [name for name, _ in model.named_parameters()]
    assert all(torch.equal(parameter, expected[name]) for name, parameter in model.named_parameters())
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
        actual, expected = (lm.generate(IDS, max_new_tokens=4, do_sample=False) for lm in (model, loaded))
    assert torch.equal(actual, expected)
    assert count_parameters(loaded) == count_parameters(model)
    assert not (tmp_path / "btx" / "config.json").exists()


def test_a_folder_that_is_not_btx(tmp_path):
    with pytest.raises(CheckpointError, match="no btx.json, so there is no BTX model. Write one with save_btx"):
        load_btx(tmp_path)
