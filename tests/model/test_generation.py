"""generate() behaves as users of transformers expect, for every way of decoding."""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, TextStreamer

from tiny_models import VOCAB, force_gate, fuse, left_pad, one_hot, tiny, tokens
from ultrafuser.errors import UltraFuserError

both = pytest.mark.parametrize("mixing", ["logits", "probabilities"])
KINDS = ["llama", "qwen2", "mistral", "gemma", "gemma2", "gpt2"]
WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20},
    "beams": {"num_beams": 3, "do_sample": False},
    "several beams": {"num_beams": 4, "num_return_sequences": 2, "do_sample": False},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "penalised": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}


def three(**options):
    return fuse([tiny("llama", 1), tiny("gpt2", 2, n_embd=48), tiny("gemma2", 3, hidden_size=16)], **options)


def generate(model, ids, seed=0, new=8, **options):
    torch.manual_seed(seed)
    with torch.no_grad():
        return model.generate(ids, max_new_tokens=new, **options)


def naive_greedy(model, ids, new=8, eos=1):
    """The oracle: one sequence, no cache, no padding, no batch."""
    ids = ids.clone()
    with torch.no_grad():
        for _ in range(new):
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
            if ids[0, -1] == eos:
                break
    return ids


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_one_specialist_generates_what_the_plain_model_generates(kind, way):
    plain = tiny(kind)
    ids = tokens(2, 5)
    expected = generate(plain, ids, **WAYS[way])
    for mixing in ("logits", "probabilities"):
        assert generate(fuse([plain], mixing=mixing), ids, **WAYS[way]).tolist() == expected.tolist()


@both
def test_greedy_is_the_naive_loop(mixing):
    model, ids = three(mixing=mixing), tokens(1, 5)
    assert generate(model, ids, new=12).tolist() == naive_greedy(model, ids, new=12).tolist()


@both
@pytest.mark.parametrize("way", WAYS)
def test_cached_equals_uncached(mixing, way):
    model, ids = three(mixing=mixing), tokens(2, 5)
    cached = generate(model, ids, use_cache=True, **WAYS[way])
    assert cached.tolist() == generate(model, ids, use_cache=False, **WAYS[way]).tolist()


@both
@pytest.mark.parametrize("way", [{}, {"num_beams": 3}, {"repetition_penalty": 1.5}])
def test_unequal_prompts_in_a_batch(mixing, way):
    model = three(mixing=mixing)
    rows = [tokens(1, n, seed=n)[0] for n in (3, 9, 6)]
    ids, mask = left_pad(rows)
    out = generate(model, ids, attention_mask=mask, do_sample=False, eos_token_id=None, **way)
    for row, prompt in enumerate(rows):
        alone = generate(model, prompt[None], do_sample=False, eos_token_id=None, **way)
        assert out[row, ids.shape[1] :].tolist() == alone[0, len(prompt) :].tolist()


@both
def test_finished_rows_are_padded(mixing):
    """One row ends early; the others go on as if it were not there."""
    model = three(mixing=mixing)
    ids = tokens(3, 5)
    free = generate(model, ids, new=10, eos_token_id=None)[:, 5:]
    stop = int(free[0, 3])
    out = generate(model, ids, new=10, eos_token_id=stop, pad_token_id=2)[:, 5:]
    for got, unstopped in zip(out.tolist(), free.tolist(), strict=True):
        end = unstopped.index(stop) + 1 if stop in unstopped else len(unstopped)
        assert got[:end] == unstopped[:end] and set(got[end:]) <= {2}


def test_sampling_follows_the_seed():
    model, ids = three(), tokens(2, 5)
    first = generate(model, ids, do_sample=True, seed=3)
    assert first.tolist() == generate(model, ids, do_sample=True, seed=3).tolist()
    assert first.tolist() != generate(model, ids, do_sample=True, seed=4).tolist()


@both
def test_sampling_follows_the_fused_distribution(mixing):
    model, ids = three(mixing=mixing), tokens(1, 4)
    with torch.no_grad():
        p = model(ids).logits[0, -1].softmax(-1)
    n = 4000
    draws = generate(model, ids, new=1, do_sample=True, top_k=0, top_p=1.0, num_return_sequences=n)[:, -1]
    observed = torch.bincount(draws, minlength=VOCAB) / n
    assert (observed - p).abs().max() < 5 * (0.25 / n) ** 0.5


def test_output_logits_are_those_of_forward():
    model, ids = three(), tokens(2, 5)
    out = generate(model, ids, return_dict_in_generate=True, output_logits=True, output_scores=True, eos_token_id=None)
    with torch.no_grad():
        expected = model(out.sequences).logits[:, 4:-1]
    torch.testing.assert_close(torch.stack(out.logits, 1), expected, rtol=1e-4, atol=1e-4)
    assert len(out.scores) == 8 and out.scores[0].shape == (2, VOCAB)


PROCESSORS = {
    "repetition_penalty": {"repetition_penalty": 1.3},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.3},
    "sequence_bias": {"sequence_bias": [[[5], 3.0]]},
    "guidance_scale": {"guidance_scale": 1.5},
    "min_p": {"do_sample": True, "min_p": 0.05, "temperature": 0.8},
}


@both
@pytest.mark.parametrize("way", PROCESSORS)
@pytest.mark.parametrize("gate", [[0.3, 0.0, -0.5], one_hot(1, 3)])
def test_processors_act_as_on_one_model(mixing, way, gate):
    """Whatever the weights are, equal specialists give the scores of one of them after any processor."""
    plain, ids = tiny(seed=4), tokens(2, 9)
    model = force_gate(fuse([tiny(seed=4) for _ in range(3)], mixing=mixing), gate)
    options = {"new": 1, "return_dict_in_generate": True, "output_scores": True, **PROCESSORS[way]}
    expected, got = (generate(each, ids, **options).scores[0] for each in (plain, model))
    untouched = generate(plain, ids, new=1, return_dict_in_generate=True, output_logits=True).logits[0]
    assert not torch.allclose(expected.softmax(-1), untouched.softmax(-1), atol=1e-3), "the processor did nothing"
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@both
def test_a_penalty_moves_a_token_that_is_almost_certain(mixing):
    """The top token has p = .955. A penalty of 1.3 on the logits leaves about .3, on log-probabilities it would leave .955."""
    model = fuse([tiny(seed=s, tie_word_embeddings=False) for s in range(2)], mixing=mixing)
    ids = tokens(1, 5)
    logits = torch.full((VOCAB,), 10.0)
    logits[ids[0, -1]] = 17.32
    for name in model.config.names:  # the same logits at every token
        head = model.specialist(name).lm_head
        head.weight.data.zero_()
        head.bias = torch.nn.Parameter(logits.clone())
    options = {"new": 1, "return_dict_in_generate": True, "output_scores": True}
    free, penalised = (generate(model, ids, repetition_penalty=p, **options).scores[0] for p in (1.0, 1.3))
    assert free.softmax(-1).max().item() == pytest.approx(0.955, abs=0.001)
    by_hand = logits.clone()
    by_hand[ids[0].unique()] /= 1.3
    torch.testing.assert_close(penalised[0].softmax(-1), by_hand.softmax(-1), rtol=1e-3, atol=1e-5)
    assert penalised.softmax(-1)[0, ids[0, -1]] < 0.4


@both
def test_beam_scores_are_log_probabilities_of_the_mixture(mixing):
    model, ids = three(mixing=mixing), tokens(2, 5)
    options = {"return_dict_in_generate": True, "output_scores": True, "eos_token_id": None, "length_penalty": 0.0}
    out = generate(model, ids, num_beams=3, num_return_sequences=2, do_sample=False, **options)
    with torch.no_grad():
        log_p = model(out.sequences).logits[:, 4:-1].log_softmax(-1)
    log_p = log_p.gather(-1, out.sequences[:, 5:, None])[..., 0]
    torch.testing.assert_close(out.sequences_scores, log_p.sum(-1), rtol=1e-4, atol=1e-3)
    steps = model.compute_transition_scores(out.sequences, out.scores, out.beam_indices, normalize_logits=False)
    torch.testing.assert_close(steps, log_p, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "way",
    [
        {"repetition_penalty": 9.0},
        {"repetition_penalty": 9.0, "num_beams": 3},
        {"repetition_penalty": 9.0, "prompt_lookup_num_tokens": 2},
    ],
    ids=str,
)
def test_penalties_do_not_count_padding(way):
    """Whatever token pads a single conversation, here the very one that would come next, the answer is the same."""
    model, prompts = three(), [tokens(1, n, seed=n)[0] for n in (3, 8, 5)]

    def padded_with(pad):
        ids, mask = left_pad(prompts, pad)
        inputs = {"specialist_input_ids": ids[None], "specialist_attention_mask": mask[None]}
        out = generate(model, ids[None, 0], attention_mask=mask[None, 0], do_sample=False, **inputs, **way)
        return out[0, 8:].tolist()

    expected = padded_with(2)
    for pad in set(expected):
        assert padded_with(pad) == expected


def test_streaming(tokenizer, capsys):
    rows = len(tokenizer)
    model = fuse([tiny(seed=s, vocab_size=rows) for s in range(2)])
    ids = tokenizer("def add(a", return_tensors="pt").input_ids
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    out = generate(model, ids, streamer=streamer, do_sample=False)
    assert capsys.readouterr().out.rstrip("\n") == tokenizer.decode(out[0, ids.shape[1] :]).rstrip("\n")


def test_stop_strings(tokenizer):
    model = fuse([tiny(seed=s, vocab_size=len(tokenizer)) for s in range(2)])
    ids = tokenizer("x", return_tensors="pt").input_ids
    free = generate(model, ids, new=12, do_sample=False, eos_token_id=None)[0, ids.shape[1] :]
    stop = tokenizer.decode(free[4:5])
    first = next(n for n in range(1, 13) if stop in tokenizer.decode(free[:n]))
    out = generate(model, ids, new=12, do_sample=False, eos_token_id=None, stop_strings=[stop], tokenizer=tokenizer)
    assert out[0, ids.shape[1] :].tolist() == free[:first].tolist()


def test_max_new_tokens_and_logits_processor():
    class Only(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return torch.full_like(scores, -float("inf")).index_fill(1, torch.tensor([7]), 0.0)

    out = generate(three(), tokens(1, 4), new=5, logits_processor=LogitsProcessorList([Only()]))
    assert out[0, 4:].tolist() == [7] * 5


def test_eos_comes_from_the_first_specialist():
    model = three()
    assert model.generation_config.eos_token_id == 1 and model.generation_config.pad_token_id == 2


# ---------------------------------------------------------------- a prompt for each specialist


@both
@pytest.mark.parametrize("way", WAYS)
def test_each_specialist_continues_its_own_prompt(mixing, way):
    """Equal prompts given one by one are the same as one prompt for all."""
    model, ids = three(mixing=mixing), tokens(2, 5)
    prompts = ids[:, None].expand(-1, 3, -1)
    expected = generate(model, ids, **WAYS[way])
    got = generate(
        model,
        ids,
        specialist_input_ids=prompts,
        specialist_attention_mask=torch.ones_like(prompts),
        **WAYS[way],
    )
    assert got.tolist() == expected.tolist()


@both
@pytest.mark.parametrize("use_cache", [True, False])
def test_prompts_of_different_lengths(mixing, use_cache):
    model = three(mixing=mixing)
    prompts = [[tokens(1, n + 2 * b, seed=10 * b + n)[0] for n in (4, 9, 6)] for b in range(2)]
    flat, mask = left_pad([prompt for row in prompts for prompt in row])
    ids, mask = flat.unflatten(0, (2, 3)), mask.unflatten(0, (2, 3))
    out = generate(model, ids[:, 0], new=6, attention_mask=mask[:, 0], specialist_input_ids=ids,
                   specialist_attention_mask=mask, use_cache=use_cache, do_sample=False, eos_token_id=None)  # fmt: skip
    new = out[:, ids.shape[-1] :]
    with torch.no_grad():
        for b in range(2):
            for step in range(6):
                rows = [torch.cat([prompt, new[b, :step]]) for prompt in prompts[b]]
                padded, its_mask = left_pad(rows)
                logits = model(specialist_input_ids=padded[None], specialist_attention_mask=its_mask[None]).logits
                assert logits[0, -1].argmax() == new[b, step]


def test_specialist_prompts_need_matching_input_ids():
    model = three()
    prompts = tokens(2, 6)[:, None].expand(-1, 3, -1)
    with pytest.raises(UltraFuserError, match="input_ids"):
        generate(model, None, specialist_input_ids=prompts)
    with pytest.raises(UltraFuserError, match="input_ids"):
        generate(model, tokens(2, 4), specialist_input_ids=prompts)


# ---------------------------------------------------------------- assistants


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "mistral"])
def test_a_specialist_may_draft(kind):
    sliding = {"sliding_window": 8} if kind == "mistral" else {}
    model = fuse([tiny(kind, s, **sliding) for s in range(3)], names=["a", "b", "c"])
    ids = tokens(1, 6)
    expected = generate(model, ids, new=14, do_sample=False)
    for name in model.config.names:
        got = generate(model, ids, new=14, do_sample=False, assistant_model=model.specialist(name))
        assert got.tolist() == expected.tolist()


def test_a_specialist_may_draft_for_prompts_of_its_own():
    model = fuse([tiny(seed=s) for s in range(2)], names=["a", "b"])
    prompts, mask = left_pad([tokens(1, 4, seed=1)[0], tokens(1, 7, seed=2)[0]])
    inputs = {"specialist_input_ids": prompts[None], "specialist_attention_mask": mask[None]}
    ids = prompts[None, 0]
    inputs["attention_mask"] = mask[None, 0]
    expected = generate(model, ids, do_sample=False, **inputs)
    got = generate(model, ids, do_sample=False, assistant_model=model.specialist("a"), **inputs)
    assert got.tolist() == expected.tolist()


DRAFTS = {
    "a specialist with a taller table": lambda model: model.specialist("b"),
    "a taller table": lambda model: tiny(seed=5, vocab_size=VOCAB + 30),
    "a lower table": lambda model: tiny(seed=5, vocab_size=VOCAB - 30),
    "another architecture": lambda model: tiny("gpt2", vocab_size=VOCAB + 1),
    "another fused model": lambda model: fuse([tiny(seed=2, vocab_size=VOCAB + 5), tiny(seed=3, vocab_size=VOCAB + 9)]),
    "a fused model with the same tokens": lambda model: fuse([tiny(seed=2), tiny(seed=3)]),
    "the model itself": lambda model: model,
}
drafts = pytest.mark.parametrize("draft", DRAFTS)


def tall():
    """Qwen2.5's tables of 151,665 and 151,936 rows, in small."""
    return fuse([tiny(seed=0), tiny(seed=1, vocab_size=VOCAB + 8)], names=["a", "b"])


@both
@drafts
def test_a_table_of_any_height_may_draft(draft, mixing):
    model = tall()
    model.config.mixing = mixing
    assistant, ids = DRAFTS[draft](model), tokens(1, 6)
    for options in ({}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}):
        expected = generate(model, ids, new=12, do_sample=False, **options)
        got = generate(model, ids, new=12, do_sample=False, assistant_model=assistant, **options)
        assert got.tolist() == expected.tolist()


@pytest.mark.parametrize("draft", ["a specialist with a taller table", "a lower table", "another fused model"])
def test_drafts_leave_nothing_behind(draft):
    model, ids = tall(), tokens(1, 6)
    assistant = DRAFTS[draft](model)
    before = assistant(ids[:, :3] % 40).logits
    generate(model, ids, do_sample=False, assistant_model=assistant)
    assert torch.equal(assistant(ids[:, :3] % 40).logits, before)
    assert not assistant._forward_hooks and not assistant._forward_pre_hooks


@pytest.mark.parametrize("draft", ["a taller table", "a lower table"])
def test_sampled_drafts_follow_the_fused_distribution(draft):
    """Speculative sampling: whatever is drafted, the first token is drawn from the fused model's distribution."""
    model, ids, n = tall(), tokens(1, 4), 200
    assistant = DRAFTS[draft](model)
    options = {"do_sample": True, "top_k": 0, "temperature": 2.0, "new": 3, "eos_token_id": None}
    with torch.no_grad():
        p = (model(ids).logits[0, -1] / 2.0).softmax(-1)
    draws = torch.stack([generate(model, ids, seed, assistant_model=assistant, **options)[0, 4:] for seed in range(n)])
    assert draws.max() < VOCAB
    observed = torch.bincount(draws[:, 0], minlength=VOCAB) / n
    assert (observed - p).abs().max() < 5 * (p.max() * (1 - p.max()) / n) ** 0.5


def test_a_copy_of_the_model_drafts_what_is_accepted():
    """The same distribution over a taller table: every draft is accepted, so few passes are needed."""
    plain = tiny(seed=1)
    taller = tiny(seed=1)
    taller.resize_token_embeddings(VOCAB + 8)
    with torch.no_grad():
        taller.get_output_embeddings().weight[VOCAB:] = (
            taller.get_output_embeddings().weight[:1] * 50
        )  # certain rubbish
    taller.generation_config.assistant_confidence_threshold = 0.0
    taller.generation_config.num_assistant_tokens = 5
    model, ids, passes = fuse([plain]), tokens(1, 6), []
    expected = generate(model, ids, new=12, do_sample=False, eos_token_id=None)
    model.register_forward_hook(lambda *_: passes.append(1))
    got = generate(model, ids, new=12, do_sample=False, eos_token_id=None, assistant_model=taller.eval())
    assert got.tolist() == expected.tolist() and len(passes) <= 3


def test_a_fused_model_drafts_for_an_ordinary_one():
    plain, ids = tiny(seed=9), tokens(1, 6)
    expected = generate(plain, ids, do_sample=False)
    assert generate(plain, ids, do_sample=False, assistant_model=tall()).tolist() == expected.tolist()


def test_other_tokenizers_take_the_way_of_transformers(tokenizer):
    """With both tokenizers, drafts go through text, as for any other model."""
    model = fuse([tiny(seed=s, vocab_size=len(tokenizer)) for s in range(2)])
    ids = tokenizer("def add(a, b):", return_tensors="pt").input_ids
    expected = generate(model, ids, do_sample=False)
    both_tokenizers = {"tokenizer": tokenizer, "assistant_tokenizer": tokenizer}
    assistant = tiny(seed=7, vocab_size=len(tokenizer) + 8)
    got = generate(model, ids, do_sample=False, assistant_model=assistant, **both_tokenizers)
    assert got.tolist() == expected.tolist()


def test_prompt_lookup():
    model, ids = three(), tokens(1, 6).repeat(1, 3)
    expected = generate(model, ids, new=12, do_sample=False)
    assert generate(model, ids, new=12, do_sample=False, prompt_lookup_num_tokens=3).tolist() == expected.tolist()


# ---------------------------------------------------------------- caches


def test_a_conversation_goes_on_with_its_cache():
    model, ids = three(), tokens(1, 5)
    first = generate(model, ids, new=4, do_sample=False, return_dict_in_generate=True, eos_token_id=None)
    longer = torch.cat([first.sequences, tokens(1, 3, seed=9)], dim=1)
    reused = generate(model, longer, new=4, do_sample=False, past_key_values=first.past_key_values, eos_token_id=None)
    assert reused.tolist() == generate(model, longer, new=4, do_sample=False, eos_token_id=None).tolist()


def test_a_static_cache_is_refused():
    with pytest.raises(UltraFuserError, match="cache_implementation='static'.*'dynamic'"):
        generate(three(), tokens(1, 4), cache_implementation="static")


def test_too_long_is_an_error_that_names_the_specialist():
    model = fuse([tiny(), tiny("gpt2", n_positions=12)], names=["long", "short"])
    with pytest.raises(UltraFuserError, match="specialist 'short': 13 tokens do not fit"):
        generate(model, tokens(1, 10), new=8, eos_token_id=None)
    with pytest.raises(UltraFuserError, match="specialist 'short': 20 tokens do not fit"):
        generate(model, tokens(1, 20))


def test_one_hot_gate_generates_what_that_specialist_generates():
    model, ids = three(), tokens(2, 5)
    for k, name in enumerate(model.config.names):
        plain = generate(model.specialist(name), ids, do_sample=False, eos_token_id=1, pad_token_id=2)
        assert generate(force_gate(model, one_hot(k, 3)), ids, do_sample=False).tolist() == plain.tolist()
