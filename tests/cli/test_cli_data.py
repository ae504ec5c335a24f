"""`ultrafuser data`: every command once, as text and as JSON, and its mistakes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from ultrafuser.cli.data import data_app
from ultrafuser.data.schema import Row
from ultrafuser.data.sources import load_rows, write_rows
from ultrafuser.errors import DataError, RecipeError
from ultrafuser.zoo.exams import questions

COMMANDS = get_command(data_app).commands  # type: ignore[attr-defined]
LEAK = "A question of a test that nobody may train on because then its score would mean nothing at all"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """run("stats", file): what the command prints on stdout."""

    def run(*words: Any) -> str:
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()
        data_app([str(word) for word in words], standalone_mode=False)
        return capsys.readouterr().out

    return run


def row(index: int, domain: str = "text", question: str | None = None) -> Row:
    turns = (("user", question or f"Question {domain} {index}?"), ("assistant", f"Answer {index} of {domain}."))
    return Row(f"{domain}-{index}", domain, turns, "[b]notes", "MIT", f"topic {index % 3}", f"sub {index % 5}")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    many = [row(n, domain) for domain in ("text", "code") for n in range(10)]
    write_rows([*many, row(10, question=LEAK), row(11, question="question TEXT 0")], path)
    return path


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_option(run, command):
    text = re.sub(r"\x1b\[[0-9;]*m", "", run(command, "--help"))
    for parameter in COMMANDS[command].params:
        assert parameter.help, f"{command}: {parameter.name} has no help"
        for option in parameter.opts:
            if option.startswith("--"):
                assert option in text, f"{command}: {option}"
    assert any("--json" in parameter.opts for parameter in COMMANDS[command].params)


def test_the_commands():
    assert set(COMMANDS) == {"stats", "map", "decontaminate", "dedup", "split", "convert", "exam", "validate"}


# ---------------------------------------------------------------- every command


def test_stats(run, rows, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    text = run("stats", rows, "--tokenizer", tmp_path / "tokenizer")
    assert re.search(r"text\W+12\W+3\W+", text) and "[b]notes" in text and "tokens, mean" in text
    result = json.loads(run("stats", rows, "--json"))
    assert result["all"]["conversations"] == 22 and "tokens" not in result["all"]
    assert json.loads(run("stats", rows, "--json", "--domain", "any"))["domains"].keys() == {"any"}


def test_decontaminate(run, rows, tmp_path):
    (tmp_path / "test.txt").write_text(f"{LEAK}\n")
    text = run("decontaminate", rows, "--against", tmp_path / "test.txt", "-o", tmp_path / "clean.jsonl")
    assert "22 rows: 21 kept, 1 dropped (text 1)" in text and re.search(r"test\.txt\W+1\b", text)
    assert len(load_rows(str(tmp_path / "clean.jsonl"))) == 21
    report = json.loads(
        run("decontaminate", rows, "-a", tmp_path / "test.txt", "--json", "--report", tmp_path / "r.json")
    )
    assert report == json.loads((tmp_path / "r.json").read_text())
    assert report["dropped_rows"][0]["id"] == "text-10"
    with pytest.raises(DataError, match="exists"):
        run("decontaminate", rows, "-a", tmp_path / "test.txt", "-o", tmp_path / "clean.jsonl")
    run("decontaminate", rows, "-a", tmp_path / "test.txt", "-o", tmp_path / "clean.jsonl", "--force")


def test_dedup(run, rows, tmp_path):
    words = ("dedup", rows, "--exact-only", "--on", "instructions")
    text = run(*words, "-o", tmp_path / "out.parquet")
    assert "22 rows: 21 kept, 1 exact and 0 near duplicates dropped" in text and re.search(
        r"text-0\W+text\W+1\W+0", text
    )
    assert len(load_rows(str(tmp_path / "out.parquet"))) == 21
    assert json.loads(run(*words, "--json"))["clusters"][0] == {
        "kept": "text-0",
        "domain": "text",
        "exact": ["text-11"],
        "near": [],
    }


def test_split(run, rows, tmp_path):
    text = run("split", rows, "-o", tmp_path / "parts", "--exact-only", "-p", "train=0.8", "-p", "test=0.2")
    assert re.search(r"train\W+18\W+8\W+10", text)
    report = json.loads((tmp_path / "parts" / "split.json").read_text())
    output = run(
        "split",
        rows,
        "-o",
        tmp_path / "parts",
        "--exact-only",
        "-p",
        "train=0.8",
        "-p",
        "test=0.2",
        "--force",
        "--json",
    )
    assert json.loads(output) == report
    for option, problem in (("train", "expected NAME=SHARE"), ("a/b=1", "expected NAME"), ("x=y", "expected NAME")):
        with pytest.raises(DataError, match=problem):
            run("split", rows, "-o", tmp_path / "other", "-p", option)
    with pytest.raises(DataError, match="another part is named 'a'"):
        run("split", rows, "-o", tmp_path / "other", "-p", "a=0.5", "-p", "a=0.5")


def test_convert(run, rows, tmp_path):
    assert "22 rows: " in run("convert", rows, "-o", tmp_path / "out.csv")
    words = ("convert", rows, "-o", tmp_path / "out.json", "--layout", "conversations", "--limit", 3, "--json")
    assert json.loads(run(*words))["rows"] == 3
    assert load_rows(str(tmp_path / "out.json")) == load_rows(str(rows), limit=3)


def test_validate(run, rows, capsys, tmp_path):
    assert "22 rows (code 10, text 12), 0 problems" in run("validate", rows)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "Q"}\n')
    with pytest.raises(DataError, match="2 problems in 1 of 1 rows, listed above"):
        run("validate", tmp_path / "bad.jsonl")
    assert f"{tmp_path}/bad.jsonl:1: no domain" in capsys.readouterr().out
    with pytest.raises(DataError):
        run("validate", tmp_path / "bad.jsonl", "--json")
    assert json.loads(capsys.readouterr().out)["bad_rows"] == 1


def test_map(run, rows, tmp_path, save, tokenizer):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    folder = save("reader", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder)
    words = ("map", rows, "--model", folder, "-o", tmp_path / "map.html", "--per-domain", 8, "--device", "cpu")
    text = run(*words, "--png", tmp_path / "map.png")
    assert re.search(r"code\W+8\W+[01]\.\d{3}", text) and "map.png" in text
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    first = (tmp_path / "map.html").read_text(encoding="utf-8")
    result = json.loads(run(*words, "--force", "--json"))
    assert result["rows"] == {"code": 8, "text": 8} and result["png"] is None
    assert (tmp_path / "map.html").read_text(encoding="utf-8") == first
    with pytest.raises(DataError, match="exists"):
        run(*words)
    for option, value in (("--part", "topics"), ("--method", "pca")):
        with pytest.raises(RecipeError, match=f"{option} '{value}': expected one of"):
            run(*words, "--force", option, value)
    with pytest.raises(RecipeError, match="--dtype 'int8': expected one of auto"):
        run(*words, "--force", "--dtype", "int8")


def test_exam_writes_questions_that_its_checker_accepts(run, tmp_path):
    target = tmp_path / "math.jsonl"
    assert "14 rows" in run("exam", "math", "--rows", 14, "--output", target)
    rows = load_rows(str(target))
    for question, row in zip(questions("math", "train"), rows, strict=False):
        assert row.messages == (("user", question.prompt), ("assistant", question.answer))
        assert (row.domain, row.topic, row.subtopic) == ("math", question.family, question.structure)
    result = json.loads(run("exam", "math", "-n", 7, "-o", tmp_path / "test.jsonl", "--split", "test", "--json"))
    assert result["rows"] == 7
    assert {row.subtopic for row in load_rows(result["output"])}.isdisjoint(row.subtopic for row in rows)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["maths", "-o", "x.jsonl"], "EXAM 'maths': expected one of text, code, math, mixed"),
        (["math", "-o", "x.jsonl", "--split", "dev"], "--split 'dev': expected one of train, test"),
        (["math", "-o", "x.txt"], "x.txt"),
    ],
)
def test_exam_refuses_what_it_does_not_have(run, words, message):
    with pytest.raises((DataError, RecipeError), match=re.escape(message)):
        run("exam", *words)
