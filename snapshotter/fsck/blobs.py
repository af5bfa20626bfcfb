"""The archives of images as a source of contents (heal.py): of the layers that use an object, those that containerd
still has are read, on all CPUs, once for all objects that are asked for.

    <root>/spool/fsck.blobs/<archive>/<ref>    what was found, until the end of the repair
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from snapshotter import failpoint
from snapshotter.durable import remove_tree
from snapshotter.fsck import archives
from snapshotter.fsck.archives import Searched
from snapshotter.fsck.contentstore import ContentStore
from snapshotter.fsck.heal import Lost, Source
from snapshotter.meta.schema import Record
from snapshotter.root import Root
from snapshotter.workers.pool import Workers

_PLACE = "fsck.blobs"
_MANY_REASONS = 3


class Blobs(Source):
    """Of one repair."""

    def __init__(self, store: ContentStore, root: Root, workers: Workers) -> None:
        self._store = store
        self._root = root
        self._workers = workers
        self._expected: dict[str, Sequence[Record]] = {}
        self._found: dict[str, Path] = {}
        self._reasons: dict[str, list[str]] = {}

    def expect(self, users: Mapping[Lost, Sequence[Record]]) -> None:
        self._expected.update((lost.ref, layers) for lost, layers in users.items() if lost.ref not in self._found)

    def candidates(self, lost: Lost) -> Iterator[Path]:
        if lost.ref in self._expected:
            self._search()
        if lost.ref in self._found:
            yield self._found[lost.ref]

    def why_not(self, lost: Lost) -> str:
        reasons = self._reasons.get(lost.ref, [])
        more = f"; and {len(reasons) - _MANY_REASONS} more" if len(reasons) > _MANY_REASONS else ""
        return "; ".join(reasons[:_MANY_REASONS]) + more

    def _search(self) -> None:
        """For all that is expected. An object that many layers use is looked for in one archive after the other, and
        first in those that may have much of the rest, too."""
        expected, self._expected = self._expected, {}
        wanted = {ref: digests for ref, layers in expected.items() if (digests := self._archives_of(ref, layers))}
        while wanted:
            count = Counter(digest for digests in wanted.values() for digest in digests)
            batch = {max(digests, key=lambda digest: (count[digest], digest)) for digests in wanted.values()}
            jobs = {digest: frozenset(ref for ref in wanted if digest in wanted[ref]) for digest in sorted(batch)}
            with ThreadPoolExecutor(self._workers.cpus, "fsck") as pool:
                results = zip(jobs.items(), pool.map(self._look_into, jobs.keys(), jobs.values()), strict=True)
                for (digest, refs), searched in results:
                    for ref in refs & searched.refs:
                        self._found[ref] = self._place(digest) / ref
                    for ref in refs - searched.refs:
                        wanted[ref].remove(digest)
                        self._reasons[ref].append(f"layer blob {digest} {searched.trouble or 'does not hold it'}")
            wanted = {ref: digests for ref, digests in wanted.items() if digests and ref not in self._found}
        failpoint.hit("fsck.step")

    def _archives_of(self, ref: str, layers: Sequence[Record]) -> list[str]:
        """Those that are there; why others are not is written down."""
        reasons = self._reasons[ref] = []
        present: list[str] = []
        for layer in layers:
            digests = self._store.archives(layer)
            here = [digest for digest in digests if self._store.path(digest)]
            present += here
            if not digests:
                reasons.append(f"no image in the content store has the layer that snapshot {layer.id} is")
            elif not here:
                reasons.append(f"layer blob {digests[0]} of snapshot {layer.id} is not in the content store")
        return list(dict.fromkeys(present))

    def _look_into(self, digest: str, refs: frozenset[str]) -> Searched:
        archive, place = self._store.path(digest), self._place(digest)
        if archive is None:
            return Searched(frozenset(), "is gone")
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            return self._workers.call(archives.search, archive, digest, refs, self._root.objects, place)
        except OSError as error:
            return Searched(frozenset(), f"could not be searched ({error.strerror or error})")

    def _place(self, digest: str) -> Path:
        return self._root.spool / _PLACE / digest.partition(":")[2]


@contextmanager
def opened(directory: Path, root: Root, workers: Workers) -> Iterator[Blobs]:
    """Raises InvalidArgument if the directory is no content store."""
    store = ContentStore(directory)
    try:
        yield Blobs(store, root, workers)
    finally:
        remove_tree(root.spool, _PLACE, lambda: False)
