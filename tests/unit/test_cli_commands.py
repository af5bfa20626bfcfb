"""snapctl as people and scripts run it, against a real daemon."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from snapshotter import __version__
from snapshotter.client import Client
from tests.rig.daemon import Daemon
from tests.rig.namespace import CHECKOUT

pytestmark = pytest.mark.root

HOSTILE = "key\x1b[2J\nwith\u202e all/of 'it' $(touch hostile)"
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z")


class Snapctl:
    """Runs snapctl on one socket."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(CHECKOUT),
            "SNAPCTL_ADDRESS": str(daemon.address),
            "TZ": "UTC",
        }

    def run(self, *words: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "snapshotter.cli", *words],
            env=self.environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == status, done.stderr
        assert all(line.startswith("snapctl: ") for line in done.stderr.splitlines())
        return done

    def json(self, *words: str) -> Any:
        done = self.run(*words, "--json")
        assert done.stdout.isascii()
        return json.loads(done.stdout)

    def lines(self, *words: str) -> list[str]:
        return self.run(*words).stdout.splitlines()

    def fails(self, status: int, *words: str) -> str:
        """The one line on stderr, without its prefix."""
        done = self.run(*words, status=status)
        assert len(done.stderr.splitlines()) == 1
        return done.stderr.removeprefix("snapctl: ").rstrip("\n")

    def shell(self, script: str, *, namespace: bool = False) -> subprocess.CompletedProcess[str]:
        """Runs bash, with `snapctl` a command in it."""
        functions = f'snapctl() {{ {sys.executable} -m snapshotter.cli "$@"; }}; export -f snapctl\n'
        unshare = ["unshare", "--mount", "--propagation", "private"] if namespace else []
        return subprocess.run(
            [*unshare, "bash", "-c", functions + script],
            env=self.environment, capture_output=True, text=True, check=False,
        )  # fmt: skip


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with tempfile.TemporaryDirectory(prefix="dds-", dir="/var/tmp") as name:
        directory = Path(name)
        with Daemon(directory / "root", directory / "s.sock", log=directory / "daemon.log") as daemon:
            yield daemon


@pytest.fixture
def snapctl(daemon: Daemon) -> Iterator[Snapctl]:
    """On a daemon without snapshots; what the test leaves is removed."""
    yield Snapctl(daemon)
    with Client(str(daemon.address)) as client:
        for info in reversed(list(client.list())):
            client.remove(info.name)
        client.cleanup()


@pytest.fixture
def layers(snapctl: Snapctl) -> None:
    """base <- work (active), base <- look (view)."""
    with Client(str(snapctl.daemon.address)) as client:
        client.prepare("extract-1")
        client.commit("base", "extract-1", labels={"a/b": "c"})
        client.prepare("work", "base", {"x": "1"})
        client.view("look", "base")


def test_a_snapshot_from_the_first_key_to_its_removal(snapctl: Snapctl) -> None:
    [mount] = snapctl.json("prepare", "extract-1", "--label", "a=b")
    assert set(mount) == {"type", "source", "options"}
    assert snapctl.json("commit", "base", "extract-1", "--label", "c=d") == {
        "name": "base",
        "key": "extract-1",
    }
    assert snapctl.json("prepare", "work", "base") == snapctl.json("mounts", "work")
    assert snapctl.json("rm", "work", "base") == [
        {"key": "work", "removed": True, "error": None},
        {"key": "base", "removed": True, "error": None},
    ]
    assert snapctl.json("ls") == []
    assert snapctl.run("cleanup").stdout == ""


@pytest.mark.usefixtures("layers")
def test_json_shapes(snapctl: Snapctl) -> None:
    infos = {info["name"]: info for info in snapctl.json("ls")}
    assert {name: (info["kind"], info["parent"]) for name, info in infos.items()} == {
        "base": ("committed", ""),
        "work": ("active", "base"),
        "look": ("view", "base"),
    }
    assert list(infos["base"]) == ["name", "parent", "kind", "created_at", "updated_at", "labels"]
    assert infos["base"]["labels"] == {"a/b": "c"}
    assert TIME.fullmatch(infos["base"]["created_at"])
    assert snapctl.json("stat", "base") == infos["base"]
    sized = {info["name"]: info for info in snapctl.json("ls", "--size")}["work"]
    usage = {usage["name"]: usage for usage in snapctl.json("usage")}["work"]
    assert usage == {"name": "work", "size_bytes": sized["size_bytes"], "inodes": sized["inodes"]}
    assert snapctl.json("usage", "work") == [usage]
    tree = snapctl.json("tree")
    assert {element["name"]: element["depth"] for element in tree} == {"base": 0, "work": 1, "look": 1}
    assert snapctl.json("ls", "--names") == ["base", "work", "look"]


@pytest.mark.usefixtures("layers")
def test_info_is_of_the_daemon(snapctl: Snapctl) -> None:
    info = snapctl.json("info")
    assert (info["version"], info["pid"]) == (__version__, snapctl.daemon.pid)
    assert (info["root"], info["address"]) == (str(snapctl.daemon.root), str(snapctl.daemon.address))
    assert (info["committed"], info["active"], info["views"]) == (1, 1, 1)
    assert info["dedup_strategy"] in ("stub", "hardlink", "off")
    assert info["durability"] == "full"
    assert TIME.fullmatch(info["started_at"])
    assert any(line.split()[:3] == ["max", "chain", str(info["max_chain"])] for line in snapctl.lines("info"))


@pytest.mark.usefixtures("layers")
def test_df_shows_the_store_and_some_or_all_snapshots(snapctl: Snapctl) -> None:
    found = snapctl.json("df", "--now")
    names = [each["name"] for each in found["snapshots"]]
    assert set(names) == {"base", "work", "look"}
    assert TIME.fullmatch(found["store"]["as_of"])
    assert found["store"]["filesystem_inodes"] > found["store"]["filesystem_inodes_free"] > 0
    shown = snapctl.lines("df")
    assert [line.split()[0] for line in shown[-4:]] == ["NAME", *names]
    assert any(line.startswith("without sharing  ") for line in shown)
    assert [line.split()[0] for line in snapctl.lines("df", "base", "work", "base")[-3:]].count("base") == 1
    assert snapctl.fails(3, "df", "gone").startswith('snapshot "gone" did not exist at ')


@pytest.mark.usefixtures("layers")
def test_gc_frees_what_was_removed(snapctl: Snapctl) -> None:
    snapctl.run("rm", "work", "look", "base")
    assert re.fullmatch(r"would free \d+ objects?, .+, \d+ inodes?.*\n", snapctl.run("gc", "--dry-run").stdout)
    assert snapctl.run("gc").stdout.startswith("freed ")
    nothing = {"dry_run": True, "objects": {"size_bytes": 0, "inodes": 0}, "trees": 0}
    assert snapctl.json("gc", "--dry-run") == nothing


@pytest.mark.usefixtures("layers")
def test_tables(snapctl: Snapctl) -> None:
    title, base, *_ = snapctl.lines("ls", "--size")
    assert title.split() == ["NAME", "KIND", "CREATED", "SIZE", "INODES", "PARENT"]
    assert re.fullmatch(r"base  committed  \d{4}-\d\d-\d\d \d\d:\d\d:\d\d  +[\d.]+ \w+  +\d+  -", base)
    assert snapctl.lines("tree") == ["base  committed", "├─ work  active", "└─ look  view"]
    assert [line.split()[0] for line in snapctl.lines("usage")] == ["NAME", "base", "work", "look"]
    assert snapctl.lines("stat", "base")[-1] == "labels   a/b=c"
    assert snapctl.lines("mounts", "look")[0].split() == ["TYPE", "SOURCE", "OPTIONS"]


@pytest.mark.usefixtures("layers")
def test_filters_reach_the_daemon(snapctl: Snapctl) -> None:
    assert snapctl.lines("ls", "--names", "kind==view", 'labels."a/b"==c') == ["base", "look"]
    assert "kind=view" in snapctl.fails(2, "ls", "kind=view")


@pytest.mark.usefixtures("layers")
def test_labels_are_set_and_removed_and_others_stay(snapctl: Snapctl) -> None:
    snapctl.run("label", "work", "y.z/w=2", "v=3")
    assert snapctl.json("label", "work", "y.z/w-", "v=4")["labels"] == {"x": "1", "v": "4"}
    assert snapctl.json("stat", "work")["labels"] == {"x": "1", "v": "4"}


def test_a_hostile_key_does_not_reach_the_terminal(snapctl: Snapctl) -> None:
    snapctl.run("prepare", HOSTILE)
    for words in (["ls"], ["ls", "--names"], ["tree"], ["stat", HOSTILE], ["usage"]):
        output = snapctl.run(*words).stdout
        assert all(line.isprintable() for line in output.splitlines())
        assert r"key\x1b[2J\nwith\u202e all" in output
    assert snapctl.json("ls", "--names") == [HOSTILE]
    snapctl.run("rm", HOSTILE)
    assert snapctl.run("stat", HOSTILE, status=3).stderr.rstrip("\n").isprintable()


@pytest.mark.usefixtures("layers")
def test_rm_goes_on_and_exits_with_the_first_failure(snapctl: Snapctl) -> None:
    done = snapctl.run("rm", "gone", "base", "work", "look", status=3)
    assert [("gone" in line, "base" in line) for line in done.stderr.splitlines()] == [
        (True, False),
        (False, True),
    ]
    assert snapctl.json("ls", "--names") == ["base"]
    done = snapctl.run("--json", "rm", "base", "gone", status=3)
    removed, failed = json.loads(done.stdout)
    assert (removed["removed"], failed["removed"]) == (True, False)
    assert f"snapctl: {failed['error']}\n" == done.stderr


@pytest.mark.usefixtures("layers")
def test_exit_statuses(snapctl: Snapctl) -> None:
    assert "gone" in snapctl.fails(3, "stat", "gone")
    assert "gone" in snapctl.fails(3, "prepare", "new", "gone")
    assert "work" in snapctl.fails(4, "prepare", "work")
    assert "base" in snapctl.fails(5, "mounts", "base")
    assert "base" in snapctl.fails(5, "rm", "base")
    assert "work" in snapctl.fails(2, "prepare", "new", "work")
    assert snapctl.fails(2, "stat", "").count("key") > 0
    assert snapctl.fails(2, "mout") == 'no command "mout"; did you mean "mount"? (see snapctl --help)'
    assert snapctl.run("usage", "work", "gone", status=3).stdout.count("work") == 1
    assert snapctl.run("--version").stdout == f"snapctl {__version__}\n"
    assert "exit status:" in snapctl.run("--help").stdout


def test_a_key_that_begins_with_a_dash(snapctl: Snapctl) -> None:
    snapctl.run("prepare", "--json", "--", "-key")
    assert snapctl.json("ls", "--names") == ["-key"]
    snapctl.run("rm", "--", "-key")


def test_a_missing_socket_is_named_with_the_remedy(snapctl: Snapctl, tmp_path: Path) -> None:
    missing = tmp_path / "missing.sock"
    message = f'no socket at {missing}: start the daemon with "systemctl start dedup-snapshotter"'
    assert snapctl.fails(6, "--address", f"unix://{missing}", "ls") == message
    missing.touch()
    assert snapctl.fails(6, "ls", "--address", str(missing)).startswith(f"nobody listens at {missing}: ")
    assert "too long" in snapctl.fails(2, "ls", "--address", "/" + "x" * 200)


def test_a_socket_path_that_needs_quoting_is_reached(snapctl: Snapctl, tmp_path: Path) -> None:
    for name in ("per%41cent", "a b?c#d", "schlüssel"):
        (tmp_path / name).symlink_to(snapctl.daemon.address)
        assert snapctl.json("ls", "--address", str(tmp_path / name)) == []
    (tmp_path / "a,b").symlink_to(snapctl.daemon.address)
    assert "comma" in snapctl.fails(2, "ls", "--address", str(tmp_path / "a,b"))


def test_another_user_is_told_to_be_root(snapctl: Snapctl) -> None:
    code = (
        "import os, sys; from snapshotter import cli\n"
        "assert cli.main(['ls']) == 0  # nobody may be unable to read what this imports\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "sys.exit(cli.main(['ls']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=snapctl.environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 8
    assert done.stderr == f"snapctl: no permission to connect to {snapctl.daemon.address}: run this as root\n"


def test_a_daemon_that_hangs_is_interrupted_quietly(snapctl: Snapctl) -> None:
    os.kill(snapctl.daemon.pid, signal.SIGSTOP)
    try:
        done = snapctl.shell(f"timeout --signal=INT 3 {sys.executable} -m snapshotter.cli ls")
        assert (done.returncode, done.stderr) == (124, "")
    finally:
        os.kill(snapctl.daemon.pid, signal.SIGCONT)


def test_a_daemon_that_does_not_answer_in_time_is_unavailable(snapctl: Snapctl) -> None:
    with Client(str(snapctl.daemon.address), timeout_s=0.2) as client:
        client.info()
        os.kill(snapctl.daemon.pid, signal.SIGSTOP)
        try:
            with pytest.raises(Exception, match=r"no answer within 0\.2 s from the daemon at .*s\.sock") as raised:
                client.info()
            assert raised.type.__name__ == "Unavailable"
        finally:
            os.kill(snapctl.daemon.pid, signal.SIGCONT)


def test_a_daemon_that_dies_is_unavailable(snapctl: Snapctl) -> None:
    with Client(str(snapctl.daemon.address)) as client:
        client.info()
        snapctl.daemon.kill()
        try:
            with pytest.raises(Exception, match="start the daemon with") as raised:
                client.info()
            assert raised.type.__name__ == "Unavailable"
        finally:
            snapctl.daemon.start()


def test_a_reader_that_leaves_is_no_error(snapctl: Snapctl) -> None:
    with Client(str(snapctl.daemon.address)) as client:
        for number in range(40):
            client.prepare(f"{number:02}" + "x" * 6000)
    done = snapctl.shell('snapctl ls --json | head -c 1; echo " ${PIPESTATUS[0]}"')
    assert (done.stdout, done.stderr) == ("[ 141\n", "")


def test_a_full_disk_under_stdout_is_an_error(snapctl: Snapctl) -> None:
    done = snapctl.shell("snapctl ls > /dev/full")
    assert (done.returncode, done.stderr) == (1, "snapctl: standard output: No space left on device\n")
    assert snapctl.shell("snapctl ls >&-").returncode == 0


def test_a_terminal_gets_lines_that_fit_and_a_pipe_gets_all(snapctl: Snapctl) -> None:
    key = "k8s.io/1/" + "x" * 100 + "-end"
    snapctl.run("prepare", key)
    assert any(key in line for line in snapctl.lines("ls"))
    for words in (["ls"], ["tree"]):
        shown = on_terminal(snapctl, *words, columns=70)
        assert all(len(line) <= 70 for line in shown)
        assert any("k8s.io/1/xx" in line and "x-end" in line for line in shown)
    assert any(key in line for line in on_terminal(snapctl, "ls", "--no-trunc", columns=70))


def on_terminal(snapctl: Snapctl, *words: str, columns: int) -> list[str]:
    """The lines that snapctl writes to a terminal of its own."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    argv = [sys.executable, "-m", "snapshotter.cli", *words]
    with subprocess.Popen(argv, env=snapctl.environment, stdout=theirs) as process:
        os.close(theirs)
        output = b""
        with contextlib.suppress(OSError):  # EIO is how a terminal says that nobody is left to write
            while chunk := os.read(ours, 65536):
                output += chunk
        os.close(ours)
    assert process.returncode == 0
    return output.decode().splitlines()


@pytest.mark.usefixtures("layers")
def test_mount_and_umount(snapctl: Snapctl, tmp_path: Path) -> None:
    target = str(tmp_path)
    done = snapctl.shell(
        f"set -e; cd {target}; mkdir t; snapctl mount work t; echo 1 > t/f; snapctl umount t; ls t\n"
        "snapctl mount look t; if touch t/f; then exit 9; fi; snapctl umount t\n"
        "snapctl mount work t --json; cat t/f; snapctl umount --json t",
        namespace=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Read-only file system" in done.stderr
    mounted, end = json.JSONDecoder().raw_decode(done.stdout)
    assert mounted == {"key": "work", "target": "t", "mounts": snapctl.json("mounts", "work")}
    assert done.stdout[end:] == '\n1\n{\n  "target": "t"\n}\n'
    assert snapctl.fails(3, "mount", "work", f"{target}/gone").startswith(f"there is no directory {target}/gone")
    assert snapctl.fails(5, "umount", target) == f"cannot unmount {target}: nothing is mounted there"
    assert "gone" in snapctl.fails(3, "mount", "gone", target)


def test_a_chain_of_128_layers_is_mounted(snapctl: Snapctl, tmp_path: Path) -> None:
    parent = ""
    with Client(str(snapctl.daemon.address)) as client:
        for number in range(128):
            [mount] = client.prepare(f"extract-{number}", parent)
            upper = next((o[9:] for o in mount.options if o.startswith("upperdir=")), mount.source)
            (Path(upper) / f"file-{number}").write_text(str(number))
            client.commit(f"layer-{number}", f"extract-{number}")
            parent = f"layer-{number}"
        client.prepare("deep", parent)
    done = snapctl.shell(
        f"snapctl mount deep {tmp_path} && cat {tmp_path}/file-0 && ls {tmp_path} | wc -l"
        f" && echo new > {tmp_path}/new && snapctl umount {tmp_path} && ls {tmp_path}",
        namespace=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "0128\n", "")
    assert len(snapctl.lines("tree")) == 129


def test_completion_offers_names_and_runs_none_of_them(snapctl: Snapctl, tmp_path: Path) -> None:
    with Client(str(snapctl.daemon.address)) as client:
        for key in ("$(touch hostile)", "sha256:abc", "sha256:abd", "two words", "plain"):
            client.prepare(key)
    words = [
        "snapctl sta",
        "snapctl stat p",
        "snapctl stat sha256:ab",
        "snapctl commit sha256:x pl",
        "snapctl rm -- ",
    ]
    tries = "".join(f"try {word!r}\n" for word in words)
    done = snapctl.shell(
        f'cd {tmp_path}; eval "$(snapctl completion bash)"\n'
        "try() { COMP_LINE=$1 COMP_POINT=${#1} COMPREPLY=(); _snapctl; echo ${COMPREPLY[@]}; }\n" + tries
    )
    assert done.stdout.splitlines() == ["stat", "plain", "abc abd", "plain", "sha256:abc sha256:abd plain"]
    assert list(tmp_path.iterdir()) == []
    assert "_snapctl_names" in snapctl.run("completion", "zsh").stdout


def test_help_and_mistakes_do_not_load_grpc() -> None:
    code = (
        "import sys; from snapshotter.cli import main\n"
        "assert main(['ls', '--help']) == 0 and main(['lss']) == 2 and main(['completion', 'zsh']) == 0\n"
        "assert not {'grpc', 'google.protobuf', 'ctypes'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
