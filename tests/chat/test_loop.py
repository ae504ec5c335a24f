"""The loop of a chat, against a scripted server: turns, commands, interrupts, and servers that fail."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import pytest

from fake_endpoint import CUT, FakeEndpoint, Step, chunk, event, failing, streamed, weighted
from ultrafuser.chat.screen import Screen
from ultrafuser.endpoint.stream import Piece


def sent(server: FakeEndpoint, index: int = -1) -> list[tuple[str, str]]:
    """(role, content) of the messages of a request."""
    return [(message["role"], message["content"]) for message in server.requests[index]["messages"]]


# ---------------------------------------------------------------- turns


def test_each_turn_sends_the_whole_chat(server, chat):
    _, out = chat(server, "hi", "", "and now?", system="Be brief.")
    assert sent(server, 0) == [("system", "Be brief."), ("user", "hi")]
    assert sent(server) == [
        ("system", "Be brief."), ("user", "hi"), ("assistant", "Hello you"), ("user", "and now?"),
    ]  # fmt: skip
    assert out.count("Hello you\n[text 0.55  code 0.45   2 tokens") == 2
    assert server.requests[0]["gate_weights"] is True and server.requests[0]["stream"] is True


def test_a_message_of_several_lines(server, chat):
    chat(server, '"""def f():', "    return 1", '"""', '"""/reset is a command"""')
    assert sent(server, 0) == [("user", "def f():\n    return 1")]
    assert sent(server)[-1] == ("user", "/reset is a command")


def test_a_path_is_no_command(server, chat):
    chat(server, "/usr/bin/python is gone. Why?", " /exit is no command after a space")
    assert sent(server, 0) == [("user", "/usr/bin/python is gone. Why?")]
    assert sent(server)[-1][1] == "/exit is no command after a space"


def test_a_server_without_weights(plain_server, chat):
    _, out = chat(plain_server, "hi", "/weights", "/specialists text", "/save chat.html")
    assert "so plain\n[" in out and "tokens/s" not in out
    assert "the server gave no weights with this answer" in out
    assert "plain has no specialists that can be told apart" in out
    assert "no answer of this chat has weights to show on a page. Save it as a .json file" in out
    assert "gate_weights" not in plain_server.requests[0] and "top_k" not in plain_server.requests[0]


def test_wide_characters_and_code_arrive_as_they_are(server, chat):
    text = "```python\n\tx = '中😀é'\n    return [x]\n```"
    server.reply = lambda question: streamed(weighted(list(text), [(0.5, 0.5)] * len(text), "stop"))
    assert f"{text}\n[" in chat(server, "code")[1]


def test_an_answer_without_text(server, chat):
    server.reply = lambda question: streamed(chunk("", "stop"))
    assert "an empty answer" in chat(server, "hi")[1]


def test_an_answer_that_is_cut(server, chat):
    server.reply = lambda question: streamed(weighted(["on"], [(1.0, 0.0)], "length"))
    assert "cut at the limit of tokens: /set max_new_tokens=N" in chat(server, "hi")[1]


# ---------------------------------------------------------------- commands


def test_retry_asks_the_same_again(server, chat):
    state = chat(server, "hi", "/set seed=5", "/retry", "/retry")[0].state
    assert sent(server, 1) == sent(server, 2) == [("user", "hi")]
    assert len(state.conversation.turns) == 1
    assert [request.get("seed") for request in server.requests] == [None, 6, 7], "another seed, so another answer"


def test_undo_and_reset(server, chat):
    state = chat(server, "one", "two", "/undo", "/undo", "/undo", "/retry")[0].state
    assert not state.conversation.turns and server.hits == 2
    chat(server, "one", "/reset", "two", system="Be brief.")
    assert sent(server) == [("system", "Be brief."), ("user", "two")]


def test_settings_change_what_is_sent(server, chat):
    _, out = chat(
        server, "/set temperature=0 top_k=5 stop=[END, a b] max_new_tokens=9", "/specialists code", "/system Hm.", "hi"
    )
    request = server.requests[0]
    assert (request["temperature"], request["top_k"], request["stop"]) == (0, 5, ["END", "a b"])
    assert request["max_tokens"] == 9 and request["specialists"] == ["code"]
    assert sent(server)[0] == ("system", "Hm.") and "answering: code" in out
    chat(server, "/specialists code", "/specialists all", "hi")
    assert "specialists" not in server.requests[-1] and "max_tokens" not in server.requests[-1]


WRONG = {
    "/retrry": "/retrry: no such command. Did you mean /retry? /help lists them",
    "/zzz": "/zzz: no such command. /help lists them",
    "/set temprature=1": "Did you mean 'temperature'?",
    "/set temperature": "'temperature': expected KEY=VALUE, such as temperature=0.5",
    "/set temperature=hot": "temperature: got 'hot', expected number",
    "/set top_p=2": "top_p: got 2",
    "/specialists codee": "no specialist 'codee'. Did you mean 'code'? Known: text, code, or all",
    "/save": "/save needs a file",
    "/save a.json": "no answer yet, so there is nothing to save",
    "/load": "/load needs a file",
    "/load nowhere.json": "nowhere.json: no such file",
    "/retry": "no question yet",
    "/undo": "nothing to undo",
    "/weights": "no answer yet",
    "/system \udcff": "the system message is not UTF-8",
    "a\udcff": "a message holds a lone surrogate",
}


@pytest.mark.parametrize("line", WRONG)
def test_what_cannot_be_done_is_said_and_the_chat_goes_on(server, chat, line):
    _, out = chat(server, line, "hi")
    assert WRONG[line] in out and "Hello you" in out and server.hits == 1


def test_help_lists_every_command(server, chat):
    from ultrafuser.chat.commands import COMMANDS

    _, out = chat(server, "/help", "/exit", "never asked")
    assert all(usage in out for usage in COMMANDS) and not server.requests


def test_weights_show_every_token(server, chat):
    _, out = chat(server, "hi", "/weights")
    assert "Hello" in out and "0.900" in out and "0.800" in out


def test_a_chat_is_saved_and_loaded(server, chat, tmp_path):
    file, page = tmp_path / "chat.json", tmp_path / "chat.html"
    first, out = chat(server, "hi <b>", f"/save {file}", f"/save {page}", "more", f"/save {file}", system="Be brief.")
    assert out.count(f"saved: {file}") == 2, "a chat may write its own file again"
    saved = json.loads(file.read_text())
    assert saved["model"] == "fused" and saved["settings"]["temperature"] == 0.7
    assert saved["messages"][2] == {
        "role": "assistant", "content": "Hello you", "specialists": ["text", "code"], "tokens": ["Hello", " you"],
        "weights": [[0.9, 0.1], [0.2, 0.8]],
    }  # fmt: skip
    assert "<html" in page.read_text() and "hi &lt;b&gt;" in page.read_text() and "Hello" in page.read_text()
    second, out = chat(server, f"/load {file}", "/weights", f"/save {file}", "next")
    assert second.state.conversation.messages()[:5] == first.state.conversation.messages()
    assert "loaded: 2 questions and answers" in out and "0.900" in out
    assert f"{file}: exists" in out, "another chat does not overwrite it"
    assert sent(server)[0] == ("system", "Be brief.") and len(sent(server)) == 6


@pytest.mark.parametrize(
    "tree",
    [
        "",
        "[]",
        "3",
        '{"messages": [{"role": "user", "content": "a"}]}',
        '{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}',
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ["b"]}]}',
        '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "specialists": ["x"], "tokens": ["c"], "weights": [[1]]}]',
        '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "specialists": ["x"]}]',
    ],
)
def test_files_that_are_no_chat(server, chat, tmp_path, tree):
    file = tmp_path / "chat.json"
    file.write_text(tree)
    _, out = chat(server, "hi", f"/load {file}", "/retry")
    assert f"{file}: no chat (" in out and out.count("Hello you") == 2, "the chat is as it was"


# ---------------------------------------------------------------- Ctrl-C


def interrupting(server: FakeEndpoint, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Ctrl-C after some pieces of an answer that never ends."""
    show, shown = Screen.show, []

    def count(self: Screen, piece: Piece) -> None:
        show(self, piece)
        shown.append(piece)
        if len(shown) == after:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Screen, "show", count)
    body = event(weighted(["on "], [(0.5, 0.5)]))
    server.script = [Step(body, headers={"content-type": "text/event-stream"}, endless=True)]


def test_an_interrupt_stops_the_answer_and_keeps_it(server, chat, monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    interrupting(server, monkeypatch, after=3)
    _, out = chat(server, "hi", "go on")
    assert "stopped, kept so far: /retry asks again, /undo removes it" in out and "Hello you" in out
    assert sent(server)[1][0] == "assistant" and sent(server)[1][1].startswith("on on on")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_of_a_pipe_ends_the_program(server, chat, monkeypatch):
    interrupting(server, monkeypatch, after=3)
    with pytest.raises(KeyboardInterrupt):
        chat(server, "hi", "never asked")
    assert server.hits == 1


@pytest.mark.parametrize("keys", [[], ["hi"]])
def test_interrupts_at_the_prompt(server, chat, monkeypatch, keys):
    """The first says how to end the chat, the second in a row ends it."""
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    typed = iter([KeyboardInterrupt(), *keys, KeyboardInterrupt(), *([EOFError()] if keys else [])])

    def read_line(prompt: str) -> str:
        item = next(typed)
        if isinstance(item, BaseException):
            raise item
        return item

    from ultrafuser.chat.loop import Chat

    init = Chat.__init__
    monkeypatch.setattr(Chat, "__init__", lambda self, *a, **k: init(self, *a, **(k | {"read_line": read_line})))
    if keys:
        assert chat(server)[1].count("/exit or Ctrl-D ends the chat, and so does another Ctrl-C") == 2
    else:
        with pytest.raises(KeyboardInterrupt):
            chat(server)


# ---------------------------------------------------------------- failures of the server

OVERFLOW = "This model's maximum context length is 64 tokens. However, you requested 80."
FAILURES: dict[str, tuple[Any, str]] = {
    "overflow": (failing(400, OVERFLOW), f"{OVERFLOW[:-1]}. /undo removes the last question and its answer, /reset starts"),
    "no key": (failing(401, "Bad key"), "status 401: Bad key. The environment variable OPENAI_API_KEY is not set. Set it to a "
               "key of this endpoint, or name another variable with --api-key-env"),
    "unknown model": (failing(404, "no model"), "status 404: no model. No such model or address"),
    "refused": (failing(400, "unknown field"), "status 400: unknown field. The server does not accept this request. /set shows"),
    "busy": (failing(429, "slow"), "status 429: slow. The server has too much to do. Try again later"),
    "broken": (failing(500, "oh"), "status 500: oh. See the server's log"),
    "cut": (CUT, "the connection broke"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_is_said_and_the_question_can_be_asked_again(server, chat, case, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    step, words = FAILURES[case]
    server.script = [step]
    state, out = chat(server, "hi", "/retry")
    assert words in out and out.count("Hello you") == 1
    assert sent(server, 0) == sent(server, 1) == [("user", "hi")]
    assert len(state.state.conversation.turns) == 1


def test_a_server_that_goes_away_in_an_answer(server, chat):
    server.script = [streamed(weighted(["Hel"], [(0.5, 0.5)]), done=False)]
    _, out = chat(server, "hi", "again")
    assert "the answer broke off. See the server's log. The answer so far is not part of the chat: /retry asks" in out
    assert sent(server) == [("user", "again")], "half an answer would mislead the model"


def test_a_server_that_is_gone(server, chat):
    from ultrafuser.chat.served import RemoteModel

    open_ = RemoteModel.open

    async def open_then_leave(url: str) -> RemoteModel:
        model = await open_(url)
        model._client._url = "http://127.0.0.1:9/v1/chat/completions"
        return model

    RemoteModel.open, restore = open_then_leave, open_  # type: ignore[method-assign]
    try:
        _, out = chat(server, "hi", "/help")
    finally:
        RemoteModel.open = restore  # type: ignore[method-assign]
    assert "cannot be reached" in out and "Check the address and that the server runs" in out and "/undo" in out
