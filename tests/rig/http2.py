"""Bare HTTP/2 (RFC 9113): frames to send as one likes, and a client that stops reading.

A gRPC library always reads a little further than its user. A StalledCall lets the server send what the windows
of section 6.9.2 (65,535 bytes at first) let it, and then has to wait until `resume`.
"""

from __future__ import annotations

import os
import select
import socket
import struct
from pathlib import Path
from types import TracebackType
from typing import Self

WINDOW_BYTES = 65_535
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM, _ACK, END_HEADERS = 1, 1, 4
_HEAD_BYTES = 9
_TIMEOUT_S = 30.0


class StalledCall:
    """One call with an empty request, on a connection of its own; a context manager."""

    def __init__(self, address: Path, method: str) -> None:
        """`method` as on the wire: /package.Service/Method."""
        self._body = bytearray()
        self._ended = False
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(_TIMEOUT_S)
        self._socket.connect(os.fspath(address))
        block = call_headers(method)
        self._socket.sendall(
            PREFACE
            + frame(SETTINGS, 0, 0, b"")
            + frame(HEADERS, END_HEADERS, 1, block)
            + frame(DATA, END_STREAM, 1, bytes(5))
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def stall(self) -> None:
        """Reads until the server may send no more. Raises EOFError where the answer is not long enough."""
        while len(self._body) < WINDOW_BYTES:
            if self._ended:
                raise EOFError(f"the whole answer has {len(self._body)} bytes")
            self._read_frame()

    def has_begun(self) -> bool:
        """Whether a part of the answer is here; does not wait for one."""
        while not self._body and select.select([self._socket], [], [], 0)[0]:
            self._read_frame()
        return bool(self._body)

    def resume(self) -> list[bytes]:
        """Reads the rest; the messages of the whole answer."""
        self._grow_windows((1 << 31) - 1 - WINDOW_BYTES)
        while not self._ended:
            self._read_frame()
        messages, at = [], 0
        while at < len(self._body):
            (length,) = struct.unpack_from(">I", self._body, at + 1)
            messages.append(bytes(self._body[at + 5 : at + 5 + length]))
            at += 5 + length
        return messages

    def _grow_windows(self, size_bytes: int) -> None:
        for stream in (0, 1):
            self._socket.sendall(frame(WINDOW_UPDATE, 0, stream, struct.pack(">I", size_bytes)))

    def _read_frame(self) -> None:
        head = self._read(_HEAD_BYTES)
        kind, flags = head[3], head[4]
        payload = self._read(int.from_bytes(head[:3], "big"))
        if kind == DATA:
            self._body += payload
        elif kind in (RST_STREAM, GOAWAY):
            raise ConnectionResetError(f"the server ended the call: frame {kind}, {payload!r}")
        elif kind in (SETTINGS, PING) and not flags & _ACK:
            self._socket.sendall(frame(kind, _ACK, 0, payload if kind == PING else b""))
        if kind in (DATA, HEADERS) and flags & END_STREAM:
            self._ended = True

    def _read(self, size_bytes: int) -> bytes:
        raw = bytearray()
        while len(raw) < size_bytes:
            part = self._socket.recv(size_bytes - len(raw))
            if not part:
                raise ConnectionResetError("the server closed the connection")
            raw += part
        return bytes(raw)


def call_headers(method: str, **more: str) -> bytes:
    """The header block of a call; `_` in the names of `more` stands for `-`."""
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": method,
        ":authority": "localhost",
        "te": "trailers",
        "content-type": "application/grpc",
        **{name.replace("_", "-"): value for name, value in more.items()},
    }
    # RFC 7541, 6.2.2: a field with a name of its own that enters no table.
    return b"".join(b"\0" + _text(name) + _text(value) for name, value in fields.items())


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + struct.pack(">BBI", kind, flags, stream) + payload


def _text(text: str) -> bytes:
    """A string literal of HPACK, short and not Huffman-coded."""
    raw = text.encode()
    assert len(raw) < 127
    return bytes([len(raw)]) + raw
