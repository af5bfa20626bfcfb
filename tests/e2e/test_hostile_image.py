"""An image whose archives carry attributes that overlay would obey, through a real containerd.

Proves: none of them reaches a layer, in whichever way containerd brings them; a container sees the files as they are.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable

import pytest

from tests.e2e.conftest import missing, skip
from tests.rig.containerd import SNAPSHOTTER, Rig
from tests.rig.image import Entry, EntryKind, Image, Layer, Recipe

pytestmark = [pytest.mark.root, pytest.mark.containerd]

OWN = b"the file's own\n" * 1000
CRAFTED = {
    f"{prefix}.overlay.{name}": value
    for prefix in ("trusted", "user")
    for name, value in {"redirect": b"/etc/shadow", "metacopy": b"", "opaque": b"y", "origin": b"x"}.items()
} | {"trusted.dedup.blake3": b"x" * 32, "user.overlay.overlay.redirect": b"escaped", "user.note": b"data"}
REFERENCE = "example.test/hostile:latest"
LAYER = Layer(
    "hostile",
    (
        Entry(b"srv", EntryKind.DIRECTORY, 0o755, xattrs=CRAFTED),
        Entry(b"srv/crafted", content=OWN, xattrs=CRAFTED),
        Entry(b"srv/empty", xattrs=CRAFTED),
        Entry(b"srv/opaque", EntryKind.DIRECTORY, 0o755, xattrs=CRAFTED),
        Entry(
            b"crafted-link", EntryKind.SYMLINK, 0o777, target=b"/etc/shadow", xattrs={"trusted.overlay.redirect": b"/"}
        ),
    ),
)


def test_what_an_image_is_crafted_with_is_not_obeyed(make_image: Callable[[Recipe], Image]) -> None:
    """containerd sets all but the trusted ones, which it leaves out."""
    if reason := missing():
        skip(reason)
    image = make_image(Recipe(REFERENCE, above=[LAYER]))
    with Rig() as rig:
        rig.ctr("image", "import", "--snapshotter", SNAPSHOTTER, str(image.archive))
        (crafted,) = rig.daemon_root.glob("snapshots/*/fs/srv/crafted")
        for path in (crafted, crafted.parent, crafted.parent / "empty", crafted.parent / "opaque"):
            names = {name for name in os.listxattr(path) if not name.startswith("trusted.")}
            assert names == {"user.note", "user.overlay.overlay.redirect"}, path
        assert "event=commit.attribute_stripped" in rig.daemon.log_text()  # the first ten, in no order
        script = "sha256sum </srv/crafted; ls /srv/opaque"
        seen = rig.ctr_run("--rm", image=REFERENCE, name="c", argv=("sh", "-c", script)).decode()
        assert hashlib.sha256(OWN).hexdigest() in seen
        assert "shown" in seen, "what the layers below have in /srv/opaque"
