"""The metadata store: group commit, durability, views, versions, damage.

Invariants: an act happens whole or not at all, whatever the others of its batch do; it is answered after
the disk has it; readers see committed states only and wait for nobody; what is not a store of this
version is refused with a line, never with a crash, and never taken for an empty one.
"""

from __future__ import annotations

import fcntl
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lmdb
import pytest

from snapshotter import mountinfo
from snapshotter.api import snapshots_pb2 as pb
from snapshotter.api import snapshots_pb2_grpc
from snapshotter.errors import FailedPrecondition, Internal, ResourceExhausted, SnapshotterError, Unavailable
from snapshotter.meta import reserve, schema
from snapshotter.meta.reserve import ENOUGH_BYTES
from snapshotter.meta.store import Store, Tx
from tests.rig.daemon import Daemon
from tests.rig.namespace import CHECKOUT

Raw = Any


@pytest.fixture
def store(base: Path) -> Iterator[Store]:
    opened = opened_at(base)
    yield opened
    opened.close()


def opened_at(base: Path) -> Store:
    (base / "metadata").mkdir(exist_ok=True)
    return Store(base / "metadata")


def put(key: str, value: str = "") -> Callable[[Tx], None]:
    return lambda tx: tx.raw.put(key.encode(), value.encode(), db=tx.store) and None


def get(store: Store, key: str) -> str | None:
    with store.read() as tx:
        raw = tx.raw.get(key.encode(), db=tx.store)
    return None if raw is None else raw.decode()


def stored(directory: Path) -> dict[str, dict[bytes, bytes]]:
    """All that is in an environment, database by database, read with nothing of ours."""
    with lmdb.open(str(directory), readonly=True, max_dbs=32, lib_version=0) as environment:
        with environment.begin() as txn:
            names = [bytes(name) for name, _ in txn.cursor()]
        databases = {name.decode(): environment.open_db(name, create=False) for name in names}
        with environment.begin() as txn:
            return {name: dict(txn.cursor(db=database)) for name, database in databases.items()}


@contextmanager
def writer_held(store: Store) -> Iterator[ThreadPoolExecutor]:
    """Keeps the writer inside a transaction: what is written meanwhile waits, and is one batch then."""
    entered, release = threading.Event(), threading.Event()

    def hold(_: Tx) -> None:
        entered.set()
        release.wait(30)

    with ThreadPoolExecutor(64) as pool:
        pool.submit(store.write, hold)
        assert entered.wait(10)
        try:
            yield pool
        finally:
            release.set()


def submit(store: Store, pool: ThreadPoolExecutor, act: Callable[[Tx], Any], frees_space: bool = False) -> Future[Any]:
    """Returns once the act waits for the writer."""
    waiting = len(store._waiting)
    future = pool.submit(store.write, act, frees_space)
    while len(store._waiting) == waiting and not future.done():
        os.sched_yield()
    return future


# -- one batch --------------------------------------------------------------------------------------


def test_an_act_that_fails_undoes_nothing_but_itself(store: Store) -> None:
    def fail_with(error: Exception) -> Callable[[Tx], None]:
        def act(tx: Tx) -> None:
            put("undone", "x")(tx)
            put("first", "changed")(tx)
            raise error

        return act

    def break_lmdb(tx: Tx) -> None:
        put("undone", "x")(tx)
        tx.raw.put(b"k" * 512, b"", db=tx.store)

    batches = store.batches
    with writer_held(store) as pool:
        first = submit(store, pool, put("first", "1"))
        refused = submit(store, pool, fail_with(FailedPrecondition("no")))
        second = submit(store, pool, put("second", "2"))
        faulty = submit(store, pool, fail_with(ZeroDivisionError("bug")))
        broken = submit(store, pool, break_lmdb)
        third = submit(store, pool, lambda tx: tx.raw.get(b"second", db=tx.store))
    assert (first.result(), second.result()) == (None, None)
    assert third.result() == b"2", "an act sees those before it"
    for future, expected in ((refused, FailedPrecondition), (faulty, ZeroDivisionError), (broken, Internal)):
        with pytest.raises(expected):
            future.result()
    assert store.batches == batches + 2, "all were one batch after the one that was held"
    assert [get(store, key) for key in ("first", "second", "undone")] == ["1", "2", None]
    store.write(put("later", "3"))
    assert get(store, "later") == "3", "the writer goes on"


def test_many_writers_share_commits(store: Store) -> None:
    """At most one commit for four acts: each waits for the disk, and meanwhile the others queue up."""
    writers, acts = 32, 40
    store.write(put("warm"))
    before = store.batches
    with ThreadPoolExecutor(writers) as pool:
        list(pool.map(lambda n: [store.write(put(f"{n}.{turn}")) for turn in range(acts)], range(writers)))
    assert store.batches - before <= writers * acts / 4


def test_what_waits_at_close_is_written_and_later_acts_are_refused(base: Path) -> None:
    store = opened_at(base)
    with writer_held(store) as pool:
        waiting = submit(store, pool, put("k", "v"))
        closing = pool.submit(store.close)
        while not store._closing:
            os.sched_yield()
    waiting.result()
    closing.result()
    with pytest.raises(Unavailable):
        store.write(put("late"))
    store.close()
    assert stored(base / "metadata")["store"][b"k"] == b"v"


# -- durability -------------------------------------------------------------------------------------

_WRITE_FOREVER = """
import itertools, os, sys
from pathlib import Path
from snapshotter.meta.store import Store
store = Store(Path(sys.argv[1]))
for n in range(int(sys.argv[2])):
    def act(tx):
        tx.raw.put(b"%d" % n, b"", db=tx.store)
        tx.raw.put(b"last", b"%d" % n, db=tx.store)
    store.write(act)
    os.write(1, b"%d\\n" % n)
os._exit(0)
"""


def python(program: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", program, *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.fspath(CHECKOUT)}


def test_what_was_answered_survives_a_kill(base: Path) -> None:
    """Each round one process writes and is killed, and this one looks."""
    (base / "metadata").mkdir()
    for _ in range(5):
        command = python(_WRITE_FOREVER, base / "metadata", 1_000_000)
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment()) as process:
            assert process.stdout
            lines = random.randrange(1, 300)
            answered = [int(process.stdout.readline()) for _ in range(lines)]
            process.send_signal(signal.SIGKILL)
            answered += map(int, process.stdout.read().split())
        found = stored(base / "metadata")["store"]
        assert {b"%d" % number for number in answered} <= found.keys()
        assert int(found[b"last"]) - answered[-1] in (0, 1), "one act at most was done and not answered"


def test_an_answer_comes_after_the_sync(base: Path) -> None:
    """A kill of the process cannot show it, the system calls do: before each answer the pages are synced,
    and then the page that makes them valid is written synchronously."""
    (base / "metadata").mkdir()
    trace = base / "trace"
    subprocess.run(
        ["strace", "-f", "-qq", "-y", "-e", "trace=openat,fdatasync,msync,pwrite64,write", "-o", trace,
         *python(_WRITE_FOREVER, base / "metadata", 5)],
        check=True, env=environment(), stdout=subprocess.DEVNULL,
    )  # fmt: skip
    lines = trace.read_text().splitlines()
    (meta_fd,) = {match[1] for line in lines if (match := re.search(r"data\.mdb\".*O_DSYNC.* = (\d+)<", line))}
    steps = [step for line in lines if (step := _step(line, meta_fd))]
    # Opening commits too, before the first answer.
    tail = "".join(steps)[-len("SMA") * 5 :]
    assert tail == "SMA" * 5, "".join(steps)


def _step(line: str, meta_fd: str) -> str:
    if re.search(r"fdatasync\(\d+<.*data\.mdb>\) += 0", line) or "<... fdatasync resumed>" in line:
        return "S"
    if re.search(rf"pwrite64\({meta_fd}<", line):
        return "M"
    return "A" if re.search(r'write\(1<[^>]*>, "\d+\\n"', line) else ""


@contextmanager
def fast_switching() -> Iterator[None]:
    """Threads take turns often, so that a busy one does not keep the interpreter for 5 ms each time."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


# -- readers ----------------------------------------------------------------------------------------


def test_readers_see_whole_acts_and_one_moment(store: Store) -> None:
    """Two numbers are always written together; a reader never sees them differ, nor change under it."""

    def write(number: int) -> Callable[[Tx], None]:
        def act(tx: Tx) -> None:
            put("one", str(number))(tx)
            put("two", str(number))(tx)
            if number % 3 == 0:
                put("two", "half")(tx)
                raise FailedPrecondition("no")

        return act

    def read() -> None:
        seen: set[bytes] = set()
        while len(seen) < 50:
            with store.read() as tx:
                values = [tx.raw.get(key, db=tx.store) for key in (b"one", b"two", b"one", b"two")]
            assert len(set(values)) == 1, values
            seen.add(values[0])
            time.sleep(0)  # lets the writer have the interpreter's lock

    with fast_switching(), ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(read) for _ in range(3)]
        number = 0
        while not all(reader.done() for reader in readers):
            number += 1
            with nullcontext() if number % 3 else pytest.raises(FailedPrecondition):
                store.write(write(number))
        for reader in readers:
            reader.result()


def test_a_reader_keeps_its_view(store: Store) -> None:
    store.write(put("k", "old"))
    with store.read() as tx:
        for number in range(100):
            store.write(put("k", f"new{number}"))
        assert tx.raw.get(b"k", db=tx.store) == b"old"
    assert get(store, "k") == "new99"


def test_a_reader_does_not_wait_for_the_writer(store: Store) -> None:
    store.write(put("k", "committed"))
    with writer_held(store) as pool:
        waiting = submit(store, pool, put("k", "waiting"))
        assert get(store, "k") == "committed"
        assert not waiting.done()


# -- versions ---------------------------------------------------------------------------------------


def test_a_newer_version_is_refused_and_left_as_it_is(base: Path) -> None:
    store = opened_at(base)
    store.write(lambda tx: tx.raw.put(b"version", schema.encode_u32(99), db=tx.store))
    store.close()
    before = stored(base / "metadata")
    with pytest.raises(FailedPrecondition, match=r"version 99.*newer dedup-snapshotter"):
        opened_at(base)
    assert stored(base / "metadata") == before


def test_a_newer_version_with_other_databases_is_left_as_it_is(base: Path) -> None:
    (base / "metadata").mkdir()
    with lmdb.open(str(base / "metadata"), max_dbs=4, lib_version=0) as environment:
        database = environment.open_db(b"store")
        with environment.begin(write=True) as txn:
            txn.put(b"version", schema.encode_u32(99), db=database)
    with pytest.raises(FailedPrecondition):
        opened_at(base)
    assert stored(base / "metadata") == {"store": {b"version": schema.encode_u32(99)}}


def test_an_older_version_is_migrated_once_and_step_by_step(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened_at(base)
    store.write(put("steps", "0"))
    store.close()

    def migrate(number: int) -> Callable[[Tx], None]:
        def step(tx: Tx) -> None:
            steps = tx.raw.get(b"steps", db=tx.store).decode()
            put("steps", f"{steps}{number}")(tx)

        return step

    first = schema.SCHEMA_VERSION
    monkeypatch.setattr(schema, "SCHEMA_VERSION", first + 2)
    monkeypatch.setattr(schema, "MIGRATIONS", {first: migrate(1), first + 1: migrate(2)})
    for _ in range(2):
        store = opened_at(base)
        assert get(store, "steps") == "012"
        store.close()
    assert stored(base / "metadata")["store"][b"version"] == schema.encode_u32(first + 2)


def test_a_migration_that_fails_changes_nothing(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened_at(base).close()
    before = stored(base / "metadata")

    def fail(tx: Tx) -> None:
        put("half", "done")(tx)
        raise FailedPrecondition("this one cannot be migrated")

    first = schema.SCHEMA_VERSION
    monkeypatch.setattr(schema, "SCHEMA_VERSION", first + 2)
    monkeypatch.setattr(schema, "MIGRATIONS", {first: put("half", "done"), first + 1: fail})
    with pytest.raises(FailedPrecondition, match="cannot be migrated"):
        opened_at(base)
    monkeypatch.undo()
    assert stored(base / "metadata") == before


def test_every_older_version_has_its_migration() -> None:
    assert set(schema.MIGRATIONS) == set(range(1, schema.SCHEMA_VERSION))


# -- damage -----------------------------------------------------------------------------------------

PAGE = 4096

_OPEN_AND_READ = """
import sys
from pathlib import Path
from snapshotter.errors import SnapshotterError
from snapshotter.meta.store import Store
try:
    store = Store(Path(sys.argv[1]))
    with store.read() as tx:
        count = sum(1 for _ in tx.raw.cursor(db=tx.snapshots))
except SnapshotterError as error:
    print(f"refused: {error}")
else:
    print(f"read: {count}")
"""


def damaged(base: Path, damage: Callable[[bytes], bytes]) -> str:
    """What a process says that opens and reads a store of 1,000 entries after the damage."""
    store = opened_at(base)
    store.write(lambda tx: [tx.raw.put(b"%08d" % n, bytes(300), db=tx.snapshots) for n in range(1000)] and None)
    store.close()
    data = base / "metadata" / "data.mdb"
    data.write_bytes(damage(data.read_bytes()))
    command = python(_OPEN_AND_READ, base / "metadata")
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr}"
    return done.stdout.strip()


def garbage(size_bytes: int) -> bytes:
    return random.Random(1).randbytes(size_bytes)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: data[:1], id="cut to a byte"),
        pytest.param(lambda data: data[:PAGE], id="cut to a page"),
        pytest.param(lambda data: data[: 2 * PAGE], id="cut to two pages"),
        pytest.param(lambda data: data[: 3 * PAGE], id="cut to three pages"),
        pytest.param(lambda data: data[: len(data) // 2], id="cut in half"),
        pytest.param(lambda data: garbage(PAGE) + data[PAGE:], id="garbage in the first page"),
        pytest.param(lambda data: data[:PAGE] + garbage(PAGE) + data[2 * PAGE :], id="garbage in the second page"),
        pytest.param(lambda data: bytes(2 * PAGE) + data[2 * PAGE :], id="zeros in both first pages"),
        pytest.param(lambda data: garbage(len(data)), id="garbage everywhere"),
        pytest.param(lambda _: b"not a database\n" * 1000, id="something else"),
        pytest.param(
            lambda data: data[: 2 * PAGE] + garbage(len(data) - 2 * PAGE),
            id="garbage after the first two pages",
        ),
        pytest.param(
            lambda data: data[: len(data) // 2] + garbage(PAGE) + data[len(data) // 2 + PAGE :],
            id="garbage in a page in the middle",
        ),
    ],
)
def test_a_damaged_file_is_an_error_and_no_crash(base: Path, damage: Callable[[bytes], bytes]) -> None:
    assert damaged(base, damage).startswith("refused: ")


def test_an_undamaged_file_is_read(base: Path) -> None:
    assert damaged(base, lambda data: data) == "read: 1000"


@pytest.mark.root
@pytest.mark.parametrize("damage", ["emptied", "removed"])
def test_lost_metadata_does_not_cost_the_snapshots(base: Path, damage: str) -> None:
    """The directories are all that is left then: a daemon that knows none of them must not sweep them."""
    daemon = Daemon(base / "root", base / "s.sock", log=base / "log")
    with daemon, daemon.channel() as channel:
        snapshots_pb2_grpc.SnapshotsStub(channel).Prepare(pb.PrepareSnapshotRequest(key="k"))
    (tree,) = (daemon.root / "snapshots").glob("*/fs")
    (tree / "precious").touch()
    data = daemon.root / "metadata" / "data.mdb"
    if damage == "emptied":
        os.truncate(data, 0)
    else:
        data.unlink()
    done = subprocess.run(daemon.command(), capture_output=True, text=True, timeout=5, check=False)
    assert done.returncode != 0
    assert str(daemon.root) in done.stderr
    assert (tree / "precious").exists()


@pytest.fixture
def full_store(base: Path) -> Iterator[tuple[Store, Path]]:
    """A store on a small filesystem of its own, and a file there without which there is space."""
    small = base / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", small], check=True)
    try:
        with closing(opened_at(small)) as store:
            store.write(put("before", "kept"))
            (small / "filler").write_bytes(bytes(4 << 20))
            yield store, small / "filler"
    finally:
        subprocess.run(["umount", small], check=True)


def write_until_full(store: Store) -> None:
    for number in range(200):
        store.write(put(f"large{number}", "x" * 100_000))


@pytest.mark.root
def test_a_full_disk_loses_nothing_and_passes(full_store: tuple[Store, Path]) -> None:
    store, filler = full_store
    with pytest.raises(SnapshotterError):
        write_until_full(store)
    assert get(store, "before") == "kept"
    filler.unlink()
    store.write(put("after", "works"))
    assert get(store, "after") == "works"


@pytest.mark.root
def test_a_full_disk_is_called_that(full_store: tuple[Store, Path]) -> None:
    with pytest.raises(ResourceExhausted):
        write_until_full(full_store[0])


def remove(key: str) -> Callable[[Tx], None]:
    return lambda tx: tx.raw.delete(key.encode(), db=tx.store) and None


@pytest.mark.root
def test_what_frees_space_does_not_fail_for_others(full_store: tuple[Store, Path]) -> None:
    """In one batch with what finds no space, of which some would have fitted."""
    store, _ = full_store
    with writer_held(store) as pool:
        grow = [submit(store, pool, put(f"{number}", "x" * 1_000_000)) for number in range(20)]
        shrink = submit(store, pool, remove("before"), frees_space=True)
    shrink.result()
    assert get(store, "before") is None
    refused = [future.exception() is not None for future in grow]
    assert {True, False} == set(refused)
    for number, future in enumerate(grow):
        assert isinstance(future.exception(), ResourceExhausted | None)
        assert (get(store, f"{number}") is None) == refused[number]


@pytest.mark.root
def test_what_frees_space_has_the_last_of_it(full_store: tuple[Store, Path]) -> None:
    """Even where no page can be used again, since somebody still reads."""
    store, _ = full_store
    with store.read():
        with pytest.raises(ResourceExhausted):
            for number in range(10_000):
                store.write(put(f"{number}", "x" * 1000))
        for number in range(20):
            store.write(remove(f"{number}"), frees_space=True)
    assert get(store, "19") is None
    assert get(store, "20") is not None


@pytest.mark.root
def test_holes_are_filled(base: Path) -> None:
    """A backup may come back with some: where they are nothing could be written once the disk is full."""
    with closing(opened_at(base)) as store:
        for number in range(100):
            store.write(put(f"{number}", "\0" * 100_000))
    data, copy = base / "metadata/data.mdb", base / "copy"
    subprocess.run(["cp", "--sparse=always", data, copy], check=True)
    copy.rename(data)
    assert data.stat().st_blocks * 512 < data.stat().st_size
    with closing(opened_at(base)) as store:
        store.write(put("after"))
    assert data.stat().st_blocks * 512 >= data.stat().st_size + ENOUGH_BYTES


def break_meta_page() -> None:
    """From now on writing a meta page fails, as on a full filesystem that writes nothing in place. LMDB has a
    descriptor of its own for that, which writes through."""
    for entry in os.listdir("/proc/self/fd"):
        try:
            leads_to = os.readlink(f"/proc/self/fd/{entry}")
        except FileNotFoundError:  # of the listing itself
            continue
        if leads_to.endswith("/metadata/data.mdb") and fcntl.fcntl(int(entry), fcntl.F_GETFL) & os.O_DSYNC:
            full = os.open("/dev/full", os.O_RDWR)
            os.dup2(full, int(entry), inheritable=False)
            os.close(full)
            return
    raise AssertionError("LMDB has no such descriptor")


def test_a_failed_write_of_a_meta_page_fails_one_act_only(store: Store) -> None:
    store.write(put("before", "kept"))
    break_meta_page()
    with pytest.raises(ResourceExhausted):
        store.write(put("lost", "x"))
    assert (get(store, "before"), get(store, "lost")) == ("kept", None)
    store.write(put("after", "works"))
    assert get(store, "after") == "works"


def test_readers_live_through_a_failed_write_of_a_meta_page(store: Store) -> None:
    """Those who read go on with their view, and the writer waits for them; new ones wait for it."""
    store.write(put("before", "kept"))
    with ThreadPoolExecutor(4) as pool:
        with store.read() as tx:
            break_meta_page()
            failing = pool.submit(store.write, put("lost", "x"))
            while not has_panicked(store):
                os.sched_yield()
            waiting = pool.submit(get, store, "before")
            assert tx.raw.get(b"before", db=tx.store) == b"kept"
            assert not failing.done()
        assert waiting.result(10) == "kept"
        with pytest.raises(ResourceExhausted):
            failing.result(10)


@contextmanager
def closed_by_failure(store: Store, base: Path, frees_space: bool = False) -> Iterator[None]:
    """A meta page could not be written, nor, until the block ends, can the environment be opened again."""
    data, away = base / "metadata/data.mdb", base / "away"
    break_meta_page()
    data.rename(away)
    data.mkdir()
    try:
        with pytest.raises(ResourceExhausted):
            store.write(put("lost", "x"), frees_space)
        yield
    finally:
        data.rmdir()
        away.rename(data)


def test_what_could_not_be_opened_again_is_tried_again_by_who_reads(store: Store, base: Path) -> None:
    """Nearly every call reads before it writes."""
    store.write(put("before", "kept"))
    with closed_by_failure(store, base):
        for _ in range(2):
            with pytest.raises(Unavailable, match="cannot be opened again"):
                get(store, "before")
    assert (get(store, "before"), get(store, "lost")) == ("kept", None)


def test_the_writer_outlives_a_reserve_that_did_not_help(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a full btrfs: what frees space is tried once more, if there is still something to write to."""
    monkeypatch.setattr(reserve, "_COPIES_ON_WRITE", frozenset({mountinfo.filesystem_of(base)}))
    with closing(opened_at(base)) as store:
        store.write(put("before", "kept"))
        with closed_by_failure(store, base, frees_space=True):
            assert store._writer.is_alive()
        store.write(put("after", "works"))
        assert (get(store, "before"), get(store, "after")) == ("kept", "works")


def has_panicked(store: Store) -> bool:
    try:
        store._env.begin().abort()
    except lmdb.PanicError:
        return True
    return False


@pytest.mark.usefixtures("store")
def test_nothing_of_the_table_of_readers_is_on_the_disk(base: Path) -> None:
    """It is written through a map, where lack of space ends the process."""
    assert os.listdir(base / "metadata") == ["data.mdb"]
    assert not list(Path("/dev/shm").glob("dedup-snapshotter-*"))


def test_a_store_that_cannot_be_opened_can_be_tried_again(base: Path) -> None:
    """The failed attempt leaves nothing open in this process."""
    store = opened_at(base)
    store.write(lambda tx: tx.raw.put(b"version", schema.encode_u32(99), db=tx.store))
    store.close()
    errors = []
    for _ in range(2):
        try:
            opened_at(base)
        except SnapshotterError as error:
            errors.append(error)
    assert [type(error) for error in errors] == [FailedPrecondition] * 2, errors
