"""The path of the unix socket: who may take it, and with which rights.

grpcio takes over a live socket without a word, and the server that stops then unlinks the path of
the one that runs; so the path is probed, and a lock beside it held, before grpcio sees it.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from snapshotter.errors import FailedPrecondition, InvalidArgument, from_os_error
from snapshotter.place import check_ancestors

_SUN_PATH_BYTES = 107
"""unix(7): sun_path has 108 bytes, and a NUL ends it."""


def parse(address: str) -> Path:
    """The path that an address names: a path, or unix://PATH. Raises InvalidArgument."""
    text = address.removeprefix("unix://")
    path = Path(text)
    if not path.is_absolute():
        raise InvalidArgument(f"address {address!r} is not an absolute path (nor unix:// and one)")
    if len(os.fsencode(text)) > _SUN_PATH_BYTES:
        raise InvalidArgument(
            f"address {address} has {len(os.fsencode(text))} bytes; the path of a unix socket has at most "
            f"{_SUN_PATH_BYTES}"
        )
    if set(text) & set("%?#,\0"):
        raise InvalidArgument(f"address {address!r} contains a character that gRPC cannot take in a socket's path")
    return path


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Holds a socket path for this process: free and bindable when the block begins, gone when it ends.

    Makes missing parents 0700. Raises FailedPrecondition when a server answers there, another
    daemon is about to bind, or something that is no socket is in the way, PermissionDenied where another user could
    put a socket of their own in its place.
    """
    try:
        check_ancestors(path)
        _make_parents(path.parent)
        lock = _lock(path.with_name(path.name + ".lock"), path)
    except OSError as error:
        raise from_os_error(f"preparing socket {path}", error) from error
    try:
        _clear(path)
        yield
        path.unlink(missing_ok=True)
    finally:
        path.with_name(path.name + ".lock").unlink(missing_ok=True)
        os.close(lock)


@contextmanager
def private_umask() -> Iterator[None]:
    """What is bound inside is 0600 from its first moment. The umask is the whole process's."""
    before = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(before)


def _make_parents(directory: Path) -> None:
    if directory.exists():
        return
    _make_parents(directory.parent)
    directory.mkdir(mode=0o700, exist_ok=True)


def _lock(path: Path, socket_path: Path) -> int:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(fd)
            raise FailedPrecondition(f"socket {socket_path} is being served by another daemon") from error
        if _is_at(fd, path):
            return fd
        os.close(fd)  # its holder unlinked it in between


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _clear(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FailedPrecondition(f"{path} exists and is not a socket; move it away or choose another --address")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(2)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except FileNotFoundError:
            return
        except OSError as error:
            # A full backlog, say: somebody is there.
            raise FailedPrecondition(f"socket {path} is in use ({error.strerror or error})") from error
    raise FailedPrecondition(f"socket {path} is being served by another process; stop it or choose another --address")
