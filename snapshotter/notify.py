"""Tells the service manager how the daemon is doing: the datagrams of sd_notify(3).

Without $NOTIFY_SOCKET there is no service manager to tell, and every function does nothing. The
variable is taken out of the environment at the first message, as sd_notify(3) advises: a child that
inherited it could speak in our name.
"""

from __future__ import annotations

import os
import socket

import structlog

log = structlog.get_logger()

_VARIABLE = "NOTIFY_SOCKET"
_SEND_S = 1.0
"""A service manager that does not read must not keep us from serving."""

_manager: str | None = None


def ready(text: str) -> None:
    """Says that the daemon serves from now on; `text` is what `systemctl status` shows."""
    _send("READY=1", _status(text))


def status(text: str) -> None:
    """Changes the line that `systemctl status` shows."""
    _send(_status(text))


def stopping() -> None:
    """Says that the daemon has begun to stop."""
    _send("STOPPING=1")


def _status(text: str) -> str:
    return "STATUS=" + " ".join(text.split())


def _send(*assignments: str) -> None:
    """One datagram. Failures are logged: the daemon is worth more than the message."""
    global _manager
    _manager = os.environ.pop(_VARIABLE, _manager)
    if not _manager:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.settimeout(_SEND_S)
            sender.sendto("\n".join(assignments).encode(errors="surrogateescape"), _address(_manager))
    except (OSError, ValueError) as error:
        log.warning("notify.failed", socket=_manager, message=assignments[0], error=str(error))


def _address(name: str) -> bytes:
    """The address to send to: a path, or @NAME in the abstract namespace (unix(7)). Raises ValueError."""
    if name.startswith("@"):
        return b"\0" + os.fsencode(name[1:])
    if name.startswith("/"):
        return os.fsencode(name)
    raise ValueError("neither a path nor an abstract socket")
