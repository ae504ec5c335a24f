"""The router learns what can be learnt from first states, never sees test rows, and chooses whole specialists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from training_fixtures import NAMES, RecordingProgress, TinyRun
from ultrafuser.compare.systems.router_model import (
    Candidate,
    Router,
    first_states,
    route_by,
    router_choices,
    router_losses,
)
from ultrafuser.data.schema import Row
from ultrafuser.data.templates import Rendered, Renderer
from ultrafuser.errors import CheckpointError, DataError
from ultrafuser.evaluate.losses import specialist_losses
from ultrafuser.specialists import fuse
from ultrafuser.train.features import FeatureStore, RowFeatures
from ultrafuser.train.rows import read_sources

CANDIDATES = [Candidate(0, "best", 0.01), Candidate(8, "regret", 0.001), Candidate(0, "soft", 0.01)]


class Rows(list):
    """Features of rows that were made up, as a feature store gives them."""

    @property
    def rows(self) -> list[Rendered]:
        return [item.row for item in self]

    @property
    def states(self) -> list[torch.Tensor]:
        return [tensor[:1] for tensor in self[0].states]


def made_up(counts: dict[str, int], seed: int = 0, noise: float = 0.1, widths: tuple[int, ...] = (4, 6)) -> Any:
    """Rows of which the first state's first number says which of two specialists is better, by one nat a token."""
    generator = torch.Generator().manual_seed(seed)
    items = Rows()
    for domain, count in counts.items():
        for i in range(count):
            length = 2 + i % 3
            better = int(torch.randint(2, (1,), generator=generator))
            states = [torch.randn(length, width, generator=generator) for width in widths]
            states[0][0, 0] = 3.0 * better - 1.5 + noise * torch.randn((), generator=generator)
            log_probs = torch.full((length, len(widths)), -2.0)
            log_probs[:, better] = -1.0
            row = Rendered(f"{domain}-{i}", domain, ((0,),) * 2, ((0,),) * 2, (1,) * length)
            items.append(RowFeatures(row, states, log_probs))
    return items


@pytest.mark.parametrize("candidate", CANDIDATES)
def test_it_learns_from_the_first_states_and_generalises_to_new_rows(candidate):
    router = Router.train(made_up({"text": 30, "code": 20}), candidates=[candidate])
    test = made_up({"text": 20, "code": 20}, seed=1)
    best = [int(item.log_probs.sum(0).argmax()) for item in test]
    assert router_choices(router, test) == best
    assert [loss.nats for loss in router_losses(router, test)] == pytest.approx(
        [loss.tokens for loss in router_losses(router, test)]
    )


def test_without_a_signal_it_chooses_the_specialist_with_the_best_mean():
    store = made_up({"text": 60}, noise=0.0)
    for i, item in enumerate(store):
        item.states[0][0, 0] = 0.0  # no sign of what is better
        item.log_probs[:] = torch.tensor([-1.0, -1.5] if i % 4 else [-2.0, -1.0])
    router = Router.train(store, candidates=CANDIDATES[:1])
    assert router.report["chosen"]["nll"] == pytest.approx(1.25, abs=0.08)  # 1.25 is to choose the first always


def test_only_training_rows_are_read():
    """The losses of the test rows may be anything: the choice is made from the states alone."""
    router = Router.train(made_up({"text": 30}), candidates=CANDIDATES)
    test = made_up({"text": 10}, seed=3)
    choices = router_choices(router, test)
    for item in test:
        item.log_probs[:] = torch.randn(item.log_probs.shape)
    assert router_choices(router, test) == choices


def test_cross_validation_is_out_of_fold():
    """Where targets are chance, held-out rows show that nothing was learnt, however well the training rows are fitted."""
    store = made_up({"text": 40}, widths=(64, 64))
    for item in store:
        item.states[0][0, 0] = 0.0
    router = Router.train(store, candidates=[Candidate(32, "best", 0.01)])
    assert router.report["candidates"][0]["nll"] > 1.2  # 1.5 is chance, 1.0 the best specialist for each row


def test_domains_weigh_the_same_whatever_their_rows():
    """Nine rows of one domain say nothing of the other's single kind of row."""
    store = made_up({"text": 45, "code": 5}, noise=0.0)
    for item in store:
        item.states[0][0, 0] = 0.0
        best = 0 if item.row.domain == "text" else 1
        item.log_probs[:] = -1.5 if best == 1 else -1.1  # the loser loses less in text
        item.log_probs[:, best] = -1.0
    # only a constant can be learnt: text prefers 0 by 0.1 nats, code prefers 1 by 0.5
    flat = Rows(RowFeatures(i.row, [torch.zeros_like(s) for s in i.states], i.log_probs) for i in store)
    router = Router.train(flat, candidates=[Candidate(0, "regret", 0.01)])
    assert set(router_choices(router, flat)) == {1}


def test_the_best_candidate_is_kept_and_all_are_reported():
    router = Router.train(made_up({"text": 30}), candidates=CANDIDATES)
    nlls = [candidate["nll"] for candidate in router.report["candidates"]]
    assert len(nlls) == len(CANDIDATES)
    assert router.report["chosen"]["nll"] == min(nlls)
    assert router.report["chosen"]["steps"] % 5 == 0


def test_training_is_seeded():
    store = made_up({"text": 20, "code": 20})
    first, same = (Router.train(store, seed=1, candidates=CANDIDATES) for _ in range(2))
    assert first.report == same.report
    for name, tensor in first.net.state_dict().items():
        assert torch.equal(tensor, same.net.state_dict()[name]), name


@pytest.mark.parametrize("candidate", CANDIDATES)
def test_saving_is_exact(tmp_path, candidate):
    store = made_up({"text": 20})
    router = Router.train(store, candidates=[candidate])
    router.save(tmp_path / "router")
    loaded = Router.load(tmp_path / "router")
    assert (loaded.widths, loaded.report) == (router.widths, router.report)
    for name, tensor in router.net.state_dict().items():
        assert torch.equal(tensor, loaded.net.state_dict()[name]), name
    assert router_choices(loaded, store) == router_choices(router, store)


def test_a_folder_without_a_router(tmp_path):
    with pytest.raises(CheckpointError, match=r"no router.json, so there is no router. Train one and save it there"):
        Router.load(tmp_path)


def test_too_few_rows():
    with pytest.raises(DataError, match="a router needs at least two training rows, got 1. Add training data"):
        Router.train(made_up({"text": 1}))


# ---------------------------------------------------------------- with specialists


@pytest.fixture(scope="module")
def fused(tiny_run: TinyRun, tmp_path_factory) -> tuple[Any, Renderer, FeatureStore]:
    folder: Path = tmp_path_factory.mktemp("router")
    recipe = tiny_run.recipe(folder)
    model, tokenizer = fuse(recipe)
    renderer = Renderer(tokenizer, model.config.chat_templates, 128)
    rows = read_sources(recipe.data.train, renderer, RecordingProgress(), "test")
    return model, renderer, FeatureStore.build(model, rows, folder / "features")


CHATS = [
    [{"role": "user", "content": "how many text 0?"}],
    [
        {"role": "user", "content": "how many code 1?"},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": "and now, 12345?"},
    ],
    [{"role": "user", "content": "the"}],
]


def test_first_states_of_a_batch_are_those_of_training_rows(fused):
    """Each specialist's own template, padded or not, cached or not: the state that predicts the answer's first token."""
    model, renderer, _ = fused
    batch_states = first_states(model, renderer, CHATS)
    for chat, states in zip(CHATS, batch_states, strict=True):
        turns = tuple((m["role"], m["content"]) for m in chat)
        row = renderer.render(Row(id="r", domain="text", messages=(*turns, ("assistant", "the lazy dog"))))
        for k, ids in enumerate(row.input_ids):
            position = len(renderer.prompt(chat)[k]) - 1
            out = model.groups[k].model(torch.tensor([ids]), output_hidden_states=True)
            assert position in row.response_index[k]
            torch.testing.assert_close(states[k], out.hidden_states[-1][0, position], atol=1e-4, rtol=1e-4)


def test_the_beginning_of_an_answer_changes_no_choice(fused):
    model, renderer, _ = fused
    begun = [*CHATS[0], {"role": "assistant", "content": "The answer is"}]
    plain, with_answer = first_states(model, renderer, [CHATS[0], begun])
    for plain_state, answer_state in zip(plain, with_answer, strict=True):
        torch.testing.assert_close(plain_state, answer_state)


def test_the_losses_are_those_of_the_chosen_specialists(fused):
    model, _, store = fused
    router = Router.train(store, candidates=CANDIDATES)
    losses = specialist_losses(store, NAMES)
    choices = router_choices(router, store)
    assert router_losses(router, store) == [losses[NAMES[k]][i] for i, k in enumerate(choices)]


def test_training_and_use_agree_on_the_same_conversation(fused):
    model, renderer, store = fused
    router = Router.train(store, candidates=CANDIDATES)
    choose = route_by(router, model, renderer)
    for item, k in zip(store, router_choices(router, store), strict=True):
        domain, number = item.row.domain, item.row.row_id.rpartition("-")[2]
        chat = [{"role": "user", "content": f"how many {domain} {number}?"}]
        assert choose(chat) == NAMES[k]
        assert choose(chat[0]["content"]) == NAMES[k]
