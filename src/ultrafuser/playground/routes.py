"""The routes of the playground: the page and its files, its configuration, the export, and proxies to compared servers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ultrafuser.display.palette import NEUTRAL, colour
from ultrafuser.errors import DataError
from ultrafuser.playground.export import MAX_EXPORT_BYTES, conversation_page, read_export
from ultrafuser.playground.proxy import Upstream, error_response, forward, read_body

PAGE = Path(__file__).parent / "page"
MEDIA_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".json": "application/json",
    ".svg": "image/svg+xml",
}
NUM_COLOURS = 32  # more specialists than any fused model has had
HEADERS = {
    # The page loads its own files alone, runs no inline script, and cannot make HTML of text.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def add_playground(app: Starlette, others: Mapping[str, Upstream] | None = None) -> None:
    """Add the page at `/` and what it needs below `/playground/`. It talks to the `/v1` and `/health` of the same app.

    Args:
        app: a FastAPI or Starlette application.
        others: OpenAI-compatible servers that answers can be compared with, by the name that the page shows.
    """
    upstreams = dict(others or {})

    async def page(request: Request) -> Response:
        return page_file("index.html")

    async def file(request: Request) -> Response:
        return page_file(request.path_params["name"])

    async def configuration(request: Request) -> Response:
        value = {"palette": palette(), "examples": examples(), "others": list(upstreams)}
        return JSONResponse(value, headers={"cache-control": "no-store"})

    async def compared(request: Request) -> Response:
        name, path = request.path_params["name"], request.path_params["path"]
        if name not in upstreams:
            return error_response(404, f"{name!r} is no compared server, expected one of {sorted(upstreams)}")
        return await forward(request, upstreams[name], path)

    app.router.routes.extend(
        [
            Route("/", page),
            Route("/playground/config.json", configuration),
            Route("/playground/export", export, methods=["POST"]),
            Route("/playground/others/{name}/{path:path}", compared, methods=["GET", "POST"]),
            Route("/playground/{name}", file),
        ]
    )


def page_file(name: str) -> Response:
    """A file of the page, or 404."""
    files = {path.name: path for path in PAGE.iterdir()}
    if name not in files:
        return error_response(404, f"the playground has no file {name!r}")
    return Response(files[name].read_bytes(), media_type=MEDIA_TYPES[files[name].suffix], headers=HEADERS)


def palette() -> dict[str, object]:
    """The colours of specialists, by their place, and the colour of tokens that no specialist leads."""
    return {"colours": [colour(index) for index in range(NUM_COLOURS)], "neutral": NEUTRAL}


def examples() -> dict[str, list[str]]:
    """Questions to begin with, by domain."""
    questions: dict[str, list[str]] = json.loads((PAGE / "examples.json").read_text(encoding="utf-8"))
    return questions


async def export(request: Request) -> Response:
    """The posted conversation as an HTML page."""
    body = await read_body(request, MAX_EXPORT_BYTES)
    if body is None:
        return error_response(413, f"a conversation of more than {MAX_EXPORT_BYTES:,} bytes. Export it as JSON")
    try:
        html = conversation_page(read_export(body))
    except DataError as error:
        return error_response(400, str(error))
    headers = {"content-disposition": 'attachment; filename="conversation.html"', "x-content-type-options": "nosniff"}
    return Response(html, media_type="text/html", headers=headers)
