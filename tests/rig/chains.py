"""The chains of a daemon's store as directories, and what containerd's images say of their hard links.

with Client(address) as client:
    store = stored(client, root)
    store.layers["base"]                    # the trees of that snapshot, its own first
alias_findings(client, root, content)       # what aliases.py has against any of them
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snapshotter.client import Client
from snapshotter.errors import NotFound
from snapshotter.model import Kind, Mount
from tests.rig.aliases import NO_LINKS, Groups, aliases, links_of_tar, links_of_tree, shared

BLOBS = Path("io.containerd.content.v1.content/blobs/sha256")
"""Below containerd's root: where it keeps the archives of its images' layers."""


@dataclass(frozen=True, slots=True)
class Store:
    """What `stored` found."""

    layers: Mapping[str, Sequence[Path]]
    """Of each committed snapshot: the trees of its chain, its own first."""
    actives: Mapping[Path, Sequence[Path]]
    """The upper of each active snapshot, and the trees of its chain."""
    names: Mapping[Path, str]
    """The committed snapshot to which a tree belongs."""


def stored(client: Client, root: Path) -> Store:
    """All chains. The API does not say where a layer is: the answer to an extraction on top of it does."""
    infos = list(client.list())
    layers: dict[str, list[Path]] = {"": []}
    numbers = itertools.count()
    for info in infos:
        if info.kind is Kind.COMMITTED:
            key = f"extract-{next(numbers)} where is it"
            (mount,) = client.prepare(key, info.name)
            with contextlib.suppress(NotFound):  # containerd's collection removes what it does not know
                client.remove(key)
            layers[info.name] = _lowers(mount)
    actives = {
        _upper(client.mounts(info.name), root): layers[info.parent] for info in infos if info.kind is Kind.ACTIVE
    }
    del layers[""]
    return Store(layers, actives, {trees[0]: name for name, trees in layers.items()})


def alias_findings(client: Client, root: Path, archived: Mapping[str, Groups]) -> list[str]:
    """One line for each alias in the store, empty when all is well.

    `archived` is what images hard-linked, by the last components of their snapshots' names. A layer that is not there
    may link what the layers below it link, and nothing else.
    """
    store = stored(client, root)
    known = {tree: archived.get(name.rpartition("/")[2]) for tree, name in store.names.items()}
    linked: dict[Path, Groups] = {}
    for trees in store.layers.values():
        inherited = frozenset[frozenset[bytes]]().union(*(known[tree] or NO_LINKS for tree in trees))
        found = known[trees[0]]
        linked[trees[0]] = inherited if found is None else found
    # A container links in its own tree what it likes.
    linked |= {upper: links_of_tree(upper) for upper in store.actives}
    chains = [*store.layers.values(), *([upper, *trees] for upper, trees in store.actives.items())]
    objects = [root / "objects"] if (root / "objects").is_dir() else []
    return aliases(chains, linked) + shared(store.actives, [*objects, *store.names])


def image_links(content: Path) -> dict[str, Groups]:
    """The hard links of every layer of every image that is in containerd's store, by the snapshot's name."""
    blobs = content / BLOBS
    manifests = [found for blob in sorted(blobs.iterdir()) for found in _json(blob) if "layers" in found]
    links: dict[str, Groups] = {}
    for manifest in manifests:
        config = blobs / _hex(manifest["config"]["digest"])
        archives = [blobs / _hex(layer["digest"]) for layer in manifest["layers"]]
        if all(blob.exists() for blob in [config, *archives]):
            diff_ids = json.loads(config.read_bytes())["rootfs"]["diff_ids"]
            links |= zip(chain_ids(diff_ids), map(archive_links, archives), strict=True)
    return links


def chain_ids(diff_ids: Sequence[str]) -> list[str]:
    """The names of the layers' snapshots, the lowest first (image-spec, config.md: Layer ChainID)."""
    return list(
        itertools.accumulate(
            diff_ids, lambda chain, diff_id: "sha256:" + hashlib.sha256(f"{chain} {diff_id}".encode()).hexdigest()
        )
    )


def archive_links(archive: Path) -> Groups:
    """The hard links of one layer. Read once for all the tests of a run: an archive does not change."""
    status = archive.stat()
    return _links(archive, status.st_ino, status.st_mtime_ns)


@functools.cache
def _links(archive: Path, _inode: int, _mtime_ns: int) -> Groups:
    with archive.open("rb") as stream:
        return links_of_tar(stream)


def _json(blob: Path) -> Iterator[dict[str, Any]]:
    """The object in a blob; nothing if it is something else."""
    with blob.open("rb") as stream:
        if stream.read(1) == b"{":
            stream.seek(0)
            yield json.load(stream)


def _hex(digest: str) -> str:
    return digest.partition(":")[2]


def _lowers(mount: Mount) -> list[Path]:
    """Of an overlay; those that hold data only are no layers."""
    options = dict(option.partition("=")[::2] for option in mount.options)
    return [Path(lower) for lower in options["lowerdir"].partition("::")[0].split(":")]


def _upper(mounts: Sequence[Mount], root: Path) -> Path:
    (mount,) = mounts
    options = dict(option.partition("=")[::2] for option in mount.options)
    if "upperdir" in options:
        return Path(options["upperdir"])
    source = Path(mount.source)
    return root / "snapshots" / source.name / "fs" if source.parent == root / "mounts" else source
