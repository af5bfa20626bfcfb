"""Mounting snapshots: what a client is told to mount, and what the daemon mounts itself."""

from __future__ import annotations

from dataclasses import dataclass

from snapshotter.meta.schema import Chain
from snapshotter.model import Kind, SnapshotId
from snapshotter.overlay.features import NO_FEATURES, Feature


@dataclass(frozen=True, slots=True)
class Target:
    """An active snapshot or a view, as far as mounting it goes."""

    id: SnapshotId
    key: str
    kind: Kind
    chain: Chain
    features: Feature = NO_FEATURES
    """What its own upper needs."""
    materialized: bool = False
    """The daemon mounts it. Decided when it is prepared, and so for good."""

    @property
    def writable(self) -> bool:
        return self.kind is Kind.ACTIVE

    @property
    def is_extraction(self) -> bool:
        """Whether containerd prepares this snapshot to unpack a layer into it.

        Told by the last component of the key (containerd's UnpackKeyFormat, "extract-<unique> <chain id>",
        behind its namespace and a number), never by labels: the author of a pod can set those.
        """
        return self.writable and self.key.rsplit("/", 1)[-1].startswith("extract-")
