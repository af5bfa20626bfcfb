"""The JSON that scripts read (docs/snapctl.md). Keys are only ever added."""

from __future__ import annotations

from typing import TYPE_CHECKING

from snapshotter.cli.output import JsonValue
from snapshotter.cli.text import rfc3339
from snapshotter.model import Extent, Freed, Info, Mount, SnapshotSpace, Space, Usage

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
        "dedup_strategy": info.dedup_strategy,
        "durability": info.durability,
        "features": [{"name": f.name, "works": f.works, "reason": f.reason, "on": f.on} for f in info.features],
    }


def store_space(space: Space) -> dict[str, JsonValue]:
    return {
        "as_of": rfc3339(space.as_of_ns),
        "took_ns": space.took_ns,
        "apparent_bytes": space.apparent_bytes,
        "allocated": extent(space.allocated),
        "unshared": extent(space.unshared),
        "objects": extent(space.objects),
        "filesystem_bytes": space.filesystem_bytes,
        "filesystem_bytes_free": space.filesystem_bytes_free,
        "filesystem_inodes": space.filesystem_inodes,
        "filesystem_inodes_free": space.filesystem_inodes_free,
        "private": dict(sorted(space.private.items())),
    }


def snapshot_space(space: SnapshotSpace) -> dict[str, JsonValue]:
    return {
        "name": space.name,
        "kind": space.kind.name.lower(),
        "strategy": space.strategy,
        "apparent_bytes": space.apparent_bytes,
        "allocated": extent(space.allocated),
        "shared": extent(space.shared),
        "exclusive": extent(space.exclusive),
        "private": dict(sorted(space.private.items())),
    }


def extent(extent: Extent) -> dict[str, JsonValue]:
    return {"size_bytes": extent.size_bytes, "inodes": extent.inodes}


def freed(freed: Freed, dry_run: bool) -> dict[str, JsonValue]:
    return {"dry_run": dry_run, "objects": extent(freed.objects), "trees": freed.trees}
