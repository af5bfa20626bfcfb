"""What a check can find: one table of ids, and the values that a check yields.

Every finding says what it is about. What its id means, and what repair does, is the same for all findings of that id
and stands here only; the table in docs/fsck.md is generated from it (`python -m snapshotter.fsck.findings`).
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from snapshotter.model import SnapshotId

if TYPE_CHECKING:
    from snapshotter.fsck.fixes import Bench


class Severity(enum.Enum):
    ERROR = "error"
    """Something is wrong, or will be."""
    NOTE = "note"
    """Nothing is wrong: space that can be freed, or what the next start of the daemon finishes."""


class Kind(NamedTuple):
    """What all findings of one id have in common."""

    meaning: str
    repair: str
    """What repair does; begins with "nothing" where it does nothing."""
    severity: Severity = Severity.ERROR


_LEFT = "nothing: the next start of the daemon does that"
_PULL = "nothing: remove the snapshots that are named, and have containerd pull the image again"

KINDS: dict[str, Kind] = {
    # the metadata file
    "database-damaged": Kind(
        "the file of the metadata breaks a rule of LMDB",
        "writes the file anew, if every record can be read; the old one goes to lost+found",
    ),
    "database-unreadable": Kind(
        "the metadata cannot be read, so the snapshots cannot be checked",
        "nothing: restore the directory metadata, or empty the root to begin anew",
    ),
    # metadata by itself
    "record-damaged": Kind(
        "the record of a snapshot cannot be decoded; the daemon does not start with it",
        "writes it into a note and takes it out; the snapshot's directory goes to lost+found",
    ),
    "record-lost": Kind(
        "the metadata names a snapshot in one place and does not know it in another",
        "takes the rest of it out of the metadata; the snapshot's directory, if there is one, goes to lost+found",
    ),
    "name-twice": Kind("two snapshots have one name, and only one of them can be reached", _PULL),
    "key-index": Kind("a name leads to no snapshot, or to another one", "makes the index from the records"),
    "child-index": Kind(
        "the index of children disagrees with the records, so a parent could be removed too early, or never",
        "makes the index from the records",
    ),
    "chain-index": Kind(
        "the stored chain of a layer is not what its parents are, so snapshots on it are mounted wrong",
        "makes the chain from the records",
    ),
    "parent-missing": Kind(
        "the parent of a snapshot does not exist",
        "takes the parent that the index of children and the stored chain name, if they agree on one",
    ),
    "parent-not-committed": Kind(
        "the parent of a snapshot is no committed one",
        "takes the parent that the index of children and the stored chain name, if they agree on one",
    ),
    "cycle": Kind(
        "a snapshot is its own ancestor",
        "takes the parent that the index of children and the stored chain name, if they agree on one",
    ),
    "next-id": Kind(
        "the next id is one that a snapshot has or had, so that two would have one directory", "raises it"
    ),
    "sealing-lost": Kind(
        "a snapshot whose commit was interrupted does not say what it was before, so its commit cannot be finished",
        "puts a stand-in there, so that the next start of the daemon finishes the commit",
    ),
    "facts-damaged": Kind(
        "what is known of the sharing of a layer cannot be decoded", "takes it out; the daemon measures instead"
    ),
    "features": Kind(
        "a record says that a tree needs less of the kernel than it does, so a kernel without that would misread it",
        "adds what is missing",
    ),
    # metadata against the disk
    "tree-missing": Kind("a snapshot has no tree", _PULL),
    "work-missing": Kind(
        "an active snapshot has no work directory, so it cannot be mounted",
        "makes an empty one; hard links of the layers below that were changed under one name only fall apart",
    ),
    "left-behind": Kind("a directory that no snapshot needs, left by a kill, is still to be deleted", _LEFT,
                        Severity.NOTE),
    "sealing": Kind("the commit of a snapshot was interrupted and is still to be finished", _LEFT, Severity.NOTE),
    "half-sealed": Kind(
        "a layer counts as finished, and some names of a file are still to be exchanged",
        "exchanges them",
    ),
    "mount-unowned": Kind("something is mounted below mounts/ that belongs to no snapshot", "unmounts it"),
    "stray": Kind("something is in the root that does not belong there", "nothing: look at it, and move it",
                  Severity.NOTE),
    # objects and references
    "object-content": Kind(
        "the content of an object is not what its hash says: every file that uses it reads wrong",
        "makes it anew from an equal file elsewhere in the root, or in a layer blob (`--from-content`); the damaged "
        "one goes to lost+found",
    ),
    "object-mark": Kind(
        "an object does not carry the hash that its name begins with, so nothing more can be shared with it",
        "writes the hash, if the content is right",
    ),
    "object-missing": Kind(
        "the object of a file is gone: reading the file fails",
        "makes it anew from an equal file elsewhere in the root, or in a layer blob (`--from-content`)",
    ),
    "object-unlinked": Kind(
        "an object that a layer uses has lost its name in the store: reading the file fails", "gives it its name back"
    ),
    "reference-missing": Kind(
        "a layer uses an object without holding it, so that it would be deleted under the layer",
        "makes the layer hold it",
    ),
    "reference-foreign": Kind(
        "what a layer holds under the name of an object is another file",
        "makes the layer hold the object; the other file goes to lost+found",
    ),
    "reference-unused": Kind(
        "a layer holds an object that it does not use", "nothing: it goes with the layer", Severity.NOTE
    ),
    "object-unused": Kind("no layer uses an object", "nothing: `snapctl gc` deletes it", Severity.NOTE),
    "stub-size": Kind(
        "a file has another size than its object, so it is cut, or ends with zeros",
        "gives it the size of the object, if the object's content is right",
    ),
    "link-count": Kind(
        "a file of the store has more names than there are below the root: what is outside can change it; or fewer, "
        "which is an error of the filesystem",
        "nothing: find the name (`find -inum`) and remove it, or check the filesystem",
    ),
    "alias": Kind(
        "two paths of a chain are one file, and the image did not link them: who writes one changes both",
        "gives the upper layer a copy of its own",
    ),
    "upper-shared": Kind(
        "a writable file is also a file of a layer or an object: who writes it changes them",
        "gives the writable snapshot a copy of its own",
    ),
    # overlay attributes in layers
    "attribute-dead": Kind(
        "a layer has attributes that only the mount which made it had a use for", "removes them"
    ),
    "attribute-unknown": Kind(
        "a layer has an attribute that overlayfs would obey, and that no layer can have",
        "nothing: remove the snapshot, or the attribute if you know what it is",
    ),
    "redirect-missing": Kind(
        "a renamed directory of a layer stands for one that is not in the layers below",
        "removes the redirection, which the kernel follows to nothing, so that the directory shows what it shows now; "
        "notes it in lost+found",
    ),
    "redirect-twice": Kind("two directories of a layer stand for the same one of the layers below", _PULL),
    "metacopy-no-data": Kind(
        "a file of a layer has its content in a layer below, where it is not: reading it fails", _PULL
    ),
}  # fmt: skip


class Fix(Protocol):
    """A repair of one finding: small, durable, harmless to repeat (fixes.py). It pickles."""

    @property
    def touches(self) -> frozenset[SnapshotId]:
        """Snapshots whose mounts would see it: none of these may be in use."""
        ...

    def describe(self) -> str:
        """What it does, as an order: "link A to B"."""
        ...

    def apply(self, bench: Bench) -> None:
        """Does it. Raises OSError."""
        ...


@dataclass(frozen=True, slots=True)
class Finding:
    id: str
    subject: str
    """What it is about: the path below the root, or a snapshot with its name. May hold anything that a name may."""
    detail: str = ""
    snapshot: SnapshotId | None = None
    """The snapshot that it is about, if it is about one."""
    fix: Fix | None = field(default=None, compare=False)
    """What repair would do; None where it can do nothing."""

    @property
    def kind(self) -> Kind:
        return KINDS[self.id]

    @property
    def is_error(self) -> bool:
        return self.kind.severity is Severity.ERROR


class Progress(NamedTuple):
    """How far a check is."""

    stage: str
    done: int
    total: int


def table() -> Iterator[str]:
    """The ids as lines of Markdown."""
    yield "| id | severity | what it means | what repair does |"
    yield "|---|---|---|---|"
    for name, kind in KINDS.items():
        yield f"| `{name}` | {kind.severity.value} | {kind.meaning} | {kind.repair} |"


if __name__ == "__main__":
    print("\n".join(table()))
