"""The server process of a playground whose model is served elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

from ultrafuser.serve.server import AnnouncedServer

GRACE_S = 5  # running answers may end within this time after an interrupt


def page_server(app: ASGIApp, on_start: Callable[[], None]) -> uvicorn.Server:
    """
    Args:
        on_start: called when the server takes requests.
    """
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=GRACE_S
    )
    return AnnouncedServer(config, on_start)
