"""A worker process (pool.py): reads a function and its arguments from stdin, a socket, and writes what it returned.

Ends at once when the other end is closed, whatever it is doing.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import socket
import threading

from snapshotter import failpoint
from snapshotter.workers import HEAD

_NICE = 10


def main() -> None:
    # A terminal's Ctrl-C is for the daemon, which then ends us. Somebody who breaks a lease (fcntl(2)) sends SIGIO.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGIO):
        signal.signal(number, signal.SIG_IGN)
    os.umask(0)
    _stay_in_the_background()
    failpoint.also_kill(os.getppid())
    connection = socket.socket(fileno=0)
    threading.Thread(target=_end_with_the_daemon, args=(connection.fileno(),), daemon=True).start()
    stream = connection.makefile("rb")
    while head := stream.read(HEAD.size):
        function, arguments = pickle.loads(stream.read(*HEAD.unpack(head)))
        try:
            answer = True, function(*arguments)
        except Exception as error:
            answer = False, error
        raw = pickle.dumps(answer)
        connection.sendall(HEAD.pack(len(raw)) + raw)


def _stay_in_the_background() -> None:
    """Calls to the daemon, and containers, come first (sched(7))."""
    os.nice(_NICE)
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _end_with_the_daemon(fd: int) -> None:
    hangup = select.poll()
    hangup.register(fd, select.POLLRDHUP)
    hangup.poll()
    os._exit(0)


if __name__ == "__main__":
    main()
