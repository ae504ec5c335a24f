"""Draws follow the distribution that the options name, and do not depend on the other rows."""

from __future__ import annotations

import math
import random

import pytest
import torch

from ultrafuser.errors import UltraFuserError
from ultrafuser.serve.engine import Sampling
from ultrafuser.serve.sampler import Sampler, Sequenced, check_sampling

VOCAB = 600  # more than the candidates that are sorted first


def logits(rows, seed=0, scale=2.0):
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


def row(prompt=(), answer=(), **options):
    sampling = Sampling(10, **options)
    return Sequenced(sampling, prompt, list(answer), random.Random(sampling.seed))


def naive(z, prompt=(), answer=(), *, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0,
          presence_penalty=0.0, frequency_penalty=0.0, logit_bias=None, seed=None):  # fmt: skip
    """The oracle: the distribution token by token, in plain Python."""
    z = [value + (logit_bias or {}).get(token, 0.0) for token, value in enumerate(z.tolist())]
    for token in {*prompt, *answer}:
        z[token] = z[token] / repetition_penalty if z[token] > 0 else z[token] * repetition_penalty
    for token in set(answer):
        z[token] -= frequency_penalty * answer.count(token) + presence_penalty
    if temperature == 0:
        return [float(token == max(range(len(z)), key=z.__getitem__)) for token in range(len(z))]
    weights = [math.exp(value / temperature) for value in z]
    weights = [w if w >= min_p * max(weights) else 0.0 for w in weights]
    order = sorted(range(len(z)), key=lambda token: -weights[token])
    for token in order[top_k or len(order) :]:
        weights[token] = 0.0
    total, before = sum(weights), 0.0
    for token in order:
        weight = weights[token] / total
        if before >= top_p and before > 0:
            weights[token] = 0.0
        before += weight
    total = sum(weights)
    return [weight / total for weight in weights]


OPTIONS = {
    "plain": {},
    "cold": {"temperature": 0.3},
    "hot nucleus, more than the candidates": {"temperature": 8.0, "top_p": 0.95},
    "nucleus": {"top_p": 0.7},
    "a nucleus of one": {"top_p": 1e-6},
    "top k": {"top_k": 3},
    "top k of almost all": {"top_k": VOCAB - 1},
    "top k and nucleus": {"top_k": 8, "top_p": 0.5},
    "min p": {"min_p": 0.2},
    "all filters": {"min_p": 0.01, "top_k": 20, "top_p": 0.9, "temperature": 1.5},
    "penalties": {"repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.7},
    "bias": {"logit_bias": {3: 9.0, 5: -100.0}},
    "greedy": {"temperature": 0.0, "frequency_penalty": 2.0},
}
PROMPT, ANSWER = (1, 2, 3, 3), [4, 5, 5, 5]


@pytest.mark.parametrize("name", OPTIONS)
def test_draws_follow_the_distribution(name):
    """The same logits in many rows: the shares of the drawn tokens are their probabilities."""
    count, options = 4000, OPTIONS[name]
    z = logits(1)
    expected = torch.tensor(naive(z[0], PROMPT, ANSWER, **options))
    rows = [row(PROMPT, ANSWER, seed=seed, **options) for seed in range(count)]
    drawn = torch.tensor([draw.token_id for draw in Sampler(rows, VOCAB).draw(z.expand(count, -1))])
    assert bool((expected[drawn] > 0).all()), "a token that the filters exclude"
    shares = torch.bincount(drawn, minlength=VOCAB) / count
    error = (expected * (1 - expected) / count).sqrt()
    assert bool(((shares - expected).abs() <= 5 * error + 2 / count).all())


def test_rows_do_not_depend_on_each_other():
    z = logits(len(OPTIONS))
    together = Sampler([row(PROMPT, ANSWER, seed=i, **o) for i, o in enumerate(OPTIONS.values())], VOCAB).draw(z)
    for i, options in enumerate(OPTIONS.values()):
        [alone] = Sampler([row(PROMPT, ANSWER, seed=i, **options)], VOCAB).draw(z[i : i + 1])
        assert alone.token_id == together[i].token_id
        assert alone.logprob == pytest.approx(together[i].logprob, abs=1e-5)


def test_drawn_tokens_count_for_the_penalties():
    """A sampler that has drawn agrees with one that starts with these tokens."""
    z, rows = logits(1), [row(temperature=0.0, frequency_penalty=2.0, presence_penalty=1.0)]
    sampler, drawn = Sampler(rows, VOCAB), []
    for _ in range(6):
        fresh = Sampler([row(answer=drawn, temperature=0.0, frequency_penalty=2.0, presence_penalty=1.0)], VOCAB)
        [draw] = sampler.draw(z)
        assert draw.token_id == fresh.draw(z)[0].token_id
        drawn.append(draw.token_id)
    assert len(set(drawn)) > 1


def test_logprobs_are_those_before_all_options():
    z = logits(2)
    before = z.clone()
    draws = Sampler([row(temperature=0.0, logprobs=3, logit_bias={7: 50.0}), row(seed=1, logprobs=0)], VOCAB).draw(z)
    expected = z.log_softmax(-1)
    assert torch.equal(z, before)
    assert draws[0].token_id == 7
    for i, draw in enumerate(draws):
        assert draw.logprob == pytest.approx(expected[i, draw.token_id].item(), abs=1e-5)
    assert [entry.token_id for entry in draws[0].top] == expected[0].topk(3).indices.tolist()
    assert [entry.logprob for entry in draws[0].top] == pytest.approx(expected[0].topk(3).values.tolist(), abs=1e-5)
    assert draws[1].top == ()


def test_a_token_of_no_probability_is_never_drawn():
    z = torch.full((64, VOCAB), -math.inf)
    z[:, [10, 500]] = 0.0
    drawn = [draw.token_id for draw in Sampler([row(seed=i) for i in range(64)], VOCAB).draw(z)]
    assert set(drawn) == {10, 500}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature is -1, expected a value from 0 to 10000"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0, expected a value above 0 up to 1"),
        ({"top_k": -2}, "top_k is -2, expected a value of at least 0"),
        ({"min_p": 1.5}, "min_p is 1.5, expected a value from 0 to 1"),
        ({"presence_penalty": 3}, "presence_penalty is 3, expected a value from -2 to 2"),
        ({"frequency_penalty": -3}, "frequency_penalty is -3"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0, expected a value above 0"),
        ({"logit_bias": {VOCAB: 1.0}}, f"token {VOCAB} with 1.0, expected tokens from 0 to {VOCAB - 1}"),
    ],
)
def test_values_out_of_range(options, message):
    with pytest.raises(UltraFuserError) as error:
        check_sampling(Sampling(5, **options), VOCAB)
    assert message in str(error.value)


def test_no_new_tokens():
    with pytest.raises(UltraFuserError, match="max_new_tokens is 0, expected a value of at least 1"):
        check_sampling(Sampling(0), VOCAB)
