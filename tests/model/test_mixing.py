"""Laws of the forward pass: the gate, the two mixings, architectures, padding, caches, templates."""

from __future__ import annotations

import pytest
import torch

from tiny_models import ARCHITECTURES, VOCAB, force_gate, fuse, left_pad, naive_mix, one_hot, tiny, tokens
from ultrafuser.errors import UltraFuserError
from ultrafuser.model.cache import UltraFuserCache
from ultrafuser.model.gate import Gate

MIXINGS = ("logits", "probabilities")
both = pytest.mark.parametrize("mixing", MIXINGS)
# More architectures that transformers loads, for what is special about their heads, positions or caches.
_PLAIN = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
_GROUPED = {**_PLAIN, "intermediate_size": 48, "num_key_value_heads": 2}
MORE = {
    "qwen3": {**_GROUPED, "head_dim": 8},
    "gemma3_text": {**_GROUPED, "head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 4.0},
    "cohere": {**_PLAIN, "intermediate_size": 48, "logit_scale": 0.25},
    "granite": {**_PLAIN, "intermediate_size": 48, "logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "phi": {**_PLAIN, "intermediate_size": 48},
    "gpt_neox": {**_PLAIN, "intermediate_size": 48},
    "gptj": {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4},
    "opt": {**_PLAIN, "ffn_dim": 48, "word_embed_proj_dim": 16},
    "bloom": {"hidden_size": 32, "n_head": 4, "n_layer": 2},
    "falcon": {**_PLAIN, "alibi": False},
    "mixtral": {**_GROUPED, "num_local_experts": 2, "sliding_window": None},
    "olmo2": {**_PLAIN, "intermediate_size": 48},
}


def more(kind: str, seed: int = 0):
    return tiny(kind, seed, **MORE.get(kind, {}))


def three(**options):
    """Three architectures of three widths."""
    return fuse([tiny("llama", 1), tiny("gpt2", 2, n_embd=48), tiny("gemma2", 3, hidden_size=16)], **options)


# ---------------------------------------------------------------- one specialist, or as good as one


@both
@pytest.mark.parametrize("kind", [*ARCHITECTURES, *MORE])
def test_one_specialist_is_the_plain_model(kind, mixing):
    plain = more(kind)
    ids = tokens(2, 9)
    with torch.no_grad():
        expected, got = plain(ids).logits, fuse([plain], mixing=mixing)(ids).logits
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=5e-6)


@pytest.mark.parametrize("kind", [*ARCHITECTURES, *MORE])
def test_one_specialist_cached_and_padded(kind):
    plain = more(kind)
    fused = fuse([plain], mixing="logits")
    rows = [tokens(1, n, seed=n)[0] for n in (5, 11)]
    ids, mask = left_pad(rows)
    with torch.no_grad():
        expected_rows = [plain(row[None]).logits[0] for row in rows]
        padded = fused(ids, attention_mask=mask).logits
        first = fused(ids[:, :7], attention_mask=mask[:, :7], use_cache=True)
        then = fused(ids[:, 7:], attention_mask=mask, past_key_values=first.past_key_values, use_cache=True).logits
    for row, expected in enumerate(expected_rows):
        torch.testing.assert_close(padded[row, -len(expected) :], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(then[row], expected[-4:], rtol=1e-4, atol=1e-4)


@both
@pytest.mark.parametrize("k", range(3))
def test_one_hot_gate_is_that_specialist(mixing, k):
    model = three(mixing=mixing)
    ids = tokens(2, 8)
    with torch.no_grad():
        plain = model.specialist(f"s{k}")(ids).logits
        got = force_gate(model, one_hot(k, 3))(ids, output_gate_weights=True)
    assert got.gate_weights.unique().tolist() == [0.0, 1.0]
    torch.testing.assert_close(got.logits, plain, rtol=1e-5, atol=1e-5)


@both
def test_identical_specialists_make_the_gate_irrelevant(mixing):
    ids = tokens(2, 8)
    model = fuse([tiny(seed=5) for _ in range(3)], mixing=mixing)
    with torch.no_grad():
        plain = tiny(seed=5)(ids).logits
        outs = [model(ids).logits]
        for scores in ([0.0, 0.0, 0.0], [3.0, -1.0, 0.5], one_hot(1, 3)):
            outs.append(force_gate(model, scores)(ids).logits)
    for got in outs:
        torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- the gate


def test_gate_is_equation_one():
    torch.manual_seed(0)
    gate = Gate([8, 8, 8], hidden_size=6).double()
    states = [torch.randn(2, 5, 8).double() for _ in range(3)]
    scores = [
        torch.relu(h @ gate.hidden.weight.T + gate.hidden.bias) @ gate.score.weight.T + gate.score.bias for h in states
    ]
    torch.testing.assert_close(gate(states).exp(), torch.cat(scores, -1).softmax(-1))


def test_gate_has_the_papers_shape():
    gate = Gate([576, 576, 576])
    assert {name: tuple(p.shape) for name, p in gate.named_parameters()} == {
        "hidden.weight": (512, 576), "hidden.bias": (512,), "score.weight": (1, 512), "score.bias": (1,)
    }  # fmt: skip


def test_gate_projects_states_of_different_widths():
    gate = Gate([8, 16, 8], hidden_size=4)
    assert [tuple(p.weight.shape) for p in gate.projections] == [(16, 8), (16, 16), (16, 8)]
    assert gate([torch.randn(3, d) for d in (8, 16, 8)]).shape == (3, 3)


@both
def test_gate_weights_sum_to_one(mixing):
    model = three(mixing=mixing)
    with torch.no_grad():
        weights = model(tokens(2, 8), output_gate_weights=True).gate_weights
    assert weights.shape == (2, 8, 3)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 8))
    assert weights.std(dim=1).max() > 0.02, "the gate of this test has no opinions, so it shows nothing"
    assert model(tokens(1, 3)).gate_weights is None


# ---------------------------------------------------------------- mixing against the oracle


@both
@pytest.mark.parametrize("kind", ["same", "mixed"])
def test_mixing_equals_the_naive_mixture(mixing, kind):
    model = three(mixing=mixing) if kind == "mixed" else fuse([tiny(seed=s) for s in range(3)], mixing=mixing)
    ids = tokens(2, 10)
    with torch.no_grad():
        out = model(ids, output_gate_weights=True)
        plain = [model.specialist(name)(ids).logits for name in model.config.names]
    expected = naive_mix(plain, out.gate_weights, mixing)
    torch.testing.assert_close(out.logits.double(), expected, rtol=1e-4, atol=1e-4)


@both
def test_batched_equals_single(mixing):
    model, ids = three(mixing=mixing), tokens(4, 7)
    with torch.no_grad():
        batched = model(ids).logits
        single = torch.cat([model(row[None]).logits for row in ids])
    torch.testing.assert_close(batched, single, rtol=1e-4, atol=1e-5)


@both
def test_left_padded_equals_unpadded(mixing):
    model = three(mixing=mixing)
    rows = [tokens(1, n, seed=n)[0] for n in (3, 12, 7)]
    ids, mask = left_pad(rows)
    with torch.no_grad():
        padded = model(ids, attention_mask=mask).logits
        for out, row in zip(padded, rows, strict=True):
            torch.testing.assert_close(out[-len(row) :], model(row[None]).logits[0], rtol=1e-4, atol=1e-4)


@both
def test_cached_equals_uncached(mixing):
    model, ids = three(mixing=mixing), tokens(2, 14)
    with torch.no_grad():
        expected = model(ids).logits
        cache, steps = None, []
        for chunk in (ids[:, :6], ids[:, 6:7], ids[:, 7:11], ids[:, 11:]):
            out = model(chunk, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    assert isinstance(cache, UltraFuserCache) and cache.get_seq_length() == 14
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-4, atol=1e-4)


def test_logits_to_keep():
    model, ids = three(), tokens(2, 6)
    with torch.no_grad():
        expected = model(ids).logits
        torch.testing.assert_close(model(ids, logits_to_keep=2).logits, expected[:, -2:])
        torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([1, 4])).logits, expected[:, [1, 4]])


def test_tuple_output():
    model, ids = three(), tokens(1, 5)
    with torch.no_grad():
        (logits,) = model(ids, return_dict=False)
        loss, *_ = model(ids, labels=ids, return_dict=False)
    torch.testing.assert_close(logits, model(ids).logits)
    assert loss.dim() == 0


# ---------------------------------------------------------------- templates: a prompt for each specialist


@both
def test_each_specialist_reads_its_own_prompt(mixing):
    model = three(mixing=mixing)
    response = tokens(1, 5, seed=9)[0]
    prompts = [tokens(1, n, seed=n)[0] for n in (4, 9, 6)]
    ids, mask = left_pad([torch.cat([prompt, response]) for prompt in prompts])
    with torch.no_grad():
        out = model(specialist_input_ids=ids[None], specialist_attention_mask=mask[None], output_gate_weights=True)
        plain = [
            model.specialist(name)(torch.cat([prompt, response])[None]).logits[0, -5:]
            for name, prompt in zip(model.config.names, prompts, strict=True)
        ]
    expected = naive_mix(plain, out.gate_weights[0, -5:], mixing)
    torch.testing.assert_close(out.logits[0, -5:].double(), expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- embedding tables


@both
def test_padded_embedding_table_is_masked(mixing):
    model = fuse([tiny(seed=0), tiny(seed=1, vocab_size=VOCAB + 8)], mixing=mixing)
    assert model.config.vocab_size == VOCAB
    with torch.no_grad():
        out = model(tokens(1, 6), output_gate_weights=True)
        plain = [model.specialist(name)(tokens(1, 6)).logits[..., :VOCAB] for name in model.config.names]
    assert out.logits.shape[-1] == VOCAB
    torch.testing.assert_close(out.logits.double(), naive_mix(plain, out.gate_weights, mixing), rtol=1e-4, atol=1e-4)


@both
@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_embeddings(mixing, tied):
    model = fuse([tiny(seed=s, tie_word_embeddings=tied) for s in range(2)], mixing=mixing)
    inner = model.specialist("s0")
    assert (inner.lm_head.weight is inner.model.embed_tokens.weight) == tied
    ids = tokens(2, 6)
    with torch.no_grad():
        out = model(ids, output_gate_weights=True)
        plain = [model.specialist(name)(ids).logits for name in model.config.names]
    torch.testing.assert_close(out.logits.double(), naive_mix(plain, out.gate_weights, mixing), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- precision


@both
def test_bfloat16_runs_and_stays_close(mixing):
    model, ids = three(mixing=mixing), tokens(2, 8)
    with torch.no_grad():
        exact = model(ids, output_gate_weights=True)
        rough = model.to(torch.bfloat16)(ids, output_gate_weights=True)
        loss = model(ids, labels=ids).loss
    assert rough.logits.dtype == torch.float32 and loss.isfinite()
    assert (rough.gate_weights - exact.gate_weights).abs().max() < 0.15
    gap = (exact.logits.softmax(-1) - rough.logits.softmax(-1)).abs().sum(-1)
    assert gap.mean() < 0.1


# ---------------------------------------------------------------- errors


def test_too_long_names_the_specialist():
    model = fuse([tiny(max_position_embeddings=64), tiny("gpt2", n_positions=16)], names=["long", "short"])
    model(tokens(1, 16))
    with pytest.raises(UltraFuserError, match=r"specialist 'short': 17 tokens .* context of 16"):
        model(tokens(1, 17))
    cache = model(tokens(1, 10), use_cache=True).past_key_values
    with pytest.raises(UltraFuserError, match="specialist 'short': 17 tokens"):
        model(tokens(1, 7), past_key_values=cache)


def test_neither_kind_of_input():
    with pytest.raises(UltraFuserError, match=r"input_ids .* or specialist_input_ids .* got neither"):
        fuse([tiny()])()


def test_unknown_specialist():
    with pytest.raises(UltraFuserError, match=r"no specialist 'x'. Known: a, b"):
        fuse([tiny(), tiny()], names=["a", "b"]).specialist("x")


def test_foreign_cache_is_refused():
    model, plain = fuse([tiny()]), tiny()
    foreign = plain(tokens(1, 4), use_cache=True).past_key_values
    with pytest.raises(UltraFuserError, match="DynamicCache.*UltraFuserCache"):
        model(tokens(1, 1), past_key_values=foreign)


def test_a_gate_that_rules_out_all_that_take_part_weighs_them_alike():
    from ultrafuser.model.mixing import restrict_weights

    log_weights = torch.tensor([[0.0, -torch.inf, -torch.inf], [0.5, 0.3, 0.2]])
    log_weights[1] = log_weights[1].log()
    active = torch.tensor([[False, True, True], [True, False, True]])
    weights = restrict_weights(log_weights, active).exp()
    torch.testing.assert_close(weights, torch.tensor([[0.0, 0.5, 0.5], [5 / 7, 0.0, 2 / 7]]))
