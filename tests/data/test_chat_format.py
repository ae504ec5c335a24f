"""What a template says is what is trained: end tokens, blanks, thoughts, system turns, the clock, rewritten history."""

from __future__ import annotations

import copy
import datetime
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from tokenizers import AddedToken

from ultrafuser.data.chat_format import BUILTIN, ChatFormat
from ultrafuser.data.schema import Row
from ultrafuser.data.templates import Rendered, Renderer, RenderStats
from ultrafuser.errors import DataError

USER = {"role": "user", "content": "how many?"}
ANSWER = {"role": "assistant", "content": "the lazy dog."}
MANY = [USER, ANSWER, {"role": "user", "content": "jumps over?"}, {"role": "assistant", "content": "12345"}]
SYSTEM = {"role": "system", "content": "Be brief."}

# Formats of our own, each with a habit of a well-known one.
OWN_END = (  # Gemma's: the turn ends with another token than eos
    "{% for m in messages %}<start>{{ m.role }}\n{{ m.content }}<stop>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + OWN_END
CLOCK = "Today is {{ strftime_now('%d %B %Y') }}.\n" + OWN_END
THINKING = (  # Qwen3's: an empty thought before the last answer, no thoughts in the history
    "{% for m in messages %}<start>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set parts = m.content.split('</think>') %}{% if loop.last %}<think>\n"
    "{{ (m.reasoning_content or parts[0].replace('<think>', '') if parts|length > 1 or m.reasoning_content else '')|trim }}"
    "\n</think>\n\n{% endif %}{{ parts[-1]|trim }}{% else %}{{ m.content }}{% endif %}<stop>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
OPENS_THOUGHT = (  # DeepSeek-R1's: the generation prompt opens a thought, which no rendered answer has
    "{% for m in messages %}<start>{{ m.role }}\n{{ m.content.split('</think>')[-1]|trim }}<stop>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant\n<think>\n{% endif %}"
)
FORGETS = (  # drops all but the last exchange
    "{% for m in messages[-2:] %}<start>{{ m.role }}\n{{ m.content }}<stop>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tagged(tokenizer) -> Any:
    """A tokenizer with turn tokens."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start>", "<stop>"]})
    return tokenizer


def row(chat: Sequence[dict[str, Any]] = MANY, **fields: Any) -> Row:
    return Row(**{"id": "r7", "domain": "text", "messages": tuple((m["role"], m["content"]) for m in chat)} | fields)


def labels(tokenizer: Any, rendered: Rendered | None) -> str:
    assert rendered is not None
    return tokenizer.decode(list(rendered.labels))


def prompt(tokenizer: Any, template: str, chat: Sequence[dict[str, Any]], **options: Any) -> str:
    renderer = Renderer(tokenizer, [ChatFormat(tokenizer, template, **options)])
    return tokenizer.decode(renderer.prompt(chat)[0])


# ---------------------------------------------------------------- ends


def test_each_specialist_reads_its_own_end_and_one_label_stands_for_all(tagged):
    renderer = Renderer(tagged, [BUILTIN["chatml"], OWN_END])
    rendered = renderer.render(row())
    stop, eos = tagged.convert_tokens_to_ids("<stop>"), tagged.eos_token_id
    assert [chat_format.end_token_id for chat_format in renderer.formats] == [eos, stop]
    assert labels(tagged, rendered) == "the lazy dog.<|im_end|>12345<|im_end|>"
    assert stop not in rendered.input_ids[0] and eos not in rendered.input_ids[1]
    # behind both questions and the first answer. That behind the last answer is never read
    assert [ids.count(end) for ids, end in zip(rendered.input_ids, (eos, stop), strict=True)] == [3, 3]


def test_a_template_without_an_end_token_gets_the_tokenizer_s_after_the_last_answer(tagged):
    bare = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    renderer = Renderer(tagged, [bare])
    assert not renderer.formats[0].writes_end
    assert labels(tagged, renderer.render(row())) == " the lazy dog. 12345<|im_end|>"
    mixed = Renderer(tagged, [bare, OWN_END])
    assert labels(tagged, mixed.render(row())) == "the lazy dog.12345<|im_end|>", "only the last end is common"


def test_a_template_without_end_tokens_ends_at_the_next_turn(tagged):
    """GLM-4 writes no end. Its turns begin with a token, which the model writes when its answer is over."""
    turns = "{% for m in messages %}<start>{{ m.role }}\n{{ m.content }}{% endfor %}"
    renderer = Renderer(tagged, [turns])
    assert labels(tagged, renderer.render(row())) == "the lazy dog.<start>12345<start>"


# ---------------------------------------------------------------- blanks


@pytest.mark.parametrize("template", ["plain", "inst"])
def test_blanks_before_an_answer_are_read_as_in_the_whole_text(tokenizer, template):
    """The blank belongs to the answer's first token, which the prompt leaves to the model."""
    renderer = Renderer(tokenizer, [BUILTIN[template]])
    rendered, text = renderer.render(row()), renderer.formats[0].render(row().chat())
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert list(rendered.input_ids[0]) == ids[: len(rendered.input_ids[0])]
    assert labels(tokenizer, rendered) == " the lazy dog.<|im_end|> 12345<|im_end|>"
    assert not tokenizer.decode(renderer.prompt(MANY[:1])[0]).endswith(" ")
    assert renderer.answer_text(rendered.labels[:3]) == tokenizer.decode(list(rendered.labels[:3])).lstrip()


def test_blanks_that_only_one_template_writes_belong_to_its_prompt(tokenizer):
    renderer = Renderer(tokenizer, [BUILTIN["chatml"], BUILTIN["plain"]])
    rendered = renderer.render(row())
    assert labels(tokenizer, rendered) == "the lazy dog.<|im_end|>12345<|im_end|>"
    for turn in (1, 3):
        prompts = renderer.prompt(MANY[:turn])
        assert [tokenizer.decode(ids)[-12:] for ids in prompts] == ["m_start|>assistant\n"[-12:], "\nAssistant: "[-12:]]
        for ids, sequence in zip(prompts, rendered.input_ids, strict=True):
            assert list(sequence[: len(ids)]) == ids, "the history is read as in training"


def test_indented_answers_are_supervised_whole(tokenizer):
    """Line break, blanks and indentation may be one token in some templates."""
    indented = row([USER, {**ANSWER, "content": "    return a + b"}])
    for names in itertools.product(BUILTIN, repeat=2):
        renderer = Renderer(tokenizer, [BUILTIN[name] for name in names])
        rendered = renderer.render(indented)
        assert labels(tokenizer, rendered).strip("\n ") == "return a + b<|im_end|>", names
        for ids in rendered.input_ids:
            assert "    return a + b" in tokenizer.decode(list(ids))


@pytest.mark.parametrize("blanks", ["\n", "  ", " \n\n"], ids=repr)
def test_blanks_that_only_one_template_strips_are_not_supervised(tokenizer, blanks):
    """Code often ends in a line break. Gemma's and Llama-2's templates strip it."""
    strips = BUILTIN["chatml"].replace("m.content", "m.content|trim")
    chat = [USER, {**ANSWER, "content": "  return a" + blanks}, *MANY[2:]]
    for templates in ((BUILTIN["chatml"], strips), (strips, BUILTIN["chatml"]), (BUILTIN["inst"], strips)):
        stats = RenderStats()
        rendered = Renderer(tokenizer, list(templates)).render(row(chat), stats)
        assert labels(tokenizer, rendered) == "return a<|im_end|>12345<|im_end|>"
        assert stats.unsupervised_answers == 0
    for other in ("chatml", "plain"):  # which keep them
        both = Renderer(tokenizer, [BUILTIN["chatml"], BUILTIN[other]]).render(row(chat))
        assert labels(tokenizer, both).endswith(f"return a{blanks}<|im_end|>12345<|im_end|>")


# ---------------------------------------------------------------- thoughts and history


def test_a_generation_prompt_that_opens_a_thought_does_not_wrap_answers(tagged):
    renderer = Renderer(tagged, [OPENS_THOUGHT])
    rendered = renderer.render(row([USER, ANSWER]))
    assert "<think>" not in tagged.decode(list(rendered.input_ids[0]))
    assert tagged.decode(renderer.prompt([USER])[0]) == "<start>user\nhow many?<stop>\n<start>assistant\n"
    thoughtful = [USER, {**ANSWER, "content": "<think>\n1 + 1\n</think>\n\nthe lazy dog."}]
    stats = RenderStats()
    assert renderer.render(row(thoughtful), stats) == rendered, "the template drops the thought"
    assert stats.rewritten == {"model": 1} and "rewrote 1 answers" in str(stats)


def test_an_empty_thought_is_prompt_and_a_thought_is_answer(tagged):
    renderer = Renderer(tagged, [THINKING])
    assert labels(tagged, renderer.render(row())) == "the lazy dog.<stop>12345<stop>"
    empty = "<start>assistant\n<think>\n\n</think>\n\n"
    assert tagged.decode(renderer.prompt([USER])[0]).endswith(empty)
    assert prompt(tagged, THINKING, [USER], template_kwargs={"enable_thinking": True}).endswith("<start>assistant\n")
    thoughtful = [USER, {**ANSWER, "content": "<think>\n1 + 1\n</think>\n\nthe lazy dog."}]
    expected = "<think>\n1 + 1\n</think>\n\nthe lazy dog.<stop>"
    assert labels(tagged, renderer.render(row(thoughtful))) == expected


def test_a_thought_that_only_some_templates_write_is_not_supervised(tagged):
    thoughtful = [USER, {**ANSWER, "content": "<think>\n1 + 1\n</think>\n\nthe lazy dog."}]
    for templates in ([OWN_END, OPENS_THOUGHT], [OPENS_THOUGHT, OWN_END]):
        renderer, stats = Renderer(tagged, templates), RenderStats()
        rendered = renderer.render(row(thoughtful), stats)
        assert labels(tagged, rendered) == "the lazy dog.<stop>"
        assert ["1 + 1" in tagged.decode(list(ids)) for ids in rendered.input_ids] == [t == OWN_END for t in templates]
        assert sum(stats.rewritten.values()) == 1


def test_a_template_that_rewrites_history_costs_only_what_it_leaves_out(tagged):
    """All turns stay supervised, in every specialist, but the answers that one template leaves out."""
    chat = [*MANY[:1], {**ANSWER, "content": "<think>\n1 + 1\n</think>\n\nthe lazy dog."}, *MANY[2:]]
    both = Renderer(tagged, [THINKING, OWN_END])
    assert labels(tagged, both.render(row(chat))) == "the lazy dog.<stop>12345<stop>"
    stats = RenderStats()
    forgetful = Renderer(tagged, [FORGETS, OWN_END]).render(row(), stats)
    assert labels(tagged, forgetful) == "12345<stop>"
    assert stats.unsupervised_answers == 1 and "1 answers not supervised" in str(stats)


def test_an_answer_of_weight_0_is_read_but_not_supervised(tagged, monkeypatch):
    weighted = row()
    chat = [dict(turn) for turn in MANY]
    chat[1]["weight"] = 0
    monkeypatch.setattr(Row, "chat", lambda self: chat)
    rendered = Renderer(tagged, [OWN_END, BUILTIN["chatml"]]).render(weighted)
    assert labels(tagged, rendered) == "12345<stop>"
    assert all("the lazy dog." in tagged.decode(list(ids)) for ids in rendered.input_ids)


# ---------------------------------------------------------------- variables, system turns, the clock


@pytest.mark.parametrize("name", BUILTIN)
def test_built_in_templates_write_tool_turns_as_no_answer(tokenizer, name):
    chat = [USER, {**ANSWER, "content": "add(1, 2)"}, {"role": "tool", "content": "3"}, ANSWER]
    rendered = Renderer(tokenizer, [BUILTIN[name]]).render(row(chat))
    assert labels(tokenizer, rendered).replace(" ", "") == "add(1,2)<|im_end|>thelazydog.<|im_end|>"
    assert "3" in tokenizer.decode(list(rendered.input_ids[0]))


def test_refused_rows_can_be_skipped(tagged):
    renderer = Renderer(tagged, [ChatFormat(tagged, NO_SYSTEM, name="math")])
    bad_rows: list[dict[str, str]] = []
    rendered, stats = renderer.render_all([row(), row([SYSTEM, *MANY])], bad_rows)
    assert len(rendered) == stats.rows == 1
    assert bad_rows[0]["where"] == "row 'r7'" and "refuses the conversation: no system turn" in bad_rows[0]["problem"]
    with pytest.raises(DataError, match="none of 1 rows can be read. The first: row 'r7': specialist 'math'"):
        renderer.render_all([row([SYSTEM, *MANY])], [])


def test_variables_reach_the_template(tagged):
    template = "{{ greeting }} {{ tools[0].function.name }}\n" + OWN_END
    tool = {"type": "function", "function": {"name": "add", "description": "", "parameters": {}}}
    text = prompt(tagged, template, [USER], template_kwargs={"greeting": "Hi", "tools": [tool]})
    assert text.startswith("Hi add\n<start>user")


def test_a_refused_system_turn_names_row_specialist_and_remedy(tagged):
    chat_format = ChatFormat(tagged, NO_SYSTEM, name="math")
    with pytest.raises(
        DataError,
        match="row 'r7': specialist 'math': its chat template refuses the conversation: no system turn. If it takes no "
        "system turn, set `system: merge` or `system: drop` for this specialist",
    ):
        Renderer(tagged, [chat_format]).render(row([SYSTEM, *MANY]))


@pytest.mark.parametrize("code", ["1 // 0", "messages + 1", "messages[0].content.x.y", "'%d' % 'a'", "[][3].a"])
def test_code_that_fails_names_the_specialist(tagged, code):
    chat_format = ChatFormat(tagged, "{{ " + code + " }}" + OWN_END, name="math")
    with pytest.raises(DataError, match="row 'r7': specialist 'math': its chat template refuses the conversation: "):
        Renderer(tagged, [chat_format]).render(row())


@pytest.mark.parametrize(
    ("policy", "first"), [("merge", "<start>user\nBe brief.\n\nhow many?"), ("drop", "<start>user\nhow many?")]
)
def test_system_turns_can_be_merged_or_dropped(tagged, policy, first):
    chat = [SYSTEM, *MANY]
    renderer = Renderer(tagged, [ChatFormat(tagged, NO_SYSTEM, system=policy), OWN_END])
    rendered = renderer.render(row(chat))
    assert tagged.decode(list(rendered.input_ids[0])).startswith(first + "<stop>")
    assert tagged.decode(list(rendered.input_ids[1])).startswith("<start>system\nBe brief.<stop>")
    assert tagged.decode(renderer.prompt(chat[:2])[0]) == first + "<stop>\n<start>assistant\n"
    assert labels(tagged, rendered) == "the lazy dog.<stop>12345<stop>"
    assert chat == [SYSTEM, *MANY], "the caller's conversation is unchanged"


def test_the_clock_shows_the_recorded_day(tagged):
    assert prompt(tagged, CLOCK, [USER], date="2024-02-29").startswith("Today is 29 February 2024.\n")
    today = datetime.date.today().strftime("%d %B %Y")
    assert prompt(tagged, CLOCK, [USER]).startswith(f"Today is {today}.\n")
    assert ChatFormat(tagged, CLOCK).reads_clock and not ChatFormat(tagged, OWN_END).reads_clock


# ---------------------------------------------------------------- both ways


def test_a_row_that_differs_from_its_template_stops_the_run(tagged):
    """A template with a clock that nobody pinned: the second rendering is another."""

    class Changing(ChatFormat):
        renderings = 0

        def render(self, chat, add_generation_prompt=False):
            text = super().render(chat, add_generation_prompt)
            Changing.renderings += len(chat) > 2
            return text.replace("many", "few") if Changing.renderings > 2 else text

    renderer = Renderer(tagged, [Changing(tagged, OWN_END, name="code")])
    with pytest.raises(
        DataError,
        match=r"row 'r7', specialist 'code': the tokens to train on differ from apply_chat_template's from token \d+ on: "
        r"got '.*many.*', expected '.*few.*'\. Please report the chat template",
    ):
        renderer.render_all([row()])


def test_equal_rows_pass(tagged):
    for templates in ([OWN_END], [OWN_END, BUILTIN["plain"]], [THINKING, OPENS_THOUGHT], [FORGETS]):
        rows, stats = Renderer(tagged, templates).render_all([row()] * 6)
        assert len(rows) == stats.rows == 6


# ---------------------------------------------------------------- what cannot work


def test_a_tokenizer_without_offsets_is_named(tagged):
    class Slow:
        is_fast = False

    with pytest.raises(DataError, match=r"specialist 'text': its tokenizer Slow tells no character offsets"):
        ChatFormat(Slow(), OWN_END, name="text")


def test_a_token_without_a_row_in_the_table_is_named(tagged):
    chat_format = ChatFormat(tagged, BUILTIN["chatml"], name="code", table_rows=tagged.convert_tokens_to_ids("<stop>"))
    renderer = Renderer(tagged, [chat_format])
    renderer.render(row())
    odd = row([{"role": "user", "content": "a <stop> b"}, ANSWER])
    for call in (lambda: renderer.render(odd), lambda: renderer.prompt(odd.chat()[:1])):
        with pytest.raises(
            DataError, match="specialist 'code' has no row in its embedding table for the token '<stop>'"
        ):
            call()


def test_rows_without_a_supervised_answer_are_counted(tagged):
    common = frozenset(range(len(tagged)))
    renderer = Renderer(tagged, [OWN_END], masked_token_ids=common)
    with pytest.raises(DataError, match="none of 2 rows has a supervised answer: 2 rows dropped because they have no"):
        renderer.render_all([row(), row()])


# ---------------------------------------------------------------- odd conversations

CALLS = (  # writes content and calls of tools
    "{% for m in messages %}<start>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls or [] %}"
    "<call>{{ call.function.name }}</call>{% endfor %}<stop>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
)


@pytest.mark.parametrize("content", ["Let me look.", ""])
def test_calls_of_tools_are_part_of_an_answer(tagged, monkeypatch, content):
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    chat = [
        USER,
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        ANSWER,
    ]
    for turns in (chat[:2], chat):
        monkeypatch.setattr(Row, "chat", lambda self, turns=turns: turns)
        text = labels(tagged, Renderer(tagged, [CALLS]).render(row()))
        assert text == f"{content}<call>add</call><stop>" + ("the lazy dog.<stop>" if turns is chat else "")


def test_a_template_that_needs_a_system_turn_tells_its_end(tagged):
    needs = "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}" + OWN_END
    chat_format = ChatFormat(tagged, needs)
    assert chat_format.end_token_id == tagged.convert_tokens_to_ids("<stop>") and chat_format.writes_end
    assert labels(tagged, Renderer(tagged, [chat_format]).render(row([SYSTEM, *MANY]))).endswith("12345<stop>")


def test_an_answer_that_a_template_leaves_out_is_not_invented(tagged):
    """The whole answer is a thought, which the template drops."""
    stats = RenderStats()
    empty = row([USER, {**ANSWER, "content": "<think>\nhmm\n</think>"}])
    assert Renderer(tagged, [OPENS_THOUGHT]).render(empty, stats) is None
    assert stats.unsupervised_rows == 1 and stats.unsupervised_answers == 1
    rendered, stats = Renderer(tagged, [OPENS_THOUGHT]).render_all([empty, row()])
    assert len(rendered) == 1 and "1 rows dropped because they have no supervised answer" in str(stats)


def test_thoughts_begin_with_their_tag_and_are_counted(tagged):
    thought = "<think>\n1 + 1\n</think>\n\nthe lazy dog."
    thoughtful = row([USER, {**ANSWER, "content": thought}])
    for switch, counted in ((None, True), (False, True), (True, False)):
        chat_format = ChatFormat(
            tagged, THINKING, template_kwargs={} if switch is None else {"enable_thinking": switch}
        )
        renderer, stats = Renderer(tagged, [chat_format]), RenderStats()
        rendered = renderer.render(thoughtful, stats)
        assert labels(tagged, rendered) == thought + "<stop>", switch
        assert ("begin with a thought" in str(stats)) == counted
        assert (
            renderer.prompt([USER])[0] == list(rendered.input_ids[0][: rendered.response_index[0][0] + 1])
        ) != counted
    plain = Renderer(tagged, [chat_format]).render(row([USER, ANSWER]))
    assert labels(tagged, plain) == "<think>\n\n</think>\n\nthe lazy dog.<stop>", (
        "asked for a thought, it writes an empty one"
    )


def test_a_special_token_that_takes_blanks_stays_in_the_prompt(tokenizer):
    """As in Phi-3: the line break and the indentation behind a turn token belong to that token."""
    phi = copy.deepcopy(tokenizer)
    phi.add_tokens(
        [AddedToken(token, special=True, rstrip=True, normalized=False) for token in ("<|user|>", "<|bot|>", "<|end|>")]
    )
    template = (
        "{% for m in messages %}{{ '<|bot|>' if m.role == 'assistant' else '<|user|>' }}\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|bot|>\n{% endif %}"
    )
    renderer = Renderer(phi, [template])
    rendered = renderer.render(row([USER, {**ANSWER, "content": "    return a"}]))
    assert labels(phi, rendered).strip() == "return a<|end|>"
    assert list(rendered.input_ids[0][: rendered.response_index[0][0] + 1]) == renderer.prompt([USER])[0]


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_row_may_be_truncated_within_a_character(tokenizer, cut):
    emoji = row([USER, {**ANSWER, "content": "Hello \U0001f600 \u0928\u092e\u0938\u094d\u0924\u0947"}])
    templates = [BUILTIN["chatml"], BUILTIN["plain"]]
    whole = Renderer(tokenizer, templates).render(emoji)
    short = Renderer(tokenizer, templates, max_length=whole.num_tokens - cut)
    assert len(short.render_all([emoji])[0]) == 1


def test_a_conversation_that_cannot_be_a_prompt_is_refused(tokenizer):
    renderer = Renderer(tokenizer, [ChatFormat(tokenizer, "{{ messages[1].content }}", name="math")])
    with pytest.raises(DataError, match="the conversation has no messages"):
        renderer.prompt([])
    with pytest.raises(DataError, match="the content of a user is a list, expected text"):
        renderer.prompt([{"role": "user", "content": [{"type": "text", "text": "hi"}]}])
    with pytest.raises(DataError, match="specialist 'math': its chat template gives an empty prompt"):
        renderer.prompt([USER])


@pytest.mark.parametrize("key", ["add_generation_prompt", "messages", "tokenize"])
def test_variables_that_the_renderer_sets_are_refused(tokenizer, key):
    with pytest.raises(DataError, match=f"specialist 'math': template_kwargs cannot set '{key}'"):
        ChatFormat(tokenizer, OWN_END, name="math", template_kwargs={key: True})


def test_bad_rows_of_a_file_are_not_those_of_a_template(tokenizer):
    earlier = [{"where": "a.jsonl:1", "problem": "broken JSON"}]
    with pytest.raises(DataError, match="none of 1 rows fits into max_length=3 tokens"):
        Renderer(tokenizer, [OWN_END], max_length=3).render_all([row()], earlier)


# ---------------------------------------------------------------- continuations


def test_the_continuation_of_a_chat_is_labelled_as_in_training(tokenizer):
    for names in itertools.product(BUILTIN, repeat=2):
        renderer = Renderer(tokenizer, [BUILTIN[name] for name in names])
        trained = renderer.render(row([USER, ANSWER]))
        scored = renderer.continuation([USER], ANSWER["content"])
        blanks = len(scored.labels) - len(trained.labels) + 1  # line breaks that all templates write, as in lm-eval
        assert blanks in (0, 1) and scored.labels[blanks:] == trained.labels[:-1], names
        for k in range(2):
            assert scored.input_ids[k] == trained.input_ids[k][: len(scored.input_ids[k])], names
        begun = renderer.continuation([USER, {"role": "assistant", "content": "the lazy"}], " dog.")
        assert tokenizer.decode(list(begun.labels)) == " dog."
    with pytest.raises(DataError, match="the continuation '' has no tokens"):
        renderer.continuation([USER, ANSWER], "")


def test_a_specialist_alone_has_the_labels_of_the_fused_model_if_it_is_told(tokenizer):
    templates = [BUILTIN["inst"], BUILTIN["alpaca"]]
    fused = Renderer(tokenizer, templates)
    assert fused.rule.apart
    for template in templates:
        assert Renderer(tokenizer, [template], apart=True).render(row()).labels == fused.render(row()).labels
