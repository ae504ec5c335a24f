"""Every command of `ultrafuser data` names a bad row, or skips and lists it, and says what it did not use."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ultrafuser.cli import main as cli

GOOD = [{"id": f"r{index}", "domain": "d", "prompt": f"Q{index}", "response": f"A{index}"} for index in range(8)]
BROKEN = {
    "surrogate": r'{"domain": "d", "prompt": "what \ud83d ?", "response": "x"}',
    "digits": '{"domain": "d", "prompt": "Q", "response": "x", "n": ' + "9" * 5000 + "}",
    "deep": '{"domain": "d", "prompt": "Q", "response": "x", "n": ' + "[" * 5000 + "]" * 5000 + "}",
    "part": '{"domain": "d", "prompt": "Q", "response": [{"type": "image"}]}',
    "list": '{"domain": "d", "prompt": "Q", "response": "x", "source": ["a"]}',
}
COMMANDS = {
    "stats": [],
    "decontaminate": ["--against", "{folder}/test.txt", "-o", "{folder}/out.jsonl"],
    "dedup": ["--exact-only", "-o", "{folder}/out.parquet"],
    "split": ["--exact-only", "-o", "{folder}/parts", "-p", "a=0.5", "-p", "b=0.5"],
    "convert": ["-o", "{folder}/out.csv"],
}


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    def run(command: str, rows: Path, *words: Any) -> tuple[int, str, str]:
        options = [word.format(folder=tmp_path) for word in COMMANDS[command]]
        monkeypatch.setattr(sys, "argv", ["ultrafuser", "data", command, str(rows), *options, *map(str, words)])
        monkeypatch.setenv("COLUMNS", "2000")
        (tmp_path / "test.txt").write_text("one two three four five six seven eight nine\n")
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as exit:
            code = int(exit.code or 0)
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def rows(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "notes.md").touch()
    return folder


def write(rows: Path, broken: str) -> Path:
    lines = [json.dumps(row) for row in GOOD]
    lines[3] = json.dumps(GOOD[3] | {"colour": "red"})
    lines.insert(2, broken)
    file = rows / "rows.jsonl"
    file.write_text("\n".join(lines) + "\n\n")
    return file


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", BROKEN)
def test_a_bad_row_is_named_or_skipped(command, kind, run, rows, tmp_path):
    file = write(rows, BROKEN[kind])
    code, out, err = run(command, rows)
    assert code == 2 and f"ultrafuser: error: {file}:3: " in err and "--on-bad-row skip" in err
    assert {path.name for path in tmp_path.iterdir()} == {"rows", "test.txt"}
    code, out, err = run(command, rows, "--on-bad-row", "skip", "--json")
    assert code == 0 and json.loads(out), err
    assert f"skipped 1 bad rows of 9, the first one {file}:3: " in err
    assert "columns that are not used: 'colour' (1 rows)" in err
    assert f"files that are not read: {rows}/notes.md" in err
    if command != "stats":
        [listing] = tmp_path.glob("*.bad_rows")
        assert json.loads(listing.read_text())["where"] == f"{file}:3" and str(listing) in err


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_answer_to_bad_rows(command, run, rows):
    write(rows, BROKEN["part"])
    code, _, err = run(command, rows, "--on-bad-row", "fix")
    assert code == 2 and "--on-bad-row 'fix': expected one of stop, skip" in err
