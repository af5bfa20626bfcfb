"""What a request must be before a service sees it: not too large, and a message of its method.

gRPC calls a message that does not parse the server's fault (UNKNOWN, with a traceback in the log), and has one limit
for all methods. Here the client is told (INVALID_ARGUMENT, RESOURCE_EXHAUSTED).
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError

from snapshotter.api import snapshots_pb2

log = structlog.get_logger()

MESSAGE_BYTES = 16 * 1024 * 1024
"""A message of any kind, in either direction; containerd's own limit. Filters can have as much."""
REQUEST_BYTES = 1024 * 1024
"""Any other request: more than twice what the largest keys and labels take. Parsing it keeps other calls waiting."""
_SNAPSHOTS = snapshots_pb2.DESCRIPTOR.services_by_name["Snapshots"].full_name
_LARGE = frozenset({f"/{_SNAPSHOTS}/List"})

_KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
Parse = Callable[[bytes, Any], Any]


class Requests(grpc.aio.ServerInterceptor):
    """Parses the requests of all services."""

    async def intercept_service(self, proceed: Any, details: Any) -> Any:
        handler = await proceed(details)
        if handler is None or handler.request_deserializer is None:
            return handler
        limit_bytes = MESSAGE_BYTES if details.method in _LARGE else REQUEST_BYTES

        async def parse(raw: bytes, context: Any) -> Any:
            if len(raw) > limit_bytes:
                await context.abort(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    f"{details.method} takes at most {limit_bytes} bytes; the request has {len(raw)}",
                )
            try:
                return handler.request_deserializer(raw)
            except DecodeError as error:
                log.debug("call.unreadable", call=details.method, reason=str(error))
                await context.abort(
                    grpc.StatusCode.INVALID_ARGUMENT,
                    f"the request of {details.method} is not a valid message (text must be UTF-8)",
                )

        return _after(parse, handler)


def _after(parse: Parse, handler: Any) -> Any:
    """The handler of one method, for requests that are not parsed yet."""
    kind = next(kind for kind in _KINDS if getattr(handler, kind) is not None)
    serve = getattr(handler, kind)

    async def parsed(raws: Any, context: Any) -> AsyncIterator[Any]:
        async for raw in raws:
            yield await parse(raw, context)

    async def serve_parsed(raw: Any, context: Any) -> Any:
        request = parsed(raw, context) if handler.request_streaming else await parse(raw, context)
        answers = serve(request, context)
        if not inspect.isasyncgen(answers):
            return await answers  # health's Watch, which writes to the context, too
        async with aclosing(answers):  # what it holds is let go of with the call, not when the garbage is collected
            async for message in answers:
                await context.write(message)
        return None

    async def answer(raw: Any, context: Any) -> Any:
        serving = serve_parsed(raw, context)
        del raw
        try:
            return await serving
        except grpc.aio.AbortError as error:
            # The call keeps it: with the frames in its traceback, and the error before it, the request would stay in
            # memory until the garbage collector comes across the cycle.
            error.__context__ = None
            raise error.with_traceback(None)  # noqa: B904

    return handler._replace(request_deserializer=None, **{kind: answer})
