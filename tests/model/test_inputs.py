"""Every keyword of `forward` and `generate`, and many of `from_pretrained`, work or are refused by name."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from tiny_models import fuse, tiny, tokens
from ultrafuser.errors import UltraFuserError
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM

POSITIONS = {
    "shifted": torch.tensor([[3, 4, 5, 6, 7, 8]]),
    "packed": torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 3]]),
    "of each row": torch.tensor([[0, 1, 2, 3, 4, 5], [9, 10, 11, 12, 13, 14]]),
}


def two(kind="llama", **options):
    return fuse([tiny(kind, s) for s in range(2)], names=["a", "b"], **options)


# ---------------------------------------------------------------- positions


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "qwen2"])
def test_positions_are_those_of_the_plain_model(kind, positions):
    plain, ids = tiny(kind), tokens(2, 6)
    with torch.no_grad():
        expected = plain(ids, position_ids=POSITIONS[positions].expand(2, -1), use_cache=False).logits
        got = fuse([plain])(ids, position_ids=POSITIONS[positions]).logits
        assert not torch.allclose(expected, plain(ids).logits, atol=1e-2) or kind != "gpt2"
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_packed_rows_do_not_see_each_other():
    model, ids = two(), tokens(1, 7)
    with torch.no_grad():
        packed = model(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3]])).logits
        apart = torch.cat([model(ids[:, :3]).logits, model(ids[:, 3:]).logits], 1)
    torch.testing.assert_close(packed, apart, rtol=1e-4, atol=1e-4)
    labels = torch.cat(
        [ids[:, :3], torch.tensor([[-100]]), ids[:, 4:]], 1
    )  # nothing predicts the next row's first token
    loss = model(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3]]), labels=labels).loss
    log_p = apart.log_softmax(-1)[0, [0, 1, 3, 4, 5]].gather(-1, ids[0, [1, 2, 4, 5, 6], None])
    torch.testing.assert_close(loss, -log_p.mean(), rtol=1e-4, atol=1e-4)


def test_positions_of_a_prompt_go_on_in_generation():
    plain, ids = tiny("gpt2"), tokens(2, 5)
    options = {"position_ids": torch.arange(7, 12).expand(2, -1), "max_new_tokens": 5, "do_sample": False}
    for extra in ({}, {"num_beams": 2}, {"use_cache": False}):
        expected = plain.generate(ids, **options, **extra)
        assert fuse([plain]).generate(ids, **options, **extra).tolist() == expected.tolist()


def test_positions_that_are_refused():
    bloom = fuse([tiny("bloom", hidden_size=32, n_head=4, n_layer=2)], names=["alibi"])
    with pytest.raises(
        UltraFuserError, match="specialist 'alibi': BloomForCausalLM takes no position_ids. Leave them out"
    ):
        bloom(tokens(1, 3), position_ids=torch.arange(3)[None])
    with pytest.raises(UltraFuserError, match=r"position_ids has the shape \(1, 4\), expected \(1, 3\)"):
        two()(tokens(1, 3), position_ids=torch.arange(4)[None])
    with pytest.raises(
        UltraFuserError, match="position_ids go with input_ids, got specialist_input_ids. Leave them out"
    ):
        two()(specialist_input_ids=tokens(2, 3)[None], position_ids=torch.arange(3)[None])


# ---------------------------------------------------------------- keywords that would have no effect


@pytest.mark.parametrize(
    ("keyword", "advice"),
    [
        ("output_hidden_states", r"Read them from model.specialist\(NAME\), or the last ones from"),
        ("output_attentions", r"Read them from model.specialist\(NAME\)"),
        ("output_router_logits", r"Read them from model.specialist\(NAME\)"),
        ("token_type_ids", "return_token_type_ids=False"),
        ("inputs_embeds", "Pass input_ids"),
        ("cache_position", "the cache knows its length"),
        ("cu_seq_lens_q", "Leave it out"),
        ("is_causal", "Leave it out"),
        ("lables", "Leave it out"),
    ],
)
def test_forward_refuses_keywords(keyword, advice):
    model, ids = two(), tokens(1, 3)
    with pytest.raises(UltraFuserError, match=f"forward got {keyword}, which a fused model does not take. .*{advice}"):
        model(ids, **{keyword: torch.zeros_like(ids) if keyword != "output_attentions" else True})
    for value in (None, False):
        torch.testing.assert_close(model(ids, **{keyword: value}).logits, model(ids).logits)


@pytest.mark.parametrize(
    "options",
    [
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"output_gate_weights": True},
        {"response_index": torch.zeros(1, 2, 1, dtype=torch.long)},
        {"labels": torch.zeros(1, 3, dtype=torch.long)},
        {"cu_seq_lens_q": torch.tensor([0, 3])},
        {"assistant_early_exit": 1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_generate_refuses_keywords(options):
    keyword = next(iter(options))
    with pytest.raises(UltraFuserError, match=f"got {keyword}, which a fused model does not take"):
        two().generate(tokens(1, 3), max_new_tokens=2, return_dict_in_generate=True, **options)


@pytest.mark.parametrize("keyword", ["token_type_ids", "inputs_embeds", "temprature", "cache_position"])
def test_transformers_refuses_the_others(keyword):
    value = torch.zeros(1, 3, 32) if keyword == "inputs_embeds" else torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=keyword):
        two().generate(tokens(1, 3), max_new_tokens=2, **{keyword: value})


@pytest.mark.parametrize("load", [AutoModelForCausalLM.from_pretrained, UltraFuserForCausalLM.from_pretrained])
@pytest.mark.parametrize("keyword", ["output_hidden_states", "output_attentions", "ignore_mismatched_sizes"])
def test_from_pretrained_refuses_keywords(full, tmp_path, keyword, load):
    full.save_pretrained(tmp_path / "fused")
    with pytest.raises(UltraFuserError, match=f"from_pretrained got {keyword}, which a fused model does not take"):
        load(tmp_path / "fused", **{keyword: True})
    load(tmp_path / "fused", **{keyword: False})


def test_from_pretrained_reads_safetensors_alone(full, tmp_path):
    full.save_pretrained(tmp_path / "fused")
    AutoModelForCausalLM.from_pretrained(tmp_path / "fused", use_safetensors=True)
    with pytest.raises(UltraFuserError, match="use_safetensors=False. Pickled weights can run code"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "fused", use_safetensors=False)


@pytest.mark.parametrize("key", ["output_hidden_states", "output_attentions"])
def test_outputs_that_the_configuration_asks_for_are_refused(key):
    model, ids = two(), tokens(1, 3)
    model.set_attn_implementation("eager")  # the only one that transformers lets return attentions
    setattr(model.config, key, True)
    with pytest.raises(UltraFuserError, match=f"forward got {key}"):
        model.generate(ids, max_new_tokens=2)
    assert model(ids, **{key: False}).logits.isfinite().all()


def test_training_inputs_need_labels():
    model, ids = two(), tokens(1, 3)
    states = model.specialist_states(ids)
    with pytest.raises(UltraFuserError, match="forward got response_index.*It goes with the labels"):
        model(ids, response_index=torch.zeros(1, 2, 1, dtype=torch.long))
    with pytest.raises(UltraFuserError, match="forward got specialist_hidden_states.*They go with the labels"):
        model(ids, specialist_hidden_states=states)
    with pytest.raises(
        UltraFuserError, match="forward got specialist_log_probs.*They go with specialist_hidden_states"
    ):
        model(ids, labels=ids, specialist_log_probs=torch.zeros(1, 3, 2))


# ---------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": tokens(1, 3)[0]}, r"input_ids has the shape \(3,\), expected \(B, T\)"),
        (
            {"specialist_input_ids": tokens(3, 4)[None]},
            r"specialist_input_ids has the shape \(1, 3, 4\), expected \(B, 2, T\) for 2 specialists",
        ),
        ({"specialist_input_ids": tokens(2, 4)}, r"specialist_input_ids has the shape \(2, 4\)"),
        (
            {"input_ids": tokens(2, 3), "attention_mask": torch.ones(2, 1, 3, 3)},
            r"attention_mask has the shape \(2, 1, 3, 3\), expected \(2, T\)",
        ),
        (
            {"specialist_input_ids": tokens(2, 4)[None], "specialist_attention_mask": torch.ones(1, 3, 4)},
            r"specialist_attention_mask has the shape \(1, 3, 4\), expected \(1, 2, T\)",
        ),
        (
            {"input_ids": tokens(1, 3), "specialist_attention_mask": torch.ones(1, 2, 3)},
            "specialist_attention_mask needs specialist_input_ids, got input_ids alone",
        ),
        (
            {"specialist_input_ids": tokens(2, 3)[None], "attention_mask": torch.tensor([[0, 1, 1]])},
            "attention_mask has padding, but specialist_attention_mask is missing. Pass both",
        ),
        (
            {"input_ids": tokens(1, 3), "attention_mask": torch.ones(1, 5)},
            "the attention mask covers 5 tokens, expected 3",
        ),
    ],
)
def test_shapes_that_do_not_fit(inputs, message):
    with pytest.raises(UltraFuserError, match=message):
        two()(**inputs)


def test_a_mask_that_fits_neither_the_new_tokens_nor_all():
    model = two()
    cache = model(tokens(1, 4), use_cache=True).past_key_values
    with pytest.raises(UltraFuserError, match=r"covers 5 tokens, expected 6 \(4 cached and 2 new ones\), or 2"):
        model(tokens(1, 2), attention_mask=torch.ones(1, 5), past_key_values=cache)


def test_generate_checks_the_prompts_masks():
    ids = tokens(1, 3)
    with pytest.raises(UltraFuserError, match="attention_mask has padding, but specialist_attention_mask is missing"):
        two().generate(
            ids, specialist_input_ids=ids[:, None].expand(-1, 2, -1), attention_mask=torch.tensor([[0, 1, 1]])
        )
