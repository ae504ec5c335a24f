"""Adapters as rows of one batch equal PEFT's own models, in values and in gradients."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from tiny_models import (
    entry,
    force_gate,
    fuse,
    fuse_entries,
    left_pad,
    naive_mix,
    one_hot,
    save_adapter,
    shake_gate,
    tiny,
    tokens,
)
from ultrafuser.errors import CheckpointError
from ultrafuser.model.adapters import is_plain_lora
from ultrafuser.model.configuration_ultrafuser import UltraFuserConfig
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.model.saving import plain_model
from ultrafuser.model.shared_base import AdapterWeights, GroupedLora, SpecialistGroup

peft = pytest.importorskip("peft")

NAMES = ("text", "code", "math")
both = pytest.mark.parametrize("mixing", ["logits", "probabilities"])
# Layers to adapt in each architecture.
TARGETS = {
    "llama": [["q_proj", "v_proj"], ["up_proj", "o_proj"]],
    "qwen2": [["q_proj", "k_proj", "v_proj"], ["down_proj"]],
    "gemma2": [["gate_proj"], ["q_proj", "o_proj"]],
    "gpt2": [["c_attn"], ["c_proj", "c_fc"]],
    "gpt_neox": [["query_key_value"], ["dense_h_to_4h"]],
}


def peft_model(spec, trainable=False):
    """The oracle: the adapter as PEFT itself runs it."""
    base = AutoModelForCausalLM.from_pretrained(spec["source"]["model"])
    return peft.PeftModel.from_pretrained(base, spec["source"]["adapter"], is_trainable=trainable).eval()


def close(got, expected, **options):
    torch.testing.assert_close(got, expected, **{"rtol": 1e-5, "atol": 1e-5} | options)


# ---------------------------------------------------------------- values


def test_adapters_on_one_base_are_one_group(shared):
    assert [group.names for group in shared.groups] == [list(NAMES)]
    base = sum(p.numel() for p in tiny().parameters())
    adapters = sum(p.numel() for p in shared.groups[0].adapter_parameters())
    gate = sum(p.numel() for p in shared.gate.parameters())
    assert sum(p.numel() for p in shared.parameters()) == base + adapters + gate


@pytest.mark.parametrize("k", range(3))
def test_each_row_block_is_pefts_own_model(shared, k):
    ids = tokens(2, 9)
    with torch.no_grad():
        expected = peft_model(shared.config.specialists[k])(ids).logits
        got = force_gate(shared.float(), one_hot(k, 3))
        got.config.mixing = "logits"
        close(got(ids).logits, expected)
    assert (expected - tiny()(ids).logits).abs().max() > 0.1, "this adapter changes nothing, so it shows nothing"


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("rslora", [False, True])
def test_adapters_of_any_architecture(kind, rslora, save, tmp_path):
    changes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
    changes = changes if kind == "gpt_neox" else {}
    base, plain = save("base", kind, **changes), tiny(kind, **changes)
    entries = [
        entry(f"s{i}", base, save_adapter(plain, tmp_path / f"a{i}", i, r, targets, use_rslora=rslora))
        for i, (r, targets) in enumerate(zip((2, 5), TARGETS[kind], strict=True))
    ]
    model, ids = fuse_entries(entries, mixing="logits"), tokens(2, 7)
    assert len(model.groups) == 1
    with torch.no_grad():
        for k, spec in enumerate(model.config.specialists):
            expected = peft_model(spec)(ids).logits
            close(force_gate(model, one_hot(k, 2))(ids).logits, expected, rtol=1e-4, atol=1e-4)
            close(model.specialist(f"s{k}")(ids).logits, expected, rtol=1e-4, atol=1e-4)


@both
def test_mixture_of_adapters_equals_the_oracle(shared, mixing):
    shared.config.mixing = mixing
    rows = [tokens(1, n, seed=n)[0] for n in (4, 9)]
    ids, mask = left_pad(rows)
    with torch.no_grad():
        out = shared(ids, attention_mask=mask, output_gate_weights=True)
        for b, row in enumerate(rows):
            plain_logits = [peft_model(spec)(row[None]).logits[0] for spec in shared.config.specialists]
            weights = out.gate_weights[b, -len(row) :]
            close(out.logits[b, -len(row) :].double(), naive_mix(plain_logits, weights, mixing), rtol=1e-4, atol=1e-4)


def test_prompts_of_its_own_for_each_adapter(shared):
    flat, mask = left_pad([tokens(1, n, seed=n)[0] for n in (4, 7, 9, 5, 6, 8)])
    ids, mask = flat.unflatten(0, (2, 3)), mask.unflatten(0, (2, 3))
    with torch.no_grad():
        states = shared.specialist_states(ids, mask)
        for k, spec in enumerate(shared.config.specialists):
            model = peft_model(spec)
            for b in range(2):
                row = ids[b, k][mask[b, k].bool()]
                expected = model.model.model(row[None]).last_hidden_state[0]
                close(states[k][b, -len(row) :], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_specialist_is_pefts_merge(shared, name):
    spec = shared.config.specialists[NAMES.index(name)]
    merged, extracted = peft_model(spec).merge_and_unload(), shared.specialist(name)
    assert type(extracted) is type(merged)
    expected = merged.state_dict()
    assert set(extracted.state_dict()) == set(expected)
    for key, weight in extracted.state_dict().items():
        close(weight, expected[key])
    with torch.no_grad():
        extracted.model.embed_tokens.weight.zero_()
    assert shared.groups[0].model.model.embed_tokens.weight.any(), "a merged specialist must be a copy"


def test_average_of_adapters(shared):
    average = plain_model(shared.groups[0], {0: 1 / 3, 1: 1 / 3, 2: 1 / 3})
    merged = [peft_model(spec).merge_and_unload().state_dict() for spec in shared.config.specialists]
    for key, weight in average.state_dict().items():
        close(weight, sum(state[key] for state in merged) / 3)


@pytest.mark.parametrize("active", [[0], [2], [0, 2], []])
def test_some_adapters_alone(shared, active):
    """The bare base, or a choice of adapters, in one pass."""
    group, ids = shared.groups[0], tokens(2, 6)
    with torch.no_grad(), group.only(active):
        got = group(ids.expand(max(1, len(active)), -1, -1))
    models = [peft_model(shared.config.specialists[i]).model for i in active] or [tiny()]
    with torch.no_grad():
        for states, model in zip(got, models, strict=True):
            close(states, model.model(ids).last_hidden_state, rtol=1e-4, atol=1e-4)
        assert group(ids.expand(3, -1, -1)).shape[0] == 3


def test_the_bare_base_beside_adapters():
    """None leaves a specialist as the base; the manifest runs it as a group of its own."""
    base = tiny()
    layer = base.model.layers[0].self_attn.q_proj
    a, b = torch.randn(2, 32), torch.randn(32, 2)
    name = "model.layers.0.self_attn.q_proj"
    group = SpecialistGroup(base, ["bare", "adapted"], [None, AdapterWeights({name: (a, b)}, 0.5)])
    x = torch.randn(2, 3, 32)
    grouped = group.loras[name](x)
    close(grouped[0], layer(x[0]))
    close(grouped[1], layer(x[1]) + 0.5 * x[1] @ a.T @ b.T)
    ids = tokens(1, 5)
    with torch.no_grad():
        close(group(ids.expand(2, -1, -1))[0], tiny().model(ids).last_hidden_state)


def test_what_is_grouped():
    """Adapters on one base loaded alike; not the bare base, other revisions, other dtypes, nor those told apart."""
    config = tiny().config.to_dict()

    def spec(name, model="org/base", adapter=None, **fields):
        source = {"model": model, "adapter": adapter, "revision": fields.pop("revision", None)}
        return {"name": name, "source": source, "config": config, **fields}

    specs = [
        spec("a", adapter="x"), spec("bare"), spec("b", adapter="y"), spec("other", "org/other", "z"),
        spec("old", adapter="x", revision="v1"), spec("half", adapter="x", dtype="bfloat16"),
        spec("dora", adapter="w", separate=True), spec("c", adapter="v"),
    ]  # fmt: skip
    assert UltraFuserConfig(specs).groups() == [[0, 2, 7], [1], [3], [4], [5], [6]]
    assert UltraFuserConfig(specs, share_base=False).groups() == [[k] for k in range(8)]


@both
def test_order_of_specialists_is_the_manifests(save, tmp_path, mixing):
    """Adapters that are not neighbours still come out in their places."""
    base, plain = save("base"), tiny()
    first = entry("first", base, save_adapter(plain, tmp_path / "a", 1))
    gpt2_entry = entry("other", save("other", "gpt2", seed=3))
    last = entry("last", base, save_adapter(plain, tmp_path / "b", 2))
    model, ids = fuse_entries([first, gpt2_entry, last], mixing=mixing), tokens(2, 6)
    assert [group.names for group in model.groups] == [["first", "last"], ["other"]]
    flat, mask = left_pad([tokens(1, n, seed=n)[0] for n in (4, 7, 9)])
    with torch.no_grad():
        for k, name in enumerate(model.config.names):
            expected = model.specialist(name)(ids).logits
            close(force_gate(model, one_hot(k, 3))(ids).logits, expected, rtol=1e-4, atol=1e-4)
        states = model.specialist_states(flat[None], mask[None])
        for k, name in enumerate(model.config.names):
            row = flat[k][mask[k].bool()]
            close(states[k][0, -len(row) :], model.specialist(name).base_model(row[None])[0][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
def test_generation_cached_equals_uncached(shared, way):
    rows = [tokens(1, n, seed=n)[0] for n in (4, 8)]
    ids, mask = left_pad(rows)
    outs = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        outs.append(shared.generate(ids, attention_mask=mask, max_new_tokens=8, use_cache=use_cache, **way).tolist())
    assert outs[0] == outs[1]
    if "do_sample" not in way:
        for row, prompt in enumerate(rows):
            alone = shared.generate(prompt[None], max_new_tokens=8, eos_token_id=None, **way)[0, len(prompt) :]
            both = shared.generate(ids, attention_mask=mask, max_new_tokens=8, eos_token_id=None, **way)
            assert both[row, ids.shape[1] :].tolist() == alone.tolist()


def test_an_adapter_may_draft(shared):
    ids = tokens(1, 6)
    expected = shared.generate(ids, max_new_tokens=16)
    for name in NAMES:
        assert (
            shared.generate(ids, max_new_tokens=16, assistant_model=shared.specialist(name)).tolist()
            == expected.tolist()
        )


# Kinds of LoRA: whether each runs beside others on one base, or is merged into a base of its own.
LORAS = {
    "some layers": ({"layers_to_transform": [1]}, True),
    "regular expression": ({"targets": r".*\.1\..*(q|down)_proj"}, True),
    "all linear": ({"targets": "all-linear"}, True),
    "gaussian": ({"init_lora_weights": "gaussian"}, True),
    "ranks": ({"rank_pattern": {"q_proj": 2}}, False),
    "alphas": ({"alpha_pattern": {"q_proj": 2}}, False),
    "dora": ({"use_dora": True}, False),
    "bias of B": ({"lora_bias": True, "kind": "qwen2"}, False),
    "base biases": ({"bias": "all", "kind": "qwen2"}, False),
    "saved modules": ({"modules_to_save": ["norm"]}, False),
    "output layer": ({"targets": ["q_proj", "lm_head"]}, False),
    "pissa": ({"init_lora_weights": "pissa"}, False),
    "olora": ({"init_lora_weights": "olora"}, False),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", LORAS)
def test_any_lora_equals_peft(case, save, tmp_path):
    options, plain_lora = dict(LORAS[case][0]), LORAS[case][1]
    kind = options.pop("kind", "llama")
    base, plain = save("base", kind, tie_word_embeddings=False), tiny(kind, tie_word_embeddings=False)
    adapter = save_adapter(plain, tmp_path / "lora", 1, **options)
    assert is_plain_lora(json.loads((adapter / "adapter_config.json").read_text())) == plain_lora
    spec = entry("text", base, adapter, **({} if plain_lora else {"separate": True}))
    model, ids = fuse_entries([spec], mixing="logits"), tokens(2, 6)
    with torch.no_grad():
        close(model(ids).logits, peft_model(spec)(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("off", [None, False, 0, "", [], {}])
def test_an_option_that_peft_does_not_have_yet_is_no_plain_lora_unless_it_is_off(tmp_path, off):
    adapter = save_adapter(tiny(), tmp_path / "lora")
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert is_plain_lora(config | {"use_invented": off})
    for on in (True, 1, "invented", ["q_proj"], {"rank": 2}):
        assert not is_plain_lora(config | {"use_invented": on})


# ---------------------------------------------------------------- gradients


@both
def test_gradients_of_each_adapter_equal_those_of_separate_runs(shared, mixing):
    shared.config.mixing = mixing
    ids = tokens(2, 8)
    shared.double()
    shared(ids, labels=ids).loss.backward()

    models = [peft_model(spec, trainable=True).double() for spec in shared.config.specialists]
    states = [model.model.model(ids).last_hidden_state for model in models]
    weights = shared.gate(states).exp()
    mixed = naive_mix([model.lm_head(h) for model, h in zip(models, states, strict=True)], weights, mixing)
    gate = {name: p.grad.clone() for name, p in shared.gate.named_parameters()}
    shared.gate.zero_grad()
    nn.functional.nll_loss(mixed[:, :-1].log_softmax(-1).flatten(0, 1), ids[:, 1:].flatten()).backward()
    for name, parameter in shared.gate.named_parameters():
        close(gate[name], parameter.grad)
    compared = 0
    for name, lora in shared.groups[0].loras.items():
        for i, model in enumerate(models):
            layer = dict(model.base_model.model.named_modules())[name]
            if rank := lora.ranks[i]:
                close(lora.lora_A.grad[i, :rank], layer.lora_A["default"].weight.grad)
                close(lora.lora_B.grad[i, :, :rank], layer.lora_B["default"].weight.grad)
                compared += 1
            assert not lora.lora_A.grad[i, rank:].any() and not lora.lora_B.grad[i, :, rank:].any()
    assert compared == 2 * 2 * 3


def test_padding_of_ranks_stays_zero_through_training(shared):
    optimizer = torch.optim.AdamW(shared.groups[0].adapter_parameters(), lr=1e-2, weight_decay=0.1)
    ids = tokens(2, 8)
    for _ in range(3):
        optimizer.zero_grad()
        shared(ids, labels=ids).loss.backward()
        optimizer.step()
    for lora in shared.groups[0].loras.values():
        for i, rank in enumerate(lora.ranks):
            assert not lora.lora_A[i, rank:].any() and not lora.lora_B[i, :, rank:].any()


def test_dropout_only_while_training():
    base = tiny()
    a, b = torch.randn(2, 32), torch.randn(32, 2)
    group = SpecialistGroup(base, ["s"])
    group.add_adapters([AdapterWeights({"model.layers.0.self_attn.q_proj": (a, b)}, 1.0)], dropout=0.5)
    lora, x = group.loras["model.layers.0.self_attn.q_proj"], torch.randn(1, 50, 32)
    group.eval()
    close(lora(x), lora.base(x) + x @ a.T @ b.T)
    group.train()
    assert not torch.equal(lora(x), lora(x))


# ---------------------------------------------------------------- new adapters for stage 2


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_new_adapters_change_nothing_at_first(targets):
    model, ids = fuse([tiny(seed=s) for s in range(2)]), tokens(2, 6)
    with torch.no_grad():
        logits_before = model(ids).logits
        for group in model.groups:
            group.new_adapters(r=4, alpha=8, dropout=0.0, target_modules=targets)
        close(model(ids).logits, logits_before, rtol=0, atol=0)
    assert len(model.groups[0].loras) == (4 if isinstance(targets, list) else 14)
    assert "lm_head" not in model.groups[0].loras
    adapters = [p for group in model.groups for p in group.adapter_parameters()]
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in adapters) and any(p.grad.any() for p in adapters)


def test_new_adapters_train_and_merge():
    model, ids = fuse([tiny(seed=s) for s in range(2)]), tokens(2, 6)
    for group in model.groups:
        group.requires_grad_(False)
        group.new_adapters(r=2, alpha=4, dropout=0.0, target_modules="all-linear")
    optimizer = torch.optim.SGD([p for g in model.groups for p in g.adapter_parameters()], lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    with torch.no_grad():
        states = model.specialist_states(ids)
        for k, name in enumerate(model.config.names):
            merged = model.specialist(name)
            assert not any(isinstance(m, GroupedLora) for m in merged.modules())
            close(states[k], merged.model(ids).last_hidden_state, rtol=1e-4, atol=1e-4)
            assert (states[k] - tiny(seed=k).model(ids).last_hidden_state).abs().max() > 1e-3


def test_new_adapters_on_gpt2():
    model, ids = fuse([tiny("gpt2")]), tokens(2, 6)
    with torch.no_grad():
        logits_before = model(ids).logits
        model.groups[0].new_adapters(r=2, alpha=4, dropout=0.0, target_modules="all-linear")
        close(model(ids).logits, logits_before, rtol=0, atol=0)
    assert len(model.groups[0].loras) == 2 * 4


# ---------------------------------------------------------------- errors


def test_no_layer_of_that_name():
    with pytest.raises(CheckpointError, match=r"specialist 's': no linear layer is called .*'query'"):
        SpecialistGroup(tiny(), ["s"]).new_adapters(4, 8, 0.0, ["query"])


def test_the_wrong_base_for_an_adapter(save, tmp_path):
    adapter = save_adapter(tiny(), tmp_path / "lora")
    words = (
        r"specialist 'text': its adapter changes 'model.layers.0.self_attn.q_proj' from 32 to 32 features, but its base"
    )
    with pytest.raises(CheckpointError, match=words + r" has a layer of \(16, 32\)"):
        fuse_entries([entry("text", save("thin", hidden_size=16), adapter)])
    with pytest.raises(CheckpointError, match=r"specialist 'text'.* no such linear layer. Is it the right base\?"):
        fuse_entries([entry("text", save("gpt2", "gpt2"), adapter)])


def test_an_adapter_of_the_output_layer_is_refused(save, tmp_path):
    adapter = save_adapter(tiny(tie_word_embeddings=False), tmp_path / "lora", targets=("q_proj", "lm_head"))
    base = save("base", tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match="specialist 'text'.*lm_head"):
        fuse_entries([entry("text", base, adapter)])
    tensors = load_file(adapter / "adapter_model.safetensors")
    only_lora = {key: value for key, value in tensors.items() if "lora_" in key}
    save_file(only_lora, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="specialist 'text'.*lm_head"):
        fuse_entries([entry("text", base, adapter)])


def test_an_adapter_that_peft_cannot_merge(save, tmp_path):
    adapter = save_adapter(tiny(), tmp_path / "lora", lora_bias=True)  # a bias beside layers that have none
    with pytest.raises(CheckpointError, match="specialist 'text': PEFT cannot merge .* base layer has no bias"):
        fuse_entries([entry("text", save("base"), adapter, separate=True)])


def test_a_model_without_a_key_value_cache_is_refused():
    plain = tiny("mamba", hidden_size=32, num_hidden_layers=1, state_size=4, expand=1)
    with pytest.raises(CheckpointError, match="specialist 's': MambaForCausalLM keeps no key-value cache"):
        SpecialistGroup(plain, ["s"])


def test_random_start_needs_no_weights(shared):
    """From a configuration alone every specialist starts from random weights, whole."""
    model = shake_gate(UltraFuserForCausalLM(UltraFuserConfig(shared.config.specialists, gate_hidden_size=16)))
    assert len(model.groups) == 3 and model(tokens(1, 4)).logits.isfinite().all()


@pytest.mark.parametrize("mixing", ["logits", "probabilities"])
def test_heads_with_the_same_weights_share_a_product(shared, mixing):
    """Without gradients, few states go through one product. It gives what a product for each specialist gives."""
    shared.config.mixing = mixing
    shared.config.set_temperatures([1.0, 0.5, 2.0])
    ids = tokens(2, 5)
    separate = shared(ids).logits
    with torch.no_grad():
        joint = shared(ids).logits
    assert separate.requires_grad and not joint.requires_grad
    torch.testing.assert_close(joint, separate, rtol=1e-5, atol=1e-5)
