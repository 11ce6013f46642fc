"""Runs a server until a signal ends it."""

from __future__ import annotations

import ipaddress
import signal
import socket
from collections.abc import Callable

import uvicorn

from peftk.serve.http.app import make_app
from peftk.serve.http.limits import Limits
from peftk.serve.http.protocol import timed_protocol
from peftk.serve.http.security import Keys
from peftk.serve.http.served import Served

_HEAD_BYTES = 32768


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, which does not listen yet. port 0: any that is free.

    Raises OSError if the address is unknown or in use.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = found[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except BaseException:
        bound.close()
        raise
    return bound


def url_of(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_local(bound: socket.socket) -> bool:
    """Whether only this machine reaches it."""
    return ipaddress.ip_address(bound.getsockname()[0]).is_loopback


def run(served: Served, bound: socket.socket, limits: Limits, keys: Keys, ready: Callable[[], None]) -> None:
    """Serves until SIGTERM or SIGINT; then takes no more requests, lets those that run end, and returns.

    ready: called once it listens.
    """
    # uvicorn raises the signal again when it has ended; that must not end the process in another way
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        Server(served, limits, keys, ready).run(sockets=[bound])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Server(uvicorn.Server):
    """uvicorn with a model. `served` is closed at its end."""

    def __init__(self, served: Served, limits: Limits, keys: Keys, ready: Callable[[], None]) -> None:
        config = uvicorn.Config(
            make_app(served, limits, keys),
            http=timed_protocol(limits),
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=limits.idle_seconds,  # type: ignore[arg-type]  # seconds, for loop.call_later
            timeout_graceful_shutdown=limits.drain_seconds,  # type: ignore[arg-type]  # seconds, for asyncio.wait_for
            limit_concurrency=limits.connections,
            h11_max_incomplete_event_size=_HEAD_BYTES,
        )
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()
