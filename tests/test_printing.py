"""Control characters never reach a terminal, whoever wrote them, and brackets of data are no markup."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from ultrafuser import printing
from ultrafuser.cli import main as command_line
from ultrafuser.errors import DataError
from ultrafuser.printing import PlainConsole, echo, echo_answer, printable, show_traceback
from ultrafuser.progress import ConsoleProgress

HOSTILE = "\x1b[2J\x1b]0;title\x07\x9b31m\x00\x7f\x08\r[bold]x[/y] \ud800 \t żółw 🐢"
SAFE = "\\u001b[2J\\u001b]0;title\\u0007\\u009b31m\\u0000\\u007f\\u0008\\u000d[bold]x[/y] \\ud800 \t żółw 🐢"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_every_control_character_is_escaped_and_nothing_else():
    assert printable(HOSTILE) == SAFE
    changed = [chr(code) for code in range(0x110000) if printable(chr(code)) != chr(code)]
    assert changed == [chr(code) for code in (*range(9), *range(11, 32), *range(127, 160), *range(0xD800, 0xE000))]
    assert printable("a\r\nb\n") == "a\nb\n"
    document = json.dumps({"text": HOSTILE.replace("\ud800", "")}, ensure_ascii=False)
    assert json.loads(printable(document)) == json.loads(document)


def test_results_are_escaped(capsys):
    echo(HOSTILE)
    assert capsys.readouterr().out == SAFE + "\n"


def test_an_answer_is_exact_in_a_file_and_escaped_on_a_terminal(monkeypatch):
    for stream, text in ((io.StringIO(), HOSTILE), (Terminal(), SAFE)):
        monkeypatch.setattr(sys, "stdout", stream)
        echo_answer(HOSTILE)
        assert stream.getvalue() == text + "\n"


@pytest.mark.parametrize("renderable", [HOSTILE, Text(HOSTILE), "table"])
def test_the_console_escapes_what_it_prints_and_reads_no_markup(renderable):
    if renderable == "table":
        renderable = Table(title=HOSTILE)
        renderable.add_column(HOSTILE)
        renderable.add_row(HOSTILE)
        renderable.add_row(Text(HOSTILE))
    stream = io.StringIO()
    PlainConsole(file=stream, width=500).print(renderable)
    assert not CONTROL.search(stream.getvalue()) and "[bold]x[/y]" in stream.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_progress_is_escaped(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream())
    progress = ConsoleProgress()
    progress._LINE_INTERVAL_S = 0.0
    progress.start(HOSTILE, 2)
    progress.advance(note=HOSTILE)
    progress.log(HOSTILE + " http://user:mango@host")
    progress.finish()
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", sys.stderr.getvalue())  # rich's own: colours, and lines to move up
    assert "\\u001b[2J" in shown and "[bold]x[/y]" in shown and "mango" not in shown
    assert not CONTROL.search(shown.replace("\r", ""))
    assert "\x1b[2J" not in sys.stderr.getvalue()


def test_errors_are_escaped(monkeypatch, capsys):
    def fail() -> None:
        raise DataError(f"row 1: {HOSTILE} http://user:mango@host")

    monkeypatch.setattr(command_line, "app", fail)
    with pytest.raises(SystemExit):
        command_line.main()
    shown = capsys.readouterr().err
    assert "\\u001b[2J" in shown and not CONTROL.search(shown) and "mango" not in shown


def test_tracebacks_are_escaped(monkeypatch, capsys):
    def fail() -> None:
        raise KeyError(HOSTILE + " http://user:mango@host")

    monkeypatch.setattr(command_line, "app", fail)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(KeyError) as error:
        command_line.main()
    assert sys.excepthook is show_traceback
    sys.excepthook(error.type, error.value, error.tb)
    shown = capsys.readouterr().err
    assert "Traceback" in shown and "KeyError" in shown and not CONTROL.search(shown) and "mango" not in shown


def test_a_hostile_file_through_the_whole_command(tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        json.dumps({"messages": [{"role": "\x1b[2J\x9b31m", "content": "x"}], "domain": "\x1b]0;t\x07"}) + "\n"
    )
    command = [sys.executable, "-m", "ultrafuser", "data"]
    for words in (["validate", str(rows)], ["stats", str(rows)]):
        result = subprocess.run([*command, *words], capture_output=True, text=True, timeout=120)
        assert result.returncode == 2 and "1b[2J" in result.stdout + result.stderr
        assert not CONTROL.search(result.stdout + result.stderr), result


def test_there_is_no_other_way_to_the_terminal():
    package = Path(printing.__file__).parent
    pattern = re.compile(r"rich\.console import [^\n]*\bConsole\b|sys\.std(out|err)\.write")
    users = {
        str(file.relative_to(package)) for file in package.rglob("*.py") if pattern.search(file.read_text("utf-8"))
    }
    assert users == {"printing.py", "evaluate/tasks/math_worker.py"}  # the last writes to a pipe
