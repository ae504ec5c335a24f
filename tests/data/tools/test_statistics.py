"""Statistics: every number counted by hand."""

from __future__ import annotations

import pytest

from ultrafuser.data.schema import Row
from ultrafuser.data.tools.statistics import data_statistics, load_tokenizer
from ultrafuser.errors import CheckpointError, DataError

PAIR = (("user", "Q"), ("assistant", "A"))
ROWS = [
    Row("1", "text", PAIR, "web", "MIT", "art", "paint"),
    Row("2", "text", (("system", "S"), *PAIR, *PAIR, *PAIR), "web", "", "art", "music"),
    Row("3", "text", PAIR, "books", "MIT", "law", "paint"),
    Row("3", "code", PAIR, "", "MIT", "", ""),
]


def test_counts_by_domain():
    counts = data_statistics(ROWS)
    assert list(counts["domains"]) == ["code", "text"]
    assert counts["domains"]["text"] == {
        "conversations": 3,
        "repeated_ids": 0,
        "topics": 2,
        "subtopics": 3,  # paint of art and paint of law are two
        "mean_turns": 5 / 3,
        "with_system_message": 1,
        "sources": {"web": 2, "books": 1},
        "licences": {"MIT": 2, "": 1},
    }
    assert counts["domains"]["code"]["topics"] == 0
    assert counts["all"]["conversations"] == 4 and counts["all"]["repeated_ids"] == 1
    assert counts["all"]["licences"] == {"MIT": 3, "": 1}


def test_tokens_are_those_of_the_contents(tokenizer):
    rows = [
        Row(str(n), "text", (("user", "how many? " * n), ("assistant", "The lazy dog"), *PAIR)) for n in range(1, 451)
    ]

    def length(text):
        return len(tokenizer.encode(text, add_special_tokens=False))

    expected = [sum(length(content) for _, content in row.messages) for row in rows]
    tokens = data_statistics(rows, tokenizer)["all"]["tokens"]
    assert tokens["total"] == sum(expected)
    assert tokens["mean"] == pytest.approx(sum(expected) / len(rows))
    assert tokens["longest"] == max(expected)
    assert tokens["median"] == sorted(expected)[224] / 2 + sorted(expected)[225] / 2
    assert tokens["answers_total"] == len(rows) * (length("The lazy dog") + length("A"))


def test_mistakes(tmp_path):
    with pytest.raises(DataError, match="there are no rows to count"):
        data_statistics([])
    with pytest.raises(CheckpointError, match="(?s)no tokenizer there: .*. Give a hub id or a folder that has one"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_is_read_from_a_folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("text", ["{", "null", "[]"])
@pytest.mark.parametrize("file", ["tokenizer.json", "config.json"])
def test_a_broken_tokenizer(tokenizer, tmp_path, file, text):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / file).write_text(text)
    with pytest.raises(CheckpointError, match="no tokenizer there"):
        load_tokenizer(str(tmp_path))
