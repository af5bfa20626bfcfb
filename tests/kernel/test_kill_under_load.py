"""Many clients at work while the daemon and its workers are killed, at every failpoint and at random times: what was
answered has happened, what was not is whole or absent, and the next start goes on with what it finds.

After each kill the list of snapshots is held against the journal of the clients' calls, and after some the whole store
is. The load goes on with what there is.
"""

from __future__ import annotations

import itertools
import random
import signal
from pathlib import Path

import pytest

from snapshotter import failpoint
from tests.rig import verify
from tests.rig.host import Host
from tests.rig.journal import Cut
from tests.rig.load import Load
from tests.rig.namespace import RigError
from tests.rig.roots import unmount_below

pytestmark = [pytest.mark.root, pytest.mark.timeout(900)]

_TICKS = 30
_MOST_TICKS = 200
"""Of the journal, until the daemon is killed whatever it is doing, and with a failpoint armed."""
_HITS = (1, 1, 2, 4)
"""At which time at its failpoint it is killed."""
_CHECK_EVERY = 6


@pytest.mark.parametrize(
    ("strategy", "kills"),
    [
        ("stub", 20),
        *[
            pytest.param(strategy, 300, marks=[pytest.mark.nightly, pytest.mark.timeout(2400)])
            for strategy in ("stub", "hardlink")
        ],
    ],
)
def test_what_was_committed_survives_kills(base: Path, strategy: str, kills: int) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    choose = random.Random(seed)
    host = Host(base, dedup={"strategy": strategy})
    load = Load(host, seed)
    names = choose.sample(sorted(failpoint.NAMES), len(failpoint.NAMES))
    reached: set[str] = set()
    # Each third time no failpoint, but any time.
    for number, name in zip(range(kills), itertools.cycle(names), strict=False):
        armed = f"{name}=kill@{choose.choice(_HITS)}" if number % 3 else ""
        if run_until_killed(host, load, _MOST_TICKS if armed else choose.randrange(_TICKS), armed):
            reached.add(name)
        is_reboot = choose.random() < 0.25
        if is_reboot:
            unmount_below(host.root)
        is_last = number == kills - 1
        with host:
            now = load.journal.now()
            expected = load.journal.at(Cut(now, now))
            infos, lines = verify.existing(host, expected)
            if number % _CHECK_EVERY == 0 or is_last:
                lines += verify.check(host, load, expected, was_power_cut=False)
            if is_last:
                lines += verify.remove_all(host)
            host.stop()
        if lines:
            pytest.fail("\n".join([f"after kill {number} at {armed}, reboot: {is_reboot}", *lines]), pytrace=False)
        load.settle(infos)
    print(f"killed at {len(reached)} failpoints, not at {sorted(failpoint.NAMES - reached)}")
    assert reached


def run_until_killed(host: Host, load: Load, ticks: int, armed: str) -> bool:
    """Whether the failpoint did it; the daemon may die of it before it serves."""
    host.daemon.environment["DEDUP_FAILPOINTS"] = armed
    try:
        host.start()
    except RigError:
        assert host.daemon.process
        assert host.daemon.process.poll() == -signal.SIGKILL, host.daemon.log_text()[-2000:]
        return True
    finally:
        host.daemon.environment.clear()
    with load.running() as running:
        load.journal.wait_for(load.journal.now() + ticks, running.stop)
        is_dead = running.stop.is_set()
        host.daemon.kill()
    host.kill()
    assert running.failures == []
    return is_dead
