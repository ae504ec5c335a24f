"""Specialists as people have them: own end tokens, added tokens, tables of other heights, templates in adapter folders."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

import ultrafuser
from tiny_models import force_gate, one_hot, save_adapter, tiny
from ultrafuser.data.chat_format import BUILTIN
from ultrafuser.data.collate import collate_rows, prompt_inputs
from ultrafuser.data.schema import Row
from ultrafuser.errors import RecipeError, TokenizerMismatchError
from ultrafuser.inspect.run import answer
from ultrafuser.recipe import load_recipe
from ultrafuser.specialists import fuse, load, make_renderer

USER = [{"role": "user", "content": "how many?"}]
ROW = Row(id="r", domain="text", messages=(("user", "how many?"), ("assistant", "the lazy dog"),
                                           ("user", "jumps over?"), ("assistant", "12345")))  # fmt: skip
STOP = "{% for m in messages %}<start>{{ m.role }}\n{{ m.content }}<stop>\n{% endfor %}"


def recipe(*specialists: dict[str, Any], **fields: Any) -> Any:
    return load_recipe({"specialists": list(specialists), "device": "cpu", "gate": {"hidden_size": 16}, **fields})


def extended(tokenizer: PreTrainedTokenizerFast, *tokens: str, **changes: Any) -> PreTrainedTokenizerFast:
    """The tokenizer with further special tokens."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in tokens])
    for key, value in changes.items():
        setattr(tokenizer, key, value)
    return tokenizer


def write(folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int, rows: int = 0, **ends: Any) -> dict[str, Any]:
    """A specialist on disk, with padding rows up to `rows`."""
    model = tiny(seed=seed, vocab_size=max(rows, len(tokenizer)), max_position_embeddings=192)
    for key, value in ends.items():
        setattr(model.generation_config, key, value)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"name": folder.name, "model": str(folder)}


def plain_log_probs(folder: str, input_ids: tuple[int, ...], index: tuple[int, ...]) -> torch.Tensor:
    """Log-probabilities by transformers alone, (R, V)."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(torch.tensor([input_ids])).logits[0, list(index)].log_softmax(-1)


# ---------------------------------------------------------------- own end tokens


def test_the_end_counts_as_each_specialist_s_own_end_token(tmp_path, tokenizer):
    """A one-hot gate gives the specialist's own likelihood of the answer and of its own end."""
    both = extended(tokenizer, "<start>", "<stop>")
    chatml = write(tmp_path / "chatml", both, 0)
    gemma = write(tmp_path / "gemma", extended(both, chat_template=STOP), 1)
    model, root = fuse(recipe(chatml, gemma))
    eos, stop = root.eos_token_id, root.convert_tokens_to_ids("<stop>")
    assert model.config.end_token_id == eos
    assert [spec["end_token_id"] for spec in model.config.specialists] == [eos, stop]
    rendered = make_renderer(model, root).render(ROW)
    for k, specialist in enumerate((chatml, gemma)):
        log_p = plain_log_probs(specialist["model"], rendered.input_ids[k], rendered.response_index[k])
        wanted = torch.tensor([(eos, stop)[k] if label == eos else label for label in rendered.labels])
        expected = -log_p.gather(1, wanted[:, None]).sum().item()
        force_gate(model, one_hot(k, 2))
        out = model(**collate_rows([rendered]), output_gate_weights=True)
        assert out.token_loss.sum().item() == pytest.approx(expected, rel=1e-4)
        logits = model(
            **{key: v for key, v in collate_rows([rendered]).items() if key == "specialist_input_ids"}
        ).logits
        probabilities = logits[0, list(rendered.response_index[k])].softmax(-1)
        torch.testing.assert_close(probabilities[:, eos], log_p[:, (eos, stop)[k]].exp(), rtol=1e-3, atol=1e-6)
        assert probabilities.sum(-1).allclose(torch.ones(len(probabilities)))


@pytest.mark.parametrize("ends", [267, [267], [1, 267]], ids=repr)
def test_ends_that_a_checkpoint_names_end_the_fused_answer_too(tmp_path, tokenizer, ends):
    """As an integer or a list, of any specialist."""
    first, second = write(tmp_path / "a", tokenizer, 0), write(tmp_path / "b", tokenizer, 1, eos_token_id=ends)
    model, root = fuse(recipe(first, second))
    assert model.generation_config.eos_token_id == [root.eos_token_id, 267]
    model.save_pretrained(tmp_path / "fused")
    root.save_pretrained(tmp_path / "fused")
    reloaded, renderer = load(tmp_path / "fused", device_map="cpu")
    force_gate(reloaded, one_hot(1, 2))
    assert reloaded.generation_config.eos_token_id == [root.eos_token_id, 267]
    # whatever it writes third is declared an end: the answer stops before it
    inputs = prompt_inputs(renderer, [USER])
    third = reloaded.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :][2].item()
    reloaded.generation_config.eos_token_id = [root.eos_token_id, third]
    assert len(answer(reloaded, renderer, [USER], max_new_tokens=6, do_sample=False)[0]) <= 2


def test_an_end_token_that_only_one_specialist_has(tmp_path, tokenizer):
    """ChatML-tuned Llama-2s end with an added token behind the common vocabulary."""
    tuned = extended(tokenizer, "<start>", "<stop>", chat_template=STOP, eos_token="<stop>")
    plain, chat = write(tmp_path / "plain", tokenizer, 0), write(tmp_path / "chat", tuned, 1)
    for order in ((plain, chat), (chat, plain)):
        model, root = fuse(recipe(*order))
        assert model.config.vocab_size == len(tokenizer) and model.config.end_token_id == tokenizer.eos_token_id
        renderer = make_renderer(model, root)
        rendered = renderer.render(ROW)
        k = order.index(chat)
        stop = tuned.convert_tokens_to_ids("<stop>")
        assert stop in rendered.input_ids[k] and stop not in rendered.input_ids[1 - k]
        log_p = plain_log_probs(chat["model"], rendered.input_ids[k], rendered.response_index[k])
        log_p = log_p.index_copy(1, torch.tensor([tokenizer.eos_token_id]), log_p[:, [stop]])[:, : len(tokenizer)]
        expected = -log_p.log_softmax(-1).gather(1, torch.tensor(rendered.labels)[:, None]).sum().item()
        force_gate(model, one_hot(k, 2))
        out = model(**collate_rows([rendered]), output_gate_weights=True)
        assert out.token_loss.sum().item() == pytest.approx(expected, rel=1e-4)


# ---------------------------------------------------------------- tokenizers that nearly agree


def test_the_paper_s_trio_fuses_trains_saves_and_answers(tmp_path, tokenizer):
    """As Llama-2 chat, CodeLlama and WizardMath: 32,000, 32,016 and 32,001 rows, with other tokens at the same ids."""
    code = extended(tokenizer, *[f"<infill-{i}>" for i in range(16)])
    wizard = extended(tokenizer, "[PAD]", pad_token="[PAD]")
    trio = [
        write(tmp_path / name, own, seed) | {"chat_template": template}
        for seed, (name, own, template) in enumerate(
            [("llama", tokenizer, "inst"), ("codellama", code, "inst"), ("wizardmath", wizard, "alpaca")]
        )
    ]
    model, root = fuse(recipe(*trio))
    assert model.config.vocab_size == len(tokenizer) and model.config.masked_token_ids == []
    assert set(model.specialist_tokenizers) == {"codellama", "wizardmath"}
    renderer = make_renderer(model, root)
    rendered = renderer.render(ROW)
    model(**collate_rows([rendered])).loss.backward()
    model.save_pretrained(tmp_path / "fused", copy=True)
    root.save_pretrained(tmp_path / "fused")
    for name in ("llama", "codellama", "wizardmath"):
        shutil.rmtree(tmp_path / name)
    reloaded, again = load(tmp_path / "fused", device_map="cpu")
    assert again.render(ROW) == rendered and again.prompt(USER) == renderer.prompt(USER)
    torch.testing.assert_close(reloaded(**collate_rows([rendered])).loss, model(**collate_rows([rendered])).loss)
    reloaded.save_pretrained(tmp_path / "again", copy=True)
    assert (tmp_path / "again" / "tokenizers" / "wizardmath" / "tokenizer.json").is_file()
    [ids] = answer(reloaded, again, [USER], max_new_tokens=5, do_sample=False)
    assert all(token < len(tokenizer) for token in ids)


@pytest.mark.parametrize("mixing", ["probabilities", "logits"])
def test_a_token_that_only_some_have_is_never_written(tmp_path, tokenizer, mixing):
    """Two added tokens at one id, and one that all have behind them."""
    first = extended(tokenizer, "<think>", "<tool>")
    second = extended(tokenizer, "[PAD]", "<tool>")
    model, root = fuse(
        recipe(write(tmp_path / "a", first, 0), write(tmp_path / "b", second, 1, rows=400), mixing=mixing)
    )
    think = first.convert_tokens_to_ids("<think>")
    assert model.config.masked_token_ids == [think] and model.config.vocab_size == think + 2
    renderer = make_renderer(model, root)
    logits = model(**prompt_inputs(renderer, [USER])).logits
    assert (logits[..., think] == -torch.inf).all() and logits[..., think + 1].isfinite().all()
    assert model.generation_config.pad_token_id < think
    spelled = Row(id="r", domain="text", messages=(("user", "how many?"), ("assistant", "a <think> b")))
    rendered = renderer.render(spelled)
    assert think in root.encode("a <think> b"), "the first specialist has a token for it"
    assert think not in rendered.labels and root.decode(list(rendered.labels[:-1])) == "a <think> b"
    assert not model(**collate_rows([rendered])).loss.isnan()


def test_more_tokens_than_table_rows_is_no_error(tmp_path, tokenizer):
    """As gemma-3-1b: 262,145 tokens on 262,144 rows."""
    folder = tmp_path / "gemma"
    specialist = write(folder, tokenizer, 0)
    extended(tokenizer, "<image_soft_token>").save_pretrained(folder)
    model, root = fuse(recipe(specialist))
    assert model.config.vocab_size == len(tokenizer)
    [ids] = answer(model, make_renderer(model, root), [USER], max_new_tokens=3, do_sample=False)
    assert len(ids) <= 3


def test_an_end_token_without_a_row_is_refused(tmp_path, tokenizer):
    folder = tmp_path / "short"
    specialist = write(folder, tokenizer, 0)
    extended(tokenizer, "<start>", "<stop>", chat_template=STOP).save_pretrained(folder)
    with pytest.raises(
        TokenizerMismatchError,
        match=r"specialist 'short': its answers end with '<stop>' \(id 321\), but its embedding table has 320 rows. Resize",
    ):
        fuse(recipe(specialist))


def test_vocabularies_without_a_common_end_are_refused(tmp_path, tokenizer):
    fields = {"eos_token": "<stop-a>", "chat_template": BUILTIN["alpaca"]}
    first = extended(tokenizer, "<stop-a>", **fields)
    second = extended(tokenizer, "<stop-b>", **fields | {"eos_token": "<stop-b>"})
    with pytest.raises(TokenizerMismatchError, match=r"no end token lies below the \d+ tokens that all specialists have: "
                                                     "'<stop-a>' of 'a', '<stop-b>' of 'b'"):  # fmt: skip
        fuse(recipe(write(tmp_path / "a", first, 0), write(tmp_path / "b", second, 1)))


# ---------------------------------------------------------------- adapters


def test_an_adapter_s_own_tokenizer_and_template_win(tmp_path, tokenizer):
    """A base without a template, and adapters that were trained in their own."""
    bare = extended(tokenizer)
    bare.chat_template = None
    base = write(tmp_path / "base", bare, 0, rows=len(tokenizer) + 8)
    plain = tiny(seed=0, vocab_size=len(tokenizer) + 8, max_position_embeddings=192)
    specialists = []
    for seed, (name, template) in enumerate({"users": "[user]{{ messages[0].content }}[answer]", "stop": STOP}.items()):
        adapter = save_adapter(plain, tmp_path / name, seed=seed)
        extended(tokenizer, "<start>", "<stop>", chat_template=template).save_pretrained(adapter)
        specialists.append({"name": name, "model": base["model"], "adapter": str(adapter)})
    model, root = fuse(recipe(*specialists))
    assert len(model.groups) == 1, "the adapters share their base"
    prompts = make_renderer(model, root).prompt(USER)
    assert [root.decode(ids) for ids in prompts] == [
        "[user]how many?[answer]", "<start>user\nhow many?<stop>\n<start>assistant\n",
    ]  # fmt: skip
    assert root.convert_tokens_to_ids("<stop>") in prompts[1], "a token that the adapter added is read as one"


def test_a_template_file_alone_beside_an_adapter(tmp_path, tokenizer):
    base = write(tmp_path / "base", tokenizer, 0)
    adapter = save_adapter(tiny(seed=0, vocab_size=len(tokenizer), max_position_embeddings=192), tmp_path / "lora")
    (adapter / "chat_template.jinja").write_text("Q: {{ messages[0].content }} A:", encoding="utf-8")
    model, root = fuse(recipe({"name": "own", "model": base["model"], "adapter": str(adapter)}, base))
    assert [root.decode(ids) for ids in make_renderer(model, root).prompt(USER)] == [
        "Q: how many? A:", "<|im_start|>user\nhow many?<|im_end|>\n<|im_start|>assistant\n",
    ]  # fmt: skip


# ---------------------------------------------------------------- recipes


def test_template_settings_of_a_recipe_are_kept_in_the_checkpoint(tmp_path, tokenizer):
    specialist = write(tmp_path / "a", tokenizer, 0) | {
        "chat_template": "{{ note }} {{ strftime_now('%Y-%m-%d') }} " + BUILTIN["chatml"],
        "template_kwargs": {"note": "Hi"},
        "system": "drop",
    }
    model, root = fuse(recipe(specialist, date="2024-02-29"))
    model.save_pretrained(tmp_path / "fused")
    root.save_pretrained(tmp_path / "fused")
    _, renderer = ultrafuser.load(tmp_path / "fused", device_map="cpu")
    text = root.decode(renderer.prompt([{"role": "system", "content": "Be brief."}, *USER])[0])
    assert text == "Hi 2024-02-29 <|im_start|>user\nhow many?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("day", ["yesterday", "2024-02-30"])
def test_a_day_that_is_none_is_refused(day):
    with pytest.raises(RecipeError, match=f"'{day}' is no day. Expected YYYY-MM-DD"):
        recipe({"name": "a", "model": "x/y"}, date=day)
