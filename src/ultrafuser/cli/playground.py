"""`ultrafuser playground`: chat in a browser, with the weights of every token."""

from __future__ import annotations

import re
import webbrowser
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from ultrafuser.cli.ending import how_to_go_on
from ultrafuser.cli.options import (
    DTYPES,
    SERVER_PACKAGES,
    Device,
    Dtype,
    TrustRemoteCode,
    check_choice,
    check_packages,
    load_folder,
)
from ultrafuser.errors import RecipeError
from ultrafuser.printing import echo, echo_error

if TYPE_CHECKING:
    from ultrafuser.playground.proxy import Upstream

GRACE_S = 5.0  # for running answers after an interrupt


@how_to_go_on("The playground had not started", resumes=False)
def playground_command(
    target: Annotated[str, Argument(help="A fused checkpoint (folder or hub id), or the URL of a running server.")],
    compare: Annotated[
        list[str] | None,
        Option(
            metavar="NAME=URL",
            help="Offer another OpenAI-compatible server for answers side by side. Repeat the option for several servers.",
        ),
    ] = None,
    host: Annotated[str, Option(help="Listen on this address. 0.0.0.0: on all.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="Listen on this port. 0: a free one.")] = 7860,
    no_browser: Annotated[bool, Option("--no-browser", help="Print the address and open no browser.")] = False,
    api_key: Annotated[
        str | None,
        Option(
            envvar="ULTRAFUSER_API_KEY",
            help="With a URL: key of that server, which everybody who opens the page then uses. With a folder: key that requests must send.",
        ),
    ] = None,
    compare_api_key: Annotated[
        str | None, Option(envvar="ULTRAFUSER_COMPARE_API_KEY", help="Key of the servers of --compare.")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Chat in the browser: tokens coloured by specialist, weights, play-back, answers side by side.

    A folder is loaded and served by this process, with the API of `ultrafuser serve`. A URL may be any OpenAI-compatible
    server. Without specialists there, answers have no colours.
    """
    check_choice("--dtype", dtype, DTYPES)
    check_packages({"aiohttp": "aiohttp"} | SERVER_PACKAGES, "serve", "ultrafuser playground")
    from ultrafuser.playground.proxy import Upstream, read_url
    from ultrafuser.serve.server import bind, is_local, run, url

    others = compared_servers(compare or [], compare_api_key)
    upstream = Upstream(read_url(target), api_key) if "://" in target else None
    listener = bind(host, port)
    is_open = api_key is None if upstream is None else api_key is not None  # to everybody who reaches the address

    def announce() -> None:
        address = url(listener).replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
        echo(f"playground: {address}")
        if is_open and not is_local(listener):
            echo_error("ultrafuser: everybody who reaches this address can use the model")
        if not no_browser:
            webbrowser.open(address)

    if upstream is not None:
        server = _remote_server(upstream, others, is_local(listener), announce)
    else:
        model, renderer = load_folder(target, dtype, device, None, trust_remote_code)
        name = Path(target).resolve().name
        server = _embedded_server(model, renderer, name, api_key, others, is_local(listener), announce)
    with suppress(KeyboardInterrupt):  # the usual end
        run(server, listener)


def _remote_server(
    upstream: Upstream, others: Mapping[str, Upstream], is_local: bool, announce: Callable[[], None]
) -> Any:
    """The page in front of a server elsewhere."""
    from ultrafuser.playground.local_app import SameOrigin, local_app
    from ultrafuser.playground.page_server import page_server

    return page_server(SameOrigin(local_app(upstream, others), is_local), announce)


def _embedded_server(
    model: Any,
    renderer: Any,
    name: str,
    api_key: str | None,
    others: Mapping[str, Upstream],
    is_local: bool,
    announce: Callable[[], None],
) -> Any:
    """The page and the API of a model in this process."""
    from ultrafuser.playground.local_app import SameOrigin
    from ultrafuser.playground.routes import add_playground
    from ultrafuser.serve.app import Settings, build_app
    from ultrafuser.serve.embedded import EmbeddedEngine
    from ultrafuser.serve.server import Server

    engine = EmbeddedEngine(model, renderer)
    app = build_app(engine, renderer, Settings(name, api_key=api_key))
    add_playground(app, others)
    app.add_middleware(SameOrigin, is_local=is_local)
    return Server(app, engine, GRACE_S, announce)


def compared_servers(pairs: list[str], api_key: str | None) -> dict[str, Upstream]:
    """The servers of --compare by name.

    Raises:
        RecipeError: not NAME=URL, or a name that is used twice.
        EndpointError: no http address.
    """
    from ultrafuser.playground.proxy import Upstream, read_url

    servers: dict[str, Upstream] = {}
    for pair in pairs:
        name, equals, url = pair.partition("=")
        if not equals or not re.fullmatch(r"[\w.-]+", name):
            raise RecipeError(f"--compare {pair!r}: expected NAME=URL, e.g. llama=http://127.0.0.1:8001")
        if name in servers:
            raise RecipeError(f"--compare {pair!r}: the name {name!r} is used twice. Choose another")
        servers[name] = Upstream(read_url(url), api_key)
    return servers
