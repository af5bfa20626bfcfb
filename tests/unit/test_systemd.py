"""The unit is one that systemd takes, and has nothing that would hide the daemon's mounts from containerd."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest

from tests.rig.installation import PREFIX, Installation

UNIT = PREFIX / "lib/systemd/system/dedup-snapshotter.service"
DROP_IN = PREFIX / "lib/systemd/system/containerd.service.d/10-dedup-snapshotter.conf"

# systemd.exec(5) up to systemd 257: settings that give a service a mount namespace, by themselves or because
# they imply one that does, and those that need one.
MOUNT_NAMESPACE = {
    "BindLogSockets", "BindPaths", "BindReadOnlyPaths", "DynamicUser", "ExecPaths", "ExtensionDirectories",
    "ExtensionImages", "IPCNamespacePath", "InaccessiblePaths", "JoinsNamespaceOf", "LoadCredential",
    "LoadCredentialEncrypted", "LogNamespace", "MountAPIVFS", "MountFlags", "MountImages",
    "NetworkNamespacePath", "NoExecPaths", "PrivateDevices", "PrivateIPC", "PrivateMounts", "PrivateNetwork",
    "PrivatePIDs", "PrivateTmp", "PrivateUsers", "ProcSubset", "ProtectClock", "ProtectControlGroups",
    "ProtectHome", "ProtectHostname", "ProtectKernelLogs", "ProtectKernelModules", "ProtectKernelTunables",
    "ProtectProc", "ProtectSystem", "ReadOnlyPaths", "ReadWritePaths", "RootDirectory",
    "RootEphemeral", "RootImage", "RootMStack", "SetCredential", "SetCredentialEncrypted", "ImportCredential",
    "TemporaryFileSystem", "InaccessibleDirectories", "ReadOnlyDirectories", "ReadWriteDirectories",
}  # fmt: skip
# And those that take rights away, from the daemon and so from the overlays that it mounts.
RIGHTS = {
    "AmbientCapabilities", "CapabilityBoundingSet", "DevicePolicy", "Group", "NoNewPrivileges",
    "RestrictFileSystems", "RestrictNamespaces", "RestrictSUIDSGID", "SecureBits", "SystemCallFilter", "User",
}  # fmt: skip


def settings(text: str) -> dict[str, list[str]]:
    """A unit file's assignments (systemd.syntax(7)), without their sections."""
    found: dict[str, list[str]] = {}
    for line in re.sub(r"\\\n", " ", text).splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.lstrip().startswith(("#", ";")):
            found.setdefault(name.strip(), []).append(value.strip())
    return found


def verify(installation: Installation, *edits: tuple[str, str]) -> str:
    """What systemd-analyze says of the installed units after these replacements; empty when all is well."""
    with installation.in_place() as host:
        for before, after in edits:
            text = installation.path(UNIT).read_text()
            assert before in text
            # Over the file, in the namespace: the installation itself stays as it is.
            host.run(["mount", "-t", "tmpfs", "tmpfs", "/tmp"])
            host.run(["tee", "/tmp/unit"], stdin=text.replace(before, after).encode())
            host.run(["mount", "--bind", "/tmp/unit", UNIT])
        units = [UNIT.name, "containerd.service"]
        command = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *units]
        done = host.run(command, check=False)
        said = (done.stdout + done.stderr).decode()
        return said or ("" if done.returncode == 0 else f"exit status {done.returncode}")


@pytest.mark.root
@pytest.mark.containerd
def test_systemd_takes_the_units(installation: Installation) -> None:
    assert verify(installation) == ""


@pytest.mark.root
@pytest.mark.containerd
@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [
        ("KillMode=mixed", "KillMode=nonsense", "Failed to parse kill mode"),
        ("OOMScoreAdjust=", "OOMScoreAjust=", "Unknown key"),
        ("/bin/containerd-dedup-grpc", "/bin/nothing-here", "not executable"),
    ],
)
def test_a_broken_unit_is_noticed(installation: Installation, before: str, after: str, complaint: str) -> None:
    assert complaint in verify(installation, (before, after))


def test_the_daemon_shares_the_mounts_and_rights_of_the_host(installation: Installation) -> None:
    present = settings(installation.path(UNIT).read_text()).keys()
    assert not present & MOUNT_NAMESPACE
    assert not present & RIGHTS


def test_the_list_of_settings_covers_the_manual() -> None:
    """This host's systemd.exec(5), where it is installed, names no sandboxing setting that the list lacks."""
    manual = Path("/usr/share/man/man5/systemd.exec.5.gz")
    if not manual.exists():
        return  # nothing to compare with
    text = gzip.decompress(manual.read_bytes()).decode().replace("\\-", "-")
    named = set(re.findall(r"\b((?:Private|Protect|Bind|Mount|Root|ReadOnly|ReadWrite|Inaccessible)\w*)=", text))
    harmless = {
        "RootHash",
        "RootHashSignature",
        "RootVerity",
        "RootImageOptions",
        "RootImagePolicy",
        "MountImagePolicy",
    }
    assert named - harmless <= MOUNT_NAMESPACE


def test_containerd_starts_after_the_snapshotter_is_ready(installation: Installation) -> None:
    unit = settings(installation.path(UNIT).read_text())
    assert unit["Type"] == ["notify"]
    assert "containerd.service" in unit["Before"]
    drop_in = settings(installation.path(DROP_IN).read_text())
    assert drop_in == {"Wants": [UNIT.name], "After": [UNIT.name]}


def test_the_tmpfiles_entry_makes_private_directories(installation: Installation) -> None:
    entries = installation.path(PREFIX / "lib/tmpfiles.d/dedup-snapshotter.conf").read_text()
    lines = [line.split() for line in entries.splitlines() if not line.startswith("#")]
    assert lines == [
        ["d", "/run/dedup-snapshotter", "0700", "root", "root", "-"],
        ["d", "/var/lib/dedup-snapshotter", "0700", "root", "root", "-"],
    ]
