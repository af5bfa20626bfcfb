"""The daemon's side of the worker processes.

They are spawned, never forked: a fork of a process with threads copies locks that nobody will release.
One works on one thing at a time, in the background of the host's scheduler. It ends when the daemon
does, however that ends: until then it holds the descriptors in `keep_open`, among them the lock of the
root, so that no other daemon meets one that is still at work.
"""

from __future__ import annotations

import os
import pickle
import socket
import struct
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import IO, Any, TypeVar

from snapshotter.durable import Stopped
from snapshotter.progress import waiting_for
from snapshotter.workers import HEAD

T = TypeVar("T")


_SPARE = 8
"""Processes for short work while long work has as many as it may."""


class WorkerDied(OSError):
    """A worker process ended in the middle of its work: killed by a person, or for want of memory."""


class Workers:
    """Runs functions in worker processes. Any thread may call. `close` it."""

    def __init__(self, keep_open: Sequence[int] = ()) -> None:
        """Starts as many processes as there are CPUs; more may follow."""
        self.cpus = len(os.sched_getaffinity(0))
        self._keep_open = tuple(keep_open)
        self._limit = 2 * self.cpus + _SPARE
        self._wake = threading.Condition()
        self._stopping = False
        self._idle = [_Worker(self._keep_open) for _ in range(self.cpus)]
        self._busy: set[_Worker] = set()

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """What the function returns; what it raises is raised here. It and its arguments must pickle.

        It must be harmless to repeat: if the process dies, another begins anew, once. Blocks. Raises WorkerDied, and
        Stopped when `stop` was called.
        """
        try:
            return self.call_once(function, *arguments)
        except WorkerDied:
            return self.call_once(function, *arguments)

    def call_once(self, function: Callable[..., T], *arguments: Any) -> T:
        """As `call`, for what cannot be repeated."""
        return self._run(1, lambda _number, _count: (function, arguments))[0]

    def share_out(self, function: Callable[..., T], *arguments: Any) -> list[T]:
        """Calls the function in as many processes as are free, at most as many as there are CPUs, with two more
        arguments: the number of the process from 0 on, and their count.

        When one fails, the others still end; then the first failure is raised, as `call` does.
        """
        return self._run(self.cpus, lambda number, count: (function, (*arguments, number, count)))

    def _run(self, at_most: int, task: Callable[[int, int], tuple[Callable[..., T], tuple[Any, ...]]]) -> list[T]:
        workers = self._take(at_most)
        failures: list[Exception] = []
        results: list[T] = []
        for number, worker in enumerate(workers):
            worker.send(task(number, len(workers)))
        awaited = deque(workers)
        with waiting_for(lambda: [worker.pid for worker in tuple(awaited)]):
            while awaited:
                try:
                    results.append(awaited[0].receive())
                except Exception as error:
                    failures.append(error)
                # What it does next is for somebody else.
                self._give_back(awaited.popleft())
        if failures:
            if self._stopping:
                raise Stopped("the daemon is stopping")
            raise failures[0]
        return results

    def stop(self) -> None:
        """Kills the processes: what they do can be killed at any point. Who waits for one gets Stopped."""
        with self._wake:
            self._stopping = True
            for worker in (*self._busy, *self._idle):
                worker.kill()
            self._wake.notify_all()

    def close(self) -> None:
        self.stop()
        with self._wake:
            for worker in self._idle:
                worker.end()
            self._idle.clear()

    def _take(self, at_most: int) -> list[_Worker]:
        """At least one."""
        with self._wake:
            with waiting_for(lambda: [worker.pid for worker in tuple(self._busy)]):
                while not self._stopping and not self._idle and len(self._busy) >= self._limit:
                    self._wake.wait()
            if self._stopping:
                raise Stopped("the daemon is stopping")
            for worker in [worker for worker in self._idle if not worker.is_alive()]:
                self._idle.remove(worker)
                worker.end()
            while not self._idle or len(self._idle) + len(self._busy) < self.cpus:
                self._idle.append(_Worker(self._keep_open))
            taken = [self._idle.pop() for _ in range(min(at_most, len(self._idle)))]
            self._busy.update(taken)
            return taken

    def _give_back(self, worker: _Worker) -> None:
        with self._wake:
            self._busy.discard(worker)
            if worker.is_alive() and not self._stopping:
                self._idle.append(worker)
            else:
                worker.end()
            self._wake.notify()


class _Worker:
    """One process and the socket to it."""

    def __init__(self, keep_open: Sequence[int]) -> None:
        ours, its = socket.socketpair()
        with its:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "snapshotter.workers.child"],
                stdin=its.fileno(),
                stdout=subprocess.DEVNULL,
                pass_fds=keep_open,
            )
        self.pid = self._process.pid
        self._socket = ours
        self._stream: IO[bytes] = ours.makefile("rb")

    def send(self, task: tuple[Callable[..., Any], tuple[Any, ...]]) -> None:
        raw = pickle.dumps(task)
        try:
            self._socket.sendall(HEAD.pack(len(raw)) + raw)
        except OSError:
            return  # it is dead, as `receive` will find out

    def receive(self) -> Any:
        try:
            (length,) = HEAD.unpack(self._stream.read(HEAD.size))
            done, value = pickle.loads(self._stream.read(length))
        except (OSError, struct.error, EOFError, pickle.UnpicklingError) as error:
            self._process.kill()
            raise WorkerDied(f"a worker process ended with status {self._process.wait()}") from error
        if not done:
            raise value
        return value

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._stream.close()
        self._socket.close()
