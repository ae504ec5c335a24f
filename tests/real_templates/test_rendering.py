"""The renderer supervises the tokens that a slow reference finds, in the formats of well-known models."""

from __future__ import annotations

import itertools

import pytest
from chat_formats import CHATS, FORMATS, MULTI, SINGLE, Chat, set_clock
from reference_tokens import prompt_tokens, reference_tokens
from tiny_tokenizers import VOCABULARIES, format_tokenizer, tiny_tokenizer

from ultrafuser.data.chat_format import ChatFormat
from ultrafuser.data.schema import Row
from ultrafuser.data.templates import Rendered, Renderer

TEXTS = [(name, chat) for name, chat_format in FORMATS.items() for chat in chat_format.documented_texts()]


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch)


def chat_format(name: str) -> ChatFormat:
    entry = FORMATS[name]
    return ChatFormat(format_tokenizer(entry), entry.jinja, name=name, template_kwargs=entry.template_kwargs)


def row(chat: Chat) -> Row:
    return Row(id="r", domain="text", messages=tuple((turn["role"], turn["content"]) for turn in chat))


def supervised(rendered: Rendered, k: int = 0) -> list[int]:
    """Positions of the tokens that the k-th sequence predicts."""
    return [position + 1 for position in rendered.response_index[k]]


@pytest.mark.parametrize("name", FORMATS)
def test_the_end_of_an_answer_is_the_token_that_the_format_documents(name):
    chat = chat_format(name)
    assert chat.tokenizer.convert_ids_to_tokens(chat.end_token_id) == FORMATS[name].end_of_turn and chat.writes_end


@pytest.mark.parametrize(("name", "chat"), TEXTS)
def test_supervised_tokens_are_those_of_the_reference(name, chat):
    entry, messages = FORMATS[name], CHATS[chat]
    chosen = chat_format(name)
    renderer = Renderer(chosen.tokenizer, [chosen])
    rendered = renderer.render(row(messages))
    assert rendered is not None
    expected = reference_tokens(chosen.tokenizer, entry.jinja, messages, entry.end_of_turn, **entry.template_kwargs)
    sequence = [*rendered.input_ids[0], rendered.labels[-1]]
    positions = supervised(rendered)
    if not entry.ends_last_answer:  # the renderer adds an end
        assert sequence.pop() == chosen.end_token_id and positions.pop() == len(sequence)
    assert sequence == expected.token_ids[: len(sequence)], "the sequence is what the template writes"
    assert positions == expected.supervised
    assert [sequence[position] for position in positions] == list(rendered.labels[: len(positions)])
    renderer.check(row(messages), rendered)


@pytest.mark.parametrize(("name", "chat"), TEXTS)
def test_prompts_at_inference_are_those_of_training_at_every_turn(name, chat):
    entry, messages = FORMATS[name], CHATS[chat]
    renderer = Renderer((chosen := chat_format(name)).tokenizer, [chosen])
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        rendered = renderer.render(row(messages[: turn + 1]))
        starts = [p for p in supervised(rendered) if p - 1 not in supervised(rendered)]
        assert renderer.prompt(messages[:turn])[0] == list(rendered.input_ids[0][: starts[-1]])
        if entry.drops_thoughts == "none":  # a later turn does not change what is before it
            whole = renderer.render(row(messages))
            prompt = renderer.prompt(messages[:turn])[0]
            assert list(whole.input_ids[0][: len(prompt)]) == prompt
        if entry.prompt_is_a_prefix:
            options = entry.template_kwargs if entry.drops_thoughts == "none" else {"enable_thinking": False}
            expected = prompt_tokens(chosen.tokenizer, entry.jinja, messages[:turn], **options)
            assert renderer.prompt(messages[:turn])[0] == expected or chosen.lead


@pytest.mark.parametrize("name", FORMATS)
def test_an_answer_reads_back_as_it_was_written(name):
    renderer = Renderer((chosen := chat_format(name)).tokenizer, [chosen])
    rendered = renderer.render(row(SINGLE))
    assert renderer.answer_text(rendered.labels) == SINGLE[-1]["content"]
    indented = [SINGLE[0], {"role": "assistant", "content": "    return x\n    y"}]
    content = indented[1]["content"]
    if content not in chosen.render(indented) or FORMATS[name].special_tokens_with_blanks:
        content = content.strip()  # by the template, or by the special token before it
    assert renderer.answer_text(renderer.render(row(indented)).labels) == content


def family(vocabulary: str) -> list[ChatFormat]:
    """All formats over one vocabulary, whose tokenizer has the special tokens of all of them."""
    entries = [entry for entry in FORMATS.values() if entry.vocabulary == vocabulary]
    special = [token for entry in entries for token in [entry.eos, entry.bos, *entry.special_tokens] if token]
    blanks = [token for entry in entries for token in entry.special_tokens_with_blanks]
    added = [token for entry in entries for token in entry.added_tokens]
    formats = []
    for entry in entries:
        tokenizer = tiny_tokenizer(
            vocabulary,
            special_tokens=sorted(set(special) - set(blanks)),
            special_tokens_with_blanks=sorted(set(blanks)),
            added_tokens=sorted(set(added) - set(special) - set(blanks)),
            eos=entry.eos,
            bos=entry.bos,
        )
        formats.append(
            ChatFormat(tokenizer, entry.jinja, name=entry.name, template_kwargs=entry.template_kwargs, system="merge")
        )
    return formats


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_formats_in_any_pair_supervise_the_same_tokens(vocabulary):
    """Specialists with different templates and end tokens on one vocabulary."""
    for pair in itertools.combinations(family(vocabulary), 2):
        renderer = Renderer(pair[0].tokenizer, pair)
        rendered = renderer.render(row(MULTI))
        assert rendered is not None
        for k, chosen in enumerate(pair):
            tokens = [*rendered.input_ids[k], chosen.end_token_id]
            read = [tokens[position] for position in supervised(rendered, k)]
            expected = [chosen.end_token_id if label == renderer.end_token_id else label for label in rendered.labels]
            same = [a == b for a, b in zip(read, expected, strict=True)]
            # a blank or line break may stand before an end token. It is predicted from the answer's last token
            assert all(s or label == renderer.end_token_id for s, label in zip(same, rendered.labels, strict=True))
            for answer in ("I am fine.", "It is 23."):
                assert answer in chosen.tokenizer.decode(rendered.input_ids[k]), (chosen.name, answer)
            prompt = renderer.prompt(MULTI[:-1])[k]
            if FORMATS[chosen.name].drops_thoughts == "none":
                assert list(rendered.input_ids[k][: len(prompt)]) == prompt
        renderer.check(row(MULTI), rendered)
        text = pair[0].tokenizer.decode(list(rendered.labels), skip_special_tokens=True)
        assert text.split() == "I am fine. It is 23.".split() or text == "I am fine.It is 23."
