"""The templates yield the documented formats, and the reference finds the tokens that answers train."""

from __future__ import annotations

import pytest
from chat_formats import CHATS, FORMATS, MULTI, SINGLE, SYSTEM, ChatFormat, set_clock
from jinja2.exceptions import TemplateError
from reference_tokens import ReferenceTokens, prompt_tokens, reference_tokens, render_text
from tiny_tokenizers import VOCABULARIES, format_tokenizer, tiny_tokenizer

TEXTS = [(name, chat) for name, chat_format in FORMATS.items() for chat in chat_format.documented_texts()]
THOUGHTS = [
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "<think>\nA greeting.\n</think>\n\nI am fine."},
    {"role": "user", "content": "What is 20 + 3?"},
    {"role": "assistant", "content": "<think>\nA sum.\n</think>\n\nIt is 23."},
]


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch)


def render(chat_format: ChatFormat, chat: list[dict[str, str]], **changes: bool) -> str:
    tokenizer = format_tokenizer(chat_format)
    return render_text(tokenizer, chat_format.jinja, chat, **chat_format.template_kwargs, **changes)


def reference(name: str, chat: list[dict[str, str]]) -> ReferenceTokens:
    chat_format = FORMATS[name]
    tokenizer = format_tokenizer(chat_format)
    return reference_tokens(tokenizer, chat_format.jinja, chat, chat_format.end_of_turn, **chat_format.template_kwargs)


def spans(name: str, chat: list[dict[str, str]]) -> list[str]:
    """The text of every supervised span."""
    tokens = reference(name, chat)
    return [tokens.text[start:end] for start, end in tokens.spans]


def test_there_are_at_least_25_models():
    assert len({chat_format.template or name for name, chat_format in FORMATS.items()}) >= 25


@pytest.mark.parametrize(("name", "chat"), TEXTS)
def test_the_template_writes_the_documented_text(name: str, chat: str):
    assert render(FORMATS[name], CHATS[chat]) == FORMATS[name].documented_texts()[chat]


@pytest.mark.parametrize("name", FORMATS)
def test_the_generation_prompt_is_the_documented_one(name: str):
    chat_format = FORMATS[name]
    prompt = render(chat_format, SINGLE[:1], add_generation_prompt=True)
    assert prompt.endswith(chat_format.prompt)
    assert chat_format.single.startswith(prompt) == chat_format.prompt_is_a_prefix


@pytest.mark.parametrize("name", [name for name, each in FORMATS.items() if each.system_turn == "refused"])
def test_a_template_that_knows_no_system_turn_refuses_it(name: str):
    assert FORMATS[name].system is None
    with pytest.raises(TemplateError, match="[Ss]ystem|roles are supported"):
        render(FORMATS[name], SYSTEM)


def test_mistral_moves_the_system_text_to_the_last_user_turn():
    text = render(FORMATS["mistral-v0.3"], [*SYSTEM[:1], *MULTI])
    assert (
        text == "<s>[INST] How are you?[/INST] I am fine.</s>[INST] Be brief.\n\nWhat is 20 + 3?[/INST] It is 23.</s>"
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "qwen3",
            "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\nI am fine.<|im_end|>\n"
            "<|im_start|>user\nWhat is 20 + 3?<|im_end|>\n<|im_start|>assistant\n<think>\nA sum.\n</think>\n\n"
            "It is 23.<|im_end|>\n",
        ),
        (
            "deepseek-r1-distill",
            "<｜begin▁of▁sentence｜><｜User｜>How are you?<｜Assistant｜>\n\nI am fine.<｜end▁of▁sentence｜>"
            "<｜User｜>What is 20 + 3?<｜Assistant｜>\n\nIt is 23.<｜end▁of▁sentence｜>",
        ),
    ],
)
def test_thoughts_of_earlier_answers_are_dropped(name: str, text: str):
    assert render(FORMATS[name], THOUGHTS) == text


@pytest.mark.parametrize("name", FORMATS)
def test_turn_tokens_are_single_tokens(name: str):
    chat_format = FORMATS[name]
    tokenizer = format_tokenizer(chat_format)
    names = [
        *chat_format.special_tokens,
        *chat_format.special_tokens_with_blanks,
        *chat_format.added_tokens,
        chat_format.end_of_turn,
    ]
    for token in names:
        assert tokenizer(token, add_special_tokens=False)["input_ids"] == [tokenizer.convert_tokens_to_ids(token)]


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("text", ["def f(x):\n    return 1234  # naïve\n", "日本 🙂", "a\n\nb\tc"])
def test_tokenizers_spell_every_text(vocabulary: str, text: str):
    tokenizer = tiny_tokenizer(vocabulary, special_tokens=[], eos="</s>")
    assert 256 < len(tokenizer) < 1000
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize(
    ("vocabulary", "first", "second"),
    [
        ("byte-level", "in", "in"),
        ("metaspace-prefix", "▁in", "▁in"),
        ("metaspace-first", "▁in", "in"),
        ("metaspace-bare", "in", "in"),
    ],
)
def test_where_a_vocabulary_writes_a_blank_of_its_own(vocabulary: str, first: str, second: str):
    tokenizer = tiny_tokenizer(vocabulary, special_tokens=[], eos="</s>")
    assert tokenizer.tokenize("in</s>in") == [first, "</s>", second]


@pytest.mark.parametrize(
    ("vocabulary", "words"),
    [
        ("byte-level", ["in", "Ġ2026"]),
        ("byte-level-single-digits", ["in", "Ġ", "2", "0", "2", "6"]),
        ("byte-level-triple-digits", ["in", "Ġ", "202", "6"]),
    ],
)
def test_how_a_vocabulary_splits_digits(vocabulary: str, words: list[str]):
    tokenizer = tiny_tokenizer(vocabulary, special_tokens=[], eos="</s>")
    assert [word for word, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in 2026")] == words


@pytest.mark.parametrize(
    ("name", "chat", "expected"),
    [
        ("gemma-2", MULTI, ["I am fine.<end_of_turn>", "It is 23.<end_of_turn>"]),
        ("phi-3.5", MULTI, ["I am fine.<|end|>", "It is 23.<|end|>"]),
        ("llama-2-chat", MULTI, [" I am fine. </s>", " It is 23. </s>"]),
        ("llama-3.2", MULTI, ["I am fine.<|eot_id|>", "It is 23.<|eot_id|>"]),
        ("mistral-v0.3", [*SYSTEM[:1], *MULTI], [" I am fine.</s>", " It is 23.</s>"]),
        ("mistral-nemo", MULTI, ["I am fine.</s>", "It is 23.</s>"]),
        ("qwen3", MULTI, ["I am fine.<|im_end|>", "It is 23.<|im_end|>"]),
        ("qwen3", THOUGHTS, ["I am fine.<|im_end|>", "<think>\nA sum.\n</think>\n\nIt is 23.<|im_end|>"]),
        ("deepseek-r1-distill", MULTI, ["I am fine.<｜end▁of▁sentence｜>", "It is 23.<｜end▁of▁sentence｜>"]),
        ("deepseek-coder", MULTI, ["I am fine.\n<|EOT|>", "It is 23.\n<|EOT|>"]),
        ("olmo-2", MULTI, ["I am fine.<|endoftext|>", "It is 23.<|endoftext|>"]),
        ("vicuna-v1.5", MULTI, [" I am fine.</s>", " It is 23.</s>"]),
        ("wizardmath", SINGLE, [" I am fine.</s>"]),
        ("glm-4", MULTI, ["I am fine.<|user|>", "It is 23."]),
    ],
)
def test_the_reference_supervises_the_answer_and_its_end(name: str, chat: list[dict[str, str]], expected: list[str]):
    assert spans(name, chat) == expected


def test_the_reference_leaves_out_blanks_that_the_template_strips():
    chat = [SINGLE[0], {"role": "assistant", "content": "  I am fine.\n\n"}]
    assert spans("gemma-2", chat) == ["I am fine.<end_of_turn>"]
    assert spans("qwen2.5", chat) == ["  I am fine.\n\n<|im_end|>"]


@pytest.mark.parametrize(("name", "chat"), TEXTS)
def test_supervised_tokens_spell_the_answers(name: str, chat: str):
    tokenizer, tokens = format_tokenizer(FORMATS[name]), reference(name, CHATS[chat])
    supervised = tokenizer.convert_ids_to_tokens([tokens.token_ids[position] for position in tokens.supervised])
    ends = [index for index, token in enumerate(supervised) if token == FORMATS[name].end_of_turn]
    num_answers = sum(message["role"] == "assistant" for message in CHATS[chat])
    assert len(ends) == num_answers - (not FORMATS[name].ends_last_answer)
    assert "".join(supervised).replace("▁", "").replace("Ġ", "").startswith("Iamfine.")


@pytest.mark.parametrize(
    "name", [name for name, each in FORMATS.items() if each.prompt_is_a_prefix and name != "qwen3"]
)
def test_prompts_are_the_tokens_before_the_answer(name: str):
    """Not so in qwen3, which writes an empty thought between the prompt and the answer, nor in deepseek-r1-distill."""
    chat_format = FORMATS[name]
    prompt = prompt_tokens(format_tokenizer(chat_format), chat_format.jinja, SINGLE[:1], **chat_format.template_kwargs)
    tokens = reference(name, SINGLE)
    assert prompt == tokens.token_ids[: tokens.supervised[0]]
