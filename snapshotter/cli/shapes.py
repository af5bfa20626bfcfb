"""The JSON that scripts read (docs/snapctl.md). Keys are only ever added."""

from __future__ import annotations

from typing import TYPE_CHECKING

from snapshotter.cli.output import JsonValue
from snapshotter.cli.text import rfc3339
from snapshotter.model import Info, Mount, Usage

if TYPE_CHECKING:
    from snapshotter.client import DaemonInfo


def snapshot(info: Info) -> dict[str, JsonValue]:
    return {
        "name": info.name,
        "parent": info.parent,
        "kind": info.kind.name.lower(),
        "created_at": rfc3339(info.created_ns),
        "updated_at": rfc3339(info.updated_ns),
        "labels": dict(sorted(info.labels.items())),
    }


def usage(usage: Usage) -> dict[str, JsonValue]:
    return {"size_bytes": usage.size_bytes, "inodes": usage.inodes}


def mount(mount: Mount) -> dict[str, JsonValue]:
    return {"type": mount.type, "source": mount.source, "options": list(mount.options)}


def daemon(info: DaemonInfo) -> dict[str, JsonValue]:
    return {
        "version": info.version,
        "pid": info.pid,
        "started_at": rfc3339(info.started_ns),
        "root": info.root,
        "address": info.address,
        "filesystem": info.filesystem,
        "active": info.active,
        "views": info.views,
        "committed": info.committed,
        "pending_deletions": info.pending_deletions,
        "max_chain": info.max_chain,
        "schema_version": info.schema_version,
        "lmdb_version": info.lmdb_version,
        "mount_mode": info.mount_mode,
        "namespace_reach": info.namespace_reach,
        "features": [{"name": f.name, "works": f.works, "reason": f.reason, "on": f.on} for f in info.features],
    }
