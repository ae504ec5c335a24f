"""`ultrafuser chat` with a folder and with a server, in this process and on a terminal of its own."""

from __future__ import annotations

import io
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from fake_endpoint import Step, event, failing, fake_endpoint, listed, streamed, weighted
from training_fixtures import NAMES
from ultrafuser.chat.screen import Screen
from ultrafuser.endpoint.stream import Piece
from ultrafuser.inspect.run import answer
from ultrafuser.model.shared_base import SpecialistGroup
from ultrafuser.specialists import load

# ---------------------------------------------------------------- chat


def test_a_chat(run, folder):
    lines = "/weights\nhow many foxes?\n/weights\n\nand dogs?\n/reset\n/weights\n/exit\nnever read\n"
    result = run("chat", folder, "--max-new-tokens", "5", "--temperature", "0", stdin=lines)
    assert result.code == 0, result.err
    assert result.out.count("no answer yet") == 2
    assert all(name in result.out for name in NAMES), "/weights shows who led"
    first = run("generate", folder, "-p", "how many foxes?", "--max-new-tokens", "5").out.strip()
    assert first in result.out


def test_a_chat_reads_only_what_is_new(run, folder, monkeypatch):
    """Every answer is that of a pass over the whole chat, but no turn reads the chat again."""
    turns, messages, answers, whole = ["how many foxes?", "and dogs?", "the quick brown fox"], [], [], []
    model, renderer = load(folder)
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        whole.append(max(map(len, renderer.prompt(messages))))
        [ids] = answer(model, renderer, [messages], max_new_tokens=5, do_sample=False)
        answers.append(renderer.tokenizer.decode(ids))
        messages.append({"role": "assistant", "content": answers[-1]})
    lengths, forward = [], SpecialistGroup.forward
    monkeypatch.setattr(
        SpecialistGroup, "forward", lambda self, ids, *rest: lengths.append(ids.shape[-1]) or forward(self, ids, *rest)
    )
    result = run("chat", folder, "--max-new-tokens", "5", "--temperature", "0", stdin="\n".join([*turns, "/exit"]))
    assert all(text in result.out for text in answers)
    read = [length for length in lengths[:: len(model.groups)] if length > 1]
    assert read[0] == whole[0] and len(read) == len(turns)
    assert sum(read[1:]) < whole[-1] - whole[0], "the second and third turn read the chat again"


def test_a_chat_ends_with_its_input(run, folder):
    assert run("chat", folder, "--max-new-tokens", "2", stdin="hi\n").code == 0


def test_a_chat_survives_a_message_that_is_not_utf8(run, folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hi \xff\nhi\n/weights\n"), "utf-8"))
    result = run("chat", folder, "--max-new-tokens", "2")
    assert result.code == 0 and "a message holds a lone surrogate, half of a character. Remove it" in result.out
    assert "no answer yet" not in result.out


def test_a_chat_survives_a_message_that_does_not_fit(run, folder):
    result = run("chat", folder, "--max-new-tokens", "2", stdin=f"{'fox ' * 300}\nhi\n/weights\n")
    assert result.code == 0 and "do not fit into its context of 192" in result.out.replace("\n", " ")
    assert "no answer yet" not in result.out


def test_only_the_chosen_specialists_answer(run, folder):
    lines = "/specialists text\nhow many foxes?\n/weights\n/specialists text,math\n/retry\n"
    result = run("chat", folder, "--max-new-tokens", "5", "--temperature", "0", stdin=lines)
    assert result.code == 0 and "[text 1.00  code 0.00  math 0.00" in result.out
    assert "code 0.00" in result.out.rpartition("answering: text, math")[2]
    assert "answering: code" in run("chat", folder, "--specialists", "code", stdin="/specialists\n").out


def test_a_seed_repeats_a_chat(run, folder):
    def tokens(*words: str) -> str:
        out = run("chat", folder, "--max-new-tokens", "8", "--temperature", "3", *words, stdin="hi\n/weights\n").out
        return out.rpartition("token")[2]

    assert tokens("--seed", "1") == tokens("--seed", "1") != tokens("--seed", "2")


def test_an_interrupt_stops_an_answer_of_the_model(run, folder, monkeypatch):
    """The next turn continues after the part that was kept, and reads only what is new."""
    monkeypatch.setattr("sys.stdin", io.StringIO("how many foxes?\nand dogs?\n"))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    show, shown = Screen.show, []

    def count(self: Screen, piece: Piece) -> None:
        show(self, piece)
        shown.append(piece)
        if len(shown) == 4:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Screen, "show", count)
    result = run("chat", folder, "--max-new-tokens", "60", "--temperature", "0")
    assert result.code == 0, result.err
    assert "stopped, kept so far" in result.out and len(shown) > 5


WRONG = {
    "nowhere": (["chat", "{tmp}/nowhere"], "nowhere: no such folder"),
    "no fused folder": (["chat", "{tmp}"], "config.json"),
    "option of a URL": (["chat", "{tmp}", "--model", "m"], "--model is for a URL: a folder has none. Leave it out"),
    "option of a folder": (
        ["chat", "http://127.0.0.1:9", "--dtype", "float32"],
        "--dtype is for a folder: a server has",
    ),
    "no server": (["chat", "http://127.0.0.1:9"], "endpoint http://127.0.0.1:9/v1: cannot be reached"),
    "no address": (["chat", "http://"], "the address: got 'http://', expected an address such as"),
    "no port": (["chat", "http://127.0.0.1:x/v1"], "expected an address such as http://127.0.0.1:8000/v1"),
    "no variable": (
        ["chat", "http://127.0.0.1:9", "--api-key-env", "sk-1"],
        "--api-key-env: got something else than the name",
    ),
    "specialist": (["chat", "{folder}", "--specialists", "poetry"], "no specialist 'poetry'. Known: text, code, math"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_chatted_with_is_one_line(run, folder, tmp_path, case):
    words, message = WRONG[case]
    result = run(*[word.format(tmp=tmp_path, folder=folder) for word in words], stdin="hi\n")
    assert result.code == 2 and message in result.err and result.err.count("\n") == 1, result.err


# ---------------------------------------------------------------- servers


@pytest.fixture
def server() -> Iterator[Any]:
    pytest.importorskip("aiohttp", reason="the endpoint extra is not installed")
    with fake_endpoint() as server:
        server.models = listed({"id": "fused", "specialists": ["text", "code"]})
        server.reply = lambda question: streamed(weighted(["Hello", " you"], [(0.9, 0.1), (0.2, 0.8)], "stop"))
        yield server


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_a_chat_with_a_server(run, server, end):
    result = run("chat", server.url.removesuffix("/v1") + end, "--system", "Be brief.", stdin="hi\n")
    assert result.code == 0, result.err
    assert "specialists: text, code" in result.out and "Hello you\n[text 0.55  code 0.45   2 tokens" in result.out
    assert server.requests[0]["model"] == "fused" and server.requests[0]["messages"][0]["content"] == "Be brief."


def test_the_model_of_a_server(run, server, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-mango-1234567890")
    server.models = listed({"id": "a"}, {"id": "b"})
    result = run("chat", server.url, stdin="hi\n")
    assert result.code == 2 and "which model? Name one with --model. It has: a, b" in result.err
    result = run("chat", server.url, "--model", "c", stdin="hi\n")
    assert result.code == 2 and "no model 'c'. Choose another --model. It has: a, b" in result.err
    assert run("chat", server.url, "--model", "b", "--api-key-env", "MY_KEY", stdin="hi\n").code == 0
    assert server.requests[0]["model"] == "b"
    assert server.headers[0]["authorization"] == "Bearer sk-mango-1234567890"
    server.models = failing(404, "no list here")
    assert run("chat", server.url, "--model", "b", stdin="hi\n").code == 0, "some servers list no models"
    assert "no list here" in run("chat", server.url, stdin="hi\n").err


def test_a_server_that_refuses_the_key(run, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-mango-1234567890")
    server.models = failing(401, "Incorrect key sk-mango-1234567890")
    result = run("chat", server.url, stdin="hi\n")
    assert result.code == 2 and "sk-mango" not in result.out + result.err
    assert (
        "status 401: Incorrect key ***. The environment variable OPENAI_API_KEY is set, but its key was not accepted. Set it "
        "to a key of this endpoint, or name another variable with --api-key-env" in result.err
    )


def test_a_chat_with_a_server_imports_no_torch(server):
    code = (
        "import sys; from ultrafuser.cli.main import app\n"
        f"app(['chat', {server.url!r}], standalone_mode=False)\n"
        "sys.stderr.write(' '.join(m for m in ('torch', 'transformers') if m in sys.modules) + '|')"
    )
    process = subprocess.run([sys.executable, "-c", code], input="hi\n", capture_output=True, text=True, timeout=60)
    assert process.stderr == "|" and "Hello you" in process.stdout, process.stderr


# ---------------------------------------------------------------- on a terminal

SECONDS = 40


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, descriptor: int, process: subprocess.Popen) -> None:
        self.descriptor, self.process, self.text = descriptor, process, ""
        self._seen = 0

    def type(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def interrupt_prompt(self) -> None:
        """Type Ctrl-C once the program waits for input. Between its prompt and its `select`, Python would miss it."""
        end = time.monotonic() + SECONDS
        status = Path(f"/proc/{self.process.pid}/stat")
        while status.exists() and status.read_text().rpartition(")")[2].split()[0] != "S":
            assert time.monotonic() < end, "the program never waited for input"
            time.sleep(0.01)
        self.type("\x03")

    def wait_for(self, text: str) -> None:
        """Read until the text appears after what was waited for before."""
        end = time.monotonic() + SECONDS
        while (position := self.text.find(text, self._seen)) < 0:
            if not select.select([self.descriptor], [], [], max(end - time.monotonic(), 0))[0]:
                raise AssertionError(f"{text!r} did not appear: {self.text[-2000:]!r}")
            self.text += os.read(self.descriptor, 65536).decode("utf-8", "replace")
        self._seen = position + len(text)


@contextmanager
def on_a_terminal(*words: str, **environment: str) -> Iterator[tuple[Terminal, subprocess.Popen]]:
    pty = pytest.importorskip("pty", reason="this system has no terminals of that kind")
    ours, theirs = pty.openpty()
    variables = os.environ | {"TERM": "xterm-256color", "COLORTERM": "truecolor", "COLUMNS": "80"} | environment
    process = subprocess.Popen(
        [sys.executable, "-m", "ultrafuser", *words], stdin=theirs, stdout=theirs, stderr=theirs, env=variables,
        start_new_session=True, preexec_fn=lambda: _take_terminal(theirs),
    )  # fmt: skip
    os.close(theirs)
    try:
        yield Terminal(ours, process), process
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def _take_terminal(descriptor: int) -> None:
    """Make it the one whose Ctrl-C interrupts this process."""
    import fcntl
    import termios

    with suppress(OSError):
        fcntl.ioctl(descriptor, termios.TIOCSCTTY, 0)


def test_a_chat_on_a_terminal(server):
    """Colours, Ctrl-C, the history of prompts, and the end."""
    body = event(weighted(["on "], [(0.5, 0.5)]))
    server.script = [Step(body, headers={"content-type": "text/event-stream"}, endless=True)]
    with on_a_terminal("chat", server.url) as (terminal, process):
        terminal.wait_for("> ")
        terminal.type("first\n")
        terminal.wait_for("on ")
        terminal.type("\x03")
        terminal.wait_for("stopped, kept so far: /retry asks again, /undo removes it")
        terminal.wait_for("> ")
        terminal.type("second\n")
        terminal.wait_for("\x1b[38;2;0;0;0;48;2;")
        terminal.wait_for("> ")
        terminal.type("\x1b[A\n")  # the arrow up: the prompt before
        terminal.wait_for("tokens/s")
        terminal.wait_for("> ")
        terminal.interrupt_prompt()
        terminal.wait_for("so does another Ctrl-C")
        terminal.type("/exit\n")
        assert process.wait(SECONDS) == 0
    questions = [request["messages"][-1]["content"] for request in server.requests]
    assert questions[:2] == ["first", "second"] and questions[2] == "second"


def test_no_colour_on_a_terminal(server):
    with on_a_terminal("chat", server.url, "--no-colour") as (terminal, process):
        terminal.wait_for("> ")
        terminal.type("hi\n")
        terminal.wait_for("Hello you\r\n[text 0.55  code 0.45")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert process.wait(SECONDS) == 0
        assert "\x1b[38" not in terminal.text and "\x1b[48" not in terminal.text
