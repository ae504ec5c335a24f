"""`ultrafuser chat`: chat in the terminal with a fused folder, or with a server."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from ultrafuser.cli.ending import AGAIN, how_to_go_on
from ultrafuser.cli.options import (
    Device,
    Dtype,
    System,
    Temperature,
    TopP,
    TrustRemoteCode,
    check_characters,
    load_folder,
)
from ultrafuser.errors import DataError

if TYPE_CHECKING:
    from ultrafuser.chat.model import ChatModel

KEY_VARIABLE = "OPENAI_API_KEY"


@how_to_go_on(f"The chat is not stored. {AGAIN} for a new one", resumes=False)
def chat_command(
    source: Annotated[
        str,
        Argument(
            help="A fused checkpoint (a folder or a hub id), or the address of a server such as http://127.0.0.1:8000.",
            metavar="FOLDER|URL",
        ),
    ],
    system: System = None,
    specialists: Annotated[
        str | None, Option(help="Let only these specialists answer, e.g. code,text. Default: all.")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        Option(
            min=1, help="Generate at most this many tokens. Default: 512 for a folder, as the server likes for a URL."
        ),
    ] = None,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.9,
    seed: Annotated[int | None, Option(help="Seed of the random numbers. Default: another one each time.")] = None,
    no_colour: Annotated[
        bool, Option("--no-colour", help="Print plain text. So does NO_COLOR in the environment.")
    ] = False,
    model: Annotated[str | None, Option(help="Model of the server. Default: the only one it has.")] = None,
    api_key_env: Annotated[
        str, Option(help="Environment variable that holds the key of the server, if it needs one.")
    ] = KEY_VARIABLE,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Chat with a fused model or a server. Answers are streamed, each token on the colour of its specialist.

    `/help` in the chat lists its commands. Ctrl-C stops an answer, `/exit` or Ctrl-D ends the chat.
    """
    check_characters({"--system": system})
    is_url = source.startswith(("http://", "https://"))
    _check_options(
        is_url,
        {"--dtype": dtype != "auto", "--device": device != "auto", "--trust-remote-code": trust_remote_code},
        {"--model": model is not None, "--api-key-env": api_key_env != KEY_VARIABLE},
    )
    from ultrafuser.chat.loop import Chat
    from ultrafuser.chat.screen import Screen
    from ultrafuser.chat.settings import read_settings

    settings = read_settings(
        {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    )
    with _event_loop() as loop:
        if is_url:
            from ultrafuser.chat.served import RemoteModel

            answerer: ChatModel = loop.run_until_complete(
                RemoteModel.open(source, model=model, api_key_env=api_key_env)
            )
        else:
            from ultrafuser.chat.local import LocalModel

            fused, renderer = load_folder(source, dtype, device, seed, trust_remote_code)
            answerer = LocalModel(source, fused, renderer)
        try:
            chat = Chat(answerer, settings, Screen(colour=not no_colour), loop, system=system)
            if specialists:
                chat.state.change("/specialists", specialists)
            _read_history()
            chat.run()
        finally:
            loop.run_until_complete(answerer.close())


def _check_options(is_url: bool, of_folder: dict[str, bool], of_url: dict[str, bool]) -> None:
    wrong = [name for name, is_given in (of_folder if is_url else of_url).items() if is_given]
    if wrong:
        kind, other = ("a folder", "a server has its own") if is_url else ("a URL", "a folder has none")
        raise DataError(f"{wrong[0]} is for {kind}: {other}. Leave it out")


@contextmanager
def _event_loop() -> Iterator[Any]:
    loop = asyncio.new_event_loop()
    try:
        yield loop
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def _read_history() -> None:
    """Give `input` its history and line editing, where the system has them."""
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401
