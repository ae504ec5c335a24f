"""From a fused model to traces: the weights shown are the weights used, token by token."""

from __future__ import annotations

import pytest
import torch

from tiny_models import force_gate, shake_gate
from training_fixtures import NAMES, TinyRun
from ultrafuser.data.collate import prompt_inputs
from ultrafuser.data.schema import Row
from ultrafuser.data.templates import Renderer
from ultrafuser.inspect.run import answer, pieces, trace_rows, trace_tokens
from ultrafuser.specialists import fuse

ASK = [{"role": "user", "content": "how many foxes?"}]
LONG = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "12345 + 67890 = ? " * 3}]


@pytest.fixture
def fused(tiny_run: TinyRun):
    model, tokenizer = fuse(tiny_run.recipe("unused"))
    shake_gate(model, scale=3.0)
    return model, Renderer(tokenizer, [s["chat_template"] for s in model.config.specialists], 192)


def test_an_answer_ends_before_its_end_token(fused):
    model, renderer = fused
    inputs = prompt_inputs(renderer, [ASK, LONG])
    raw = model.generate(**inputs, max_new_tokens=12, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    answers = answer(model, renderer, [ASK, LONG], max_new_tokens=12, do_sample=False)
    for ids, generated in zip(answers, raw.tolist(), strict=True):
        assert ids == generated[: generated.index(1)] if 1 in generated else ids == generated


def test_end_tokens_are_cut_whether_one_or_several(fused):
    model, renderer = fused
    [ids] = answer(model, renderer, [ASK], max_new_tokens=12, do_sample=False)
    assert len(ids) > 3
    model.generation_config.eos_token_id = [ids[2], ids[3]]
    assert answer(model, renderer, [ASK], max_new_tokens=12, do_sample=False) == [ids[: min(map(ids.index, ids[2:4]))]]


def test_batched_answers_equal_single_ones(fused):
    model, renderer = fused
    together = answer(model, renderer, [ASK, LONG], max_new_tokens=8, do_sample=False)
    assert together == [answer(model, renderer, [c], max_new_tokens=8, do_sample=False)[0] for c in (ASK, LONG)]


@pytest.mark.parametrize("talk", [ASK, LONG])
def test_a_trace_shows_the_weights_that_generation_used(fused, talk):
    """The oracle: each step's weights from a forward pass over prompt and tokens so far, specialist by specialist."""
    model, renderer = fused
    [ids] = answer(model, renderer, [talk], max_new_tokens=6, do_sample=False)
    trace = trace_tokens(model, renderer, talk, ids, domain="mixed", title="t")
    assert (trace.specialists, trace.domain, trace.title) == (list(NAMES), "mixed", "t")
    assert trace.prompt == talk[-1]["content"]
    prompts = renderer.prompt(talk)
    for r in range(len(ids)):
        states = []
        for k, prompt in enumerate(prompts):
            read = torch.tensor([[*prompt, *ids[:r]]])
            with torch.no_grad():
                states.append(model.groups[k].model(read, output_hidden_states=True).hidden_states[-1][:, -1])
        with torch.no_grad():
            w = model.gate(states).exp()[0].tolist()
        assert trace.weights[r] == pytest.approx(w, abs=1e-4)


def test_a_one_hot_gate_leads_everywhere(fused):
    model, renderer = fused
    force_gate(model, [0.0, -float("inf"), -float("inf")])
    trace = trace_tokens(model, renderer, ASK, [10, 11, 12])
    assert [index for index, _ in trace.leaders] == [0, 0, 0]
    assert trace.weights == [[1, 0, 0]] * 3


def test_traces_of_rows_cover_their_answers(fused, tiny_run):
    model, renderer = fused
    rows = [
        Row("a", "code", (("user", "how many?"), ("assistant", "def add(a, b):\n    return a"))),
        Row("b", "math", (("user", "1 + 1"), ("assistant", "2"), ("user", "and 2 + 2?"), ("assistant", "4"))),
    ]
    first, second = trace_rows(model, renderer, rows)
    assert (first.domain, first.title, first.prompt) == ("code", "a", "how many?")
    assert first.text == "def add(a, b):\n    return a<|im_end|>"
    assert second.prompt == "and 2 + 2?"
    assert second.text.endswith("4<|im_end|>")
    for trace in (first, second):
        assert len(trace.weights) == len(trace.tokens)


def test_rows_that_do_not_fit_are_cut_or_left_out(fused):
    model, renderer = fused
    prompt_too_long = Row("a", "text", (("user", "fox " * 300), ("assistant", "ok")))
    answer_too_long = Row("b", "text", (("user", "hi"), ("assistant", "fox " * 300)))
    [trace] = trace_rows(model, renderer, [prompt_too_long, answer_too_long])
    assert trace.title == "b" and len(trace.tokens) < 192


def test_a_loaded_model_leaves_out_what_its_context_cannot_hold(fused, tmp_path):
    import ultrafuser

    model, renderer = fused
    model.save_pretrained(tmp_path / "fused")
    renderer.tokenizer.save_pretrained(tmp_path / "fused")
    loaded, loaded_renderer = ultrafuser.load(tmp_path / "fused", device_map="cpu")
    assert (
        list(trace_rows(loaded, loaded_renderer, [Row("a", "text", (("user", "fox " * 300), ("assistant", "ok")))]))
        == []
    )


@pytest.mark.parametrize("text", ["The fox", " 数学 naïve 🦊!", "a\n\n\tb", "", "�?"])
def test_pieces_join_to_the_text(fused, text):
    _, renderer = fused
    ids = renderer.tokenizer.encode(text, add_special_tokens=False)
    texts = pieces(renderer, ids)
    assert "".join(texts) == text and len(texts) == len(ids)


def test_a_character_of_several_tokens_belongs_to_the_last(fused):
    _, renderer = fused
    ids = renderer.tokenizer.encode("🦊", add_special_tokens=False)
    assert len(ids) > 1
    assert pieces(renderer, ids) == [""] * (len(ids) - 1) + ["🦊"]
