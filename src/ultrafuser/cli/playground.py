"""`ultrafuser playground`: chat in a browser, with the weights of every token."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from ultrafuser.cli.options import Device, Dtype, TrustRemoteCode
from ultrafuser.errors import MissingExtraError, RecipeError
from ultrafuser.printing import echo

if TYPE_CHECKING:
    from ultrafuser.playground.proxy import Upstream


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
            help="Key of the server at the URL. Everybody who can open the page can then use that server.",
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

    A folder is loaded and served by this process. A URL may be any OpenAI-compatible server. Without specialists there,
    answers have no colours.
    """
    try:
        import aiohttp  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(error.name or "uvicorn", "serve", "the playground") from None
    from ultrafuser.playground.launch import launch
    from ultrafuser.playground.local_app import local_app
    from ultrafuser.playground.proxy import Upstream, read_url

    others = compared_servers(compare or [], compare_api_key)
    app = local_app(Upstream(read_url(target), api_key), others, host=host)
    launch(app, host=host, port=port, announce=lambda url: echo(f"playground: {url}"), opens_browser=not no_browser)


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
