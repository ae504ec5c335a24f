"""A chat with a scripted server: the messages that a user types, and what appears."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fake_endpoint import FakeEndpoint, chunk, fake_endpoint, listed, streamed, weighted
from ultrafuser.chat.loop import Chat
from ultrafuser.chat.screen import Screen
from ultrafuser.chat.served import RemoteModel
from ultrafuser.chat.settings import ChatSettings

NAMES = ["text", "code"]
WEIGHTS = [(0.9, 0.1), (0.2, 0.8)]
ANSWER = streamed(weighted(["Hello", " you"], WEIGHTS), weighted([""], WEIGHTS[:1], "stop"))


@pytest.fixture
def server() -> Iterator[FakeEndpoint]:
    """A server of ours, with two specialists."""
    pytest.importorskip("aiohttp", reason="the endpoint extra is not installed")
    with fake_endpoint() as server:
        server.models = listed({"id": "fused", "specialists": NAMES, "max_model_len": 64})
        server.reply = lambda question: ANSWER
        yield server


@pytest.fixture
def plain_server() -> Iterator[FakeEndpoint]:
    """A server of someone else."""
    pytest.importorskip("aiohttp", reason="the endpoint extra is not installed")
    with fake_endpoint() as server:
        server.models = listed({"id": "plain"})
        server.reply = lambda question: streamed(chunk("so "), chunk("plain"), chunk(None, "stop"))
        yield server


@pytest.fixture
def chat(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[Chat, str]]:
    """chat(server, "hello", "/weights"): the chat after these lines, and its output."""

    def run(server: FakeEndpoint, *lines: str, **options: Any) -> tuple[Chat, str]:
        loop, typed = asyncio.new_event_loop(), io.StringIO("".join(f"{line}\n" for line in lines))

        def read_line(prompt: str) -> str:
            if not (line := typed.readline()):
                raise EOFError
            return line.removesuffix("\n")

        model = loop.run_until_complete(RemoteModel.open(server.url))
        chat = Chat(model, ChatSettings(), Screen(), loop, read_line=read_line, **options)
        try:
            chat.run()
        finally:
            loop.run_until_complete(model.close())
            loop.close()
        return chat, capsys.readouterr().out

    return run
