"""The supervised tokens are exactly the answers, and they line up over K templates."""

from __future__ import annotations

import pytest

from ultrafuser.data.chat_format import BUILTIN, resolve_template
from ultrafuser.data.schema import Row
from ultrafuser.data.templates import Renderer
from ultrafuser.errors import DataError

ONE = (("user", "how many?"), ("assistant", "12345"))
MANY = (
    ("system", "Be brief."),
    ("user", "def add(a, b)"),
    ("assistant", "return a + b"),
    ("user", "jumps over?"),
    ("assistant", "the lazy dog\n\nand  two  spaces"),
)
LEAD = {"plain": " ", "inst": " "}  # the blanks that the template writes before an answer belong to it
CHAT = [{"role": role, "content": content} for role, content in MANY]
ALL = list(BUILTIN.values())


def row(messages=ONE, **fields) -> Row:
    return Row(**{"id": "r", "domain": "text", "messages": messages} | fields)


def supervised(rendered, k: int) -> list[int]:
    """The tokens right after the states that predict, as far as the sequence holds them."""
    ids = rendered.input_ids[k]
    return [ids[i + 1] for i in rendered.response_index[k] if i + 1 < len(ids)]


# ---------------------------------------------------------------- which tokens are supervised


@pytest.mark.parametrize("name", BUILTIN)
@pytest.mark.parametrize("messages", [ONE, MANY], ids=["one turn", "many turns"])
def test_labels_are_exactly_the_answers(tokenizer, name, messages):
    got = Renderer(tokenizer, [BUILTIN[name]]).render(row(messages))
    answers = [content for role, content in messages if role == "assistant"]
    answers = [LEAD.get(name, "") + answer for answer in answers]
    expected = [token for a in answers for token in [*tokenizer.encode(a), tokenizer.eos_token_id]]
    assert list(got.labels) == expected
    assert tokenizer.decode(got.labels) == "".join(answer + tokenizer.eos_token for answer in answers)
    assert supervised(got, 0) == expected[:-1], "the last token is predicted, never read"
    assert got.truncated == 0 and len(got.response_index[0]) == len(expected)


@pytest.mark.parametrize("messages", [ONE, MANY], ids=["one turn", "many turns"])
def test_templates_line_up(tokenizer, messages):
    got = Renderer(tokenizer, ALL).render(row(messages))
    assert len(got.input_ids) == len(got.response_index) == len(ALL)
    assert len({len(ids) for ids in got.input_ids}) > 1, "templates of one length show nothing"
    for k in range(len(ALL)):
        assert supervised(got, k) == list(got.labels[:-1])
        assert len(got.response_index[k]) == len(got.labels)
        assert max(got.response_index[k]) == len(got.input_ids[k]) - 1
    assert got.num_tokens == max(map(len, got.input_ids))


@pytest.mark.parametrize("name", BUILTIN)
@pytest.mark.parametrize("messages", [ONE, MANY], ids=["one turn", "many turns"])
def test_a_sequence_reads_as_its_template_writes_it(tokenizer, name, messages):
    """Put together from pieces, it is still the text that the template gives for the whole conversation."""
    got = Renderer(tokenizer, [BUILTIN[name]]).render(row(messages))
    chat = [{"role": role, "content": content} for role, content in messages]
    full = tokenizer.apply_chat_template(chat, chat_template=BUILTIN[name], tokenize=False)
    assert full.startswith(tokenizer.decode(got.input_ids[0]))
    rest = full[len(tokenizer.decode(got.input_ids[0])) :]
    assert rest.startswith((tokenizer.decode(got.labels[-1]), tokenizer.eos_token))


@pytest.mark.parametrize("name", BUILTIN)
def test_nothing_but_answers_is_supervised(tokenizer, name):
    got = Renderer(tokenizer, [BUILTIN[name]]).render(row(MANY))
    predicted = {i + 1 for i in got.response_index[0]}
    rest = tokenizer.decode([token for i, token in enumerate(got.input_ids[0]) if i not in predicted])
    for role, content in MANY:
        assert (content in rest) == (role != "assistant"), (role, rest)


@pytest.mark.parametrize("name", BUILTIN)
@pytest.mark.parametrize("messages", [ONE, MANY], ids=["one turn", "many turns"])
def test_generation_prompts_are_what_training_saw(tokenizer, name, messages):
    """Up to the last answer a training sequence is the prompt that generation starts from, token for token."""
    renderer = Renderer(tokenizer, [BUILTIN[name]])
    got = renderer.render(row(messages))
    chat = [{"role": role, "content": content} for role, content in messages]
    last = len(tokenizer.encode(LEAD.get(name, "") + messages[-1][1])) + 1
    start = got.response_index[0][-last] + 1
    assert renderer.prompt(chat[:-1])[0] == list(got.input_ids[0][:start])


def test_system_message_reaches_every_template(tokenizer):
    got = Renderer(tokenizer, ALL).render(row(MANY))
    assert all("Be brief." in tokenizer.decode(ids) for ids in got.input_ids)


def test_a_template_that_rewrites_earlier_answers_supervises_only_the_last(tokenizer):
    """E.g. templates that drop the reasoning of earlier turns. All specialists then learn the same answer."""
    forgetful = (
        "{% for m in messages %}{% if m.role == 'assistant' %}A:[cut]\n{% else %}"
        "Q:{{ m.content }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}"
    )
    got = Renderer(tokenizer, [forgetful, BUILTIN["chatml"]]).render(row(MANY))
    assert tokenizer.decode(got.labels) == MANY[-1][1] + tokenizer.eos_token
    assert all(supervised(got, k) == list(got.labels[:-1]) for k in range(2))
    assert "return a + b" not in tokenizer.decode(got.input_ids[0])
    assert "return a + b" in tokenizer.decode(got.input_ids[1])


# ---------------------------------------------------------------- what does not fit


@pytest.mark.parametrize("cut", [1, 3, 4])
def test_truncation_is_counted(tokenizer, cut):
    full = Renderer(tokenizer, ALL).render(row(MANY))
    limit = full.num_tokens - cut
    got = Renderer(tokenizer, ALL, max_length=limit).render(row(MANY))
    assert got.truncated == cut and got.labels == full.labels[:-cut]
    assert got.num_tokens == limit
    for k in range(len(ALL)):
        assert got.input_ids[k] == full.input_ids[k][: len(full.input_ids[k]) - cut]
        assert len(got.response_index[k]) == len(got.labels)


def test_a_row_of_exactly_max_length_is_not_truncated(tokenizer):
    full = Renderer(tokenizer, ALL).render(row(MANY))
    assert Renderer(tokenizer, ALL, max_length=full.num_tokens).render(row(MANY)) == full


def test_truncation_inside_an_earlier_answer(tokenizer):
    full = Renderer(tokenizer, ALL).render(row(MANY))
    first = len(tokenizer.encode(MANY[2][1])) + 1
    limit = max(index[2] for index in full.response_index) + 1  # three tokens of the first answer fit everywhere
    got = Renderer(tokenizer, ALL, max_length=limit).render(row(MANY))
    assert got.labels == full.labels[:3] and got.truncated == len(full.labels) - 3 and first > 3


def test_a_prompt_that_fills_it_drops_the_row(tokenizer):
    full = Renderer(tokenizer, ALL).render(row())
    prompt = max(index[0] for index in full.response_index) + 1
    assert Renderer(tokenizer, ALL, max_length=prompt).render(row()).truncated == len(full.labels) - 1
    assert Renderer(tokenizer, ALL, max_length=prompt - 1).render(row()) is None


def test_counts_of_a_data_set(tokenizer):
    short, long = row(), row((("user", "x" * 200), ("assistant", "y")))
    limit = Renderer(tokenizer, ALL).render(short).num_tokens - 1
    rendered, stats = Renderer(tokenizer, ALL, max_length=limit).render_all([short, long, short])
    assert [r.row_id for r in rendered] == ["r", "r"]
    assert (stats.rows, stats.truncated_rows, stats.truncated_tokens, stats.dropped_rows) == (2, 2, 2, 1)
    assert str(stats) == (
        "2 rows kept, 2 of them truncated by 2 response tokens. 1 rows dropped because the prompt alone fills max_length"
    )
    with pytest.raises(DataError, match="none of 1 rows fits into max_length=5 tokens. Raise it"):
        Renderer(tokenizer, ALL, max_length=5).render_all([long])


# ---------------------------------------------------------------- the built-in templates' text


def text(name: str, messages=CHAT, generation: bool = False) -> str:
    """The template's text with <s> and </s>, by transformers' own rendering."""
    import jinja2

    return jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(BUILTIN[name]).render(
        messages=messages, bos_token="<s>", eos_token="</s>", add_generation_prompt=generation
    )  # fmt: skip


def test_plain():
    assert text("plain") == (
        "<s>Be brief.\nUser: def add(a, b)\nAssistant: return a + b</s>\nUser: jumps over?\n"
        "Assistant: the lazy dog\n\nand  two  spaces</s>\n"
    )
    assert text("plain", CHAT[1:2], True) == "<s>User: def add(a, b)\nAssistant:"


def test_inst():
    assert text("inst") == (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\ndef add(a, b) [/INST] return a + b</s>"
        "<s>[INST] jumps over? [/INST] the lazy dog\n\nand  two  spaces</s>"
    )
    assert text("inst", CHAT[1:2], True) == "<s>[INST] def add(a, b) [/INST]"


def test_alpaca():
    assert text("alpaca", CHAT[1:2], True) == (
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\ndef add(a, b)\n\n### Response:\n"
    )
    assert text("alpaca", CHAT[:3]) == (
        "<s>Be brief.\n\n### Instruction:\ndef add(a, b)\n\n### Response:\nreturn a + b</s>\n\n"
    )


def test_chatml():
    assert text("chatml", CHAT[:2], True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\ndef add(a, b)<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("name", BUILTIN)
def test_builtin_templates_without_bos(tokenizer, name):
    """Qwen's tokenizers have no bos_token. The word None must not appear."""
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.bos_token = None
    got = Renderer(bare, [BUILTIN[name]]).render(row(MANY))
    assert "None" not in bare.decode(got.input_ids[0])


# ---------------------------------------------------------------- which template


def test_resolving_a_template(tokenizer, tmp_path):
    assert resolve_template(None, tokenizer, "s") == tokenizer.chat_template
    assert resolve_template("inst", tokenizer, "s") == BUILTIN["inst"]
    assert resolve_template("{{ messages }}", tokenizer, "s") == "{{ messages }}"
    (tmp_path / "custom.jinja").write_text("{% for m in messages %}é{% endfor %}", encoding="utf-8")
    assert resolve_template(str(tmp_path / "custom.jinja"), tokenizer, "s") == "{% for m in messages %}é{% endfor %}"


class Named:
    """A tokenizer with several named templates."""

    def __init__(self, chat_template):
        self.chat_template = chat_template


def test_several_named_templates():
    assert resolve_template(None, Named({"default": "{{ a }}", "tool_use": "{{ b }}"}), "s") == "{{ a }}"
    with pytest.raises(DataError, match="specialist 's': its tokenizer has no chat template"):
        resolve_template(None, Named({"tool_use": "{{ b }}"}), "s")


@pytest.mark.parametrize("template", [None, "", " \n", {}, {"default": ""}, {"tool_use": "x"}])
def test_no_chat_template(template):
    with pytest.raises(DataError, match=r"specialist 'math': its tokenizer has no chat template. Give one: a built-in "
                                        r"\(chatml, plain, inst, alpaca\), a Jinja file, or Jinja text"):  # fmt: skip
        resolve_template(None, Named(template), "math")


@pytest.mark.parametrize("template", ["vicuna", "no/such/file.jinja", "x" * 5000])
def test_unknown_template(tokenizer, template):
    with pytest.raises(
        DataError, match=r"specialist 'math': chat template 'x?.*' is neither built in \(chatml, .*nor a file"
    ):
        resolve_template(template, tokenizer, "math")


def test_a_template_with_a_mistake(tokenizer):
    with pytest.raises(
        DataError, match=r"specialist 'model': its chat template '\{% for m in %\}' is no Jinja: Expected"
    ):
        Renderer(tokenizer, ["{% for m in %}"])


def test_a_template_that_refuses(tokenizer):
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system message, please') }}{% endif %}Q:"
    with pytest.raises(DataError, match="no system message, please"):
        Renderer(tokenizer, [strict]).render(row(MANY))


def test_an_empty_prompt(tokenizer):
    with pytest.raises(DataError, match="row 'r': a chat template gives an empty prompt"):
        Renderer(tokenizer, ["{% if false %}{% endif %}"]).render(row())


def test_no_eos_token(tokenizer):
    import copy

    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(DataError, match="no eos_token, so answers would never end"):
        Renderer(endless, [BUILTIN["plain"]])
