"""The chunked loss equals the plain one, value and every gradient, and never holds (tokens, V)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tiny_models import VOCAB, force_gate, fuse, left_pad, naive_mix, one_hot, tiny, tokens
from ultrafuser.model import loss as loss_module
from ultrafuser.model.loss import Head, label_log_prob, mixed_log_prob

both = pytest.mark.parametrize("mixing", ["logits", "probabilities"])
N, V, WIDTHS = 7, 11, (4, 6, 4)
# (scale, softcap, temperature): plain, Cohere or Granite with a temperature, all at once
SHAPES = [(1.0, None, 1.0), (0.3, None, 1.25), (2.0, 1.5, 0.8)]


def problem(seed: int = 0, biases: bool = True):
    """States, tables, biases and log weights in double precision, all leaves, and targets."""
    g = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()

    states = [leaf(N, d) for d in WIDTHS]
    tables = [leaf(V, d) for d in WIDTHS]
    bias = [leaf(V) if biases and k != 1 else None for k in range(len(WIDTHS))]
    scores = leaf(N, len(WIDTHS))
    return states, tables, bias, scores, torch.randint(0, V, (N,), generator=g)


def heads_of(tables, biases):
    return [Head(t, b, *shape) for t, b, shape in zip(tables, biases, SHAPES, strict=True)]


def naive_log_prob(states, tables, biases, scores, targets, mixing):
    """The oracle: all logits at once, plain autograd."""
    logits = []
    for h, table, bias, (scale, softcap, temperature) in zip(states, tables, biases, SHAPES, strict=True):
        z = (h @ table.T + (0 if bias is None else bias)) * scale
        logits.append((z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature)
    mixed = naive_mix(logits, scores.softmax(-1), mixing)
    return mixed.log_softmax(-1)[torch.arange(len(targets)), targets]


def gradients(value, leaves):
    weights = torch.linspace(0.5, 1.5, len(value), dtype=value.dtype)  # a different upstream gradient for each token
    return torch.autograd.grad((value * weights).sum(), [leaf for leaf in leaves if leaf is not None])


@both
@pytest.mark.parametrize("chunk", [1, 3, N, N + 1, None])
def test_value_and_all_gradients_equal_plain_autograd(mixing, chunk):
    states, tables, biases, scores, y = problem()
    leaves = [*states, *tables, *biases, scores]
    expected = naive_log_prob(states, tables, biases, scores, y, mixing)
    got = mixed_log_prob(states, heads_of(tables, biases), scores.log_softmax(-1), y, mixing, chunk)
    torch.testing.assert_close(got, expected)
    for gradient, plain in zip(gradients(got, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(gradient, plain)


# the end of an answer, for all and for each: a swap within the vocabulary, a row behind it, none
COMMON, MASKED, ENDS = V - 2, (2, 5), [(1, 4), (1, V - 1), None]


@both
@pytest.mark.parametrize("chunk", [1, 3, None])
def test_own_end_tokens_and_tokens_that_only_some_have(mixing, chunk):
    """The logit of the common end is that of each specialist's own end token. Tokens that not all have get none."""
    states, tables, biases, scores, y = problem(4)
    y = torch.tensor([1, 1, 3, 4, 0])[torch.arange(N) % 5]
    leaves = [*states, *tables, *biases, scores]
    common = [token for token in range(COMMON) if token not in MASKED]
    logits = []
    for h, table, bias, (scale, softcap, temperature), end in zip(states, tables, biases, SHAPES, ENDS, strict=True):
        z = (h @ table.T + (0 if bias is None else bias)) * scale
        z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
        order = list(range(V))
        if end is not None:
            order[end[0]], order[end[1]] = order[end[1]], order[end[0]]
        logits.append(z[:, [order[token] for token in common]])
    columns = torch.tensor([common.index(token) for token in y])
    expected = naive_mix(logits, scores.softmax(-1), mixing).log_softmax(-1)[torch.arange(N), columns]
    heads = [
        head._replace(vocab_size=COMMON, end=end, masked=MASKED)
        for head, end in zip(heads_of(tables, biases), ENDS, strict=True)
    ]
    got = mixed_log_prob(states, heads, scores.log_softmax(-1), y, mixing, chunk)
    torch.testing.assert_close(got, expected)
    for gradient, plain in zip(gradients(got, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(gradient, plain)
    for head, state, z in zip(heads, states, logits, strict=True):
        torch.testing.assert_close(head.logits(state)[:, common], z)
        assert (head.logits(state)[:, list(MASKED)].exp() == 0).all()


@both
@pytest.mark.parametrize("chunk", [3, None])
def test_gradcheck(mixing, chunk):
    states, tables, biases, scores, y = problem(1, biases=False)

    def function(*tensors):
        heads = heads_of(tensors[3:6], [None] * 3)
        return mixed_log_prob(tensors[:3], heads, tensors[6].log_softmax(-1), y, mixing, chunk)

    assert torch.autograd.gradcheck(function, (*states, *tables, scores))


@both
@pytest.mark.parametrize("trained", ["gate", "states", "tables", "first state"])
def test_any_part_may_be_frozen(mixing, trained):
    states, tables, biases, scores, y = problem(2)
    weights = {"gate": [scores], "states": states, "tables": tables, "first state": states[:1]}[trained]
    for leaf in [*states, *tables, *biases, scores]:
        if leaf is not None:
            leaf.requires_grad_(any(leaf is c for c in weights))
    expected = gradients(naive_log_prob(states, tables, biases, scores, y, mixing), weights)
    got = mixed_log_prob(states, heads_of(tables, biases), scores.log_softmax(-1), y, mixing, 2)
    for gradient, plain in zip(gradients(got, weights), expected, strict=True):
        torch.testing.assert_close(gradient, plain)


@both
def test_one_table_shared_by_all(mixing):
    """Adapters on one base: the same output layer K times, whose gradients add up."""
    g = torch.Generator().manual_seed(3)
    states = [torch.randn(N, 4, generator=g, dtype=torch.float64).requires_grad_() for _ in range(3)]
    table = torch.randn(V + 2, 4, generator=g, dtype=torch.float64).requires_grad_()  # two rows of padding
    scores = torch.randn(N, 3, generator=g, dtype=torch.float64)
    y = torch.randint(0, V, (N,), generator=g)
    got = mixed_log_prob(states, [Head(table[:V])] * 3, scores.log_softmax(-1), y, mixing, 3)
    mixed = naive_mix([h @ table[:V].T for h in states], scores.softmax(-1), mixing)
    expected = mixed.log_softmax(-1)[torch.arange(N), y]
    for gradient, plain in zip(gradients(got, [table, *states]), gradients(expected, [table, *states]), strict=True):
        torch.testing.assert_close(gradient, plain)


@both
def test_no_tokens_at_all(mixing):
    states, tables, biases, scores, y = problem()
    empty = [h[:0] for h in states]
    got = mixed_log_prob(empty, heads_of(tables, biases), scores[:0].log_softmax(-1), y[:0], mixing)
    assert got.shape == (0,)
    for gradient in torch.autograd.grad(got.sum(), [*states, *tables, scores]):
        assert not gradient.any()


def test_label_log_prob_is_one_specialist():
    states, tables, biases, _, y = problem()
    for h, head in zip(states, heads_of(tables, biases), strict=True):
        expected = head.logits(h).log_softmax(-1)[torch.arange(N), y]
        torch.testing.assert_close(label_log_prob(h, head, y, 2), expected)


@both
def test_extreme_logits_stay_finite(mixing):
    states, tables, biases, scores, y = problem()
    huge = [h.detach().mul(1e4).requires_grad_() for h in states]
    sure = torch.tensor([[0.0, -1e4, -1e4]], dtype=torch.float64).expand(N, 3).clone().requires_grad_()
    got = mixed_log_prob(huge, heads_of(tables, biases), sure.log_softmax(-1), y, mixing, 3)
    assert got.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients(got, [*huge, *tables, sure]))


@both
def test_low_precision_tables(mixing):
    """bfloat16 states and tables, float32 log-probabilities and sums."""
    states, tables, biases, scores, y = problem()
    low_states = [h.detach().bfloat16().requires_grad_() for h in states]
    low_tables = [t.detach().bfloat16().requires_grad_() for t in tables]
    no_bias = [None] * 3
    log_w = scores.detach().float().log_softmax(-1)
    got = mixed_log_prob(low_states, heads_of(low_tables, no_bias), log_w, y, mixing, 3)
    exact = naive_log_prob(states, tables, no_bias, scores, y, mixing)
    assert got.dtype == torch.float32
    assert (got.double() - exact).abs().max() < 0.1
    rough = gradients(got, [*low_states, *low_tables])
    for gradient, plain in zip(rough, gradients(exact, [*states, *tables]), strict=True):
        assert gradient.dtype == torch.bfloat16
        assert (gradient.double() - plain).norm() < 0.1 * plain.norm()


# ---------------------------------------------------------------- what is held


@both
@pytest.mark.parametrize("stage", [1, 2])
def test_nothing_as_large_as_the_logits_is_kept(mixing, stage):
    g = torch.Generator().manual_seed(0)
    n, v, d = 64, 500, 8
    states = [torch.randn(n, d, generator=g).requires_grad_(stage == 2) for _ in range(3)]
    heads = [Head(torch.randn(v, d, generator=g)) for _ in range(3)]
    scores = torch.randn(n, 3, generator=g).requires_grad_()
    saved_sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved_sizes.append(t.numel()), t)[1], lambda t: t):
        out = mixed_log_prob(states, heads, scores.log_softmax(-1), torch.arange(n), mixing, 4)
        out.sum().backward()
    assert max(saved_sizes) <= v * d < n * v


@both
def test_stage_one_never_goes_back_through_the_heads(mixing, monkeypatch):
    calls = []
    plain = Head.logits
    monkeypatch.setattr(Head, "logits", lambda *args: (calls.append(args), plain(*args))[1])
    states, tables, _, scores, y = problem()
    heads = [Head(t.detach()) for t in tables]
    out = mixed_log_prob([h.detach() for h in states], heads, scores.log_softmax(-1), y, mixing, 4)
    forward = len(calls)
    out.sum().backward()
    assert forward == 3 * 2 and len(calls) == forward and scores.grad.any()


def test_chunks_fit_the_budget_and_cover_every_token():
    weight = torch.empty(49_152, 1)
    chunks = loss_module.token_chunks(4096, weight, None)
    assert chunks[0].stop * 49_152 <= loss_module._CHUNK_VALUES["cpu"]
    assert [i for chunk in chunks for i in range(4096)[chunk]] == list(range(4096))


# ---------------------------------------------------------------- the model's loss


def model_of(mixing):
    return fuse([tiny("llama", 1), tiny("gemma2", 2), tiny("gpt2", 3)], mixing=mixing).double()


def plain_loss(model, ids, labels, mask=None):
    """Cross entropy over the model's own full logits, by transformers' convention."""
    logits = model(ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    return nn.functional.nll_loss(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


@both
def test_loss_and_all_gradients_of_the_model(mixing):
    model, ids = model_of(mixing), tokens(3, 9)
    labels = ids.clone()
    labels[0, :6] = labels[1, 4] = labels[2, :] = -100
    expected = plain_loss(model, ids, labels)
    expected.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    got = model(ids, labels=labels).loss
    got.backward()
    torch.testing.assert_close(got, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name], msg=lambda text, name=name: f"{name}: {text}")


@both
def test_loss_ignores_padding(mixing):
    model = model_of(mixing).float()  # Gemma 2's own attention gives NaN for padded rows in double precision
    rows = [tokens(1, n, seed=n)[0] for n in (4, 10)]
    ids, mask = left_pad(rows)
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, -4] = labels[1, 0] = -100  # nothing predicts a first token
    with torch.no_grad():
        got = model(ids, attention_mask=mask, labels=labels).loss
        single = [model(row[None], labels=row[None]).loss * (len(row) - 1) for row in rows]
    torch.testing.assert_close(got, sum(single) / 12, rtol=1e-5, atol=1e-5)


@both
def test_num_items_in_batch_makes_accumulation_exact(mixing):
    model, ids = model_of(mixing), tokens(4, 8)
    labels = ids.clone()
    labels[0, :5] = -100
    total = (labels[:, 1:] != -100).sum()
    with torch.no_grad():
        batch_loss = model(ids, labels=labels).loss
        row_losses = [model(ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=total).loss for i in range(4)]
    torch.testing.assert_close(sum(row_losses), batch_loss)


@both
def test_no_labels_is_a_loss_of_zero(mixing):
    """A micro-batch whose answers were all cut must not turn the run into NaN."""
    model, ids = model_of(mixing), tokens(2, 5)
    for items in (None, 10):
        out = model(ids, labels=torch.full_like(ids, -100), num_items_in_batch=items)
        assert out.loss == 0
        out.loss.backward()
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@both
def test_token_loss_and_gate_weights_come_with_the_loss(mixing):
    model, ids = model_of(mixing), tokens(2, 6)
    labels = ids.clone()
    labels[0, 3] = -100
    with torch.no_grad():
        out = model(ids, labels=labels, output_gate_weights=True)
        logits = model(ids, output_gate_weights=True)
    torch.testing.assert_close(out.token_loss.sum() / 9, out.loss)
    assert out.token_loss[0, 2] == 0 and not out.gate_weights[0, 2].any() and not out.gate_weights[:, -1].any()
    torch.testing.assert_close(out.gate_weights[1, :-1], logits.gate_weights[1, :-1])
    expected = -logits.logits[1, :-1].log_softmax(-1).gather(-1, ids[1, 1:, None]).squeeze(-1)
    torch.testing.assert_close(out.token_loss[1, :-1], expected)
    quiet = model(ids, labels=labels)
    assert quiet.gate_weights is None and quiet.token_loss is None


def rendered():
    """Two rows for three specialists with prompts of different lengths, padded on the right as training does."""
    prompts = [[tokens(1, 3 + k + 2 * b, seed=10 * b + k)[0] for k in range(3)] for b in range(2)]
    answers = [tokens(1, 5, seed=30)[0], tokens(1, 3, seed=31)[0]]
    width = max(len(p) for row in prompts for p in row) + 5
    ids, index = torch.full((2, 3, width), 2), torch.zeros(2, 3, 5, dtype=torch.long)
    mask, labels = torch.zeros(2, 3, width, dtype=torch.long), torch.full((2, 5), -100)
    for b, answer in enumerate(answers):
        labels[b, : len(answer)] = answer
        for k, prompt in enumerate(prompts[b]):
            sequence = torch.cat([prompt, answer])
            ids[b, k, : len(sequence)], mask[b, k, : len(sequence)] = sequence, 1
            index[b, k, : len(answer)] = torch.arange(len(prompt) - 1, len(sequence) - 1)
    return prompts, answers, ids, mask, index, labels


@both
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "no mask"])
def test_response_index_lines_up_different_templates(mixing, masked):
    """Padded on the right, a causal model needs no mask."""
    model = model_of(mixing)
    prompts, answers, ids, mask, index, labels = rendered()
    mask = mask if masked else None
    with torch.no_grad():
        out = model(specialist_input_ids=ids, specialist_attention_mask=mask, response_index=index, labels=labels,
                    output_gate_weights=True)  # fmt: skip
        for b, answer in enumerate(answers):
            plain_logits = [
                model.specialist(name)(torch.cat([prompt, answer])[None]).logits[0, len(prompt) - 1 : -1]
                for name, prompt in zip(model.config.names, prompts[b], strict=True)
            ]
            mixed = naive_mix(plain_logits, out.gate_weights[b, : len(answer)], mixing).log_softmax(-1)
            expected = -mixed[torch.arange(len(answer)), answer]
            torch.testing.assert_close(out.token_loss[b, : len(answer)], expected)
    torch.testing.assert_close(out.loss, out.token_loss.sum() / 8)


@both
def test_cached_features_give_the_same_loss_and_gate_gradient(mixing, monkeypatch):
    model = model_of(mixing)
    for group in model.groups:
        group.requires_grad_(False)
    _, _, ids, mask, index, labels = rendered()
    direct = model(specialist_input_ids=ids, specialist_attention_mask=mask, response_index=index, labels=labels)
    direct.loss.backward()
    plain = [p.grad.clone() for p in model.gate.parameters()]
    model.zero_grad()

    with torch.no_grad():
        states = model.specialist_states(ids, mask)
        states = [
            s.gather(1, i[..., None].expand(-1, -1, s.shape[-1])) for s, i in zip(states, index.unbind(1), strict=True)
        ]
        labelled = labels != -100
        log_probs = torch.zeros(*labels.shape, 3, dtype=torch.float64)
        log_probs[labelled] = model.specialist_log_probs([s[labelled] for s in states], labels[labelled])
    if mixing == "probabilities":
        monkeypatch.setattr(Head, "logits", lambda *_: pytest.fail("an output layer ran"))
    monkeypatch.setattr(model, "specialist_states", lambda *_: pytest.fail("a specialist ran"))
    cached = model(specialist_hidden_states=states, specialist_log_probs=log_probs, labels=labels)
    cached.loss.backward()
    torch.testing.assert_close(cached.loss, direct.loss)
    for parameter, expected in zip(model.gate.parameters(), plain, strict=True):
        torch.testing.assert_close(parameter.grad, expected)


@both
def test_cached_features_without_log_probs(mixing):
    model, ids = model_of(mixing), tokens(2, 6)
    with torch.no_grad():
        states = [s[:, :-1] for s in model.specialist_states(ids)]
        torch.testing.assert_close(model.loss_from_features(states, ids[:, 1:]).loss, model(ids, labels=ids).loss)


def test_specialist_log_probs_are_each_specialists_own():
    model, ids = model_of("probabilities"), tokens(2, 6)
    with torch.no_grad():
        states = [s[:, :-1].flatten(0, 1) for s in model.specialist_states(ids)]
        got = model.specialist_log_probs(states, ids[:, 1:].flatten())
        for k, name in enumerate(model.config.names):
            log_probs = model.specialist(name)(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
            torch.testing.assert_close(got[:, k], log_probs.flatten())


@both
def test_one_hot_loss_is_that_specialists_loss(mixing):
    model, ids = model_of(mixing), tokens(2, 7)
    with torch.no_grad():
        for k, name in enumerate(model.config.names):
            expected = model.specialist(name)(ids, labels=ids).loss
            got = force_gate(model, one_hot(k, 3))(ids, labels=ids).loss
            torch.testing.assert_close(got, expected, check_dtype=False)


@both
def test_padded_tables_do_not_take_probability(mixing):
    model, ids = fuse([tiny(seed=0), tiny(seed=1, vocab_size=VOCAB + 9)], mixing=mixing), tokens(2, 7)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, labels=ids).loss, plain_loss(model, ids, ids))


@both
def test_stage_one_gradients_reach_the_gate_alone(mixing):
    model, ids = model_of(mixing), tokens(2, 7)
    for group in model.groups:
        group.requires_grad_(False)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith("gate."), name


@both
def test_gradient_checkpointing_changes_nothing(mixing):
    model, ids = model_of(mixing), tokens(2, 7)
    model(ids, labels=ids).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name], msg=lambda text, name=name: f"{name}: {text}")
