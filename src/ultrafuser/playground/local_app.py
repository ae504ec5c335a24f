"""The application behind `ultrafuser playground URL`: the page, and a proxy to the server at the URL."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ultrafuser.playground.proxy import Upstream, error_response, forward
from ultrafuser.playground.routes import add_playground

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def local_app(upstream: Upstream, others: Mapping[str, Upstream] | None = None) -> Starlette:
    """The playground of a server elsewhere. `/v1` and `/health` are passed on to it."""

    async def api(request: Request) -> Response:
        return await forward(request, upstream, f"v1/{request.path_params['path']}")

    async def health(request: Request) -> Response:
        return await forward(request, upstream, "health")

    app = Starlette(routes=[Route("/v1/{path:path}", api, methods=["GET", "POST"]), Route("/health", health)])
    add_playground(app, others)
    return app


class SameOrigin:
    """Refuses what pages of other sites send through the user's browser: they could use a key that they do not have."""

    def __init__(self, app: ASGIApp, is_local: bool) -> None:
        """
        Args:
            is_local: only this machine reaches the application, so it is only called by this machine's names.
        """
        self.app, self.is_local = app, is_local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (problem := self._problem(Request(scope))):
            await error_response(403, problem, "other_origin")(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _problem(self, request: Request) -> str | None:
        host = request.headers.get("host", "")
        if self.is_local and urlsplit(f"//{host}").hostname not in LOOPBACK:
            return f"the host {host!r} is not this machine. Open the playground at the address that it printed"
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return f"a request from {origin!r}. The playground answers its own page alone"
        return None
