"""Everything that fsck.overlay can find. The table in docs/fsck.overlay.md is made from this one."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from snapshotter.fsck_overlay.layers import Place


class Consent(enum.Enum):
    """Whom a repair asks."""

    SAFE = "-p"
    """Nobody: it takes nothing away that anybody could see or need."""
    ASK = "-y"
    """The user: it decides between two readings, or changes what the overlay shows."""
    NONE = "no"
    """It cannot be mended from here."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One row of the table."""

    id: str
    consent: Consent
    """At most: a finding in a layer that cannot be changed is never mended."""
    means: str
    mends: str


_KINDS = (
    Kind(
        "lower-replaced",
        Consent.NONE,
        "this is not the lower that the upper was made on: the stored file handles lead elsewhere",
        "nothing is offered: every other finding would come from this one. Mount with the right lower",
    ),
    Kind(
        "whiteout-orphan",
        Consent.SAFE,
        "a whiteout hides nothing: no lower layer has the name, or the directory is merged with none",
        "removes the whiteout",
    ),
    Kind(
        "whiteout-unmarked",
        Consent.SAFE,
        'a whiteout of the attribute kind is in a directory without opaque="x", so readdir shows it',
        "marks the directory",
    ),
    Kind(
        "redirect-dangling",
        Consent.SAFE,
        "a redirect is malformed, or leads to no directory in any lower layer",
        "removes the redirect",
    ),
    Kind(
        "redirect-dangling-merge",
        Consent.ASK,
        "the same, and a lower layer has a directory of the name that it would be merged with without its redirect",
        "removes the redirect and makes the directory opaque, so that it shows what it shows now",
    ),
    Kind(
        "redirect-uncovered",
        Consent.SAFE,
        "the directory that a redirect of the upper leads to also shows at its old place",
        "adds the whiteout that a rename leaves there",
    ),
    Kind(
        "redirect-duplicate",
        Consent.ASK,
        "two directories are merged with the same directory of a lower layer",
        "removes this redirect, and makes the directory opaque if a lower layer has one of its name",
    ),
    Kind(
        "impure-missing",
        Consent.SAFE,
        "a directory holds something that was copied up, or a merged directory, and is not marked as impure",
        "marks it",
    ),
    Kind(
        "origin-invalid",
        Consent.SAFE,
        "an origin is not a file handle of overlayfs",
        'empties it, which says "copied up, origin unknown"',
    ),
    Kind(
        "origin-type",
        Consent.ASK,
        "an origin leads to an inode of another type, so that the kernel refuses the file (EIO)",
        'empties it, which says "copied up, origin unknown"',
    ),
    Kind(
        "origin-directory",
        Consent.ASK,
        "with nfs_export: the origin of a merged directory is another directory, so that the kernel does not merge it",
        "writes the handle of the directory that it is merged with",
    ),
    Kind(
        "metacopy-value",
        Consent.ASK,
        "the value of a metacopy attribute is malformed, so that the kernel refuses the file (EIO)",
        "empties it, which means no digest",
    ),
    Kind(
        "metacopy-no-data",
        Consent.ASK,
        "a file has only metadata, and no layer below has its data",
        "moves the file to lost+found in the work directory",
    ),
    Kind(
        "metacopy-size",
        Consent.NONE,
        "a file has only metadata, and its data below has another size: the lower layer was changed",
        "nothing: only the layer that it was made on has its data",
    ),
    Kind(
        "uuid-size",
        Consent.ASK,
        "the overlay's own UUID on the root of the upper has not 16 bytes",
        "removes it; the next mount makes another one",
    ),
    Kind(
        "index-foreign",
        Consent.ASK,
        "the index belongs to another upper, so that index=on refuses the mount (ESTALE)",
        "moves the index to lost+found in the work directory",
    ),
    Kind(
        "index-stray",
        Consent.SAFE,
        "something in the index is no entry of it, so that index=on refuses the mount",
        "moves it to lost+found in the work directory",
    ),
    Kind(
        "index-origin",
        Consent.SAFE,
        "a copied-up hard link has no origin, or not the one that its index entry is named after: the kernel refuses "
        "the mount, or drops the entry and with it the link between the names",
        "writes the origin that the entry is named after",
    ),
    Kind(
        "index-stale",
        Consent.ASK,
        "an index entry is for a file that no lower layer has",
        "moves it to lost+found in the work directory",
    ),
    Kind(
        "index-type",
        Consent.ASK,
        "an index entry is for a lower file of another type, so that the kernel refuses it (EIO)",
        "moves it to lost+found in the work directory",
    ),
    Kind(
        "index-whiteout",
        Consent.SAFE,
        "the index says that a file or directory was removed (nfs_export), and it shows: the kernel refuses it (EIO)",
        "removes the index's whiteout",
    ),
    Kind(
        "index-nlink",
        Consent.SAFE,
        "the link count of a copied-up hard link is malformed, missing or impossible",
        "counts the names and writes it",
    ),
    Kind(
        "index-directory",
        Consent.SAFE,
        "an index entry of a directory (nfs_export) does not lead to the directory of the upper that it is for",
        "lets it lead there, or moves it to lost+found in the work directory when there is none",
    ),
)
KINDS = {kind.id: kind for kind in _KINDS}


@dataclass(frozen=True, slots=True)
class DropAttribute:
    place: Place
    name: str
    """Without overlay's prefix."""


@dataclass(frozen=True, slots=True)
class SetAttribute:
    place: Place
    name: str
    value: bytes


@dataclass(frozen=True, slots=True)
class RemoveWhiteout:
    place: Place


@dataclass(frozen=True, slots=True)
class AddWhiteout:
    place: Place
    parents: tuple[Place, ...]
    """What shows at each directory above it, outermost first: made in the layer where it has none."""


@dataclass(frozen=True, slots=True)
class SetAside:
    """Moves to lost+found in the work directory."""

    place: Place
    why: str


Step = DropAttribute | SetAttribute | RemoveWhiteout | AddWhiteout | SetAside


@dataclass(frozen=True, slots=True)
class Finding:
    kind: Kind
    place: Place
    detail: str
    steps: tuple[Step, ...] = ()


def finding(kind_id: str, place: Place, detail: str, *steps: Step) -> Finding:
    """`detail` goes on where the kind's meaning ends."""
    return Finding(KINDS[kind_id], place, detail, steps)


def table() -> str:
    """The rows for docs/fsck.overlay.md."""
    rows = ["| id | what it means | repair | with |", "|---|---|---|---|"]
    rows += [f"| `{kind.id}` | {kind.means} | {kind.mends} | {kind.consent.value} |" for kind in _KINDS]
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(table(), end="")
