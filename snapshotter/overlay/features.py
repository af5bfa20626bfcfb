"""Overlay features that what is stored can depend on, as ext4 has them.

    incompatible           a layer is read wrong without it: METACOPY, REDIRECT_DIR
    read-only compatible   layers read right, but an active snapshot's upper must not be mounted: INDEX

What only helps (origin, impure) is not recorded.
"""

from __future__ import annotations

import enum


class Feature(enum.IntFlag):
    """The bits are on disk (meta.schema)."""

    METACOPY = 1
    REDIRECT_DIR = 2
    INDEX = 1 << 16


NO_FEATURES = Feature(0)
INCOMPATIBLE = Feature.METACOPY | Feature.REDIRECT_DIR
READ_ONLY_COMPATIBLE = Feature.INDEX
KNOWN_BITS = int(INCOMPATIBLE | READ_ONLY_COMPATIBLE)


def option_names(features: Feature) -> list[str]:
    """The mount options behind some features."""
    return [feature.name.lower() for feature in Feature if feature in features and feature.name]
