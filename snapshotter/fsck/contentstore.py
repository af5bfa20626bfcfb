"""Containerd's content store as a directory: which blob is the layer of a snapshot.

    blobs/<algorithm>/<hash>    archives of layers, manifests and configurations of images; no name says which is what

containerd calls the snapshot of an image's layer `<namespace>/<number>/<chain ID>`; the chain ID is made of the diff
IDs of the layer and of those below it (image-spec, config.md: Layer ChainID). An image's configuration has the diff
IDs, and its manifest the archives in the same order. Which files are JSON shows in their size and their first byte. An
OCI image layout that is unpacked is a content store, too.

What is written here is the images': it is checked before anything is made of it, and the archive that it leads to is
only a place to look for a content whose hash is known.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from snapshotter.errors import InvalidArgument
from snapshotter.meta.schema import Record

_CONTENT = "io.containerd.content.v1.content"
_CHAIN_ID = re.compile(r"(?:.*/)?(sha256:[0-9a-f]{64})", re.DOTALL)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")
_ALGORITHMS = ("sha256", "sha512")
_LAYER_DIGEST = "containerd.io/snapshot/cri.layer-digest"
"""The label that says which archive a snapshot was made of, where containerd sends any: CRI does, unless
disable_snapshot_annotations is set (pkg/snapshotters/annotations.go)."""
_MAX_JSON_BYTES = 8 << 20
"""The largest manifest or configuration that containerd reads (core/images/image.go)."""


class ContentStore:
    """One content store. Containerd may be running: a blob never changes once it is there."""

    def __init__(self, directory: Path) -> None:
        """`directory`: the store, the directory `blobs` in it, or containerd's root. Raises InvalidArgument."""
        for blobs in (directory / "blobs", directory, directory / _CONTENT / "blobs"):
            if any((blobs / algorithm).is_dir() for algorithm in _ALGORITHMS):
                self._blobs = blobs
                return
        raise InvalidArgument(
            f"{directory} is no content store: name containerd's, which usually is /var/lib/containerd/{_CONTENT}"
        )

    def path(self, digest: str) -> Path | None:
        """Of a blob; None if it is not here."""
        path = self._blobs / digest.replace(":", "/")
        return path if path.is_file() else None

    def archives(self, record: Record) -> list[str]:
        """Digests of the archives of a layer: as a rule one, several if images have it in several forms, and none if
        nothing here says which. They need not be here. Raises OSError."""
        found = [record.labels.get(_LAYER_DIGEST, "")]
        if match := _CHAIN_ID.fullmatch(record.name):
            found += self._by_chain_id.get(match[1], ())
        return list(dict.fromkeys(digest for digest in found if _DIGEST.fullmatch(digest)))

    @cached_property
    def _by_chain_id(self) -> Mapping[str, Sequence[str]]:
        """The archives of each layer of each image."""
        diff_ids: dict[str, list[str]] = {}
        manifests: list[tuple[str, list[str]]] = []
        for digest, value in self._objects():
            if ids := _diff_ids(value):
                diff_ids[digest] = ids
            elif manifest := _manifest(value):
                manifests.append(manifest)
        found: dict[str, list[str]] = {}
        for config, layers in manifests:
            chain = diff_ids.get(config, ())
            if len(chain) == len(layers):
                for chain_id, layer in zip(chain_ids(chain), layers, strict=True):
                    found.setdefault(chain_id, []).append(layer)
        for chain in diff_ids.values():  # an archive that is not compressed has its diff ID as its digest
            for chain_id, diff_id in zip(chain_ids(chain), chain, strict=True):
                found.setdefault(chain_id, []).append(diff_id)
        return found

    def _objects(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every blob that is a JSON object, and undamaged."""
        for algorithm in _ALGORITHMS:
            try:
                entries = os.scandir(self._blobs / algorithm)
            except FileNotFoundError:
                continue
            with entries:
                for entry in entries:
                    digest = f"{algorithm}:{entry.name}"
                    if _DIGEST.fullmatch(digest) and entry.is_file(follow_symlinks=False):
                        value = _read_object(Path(entry.path), algorithm, entry.name)
                        if isinstance(value, dict):
                            yield digest, value


def chain_ids(diff_ids: Sequence[str]) -> Iterator[str]:
    """Of the layer of each diff ID, the lowest first."""
    chain_id = ""
    for diff_id in diff_ids:
        chain_id = "sha256:" + hashlib.sha256(f"{chain_id} {diff_id}".encode()).hexdigest() if chain_id else diff_id
        yield chain_id


def _read_object(path: Path, algorithm: str, name: str) -> Any:
    """The value of a JSON object; None of anything else."""
    try:
        with path.open("rb") as stream:
            if os.fstat(stream.fileno()).st_size > _MAX_JSON_BYTES or stream.read(16).lstrip()[:1] != b"{":
                return None
            stream.seek(0)
            raw = stream.read()
    except OSError:  # collected meanwhile, or unreadable: as good as not here
        return None
    if hashlib.new(algorithm, raw).hexdigest() != name:
        return None
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def _diff_ids(value: dict[str, Any]) -> list[str]:
    """Of an image's configuration; empty for anything else."""
    rootfs = value.get("rootfs")
    found = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not isinstance(found, list) or not all(isinstance(each, str) and _DIGEST.fullmatch(each) for each in found):
        return []
    return found


def _manifest(value: dict[str, Any]) -> tuple[str, list[str]] | None:
    """The digests of an image's configuration and of its layers; None for anything else."""
    config, layers = value.get("config"), value.get("layers")
    if not isinstance(layers, list):
        return None
    digests = [each.get("digest") if isinstance(each, dict) else None for each in (config, *layers)]
    found = [digest for digest in digests if isinstance(digest, str)]
    return (found[0], found[1:]) if len(found) == len(digests) else None
