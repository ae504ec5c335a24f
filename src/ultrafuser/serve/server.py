"""The server process: its socket, its signals, and its end."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from ultrafuser.errors import UltraFuserError
from ultrafuser.printing import echo_error
from ultrafuser.serve.engine import Engine

_KEEP_ALIVE_S = 65  # longer than the pools of clients and proxies keep idle connections
_LAST_WORDS_S = 5  # for the answers that were cut off


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet, so that a wrong address is an error before a model is loaded.

    Args:
        port: 0: any free one.

    Raises:
        UltraFuserError: the address cannot be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise UltraFuserError(f"--host {host!r} is no address of this machine. Try 127.0.0.1 or 0.0.0.0") from error
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        problem = error.strerror or str(error)
        raise UltraFuserError(
            f"port {port} of {host} cannot be used: {problem}. Choose another one, or --port 0 for any free one"
        ) from error
    return listener


def url(listener: socket.socket) -> str:
    """The address of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_local(listener: socket.socket) -> bool:
    """Whether only programs on this machine reach it."""
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


class AnnouncedServer(uvicorn.Server):
    """Says when it takes requests."""

    def __init__(self, config: uvicorn.Config, on_start: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_start = on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self._on_start()


class Server(AnnouncedServer):
    """Finishes running answers after the first signal, and ends at once after the second.

    While it finishes them it still listens, so that new requests get 503 and not a refused connection.
    """

    def __init__(self, app: FastAPI, engine: Engine, grace_s: float, on_start: Callable[[], None]) -> None:
        """
        Args:
            grace_s: for the running answers.
            on_start: called when the server takes requests.
        """
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_LAST_WORDS_S,
        )
        super().__init__(config, on_start)
        self._traffic, self._engine, self._grace_s = app.state.traffic, engine, grace_s
        self._ending: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called in the main thread between two instructions, so it only schedules."""
        if self._traffic.is_draining:
            os._exit(128 + sig)
        self._traffic.is_draining = True
        asyncio.get_running_loop().call_soon_threadsafe(self._end, sig)

    def _end(self, sig: int) -> None:
        count = self._traffic.num_running
        again = "Press Ctrl-C again to end at once" if sig == signal.SIGINT else "A second signal ends it at once"
        if count:
            echo_error(f"ultrafuser: finishing {count} requests within {self._grace_s:g} s. {again}")
        self._ending = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        if not await self._traffic.drain(self._grace_s):
            echo_error(f"ultrafuser: {self._traffic.num_running} requests were not finished in time and are cut off")
        await self._engine.close()
        self.should_exit = True


def run(server: uvicorn.Server, listener: socket.socket) -> None:
    """Serve until a signal has ended it.

    Raises:
        UltraFuserError: another process has taken the port since.
    """
    try:
        server.run(sockets=[listener])
    except OSError as error:
        raise UltraFuserError(f"{url(listener)} cannot be listened on: {error.strerror or error}") from error
