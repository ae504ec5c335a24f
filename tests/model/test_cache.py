"""A cache that outlives a turn: the next turn gives what a fresh pass gives, whatever its prompts are."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from tiny_models import entry, fuse, fuse_entries, left_pad, save_adapter, tiny, tokens
from ultrafuser.errors import UltraFuserError

MODELS = {
    "three architectures": lambda: [tiny("llama", 1), tiny("gpt2", 2, n_embd=48), tiny("gemma2", 3, hidden_size=16)],
    "sliding windows": lambda: [tiny("mistral", s, sliding_window=6) for s in range(3)],
    "no positions": lambda: [tiny("bloom", s, hidden_size=32, n_head=4, n_layer=2) for s in range(3)],
    "rotary and alibi": lambda: [tiny("qwen2", 1), tiny("bloom", 2, hidden_size=32, n_head=4, n_layer=2), tiny(seed=3)],
}
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "samples": {"do_sample": True, "num_return_sequences": 2},
    "chunks": {"prefill_chunk_size": 3},
    "penalised": {"repetition_penalty": 1.4},
}
GROWTH = [(5, 2, 9), (1, 4, 2), (6, 3, 3)]  # new tokens of each of the 3 specialists, turn by turn


@pytest.fixture
def around(save, tmp_path):
    """Two adapters on one base, the first and the last specialist, and another model between them."""
    base, plain = save("base"), tiny()
    first, last = (entry(name, base, save_adapter(plain, tmp_path / name, seed)) for seed, name in enumerate("ac", 1))
    return fuse_entries([first, entry("b", save("b", "gpt2", seed=3)), last])


@pytest.fixture(params=[*MODELS, "shared base", "shared base around another model"])
def model(request):
    if request.param == "shared base":
        return request.getfixturevalue("shared")
    if request.param == "shared base around another model":
        return request.getfixturevalue("around")
    return fuse(MODELS[request.param]())


def padded(prompts):
    """B x K prompts -> what `generate` takes."""
    flat, mask = left_pad([prompt for row in prompts for prompt in row])
    ids, mask = (tensor.unflatten(0, (len(prompts), len(prompts[0]))) for tensor in (flat, mask))
    return {
        "input_ids": ids[:, 0],
        "attention_mask": mask[:, 0],
        "specialist_input_ids": ids,
        "specialist_attention_mask": mask,
    }


def answer(model, prompts, cache=None, seed=0, new=4, **options):
    torch.manual_seed(seed)
    options = {"do_sample": False, "eos_token_id": None, "max_new_tokens": new} | options
    inputs = padded(prompts)
    out = model.generate(**inputs, past_key_values=cache, return_dict_in_generate=True, output_logits=True, **options)
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, 1)


def same_as_fresh(model, prompts, cache, **options):
    """The answers with the cache, which are those without it."""
    fresh, fresh_logits = answer(model, prompts, **options)
    reused, reused_logits = answer(model, prompts, cache, **options)
    assert reused.tolist() == fresh.tolist()
    torch.testing.assert_close(reused_logits, fresh_logits, rtol=1e-3, atol=1e-3)
    return reused


def grown(prompts, answers, turn):
    """The prompts of the next turn: other numbers of new tokens for every row and specialist."""
    out = []
    for b, row in enumerate(prompts):
        lengths = [n + b * (k + turn) % 4 for k, n in enumerate(GROWTH[turn])]
        more = [tokens(1, n, seed=100 * turn + 10 * b + k)[0] for k, n in enumerate(lengths)]
        answered = answers[b] if len(answers) else torch.tensor([], dtype=torch.long)
        out.append([torch.cat([prompt, answered, new]) for prompt, new in zip(row, more, strict=True)])
    return out


def reads(model):
    """The lengths of the coming passes of the first specialist, filled while the model runs."""
    lengths = []
    model.groups[0].register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[-1]))
    return lengths


def opening(batch):
    return grown([[torch.tensor([], dtype=torch.long)] * 3] * batch, [], 0)


# ---------------------------------------------------------------- turns of a conversation


@pytest.mark.parametrize("batch", [1, 3])
def test_a_talk_in_prompts_that_grow_differently(model, batch):
    cache, prompts = model.new_cache(), opening(batch)
    answers = same_as_fresh(model, prompts, cache)
    for turn in (1, 2):
        prompts = grown(prompts, answers, turn)
        answers = same_as_fresh(model, prompts, cache)


@pytest.mark.parametrize("way", WAYS)
def test_a_talk_in_every_way_of_decoding(way):
    model = fuse(MODELS["three architectures"]())
    cache, prompts = model.new_cache(), opening(2)
    answers, _ = answer(model, prompts, cache)
    prompts = grown(prompts, answers, 1)
    same_as_fresh(model, prompts, cache, **WAYS[way])
    same_as_fresh(model, grown(prompts, answers, 2), cache, **WAYS[way])  # now with a row for each beam or sample


@pytest.mark.parametrize("draft", ["specialist", "prompt"])
def test_a_talk_with_drafts(draft):
    model = fuse(MODELS["sliding windows"]())
    cache, prompts = model.new_cache(), opening(1)
    drafts = {"assistant_model": model.specialist("s0")} if draft == "specialist" else {"prompt_lookup_num_tokens": 2}
    answers = same_as_fresh(model, prompts, cache, **drafts)
    same_as_fresh(model, grown(prompts, answers, 1), cache, **drafts)


@pytest.mark.parametrize("change", ["early", "late", "all", "shorter", "same"])
def test_a_template_that_rewrites_the_talk(model, change):
    cache, prompts = model.new_cache(), opening(2)
    answers, _ = answer(model, prompts, cache)
    prompts = grown(prompts, answers, 1)
    if change == "early":
        prompts[0][1][1] = 3 + (prompts[0][1][1] - 2) % 69
    elif change == "late":
        prompts[1][2][-4] = 3 + (prompts[1][2][-4] - 2) % 69
    elif change == "all":
        prompts = [[tokens(1, 9, seed=50 + b + k)[0] for k in range(3)] for b in range(2)]
    elif change == "shorter":
        prompts = [[prompt[:4] for prompt in row] for row in prompts]
    else:
        prompts = opening(2)
    same_as_fresh(model, prompts, cache)


def test_other_rows_go_on(model):
    """One row of three goes on alone, then three rows go on from this one."""
    cache, prompts = model.new_cache(), opening(3)
    answers, _ = answer(model, prompts, cache)
    prompts = grown(prompts[1:2], answers[1:2], 1)
    answers = same_as_fresh(model, prompts, cache)
    same_as_fresh(model, grown(prompts * 3, [answers[0]] * 3, 2), cache)


def test_one_prompt_for_all_specialists(model):
    """Batches whose left padding moves between the turns."""
    cache, rows = model.new_cache(), [tokens(1, n, seed=n)[0] for n in (3, 8)]
    for turn in range(3):
        ids, mask = left_pad(rows)
        options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 4, "eos_token_id": None}
        fresh = model.generate(ids, **options)
        assert model.generate(ids, past_key_values=cache, **options).tolist() == fresh.tolist()
        new = fresh[:, ids.shape[1] :]
        rows = [torch.cat([row, new[b], tokens(1, 1 + 3 * b * turn, seed=turn)[0]]) for b, row in enumerate(rows)]


def test_a_prefix_is_prefilled_once_for_many_prompts(model):
    prefix = [tokens(1, n, seed=n)[0] for n in (6, 4, 7)]
    inputs = padded([prefix])
    cache = model.new_cache()
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    for seed in (1, 2):
        prompts = [[torch.cat([ids, tokens(1, 2 + k, seed=seed)[0]]) for k, ids in enumerate(prefix)]]
        same_as_fresh(model, prompts, copy.deepcopy(cache))


# ---------------------------------------------------------------- what is read again


def test_a_turn_reads_only_what_is_new():
    model = fuse([tiny("llama", 1), tiny("gpt2", 2, n_embd=48), tiny("qwen2", 3)])
    cache, prompts = model.new_cache(), opening(1)
    answers, _ = answer(model, prompts, cache)
    lengths = reads(model)
    answer(model, grown(prompts, answers, 1), cache)
    assert lengths == [GROWTH[1][1] + 1, 1, 1, 1], "the longest growth, and the last token of the answer"


@pytest.mark.parametrize("record", [True, False])
def test_sliding_windows_go_on_if_they_record(record):
    """A window has dropped states that a moved prompt needs: read again from the start, or never drop them."""
    model = fuse(MODELS["sliding windows"]())
    cache, prompts = model.new_cache(record=record), opening(1)
    answers = same_as_fresh(model, prompts, cache)
    prompts = grown(prompts, answers, 1)
    longest = max(len(prompt) for prompt in prompts[0])
    lengths = reads(model)
    answer(model, prompts, cache)
    assert lengths[0] == (GROWTH[1][1] + 1 if record else longest)


@pytest.mark.parametrize("kind", ["three architectures", "no positions"])
def test_a_pass_that_failed_leaves_a_usable_cache(kind, monkeypatch):
    model = fuse(MODELS[kind]())
    cache, prompts = model.new_cache(), opening(1)
    answers, _ = answer(model, prompts, cache)
    prompts = grown(prompts, answers, 1)
    with monkeypatch.context() as patch:
        patch.setattr(model.groups[1], "forward", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            answer(model, prompts, cache)
    same_as_fresh(model, prompts, cache)


# ---------------------------------------------------------------- passes by hand


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32])
def test_masks_of_any_type(dtype):
    model = fuse(MODELS["three architectures"]())
    inputs = padded([[tokens(1, n, seed=n)[0] for n in (3, 6, 4)]])
    masks = {name: inputs[name].to(dtype) for name in ("attention_mask", "specialist_attention_mask")}
    options = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None}
    expected = model.generate(**inputs, **options).tolist()
    cache = model.new_cache()
    for _ in range(2):
        assert model.generate(**inputs | masks, past_key_values=cache, **options).tolist() == expected


@pytest.mark.parametrize("mask_of", ["all", "new", "none"])
def test_cached_padding_stays_masked(model, mask_of):
    prompts = [[tokens(1, 3 + 2 * b + k, seed=10 * b + k)[0] for k in range(3)] for b in range(2)]
    inputs = padded(prompts)
    ids, mask = inputs["specialist_input_ids"], inputs["specialist_attention_mask"]
    more = tokens(2, 3, seed=9)[:, None].expand(-1, 3, -1)
    whole = {
        "specialist_input_ids": torch.cat([ids, more], -1),
        "specialist_attention_mask": torch.cat([mask, torch.ones_like(more)], -1),
    }
    given = {"all": whole["specialist_attention_mask"], "new": torch.ones_like(more), "none": None}[mask_of]
    with torch.no_grad():
        expected = model(**whole).logits[:, -3:]
        cache = model(specialist_input_ids=ids, specialist_attention_mask=mask, use_cache=True).past_key_values
        got = model(specialist_input_ids=more, specialist_attention_mask=given, past_key_values=cache).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_tokens_follow_what_happens_to_the_states(model):
    prompts = [[tokens(1, 3 + 2 * b + k, seed=10 * b + k)[0] for k in range(3)] for b in range(2)]
    inputs = padded(prompts)
    cache = model.new_cache(record=True)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    ids, mask = inputs["specialist_input_ids"], inputs["specialist_attention_mask"]
    cache.crop(-2)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
    cache.batch_select_indices(torch.tensor([0, 1]))
    order = [1, 0]
    assert cache.input_ids.tolist() == ids[order, :, :-2].tolist()
    assert cache.attention_mask.tolist() == mask[order, :, :-2].tolist()
    more = tokens(2, 4, seed=9)[:, None].expand(-1, 3, -1)
    with torch.no_grad():
        got = model(specialist_input_ids=more, past_key_values=cache).logits
        whole = torch.cat([ids[order, :, :-2], more], -1), torch.cat([mask[order, :, :-2], torch.ones_like(more)], -1)
        expected = model(specialist_input_ids=whole[0], specialist_attention_mask=whole[1]).logits[:, -4:]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    cache.reset()
    assert cache.input_ids is None and cache.get_seq_length() == 0


# ---------------------------------------------------------------- refusals


def test_caches_that_are_refused():
    model = fuse([tiny(seed=s) for s in range(2)])
    with pytest.raises(UltraFuserError, match="an offloaded cache needs an accelerator, but the model is on the CPU"):
        model.generate(tokens(1, 3), cache_implementation="offloaded", max_new_tokens=2)
    with pytest.raises(UltraFuserError, match=r"past_key_values is a DynamicCache. Pass model.new_cache\(\)"):
        model.generate(tokens(1, 3), past_key_values=DynamicCache(), max_new_tokens=2)
    with pytest.raises(UltraFuserError, match="past_key_values needs use_cache=True, got use_cache=False"):
        model.generate(tokens(1, 3), past_key_values=model.new_cache(), use_cache=False, max_new_tokens=2)
    with pytest.raises(
        UltraFuserError, match="covers 4 tokens, but specialist_input_ids has 3. Pass the whole prompts"
    ):
        prompts = tokens(1, 3)[:, None].expand(-1, 2, -1)
        mask = torch.ones(1, 2, 4, dtype=torch.long)
        model.generate(tokens(1, 3), specialist_input_ids=prompts, specialist_attention_mask=mask, max_new_tokens=2)


def test_recurrent_states_are_computed_again():
    """They cannot go back to an earlier token, but they go on from where they are."""
    fields = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    layers = {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}
    model = fuse([tiny("lfm2", s, **fields, **layers) for s in range(2)])
    cache, options = model.new_cache(), {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None}
    ids = torch.cat([model.generate(tokens(2, 7), past_key_values=cache, **options), tokens(2, 3, seed=5)], 1)
    lengths = reads(model)
    for prompts, read in ((ids, 4), (ids[:, 1:], 13), (ids[:, :8], 8)):
        expected = model.generate(prompts, **options)
        lengths.clear()
        assert model.generate(prompts, past_key_values=copy.deepcopy(cache), **options).tolist() == expected.tolist()
        assert lengths[0] == read


# ---------------------------------------------------------------- rows that join and leave


def one_row(model, prompts, growing, record=False):
    """A cache of one row and the logits behind its prompts."""
    cache = model.new_cache(growing=growing, record=record)
    inputs = padded([prompts])
    with torch.no_grad():
        out = model.specialist_states(inputs["specialist_input_ids"], inputs["specialist_attention_mask"], cache)
    return cache, [state[:, -1] for state in out]


def steps(model, cache, ids):
    """The states of each specialist behind single tokens, (B, T) -> K x (B, T, D_k)."""
    with torch.no_grad():
        columns = [model.specialist_states(ids[:, [t]], None, cache) for t in range(ids.shape[1])]
    return [torch.cat(states, 1) for states in zip(*columns, strict=True)]


ROWS = [(5, 9, 2), (1, 1, 1), (12, 4, 7), (3, 3, 3)]


@pytest.mark.parametrize("growing", [False, True])
@pytest.mark.parametrize("record", [False, True])
def test_rows_that_join_and_leave_go_on_as_alone(model, growing, record):
    rows = [[tokens(1, n, seed=10 * b + k)[0] for k, n in enumerate(lengths)] for b, lengths in enumerate(ROWS)]
    continued = tokens(len(ROWS), 6, seed=99)
    expected = [steps(model, one_row(model, row, False)[0], continued[[b]]) for b, row in enumerate(rows)]

    def same(states, batch, columns):
        for k, state in enumerate(states):
            alone = torch.cat([expected[b][k][:, columns] for b in batch])
            torch.testing.assert_close(state, alone, rtol=1e-4, atol=1e-4)

    cache = model.new_cache(growing=growing, record=record)
    for row in rows[:3]:
        cache.join(one_row(model, row, growing, record)[0])
    same(steps(model, cache, continued[:3, :2]), [0, 1, 2], slice(0, 2))
    copied = cache.copied()
    cache.batch_select_indices(torch.tensor([1, 0]))
    before = cache.get_seq_length()
    cache.trim()
    assert cache.get_seq_length() == before - 3, "the padding before the longest of the rows that stay"
    fourth = one_row(model, rows[3], growing, record)[0]
    steps(model, fourth, continued[[3], :2])
    cache.join(fourth)
    same(steps(model, cache, continued[[1, 0, 3], 2:4]), [1, 0, 3], slice(2, 4))
    cache.batch_select_indices(torch.tensor([0]))
    cache.trim()
    assert cache.get_seq_length() == 5 and cache.attention_mask is None
    same(steps(model, cache, continued[[1], 4:]), [1], slice(4, 6))
    same(steps(model, copied, continued[:3, 2:]), [0, 1, 2], slice(2, 6))


def test_growing_layers_write_into_free_columns():
    """A step copies no states, and what is assigned or copied shares no free columns."""
    model = fuse([tiny(seed=s) for s in range(3)])
    cache, _ = one_row(model, [tokens(1, 4, seed=k)[0] for k in range(3)], growing=True)
    pointers = [layer.keys.data_ptr() for layer in cache.layers]
    copied = cache.copied()
    steps(model, cache, tokens(1, 3, seed=5))
    assert [layer.keys.data_ptr() for layer in cache.layers] == pointers
    kept = [layer.keys.clone() for layer in cache.layers]
    steps(model, copied, tokens(1, 3, seed=6))
    for layer, keys in zip(cache.layers, kept, strict=True):
        assert torch.equal(layer.keys, keys)
    cache.crop(-2)
    assert cache.get_seq_length() == 5 and cache.layers[0].values.shape[2] == 5


def test_recurrent_states_cannot_join():
    model = fuse([tiny("llama", 1), tiny("llama", 2)])
    assert model.new_cache().can_join
    cache = model.new_cache()
    cache.groups[1].layers[0] = object()
    assert not cache.can_join
