"""The gRPC server at a socket, and another in its place where it breaks.

grpcio's asynchronous server decodes the path of a request in its main loop: one that is not UTF-8 ends the loop, and
with it the serving, of everybody, while the process goes on. (AioServer._server_main_loop in server.pyx.pxi; seen with
1.85.1.)
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import structlog

from snapshotter import listener

log = structlog.get_logger()

_FINISH_S = 5.0
"""How long calls that a broken server has accepted may still take. Those that came as it broke get no answer before."""
_LEAVE_S = 5.0


class Port:
    """`open`, `serve_until` something, `close`; all in one event loop."""

    def __init__(self, address: Path, make: Callable[[], Awaitable[Any]]) -> None:
        """`make` gives a grpc.aio.Server with its services, that is not started."""
        self._address = address
        self._make = make
        self._server: Any = None
        self._broken: dict[Any, asyncio.Task[None]] = {}
        self._doubt = asyncio.Event()

    async def open(self) -> None:
        """Serves from now on."""
        self._server = await self._make()
        with listener.private_umask():
            self._server.add_insecure_port(f"unix:{self._address}")
            await self._server.start()

    async def serve_until(self, stopping: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._on_unhandled)
        waiting = [loop.create_task(stopping.wait()), loop.create_task(self._doubt.wait())]
        while not stopping.is_set():
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if self._doubt.is_set() and not stopping.is_set():
                self._doubt.clear()
                waiting[1] = loop.create_task(self._doubt.wait())
                await self._mend()
        waiting[1].cancel()

    async def close(self, grace_s: float) -> None:
        """Lets running calls end, for at most `grace_s`."""
        await asyncio.gather(*(server.stop(grace_s) for server in (self._server, *self._broken)))

    def _on_unhandled(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """What ended the server's main loop was raised in a task on which nobody waits."""
        loop.default_exception_handler(context)
        self._doubt.set()

    async def _mend(self) -> None:
        try:
            await self._server.wait_for_termination(timeout=0)
        except Exception as error:
            log.error("server.broken", reason=str(error), help="it is replaced; running calls go on")
            broken, self._server = self._server, None
            self._broken[broken] = asyncio.create_task(self._finish(broken))
            # It takes away the socket when its listener is gone, and must not find the next one's there.
            deadline_s = asyncio.get_running_loop().time() + _LEAVE_S
            while self._address.exists() and asyncio.get_running_loop().time() < deadline_s:
                await asyncio.sleep(0.001)
            await self.open()

    async def _finish(self, broken: Any) -> None:
        await broken.stop(_FINISH_S)
        del self._broken[broken]
