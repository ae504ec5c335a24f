"""Run an application on a port of this machine, and open it in the browser."""

from __future__ import annotations

import socket
import webbrowser
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

from ultrafuser.errors import UltraFuserError

GRACE_S = 5  # running answers may end within this time after an interrupt


class _Server(uvicorn.Server):
    """Says when it answers requests."""

    started_callback: Callable[[], None]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.started_callback()


def launch(
    app: ASGIApp,
    *,
    host: str,
    port: int,
    announce: Callable[[str], None],
    opens_browser: bool,
    log_level: str = "warning",
) -> None:
    """Serve until the process is interrupted.

    Args:
        port: 0 takes a free one.
        announce: called with the address once the server answers.

    Raises:
        UltraFuserError: the address cannot be used.
    """
    listener = _listen(host, port)
    address = page_address(host, listener.getsockname()[1])

    def started() -> None:
        announce(address)
        if opens_browser:
            webbrowser.open(address)

    config = uvicorn.Config(app, log_level=log_level, access_log=False, timeout_graceful_shutdown=GRACE_S)
    server = _Server(config)
    server.started_callback = started
    try:
        server.run(sockets=[listener])
    finally:
        listener.close()


def page_address(host: str, port: int) -> str:
    """The address to open on this machine."""
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{name}:{port}"


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        cause = error.strerror or str(error)
        raise UltraFuserError(
            f"--host {host} --port {port}: {cause}. Choose another port with --port, or 0 for a free one"
        ) from None
