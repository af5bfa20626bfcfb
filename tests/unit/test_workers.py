"""Worker processes: what they return and raise, and that none outlives who started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snapshotter.durable import Stopped
from snapshotter.errors import NotFound
from snapshotter.progress import Watch
from snapshotter.workers.pool import WorkerDied, Workers


@pytest.fixture
def workers() -> Iterator[Workers]:
    made = Workers()
    yield made
    made.close()


def refuse(text: str) -> None:
    raise NotFound(text)


def number_of(text: str, number: int, count: int) -> tuple[str, int, int, int]:
    return text, number, count, os.getpid()


def fail_if_first(directory: Path, number: int, _count: int) -> None:
    if number == 0:
        raise OSError("the first")
    (directory / str(number)).touch()


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_call_returns_and_raises_what_the_function_does(workers: Workers) -> None:
    assert workers.call(os.path.join, "a", "b") == "a/b"
    assert workers.call(os.getpid) != os.getpid()
    with pytest.raises(NotFound, match=r"^gone$"):
        workers.call(refuse, "gone")
    with pytest.raises(FileNotFoundError) as raised:
        workers.call(os.stat, "/does/not/exist")
    assert raised.value.filename == "/does/not/exist"


def test_work_is_shared_out_to_processes_of_their_own(workers: Workers) -> None:
    answers = workers.share_out(number_of, "x")
    assert len(answers) == workers.cpus
    assert {answer[:3] for answer in answers} == {("x", number, workers.cpus) for number in range(workers.cpus)}
    assert len({answer[3] for answer in answers}) == workers.cpus


def test_when_one_piece_fails_the_others_are_over(workers: Workers, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="the first"):
        workers.share_out(fail_if_first, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [str(number) for number in range(1, workers.cpus)]


def read_if_last(fifo: Path, number: int, count: int) -> bytes | None:
    return fifo.read_bytes() if number == count - 1 else None


def test_a_process_that_hangs_is_not_hidden_by_those_that_are_done(workers: Workers, tmp_path: Path) -> None:
    """Although they work for others now."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    answers: list[bytes | None] = []
    hanging = threading.Thread(target=lambda: answers.extend(workers.share_out(read_if_last, fifo)))
    hanging.start()
    watch = Watch()

    def seems_idle() -> bool:
        workers.call(os.getpid)
        return watch.idle_s(hanging.native_id or 0) > 0.3

    try:
        wait_until(seems_idle)
    finally:
        fifo.write_bytes(b"on")
        hanging.join()
    assert answers[-1] == b"on"


def test_a_worker_that_dies_is_an_error_and_replaced(workers: Workers) -> None:
    for _ in range(5):
        with pytest.raises(WorkerDied, match="status 3"):
            workers.call(os._exit, 3)
    assert workers.call(os.path.join, "a", "b") == "a/b"


def test_a_worker_that_was_killed_while_idle_is_replaced(workers: Workers) -> None:
    pids = {workers.call(os.getpid)}
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not any(map(is_there, pids)))
    assert workers.call(os.getpid) not in pids


def test_more_callers_than_processes_are_all_served(workers: Workers) -> None:
    answers: list[str] = []
    threads = [
        threading.Thread(target=lambda n=number: answers.append(workers.call(os.path.join, "a", str(n))))  # type: ignore[misc]
        for number in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(answers) == sorted(f"a/{number}" for number in range(20))


def test_stopping_ends_who_waits(workers: Workers) -> None:
    pid = workers.call(os.getpid)
    failures: list[Exception] = []

    def wait() -> None:
        try:
            workers.call(time.sleep, 100)
        except Stopped as error:
            failures.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    wait_until(lambda: pid in workers_of_this_process())
    workers.stop()
    thread.join(10)
    assert len(failures) == 1
    with pytest.raises(Stopped):
        workers.call(os.getpid)


def workers_of_this_process() -> set[int]:
    children = [path.read_text() for path in Path("/proc/self/task").glob("*/children")]
    return {int(pid) for pid in " ".join(children).split()}


def test_no_worker_outlives_a_killed_owner_and_its_lock_goes_with_it(tmp_path: Path) -> None:
    """Also one that is at work. Until it has ended it holds what it was given."""
    script = (
        "import fcntl, os, sys, threading, time\n"
        "from snapshotter.workers.pool import Workers\n"
        "fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)\n"
        "fcntl.flock(fd, fcntl.LOCK_EX)\n"
        "workers = Workers([fd])\n"
        "pids = [workers.call(os.getpid)]\n"
        "threading.Thread(target=workers.call, args=(time.sleep, 100), daemon=True).start()\n"
        "print(*pids, flush=True)\n"
        "time.sleep(100)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", script, tmp_path / "lock"], stdout=subprocess.PIPE, text=True)
    assert owner.stdout
    with owner.stdout:
        pids = [int(pid) for pid in owner.stdout.readline().split()]
        assert pids
        owner.kill()
        owner.wait()
    wait_until(lambda: not any(map(is_there, pids)))
    assert subprocess.run(["flock", "--timeout", "10", tmp_path / "lock", "true"], check=False).returncode == 0
