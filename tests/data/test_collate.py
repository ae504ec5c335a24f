"""Padding: shapes, sides, labels, and that it changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch

from tiny_models import fuse, tiny
from ultrafuser.data.chat_format import BUILTIN
from ultrafuser.data.collate import collate_rows, pad_labels, prompt_inputs
from ultrafuser.data.schema import Row
from ultrafuser.data.templates import Rendered, Renderer
from ultrafuser.errors import DataError

ROWS = [
    Rendered("a", "text", ((5, 6, 7, 8), (9, 10, 11, 12, 13)), ((2, 3), (3, 4)), (20, 21)),
    Rendered("b", "code", ((5, 6), (9, 10)), ((1,), (1,)), (22,)),
    Rendered("c", "math", ((5, 6, 7), (9, 10, 11, 12, 13, 14, 15)), ((0, 1, 2), (4, 5, 6)), (23, 24, 25)),
]
TALKS = [
    [{"role": "user", "content": "hi"}],
    [{"role": "user", "content": "how many foxes?"}, {"role": "assistant", "content": "12"},
     {"role": "user", "content": "and dogs?"}],
]  # fmt: skip


@pytest.fixture
def renderer(tokenizer) -> Renderer:
    return Renderer(tokenizer, [BUILTIN["chatml"], BUILTIN["plain"], BUILTIN["inst"]])


def test_rows_are_padded_on_the_right():
    batch = collate_rows(ROWS, pad_id=99)
    ids, index, labels = batch["specialist_input_ids"], batch["response_index"], batch["labels"]
    assert ids.shape == (3, 2, 7) and index.shape == (3, 2, 3) and labels.shape == (3, 3)
    assert {tensor.dtype for tensor in batch.values()} == {torch.long}
    assert ids[0].tolist() == [[5, 6, 7, 8, 99, 99, 99], [9, 10, 11, 12, 13, 99, 99]]
    assert labels.tolist() == [[20, 21, -100], [22, -100, -100], [23, 24, 25]]
    assert index[2].tolist() == [[0, 1, 2], [4, 5, 6]]
    assert index[1].tolist() == [[1, 0, 0], [1, 0, 0]]


def test_labels_alone():
    assert torch.equal(pad_labels(ROWS), collate_rows(ROWS)["labels"])


def test_a_row_costs_the_same_alone_and_in_a_batch():
    model = fuse([tiny(seed=1), tiny(seed=2)])
    batch = collate_rows(ROWS)
    together = model(**batch, output_gate_weights=True).token_loss
    for b, row in enumerate(ROWS):
        single = model(**collate_rows([row]), output_gate_weights=True).token_loss
        torch.testing.assert_close(together[b, : len(row.labels)], single[0], atol=1e-5, rtol=1e-5)


def test_the_padding_token_does_not_matter():
    model = fuse([tiny(seed=1), tiny(seed=2)])
    torch.testing.assert_close(model(**collate_rows(ROWS, 0)).loss, model(**collate_rows(ROWS, 3)).loss)


def test_prompts_are_padded_on_the_left_to_one_length(renderer):
    inputs = prompt_inputs(renderer, TALKS)
    prompts = [renderer.prompt(talk) for talk in TALKS]
    longest = max(len(ids) for row_prompts in prompts for ids in row_prompts)
    assert inputs["specialist_input_ids"].shape == inputs["specialist_attention_mask"].shape == (2, 3, longest)
    for b, row_prompts in enumerate(prompts):
        for k, ids in enumerate(row_prompts):
            row, mask = inputs["specialist_input_ids"][b, k], inputs["specialist_attention_mask"][b, k]
            assert row[mask.bool()].tolist() == ids
            assert mask.tolist() == [0] * (longest - len(ids)) + [1] * len(ids)
            assert set(row[~mask.bool()].tolist()) <= {renderer.tokenizer.pad_token_id}
    assert torch.equal(inputs["input_ids"], inputs["specialist_input_ids"][:, 0])
    assert torch.equal(inputs["attention_mask"], inputs["specialist_attention_mask"][:, 0])


def test_without_a_padding_token_the_end_token_pads(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    renderer = Renderer(bare, [BUILTIN["chatml"], BUILTIN["inst"]])
    assert prompt_inputs(renderer, TALKS)["specialist_input_ids"][0, 0, 0] == tokenizer.eos_token_id


def test_a_row_and_its_prompt_begin_alike(renderer):
    """What is trained on is what generation sees: the prompt of the row, then its response tokens."""
    row = Row("a", "text", (("user", "how many?"), ("assistant", "12345")))
    rendered, prompts = renderer.render(row), renderer.prompt(row.chat()[:1])
    for ids, index, prompt in zip(rendered.input_ids, rendered.response_index, prompts, strict=True):
        assert list(ids) == prompt + list(rendered.labels[:-1])
        assert index[0] == len(prompt) - 1


def test_a_template_that_refuses_the_messages_is_an_error(tokenizer):
    jinja = "{{ raise_exception('system messages are not supported') }}"
    with pytest.raises(DataError, match="system messages are not supported"):
        prompt_inputs(Renderer(tokenizer, [jinja]), TALKS)
