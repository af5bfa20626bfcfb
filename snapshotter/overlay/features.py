"""Overlay features that what is stored can depend on, as ext4 has them.

    incompatible           a layer is read wrong without it: METACOPY, REDIRECT_DIR, DATA_ONLY
    read-only compatible   layers read right, but an active snapshot's upper must not be mounted: INDEX

What only helps (origin, impure) is not recorded.
"""

from __future__ import annotations

import enum


class Feature(enum.IntFlag):
    """The bits are on disk (meta.schema)."""

    METACOPY = 1
    REDIRECT_DIR = 2
    DATA_ONLY = 4
    """Files whose content is in the object store, which has to be mounted as a data-only layer."""
    INDEX = 1 << 16


NO_FEATURES = Feature(0)
INCOMPATIBLE = Feature.METACOPY | Feature.REDIRECT_DIR | Feature.DATA_ONLY
READ_ONLY_COMPATIBLE = Feature.INDEX
OF_STUBS = Feature.METACOPY | Feature.REDIRECT_DIR | Feature.DATA_ONLY
"""What a layer with stubs needs."""
OF_UPPERS = Feature.METACOPY | Feature.REDIRECT_DIR | Feature.INDEX
"""What the kernel may use in an upper."""
KNOWN_BITS = int(INCOMPATIBLE | READ_ONLY_COMPATIBLE)


def option_names(features: Feature) -> list[str]:
    """The mount options behind some features."""
    return [feature.name.lower() for feature in Feature if feature in features and feature.name]
