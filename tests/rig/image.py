"""Makes a real image of several layers, with everything in it that a snapshotter can get wrong.

The first layer is made of Debian packages (a shell and tools that run); the others add, change, hide
and delete files. The image is an OCI archive (image-spec, image-layout.md and layer.md) of PAX tar files,
with times in nanoseconds and xattrs, and the same input gives the same bytes.

    recipe = Recipe("example.test/first:latest")
    image = build_image(recipe, directory / "first.tar")
    merged(image.layers)[b"srv/changed"].content      # what a container must see

A second image of the same packages at other times: Recipe("…", shift_ns=5_000_000_000).
"""

from __future__ import annotations

import enum
import gzip
import hashlib
import io
import json
import platform
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from backports import zstd

from tests.rig import packages

ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
"""This machine's, as OCI and Go name it."""

EPOCH_NS = 1_700_000_000_000_000_000
"""The time of files that have none of their own; an image's layers are deterministic."""

WHITEOUT = b".wh."
OPAQUE = b".wh..wh..opq"


class Packing(enum.Enum):
    """How the blob of a layer is compressed. The values are what its media type ends with."""

    PLAIN = ""
    GZIP = "+gzip"
    ZSTD = "+zstd"


class EntryKind(enum.Enum):
    """What one entry of a layer does. The values are tarfile's types; the last two are plain files there."""

    FILE = tarfile.REGTYPE
    DIRECTORY = tarfile.DIRTYPE
    SYMLINK = tarfile.SYMTYPE
    HARD_LINK = tarfile.LNKTYPE
    FIFO = tarfile.FIFOTYPE
    WHITEOUT = b"whiteout"
    """Deletes `path` of the layers below."""
    OPAQUE = b"opaque"
    """Hides what the layers below have in the directory `path`."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a layer. `path` and `target` are bytes: names need not be UTF-8."""

    path: bytes
    """Without a leading slash."""
    kind: EntryKind = EntryKind.FILE
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime_ns: int = EPOCH_NS
    content: bytes = b""
    target: bytes = b""
    """Where a symbolic link points; for a hard link, the path of the first name."""
    xattrs: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Layer:
    """Entries in the order of the archive."""

    comment: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to build. Two recipes that differ only in `shift_ns` differ only in the files' times."""

    reference: str
    shift_ns: int = 0
    """Added to every mtime."""
    above: Sequence[Layer] = ()
    """More layers, above the usual ones."""


@dataclass(frozen=True, slots=True)
class Image:
    """A built image: the archive for `ctr image import`, and what is in it."""

    reference: str
    archive: Path
    layers: tuple[Layer, ...]
    diff_ids: tuple[str, ...]


def build_image(recipe: Recipe, archive: Path) -> Image:
    """Writes the OCI archive. Downloads packages that are not cached; raises RigError where it cannot."""
    layers = with_parents([base_layer(), *feature_layers(), *recipe.above], recipe.shift_ns)
    blobs = [_layer_tar(layer) for layer in layers]
    diff_ids = tuple(_digest(blob) for blob in blobs)
    _write_archive(archive, recipe.reference, [layer.comment for layer in layers], blobs)
    return Image(recipe.reference, archive, tuple(layers), diff_ids)


def build_packed(reference: str, layers: Sequence[Layer], packings: Sequence[Packing], archive: Path) -> Image:
    """Writes the OCI archive of an image of just these layers, each packed in a way of its own."""
    layers = with_parents(layers)
    blobs = [_layer_tar(layer) for layer in layers]
    _write_archive(archive, reference, [layer.comment for layer in layers], blobs, packings)
    return Image(reference, archive, tuple(layers), tuple(_digest(blob) for blob in blobs))


def write_with_layer(image: Image, reference: str, layer_tar: bytes, archive: Path) -> None:
    """Writes the OCI archive of another image: the layers of `image` and, on top of them, one that is a tar already."""
    blobs = [*(_layer_tar(layer) for layer in image.layers), layer_tar]
    _write_archive(archive, reference, [*(layer.comment for layer in image.layers), "added"], blobs)


def merged(layers: Iterable[Layer]) -> dict[bytes, Entry]:
    """What a container sees: path to entry. A hard link has the attributes of its first name, and the
    first name's path in `target`."""
    seen: dict[bytes, Entry] = {}
    for layer in layers:
        for entry in layer.entries:
            _hide(seen, entry)
        for entry in layer.entries:
            if entry.kind is EntryKind.HARD_LINK:
                seen[entry.path] = replace(
                    seen[entry.target], path=entry.path, kind=EntryKind.HARD_LINK, target=entry.target
                )
            elif entry.kind not in (EntryKind.WHITEOUT, EntryKind.OPAQUE):
                seen[entry.path] = entry
    return seen


def with_parents(layers: Iterable[Layer], shift_ns: int = 0) -> list[Layer]:
    """The layers with their times shifted, and each with an entry for every directory that it changes: an
    unpacker touches directories in which it makes something, and only an entry sets the time back."""
    result: list[Layer] = []
    below: dict[bytes, Entry] = {}
    for layer in layers:
        own = {entry.path: entry for entry in layer.entries if entry.kind is EntryKind.DIRECTORY}
        entries: list[Entry] = []
        done: set[bytes] = set()
        for entry in layer.entries:
            for parent in _parents(entry.path) + ([entry.path] if entry.kind is EntryKind.OPAQUE else []):
                if parent not in done:
                    entries.append(own.get(parent) or below.get(parent) or _directory(parent))
                    done.add(parent)
            if entry.path not in done or entry.kind is not EntryKind.DIRECTORY:
                entries.append(entry)
                done.add(entry.path)
        # Directories taken from below have their time shifted already.
        shifted = tuple(
            entry if below.get(entry.path) is entry else replace(entry, mtime_ns=entry.mtime_ns + shift_ns)
            for entry in entries
        )
        result.append(Layer(layer.comment, shifted))
        below = merged(result)
    return result


# -- what the layers hold


def base_layer() -> Layer:
    """The packages, on a merged /usr as every distribution has it now, whatever each package still says."""
    entries = {
        name: Entry(name, EntryKind.SYMLINK, 0o777, target=b"usr/" + name)
        for name in (b"bin", b"lib", b"lib64", b"sbin")
    }
    for name, mode in {b"dev": 0o755, b"proc": 0o755, b"sys": 0o755, b"run": 0o755, b"tmp": 0o1777,
                       b"root": 0o700, b"usr": 0o755, b"usr/lib64": 0o755}.items():  # fmt: skip
        entries[name] = _directory(name, mode)
    for deb in packages.packages():
        for member, content in packages.members(deb):
            entry = _package_entry(member, content)
            if entry.path and not _is_left_out(entry.path) and entry.path not in entries:
                entries[entry.path] = entry
    entries.setdefault(b"usr/bin/sh", Entry(b"usr/bin/sh", EntryKind.SYMLINK, 0o777, target=b"dash"))
    return Layer("packages", tuple(_hard_links_last(entries.values())))


def feature_layers() -> list[Layer]:
    """Two layers to be changed or looked at, and one that changes them."""
    return [
        Layer(
            "files to hide and to change",
            (
                _directory(b"srv", 0o751, uid=7, xattrs={"user.place": b"a directory"}),
                Entry(b"srv/deleted", content=b"a later layer deletes this file\n"),
                Entry(b"srv/opaque/hidden", content=b"a later layer makes the directory opaque\n"),
                Entry(b"srv/opaque/deep/hidden", content=b"hidden too\n"),
                Entry(b"srv/gone/file", content=b"a later layer deletes the directory\n"),
                Entry(b"srv/changed", content=b"first version\n"),
                Entry(b"srv/file-then-directory", content=b"a later layer has a directory here\n"),
                Entry(b"srv/link-then-file", EntryKind.SYMLINK, 0o777, target=b"changed"),
                Entry(b"srv/twice", content=_bulk(300_000)),
            ),
        ),
        Layer(
            "attributes",
            (
                Entry(b"srv/first-name", content=b"one file, two names\n", mode=0o640, uid=1000, gid=100),
                Entry(b"srv/second-name", EntryKind.HARD_LINK, target=b"srv/first-name"),
                Entry(b"srv/set-user-id", content=b"#!/bin/sh\nid -u\n", mode=0o4755),
                Entry(b"srv/set-group-id", content=b"#!/bin/sh\nid -g\n", mode=0o2755, gid=50),
                Entry(
                    b"srv/capability",
                    content=b"#!/bin/sh\n",
                    mode=0o755,
                    xattrs={"security.capability": CAP_NET_RAW},
                ),
                Entry(b"srv/user-xattr", xattrs={"user.origin": b"layer two", "user.bytes": b"\x00\xff=\n"}),
                Entry(b"srv/nanosecond", mtime_ns=1_600_000_000_123_456_789),
                Entry(b"srv/not-utf8-\xff\xfe", content=b"a name is bytes\n"),
                Entry("srv/größe-文".encode(), content=b"UTF-8\n"),
                Entry(b"srv/" + b"long" * 60, content=b"a name too long for plain tar\n"),
                Entry(b"srv/owner", uid=3_000_000_000, gid=2_999_999_999),
                Entry(b"srv/empty"),
                Entry(b"srv/empty-directory", EntryKind.DIRECTORY, 0o700, mtime_ns=EPOCH_NS + 1),
                Entry(b"srv/dangling", EntryKind.SYMLINK, 0o777, target=b"/not/here", mtime_ns=EPOCH_NS + 2),
                Entry(b"srv/fifo", EntryKind.FIFO, 0o600),
                Entry(b"srv/same-content", content=_bulk(300_000), mtime_ns=EPOCH_NS + 3),
            ),
        ),
        Layer(
            "whiteouts and changes",
            (
                Entry(b"srv/deleted", EntryKind.WHITEOUT),
                Entry(b"srv/gone", EntryKind.WHITEOUT),
                Entry(b"srv/opaque", EntryKind.OPAQUE),
                Entry(b"srv/opaque/shown", content=b"the only file here\n"),
                Entry(b"srv/changed", content=b"second version\n", mode=0o600),
                Entry(b"srv/file-then-directory", EntryKind.DIRECTORY, 0o755),
                Entry(b"srv/file-then-directory/inside", content=b"inside\n"),
                Entry(b"srv/link-then-file", content=b"no link any more\n"),
                Entry(b"srv/twice", content=_bulk(300_000), mtime_ns=EPOCH_NS + 4),
            ),
        ),
    ]


CAP_NET_RAW = bytes.fromhex("0100000200200000000000000000000000000000")
"""cap_net_raw=ep as the kernel keeps it: struct vfs_cap_data, version 2 (<linux/capability.h>)."""


def _bulk(size: int) -> bytes:
    """Bytes that do not repeat within a block, the same on every call."""
    return hashlib.shake_128(b"dedup-snapshotter").digest(size)


def _directory(path: bytes, mode: int = 0o755, uid: int = 0, xattrs: Mapping[str, bytes] | None = None) -> Entry:
    return Entry(path, EntryKind.DIRECTORY, mode, uid, xattrs=xattrs or {})


def _package_entry(member: tarfile.TarInfo, content: bytes) -> Entry:
    kind = EntryKind(member.type)
    target = member.linkname.encode("utf-8", "surrogateescape")
    return Entry(
        _merge_usr(member.name.encode("utf-8", "surrogateescape")),
        kind, member.mode, member.uid, member.gid, int(member.mtime) * 10**9, content,
        _merge_usr(target) if kind is EntryKind.HARD_LINK else target,
    )  # fmt: skip


def _merge_usr(path: bytes) -> bytes:
    path = path.removeprefix(b"./").strip(b"/")
    if path == b".":
        return b""
    first = path.partition(b"/")[0]
    return b"usr/" + path if first in (b"bin", b"lib", b"lib64", b"sbin") else path


def _is_left_out(path: bytes) -> bool:
    """Documentation, translations and character sets: nothing that a program needs here."""
    return path.startswith((b"usr/share/", b"var/")) or b"/gconv/" in path


def _hard_links_last(entries: Iterable[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda entry: (entry.kind is EntryKind.HARD_LINK, entry.path))


def _parents(path: bytes) -> list[bytes]:
    parts = path.split(b"/")
    return [b"/".join(parts[:count]) for count in range(1, len(parts))]


def _hide(seen: dict[bytes, Entry], entry: Entry) -> None:
    """Takes out of `seen` what this entry of a layer above deletes, hides or replaces."""
    if entry.kind is not EntryKind.DIRECTORY:
        for path in [path for path in seen if path.startswith(entry.path + b"/")]:
            del seen[path]
    if entry.kind is not EntryKind.OPAQUE:
        seen.pop(entry.path, None)


# -- the formats


def _layer_tar(layer: Layer) -> bytes:
    by_path = {entry.path: entry for entry in layer.entries}
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, encoding="utf-8", errors="surrogateescape"
    ) as archive:
        for entry in layer.entries:
            # A further name repeats the attributes of the first: containerd sets them again.
            first = by_path[entry.target] if entry.kind is EntryKind.HARD_LINK else entry
            named = replace(first, path=entry.path, kind=entry.kind, target=entry.target)
            member, content = _tar_member(named)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def _tar_member(entry: Entry) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(_text(_archive_name(entry)))
    marks = (EntryKind.WHITEOUT, EntryKind.OPAQUE)
    member.type = tarfile.REGTYPE if entry.kind in marks else entry.kind.value
    member.mode, member.uid, member.gid = entry.mode, entry.uid, entry.gid
    member.linkname = _text(entry.target)
    member.mtime = entry.mtime_ns // 10**9
    member.pax_headers = {
        "mtime": _pax_time(entry.mtime_ns),
        **{f"SCHILY.xattr.{name}": _text(value) for name, value in sorted(entry.xattrs.items())},
    }
    content = entry.content if entry.kind is EntryKind.FILE else b""
    member.size = len(content)
    return member, content


def _archive_name(entry: Entry) -> bytes:
    directory, slash, name = entry.path.rpartition(b"/")
    if entry.kind is EntryKind.WHITEOUT:
        return directory + slash + WHITEOUT + name
    if entry.kind is EntryKind.OPAQUE:
        return entry.path + b"/" + OPAQUE
    return entry.path


def _pax_time(time_ns: int) -> str:
    """Seconds with nine decimals. Never negative: containerd takes what is before 1970 for 1970."""
    return f"{time_ns // 10**9}.{time_ns % 10**9:09d}"


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _digest(blob: bytes) -> str:
    return "sha256:" + hashlib.sha256(blob).hexdigest()


def pack(tar: bytes, packing: Packing) -> bytes:
    """The blob of a layer."""
    if packing is Packing.GZIP:
        return gzip.compress(tar, 1, mtime=0)
    return zstd.compress(tar, 1) if packing is Packing.ZSTD else tar


def _write_archive(
    path: Path, reference: str, comments: Sequence[str], layers: Sequence[bytes], packings: Sequence[Packing] = ()
) -> None:
    """`packings`: one a layer; without them, layers stay as they are."""
    hows = packings or [Packing.PLAIN] * len(layers)
    packed = [(pack(layer, how), how) for layer, how in zip(layers, hows, strict=True)]
    config = _json(
        {
            "architecture": ARCHITECTURE,
            "os": "linux",
            "config": {"Env": ["PATH=/usr/sbin:/usr/bin", "LC_ALL=C"], "Cmd": ["/bin/sh"]},
            "rootfs": {"type": "layers", "diff_ids": [_digest(layer) for layer in layers]},
            "history": [{"created_by": comment} for comment in comments],
        }
    )
    manifest = _json(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": _descriptor("application/vnd.oci.image.config.v1+json", config),
            "layers": [_descriptor("application/vnd.oci.image.layer.v1.tar" + how.value, blob) for blob, how in packed],
        }
    )
    names = {
        # The first is containerd's own, which takes the whole reference.
        "io.containerd.image.name": reference,
        "org.opencontainers.image.ref.name": reference.rpartition(":")[2],
    }
    entry = {**_descriptor("application/vnd.oci.image.manifest.v1+json", manifest), "annotations": names}
    files = {"oci-layout": _json({"imageLayoutVersion": "1.0.0"})}
    for blob in [config, manifest, *(blob for blob, _ in packed)]:
        files["blobs/" + _digest(blob).replace(":", "/")] = blob
    files["index.json"] = _json({"schemaVersion": 2, "manifests": [entry]})
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in _sorted(files):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def _sorted(files: Mapping[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """oci-layout first, as readers that look at the first name expect."""
    yield from sorted(files.items(), key=lambda item: (item[0] != "oci-layout", item[0]))


def _descriptor(media_type: str, blob: bytes) -> dict[str, object]:
    return {"mediaType": media_type, "digest": _digest(blob), "size": len(blob)}


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True).encode()
