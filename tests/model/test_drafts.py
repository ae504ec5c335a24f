"""Speculative decoding changes the time of an answer, never its tokens or their distribution."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from test_generation import generate, three
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList, TextStreamer

from tiny_models import VOCAB, force_gate, fuse, left_pad, one_hot, tiny, tokens
from ultrafuser.errors import UltraFuserError
from ultrafuser.model.speculation import Speculation, _Acceptance, _Chooser, _continuation, _Drafts

both = pytest.mark.parametrize("mixing", ["logits", "probabilities"])
modes = pytest.mark.parametrize("mode", ["auto", "ngram", "specialist"])


def repeated(rows=1, length=6, times=3):
    return tokens(rows, length).repeat(1, times)


@modes
@both
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gemma2", "mistral"])
def test_greedy_tokens_are_the_plain_ones(kind, mixing, mode):
    sliding = {"sliding_window": 8} if kind == "mistral" else {}
    model = fuse([tiny(kind, s, **sliding) for s in range(3)], mixing=mixing)
    ids, plan = repeated(), Speculation(mode)
    expected = generate(model, ids, new=24, do_sample=False)
    assert generate(model, ids, new=24, do_sample=False, speculative=plan).tolist() == expected.tolist()
    assert mode == "ngram" or plan.drafted > 0  # a model may never repeat what the prompt says
    assert plan.tokens == plan.passes + plan.accepted + 1 == expected.shape[1] - ids.shape[1]


@both
@pytest.mark.parametrize("drafter", range(3))
def test_each_group_may_draft(mixing, drafter):
    """Also one behind the first, with other widths and its own gate projection."""
    model, ids = three(mixing=mixing), tokens(1, 6)
    force_gate(model, one_hot(drafter, 3))
    plan = Speculation("specialist")
    expected = generate(model, ids, new=24, do_sample=False)
    assert generate(model, ids, new=24, do_sample=False, speculative=plan).tolist() == expected.tolist()


def test_a_certain_gate_keeps_every_draft_of_its_specialist():
    model, ids = fuse([tiny(seed=s) for s in range(3)]), tokens(1, 6)
    force_gate(model, one_hot(1, 3))
    expected = generate(model, ids, new=25, do_sample=False, eos_token_id=None)
    plan = Speculation("specialist", max_draft=3)
    got = generate(model, ids, new=25, do_sample=False, eos_token_id=None, speculative=plan)
    assert got.tolist() == expected.tolist()
    # the first drafts come from the first group, because the gate's choice is not known yet
    assert plan.acceptance > 0.7 and plan.passes < 12


@modes
@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"min_new_tokens": 9, "bad_words_ids": [[5], [7]]},
        {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
    ],
)
def test_processors_see_the_tokens_before_each_draft(mode, options):
    model, ids = three(), repeated()
    options = {"do_sample": False} | options
    expected = generate(model, ids, new=16, **options)
    assert generate(model, ids, new=16, speculative=mode, **options).tolist() == expected.tolist()


@modes
@both
def test_rows_of_a_batch_keep_their_answers(mixing, mode):
    model = three(mixing=mixing)
    ids, mask = left_pad([*tokens(2, 12), tokens(1, 7)[0].repeat(3), tokens(1, 3)[0]])
    expected = generate(model, ids, new=16, do_sample=False, attention_mask=mask)
    got = generate(model, ids, new=16, do_sample=False, attention_mask=mask, speculative=mode)
    assert got.tolist() == expected.tolist()


@modes
def test_finished_rows_are_padded(mode):
    model, ids = three(), repeated(3)
    plain = generate(model, ids, new=16, do_sample=False, eos_token_id=None)
    end = int(plain[1, ids.shape[1] + 3])  # ends the second row early
    options = {"new": 16, "do_sample": False, "eos_token_id": end, "pad_token_id": 0}
    expected = generate(model, ids, **options)
    assert generate(model, ids, speculative=mode, **options).tolist() == expected.tolist()


class EndsRows(StoppingCriteria):
    """Ends each row at a token that is a multiple of five."""

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] % 5 == 0


@modes
def test_rows_that_a_criterion_ends_go_on_as_in_plain_decoding(mode):
    model, ids = three(), repeated(3)
    options = {
        "new": 16,
        "do_sample": False,
        "eos_token_id": None,
        "stopping_criteria": StoppingCriteriaList([EndsRows()]),
    }
    assert generate(model, ids, speculative=mode, **options).tolist() == generate(model, ids, **options).tolist()


@modes
def test_each_specialist_continues_its_own_prompt(mode):
    model = fuse([tiny(seed=s) for s in range(2)], names=["a", "b"])
    prompts, mask = left_pad([tokens(1, 4, seed=1)[0], tokens(1, 9, seed=2)[0]])
    inputs = {"specialist_input_ids": prompts[None], "specialist_attention_mask": mask[None]}
    ids = prompts[None, 0]
    inputs["attention_mask"] = mask[None, 0]
    expected = generate(model, ids, new=20, do_sample=False, **inputs)
    assert generate(model, ids, new=20, do_sample=False, speculative=mode, **inputs).tolist() == expected.tolist()


@modes
def test_tokens_of_one_specialist_alone_are_not_drafted(mode):
    model = fuse([tiny(seed=0, vocab_size=VOCAB + 8), tiny(seed=1)], names=["a", "b"])
    for first in range(3, 9):  # one of them follows the repeated text
        own = torch.tensor([20, first, VOCAB + 3, 20, first, VOCAB + 3, 9, 20, first])
        prompts = torch.stack([own, tokens(1, 9, seed=2)[0]])[None]
        options = {"new": 8, "do_sample": False, "eos_token_id": None, "specialist_input_ids": prompts}
        expected = generate(model, prompts[:, 0], **options)
        assert generate(model, prompts[:, 0], speculative=mode, **options).tolist() == expected.tolist()


class Counting(LogitsProcessor):
    """Forbids the token that its number of calls names, so that a call too many shows."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        scores[:, 3 + self.calls % 40] = -torch.inf
        return scores


@modes
def test_processors_that_count_see_each_token_once(mode):
    model, ids = three(), repeated()
    answers = [
        generate(
            model, ids, new=16, logits_processor=LogitsProcessorList([Counting()]), do_sample=False, speculative=way
        )
        for way in (None, mode)
    ]
    assert answers[0].tolist() == answers[1].tolist()


def test_windows_do_not_grow_after_a_speculative_turn():
    model, ids = fuse([tiny("mistral", s, sliding_window=8) for s in range(2)]), repeated()
    cache = model.new_cache()
    answer = generate(model, ids, new=6, do_sample=False, past_key_values=cache, speculative="auto")
    generate(model, torch.cat([answer, tokens(1, 30)], dim=1), new=6, do_sample=False, past_key_values=cache)
    assert all(layer.keys.shape[2] <= 8 for layer in cache.layers)


@modes
def test_a_conversation_goes_on_with_its_cache(mode):
    model, ids = three(), repeated()
    cache = model.new_cache()
    answer = generate(model, ids, new=9, do_sample=False, past_key_values=cache, speculative=mode)
    assert cache.input_ids.shape[-1] == answer.shape[1] - 1  # the last token is not read yet, as in plain decoding
    assert cache.input_ids[0, 0].tolist() == answer[0, :-1].tolist()
    turn = torch.cat([answer, tokens(1, 5, seed=8)], dim=1)
    expected = generate(model, turn, new=9, do_sample=False)
    got = generate(model, turn, new=9, do_sample=False, past_key_values=cache, speculative=mode)
    assert got.tolist() == expected.tolist()


@modes
@pytest.mark.parametrize("new", [1, 2, 5])
def test_no_answer_is_longer_than_asked(mode, new):
    model, ids = three(), repeated()
    assert generate(model, ids, new=new, do_sample=False, eos_token_id=None, speculative=mode).shape[1] == 18 + new


@modes
def test_drafts_stay_within_the_context(mode):
    model = fuse([tiny(seed=s, max_position_embeddings=32) for s in range(2)])
    ids = repeated()
    expected = generate(model, ids, new=14, do_sample=False, eos_token_id=None)
    got = generate(model, ids, new=14, do_sample=False, eos_token_id=None, speculative=mode)
    assert got.tolist() == expected.tolist()
    with pytest.raises(UltraFuserError, match="do not fit into its context of 32"):
        generate(model, ids, new=30, do_sample=False, eos_token_id=None, speculative=mode)


def test_streaming_and_stop_strings(tokenizer, capsys):
    model = fuse([tiny(seed=s, vocab_size=len(tokenizer)) for s in range(2)])
    ids = tokenizer("def add(a, b): return a + b", return_tensors="pt").input_ids.repeat(1, 2)
    plain = generate(model, ids, new=12, do_sample=False)
    expected = tokenizer.decode(plain[0, ids.shape[1] :], skip_special_tokens=True)
    generate(
        model,
        ids,
        new=12,
        do_sample=False,
        speculative="auto",
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
    assert capsys.readouterr().out.strip() == expected.strip()
    stop = tokenizer.decode(plain[0, ids.shape[1] + 4])
    options = {"new": 12, "do_sample": False, "stop_strings": [stop], "tokenizer": tokenizer}
    assert generate(model, ids, speculative="auto", **options).tolist() == generate(model, ids, **options).tolist()


def test_the_dictionary_has_sequences_and_cache():
    model, ids = three(), repeated()
    out = generate(model, ids, do_sample=False, return_dict_in_generate=True, speculative="ngram")
    assert out.sequences.tolist() == generate(model, ids, do_sample=False).tolist()
    assert out.past_key_values.get_seq_length() == out.sequences.shape[1] - 1


# ---------------------------------------------------------------- sampling


def chi_square_bound(degrees: int) -> float:
    """The 99.99% quantile (Wilson and Hilferty's approximation)."""
    return degrees * (1 - 2 / (9 * degrees) + 3.72 * math.sqrt(2 / (9 * degrees))) ** 3


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("mode", ["ngram", "specialist"])
def test_sampled_answers_follow_the_fused_distribution(mode, rows):
    """Chi-square over all answers of three tokens, whose probabilities are computed one by one."""
    small = 3
    model = fuse([tiny(seed=s, vocab_size=small) for s in range(2)], mixing="probabilities")
    ids = torch.tensor([[2, 1, 0, 0, 2, 1, 0, 0, 2, 1]])
    mask = torch.ones_like(ids)
    answers = list(itertools.product(range(small), repeat=3))
    with torch.no_grad():
        batch = torch.tensor([[*ids[0].tolist(), *answer] for answer in answers])
        log_p = model(batch).logits[:, -4:-1].log_softmax(-1)
    expected = log_p.gather(2, batch[:, -3:, None]).sum((1, 2)).exp().double()
    assert float(expected.sum()) == pytest.approx(1, abs=1e-4)
    draws, plan = 250 * rows, Speculation(mode)
    options = {
        "do_sample": True,
        "top_k": 0,
        "new": 3,
        "eos_token_id": None,
        "attention_mask": mask,
        "speculative": plan,
    }
    drawn = [generate(model, ids, seed, num_return_sequences=rows, **options)[:, -3:] for seed in range(draws // rows)]
    index = (torch.cat(drawn) * torch.tensor([small**2, small, 1])).sum(1)
    observed = torch.bincount(index, minlength=len(answers)).double()
    often = expected * draws >= 5
    cells = torch.cat([expected[often] * draws, (expected[~often].sum() * draws)[None]])
    counts = torch.cat([observed[often], observed[~often].sum()[None]])
    assert float(((counts - cells) ** 2 / cells).sum()) < chi_square_bound(len(cells) - 1)
    assert plan.drafted > 0


@pytest.mark.parametrize("proposal", [[0.7, 0.1, 0.1, 0.1], [0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25], None])
def test_a_checked_draft_has_the_target_distribution(proposal):
    target, rows = torch.tensor([0.1, 0.2, 0.3, 0.4]), 200_000
    torch.manual_seed(0)
    if proposal is None:  # the token is certain, as when it is copied from the text
        tokens_, probs = torch.full((rows,), 2), None
    else:
        tokens_ = torch.multinomial(torch.tensor(proposal), rows, replacement=True)
        probs = torch.tensor(proposal).expand(rows, 1, 4)
    chooser = _Chooser(LogitsProcessorList(), do_sample=True)
    token, kept = chooser.check(tokens_[:, None], target.log().expand(rows, 4), _Drafts(tokens_[:, None], probs), 0)
    observed = torch.bincount(token, minlength=4) / rows
    assert (observed - target).abs().max() < 0.005
    overlap = 0.3 if proposal is None else float(torch.minimum(target, torch.tensor(proposal)).sum())
    assert float(kept.float().mean()) == pytest.approx(overlap, abs=0.005)
    assert torch.equal(token[kept], tokens_[kept])


def test_the_same_seed_draws_the_same_answer():
    model, ids = three(), repeated()
    options = {"do_sample": True, "new": 20, "speculative": "auto"}
    assert generate(model, ids, 3, **options).tolist() == generate(model, ids, 3, **options).tolist()


# ---------------------------------------------------------------- drafts


@pytest.mark.parametrize(
    ("text", "length", "expected"),
    [
        ([1, 2, 3, 4, 9, 2, 3], 3, [4, 9, 2]),
        ([2, 3, 7, 2, 3, 8, 2, 3], 2, [8, 2]),  # the latest of equal length
        ([5, 2, 3, 7, 1, 2, 3, 8, 5, 2, 3], 2, [7, 1]),  # the longest
        ([4, 5, 4, 5], 5, [4, 5, 4, 5, 4]),  # a loop goes on
        ([6, 6, 6], 2, [6, 6]),
        ([1, 2, 3, 1], 2, None),  # one token is no match
        ([1, 2, 3, 4], 2, None),
        ([1], 2, None),
    ],
)
def test_the_text_drafts_what_followed_before(text, length, expected):
    drafted = _continuation(torch.tensor(text), length)
    assert (None if drafted is None else drafted.tolist()) == expected


@pytest.mark.parametrize(
    ("accepted", "rejected", "cost", "expected"),
    [
        (0, 8, 0.2, 0),  # .15 are kept: 1.15 tokens in 1.2
        (10, 0, 1.1, 0),  # a draft takes more than a pass
        (8, 8, 0.2, 2),  # .53: 1.53 / 1.2, 1.81 / 1.4, 1.95 / 1.6
        (90, 0, 0.0, 12),  # free drafts: as many as allowed
    ],
)
def test_the_length_that_pays(accepted, rejected, cost, expected):
    estimate = _Acceptance(cost)
    estimate._accepted, estimate._rejected = 1.5 + accepted, 0.5 + rejected
    assert estimate.best_length(12) == expected
    assert estimate.best_length(0) == 0


def test_an_estimate_follows_what_happens():
    estimate = _Acceptance(0.2)
    for _ in range(20):
        estimate.learn(0, 4)
    assert estimate.best_length(8) == 0
    waits = next(i for i in range(100) if estimate.next_length(8))
    assert 1 <= waits < 30  # passes without drafts, after which it tries again
    for _ in range(20):
        estimate.learn(8, 8)
    assert estimate.best_length(8) == 8


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speculative": "fast"}, "speculative='fast' is not known. Use auto, ngram, specialist"),
        ({"speculative": Speculation(max_draft=-1)}, "max_draft=-1 is no number of tokens"),
        ({"speculative": Speculation(max_draft=2.5)}, "max_draft=2.5 is no number of tokens"),
        ({"num_beams": 2}, "no beams"),
        ({"output_scores": True, "return_dict_in_generate": True}, "Leave out output_scores or speculative"),
        ({"use_cache": False}, "needs use_cache=True"),
        ({"guidance_scale": 1.5}, "Leave out guidance_scale or speculative"),
        ({"position_ids": torch.arange(18)[None]}, "takes no position_ids"),
        ({"prompt_lookup_num_tokens": 3}, "speculative and prompt_lookup_num_tokens do not go together"),
        ({"synced_gpus": True}, "Leave out synced_gpus or speculative"),
    ],
)
def test_what_does_not_go_together_is_said(options, message):
    with pytest.raises(UltraFuserError, match=message):
        generate(three(), repeated(), **({"speculative": "auto", "do_sample": False} | options))


def test_specialists_on_one_base_do_not_draft_for_each_other():
    model = fuse([tiny(seed=0)])
    with pytest.raises(UltraFuserError, match="run together on one base"):
        generate(model, repeated(), speculative="specialist")


def test_a_vocabulary_with_masked_tokens_drafts_none_of_them():
    model = fuse([tiny(seed=0), tiny(seed=1, vocab_size=VOCAB + 8)])
    ids = repeated()
    expected = generate(model, ids, new=16, do_sample=False)
    assert generate(model, ids, new=16, do_sample=False, speculative="specialist").tolist() == expected.tolist()
