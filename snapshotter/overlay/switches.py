"""Which overlay features to mount with: the configuration held against what the probe found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from snapshotter.errors import FailedPrecondition
from snapshotter.overlay.attributes import TRUSTED, USER, Names
from snapshotter.overlay.features import NO_FEATURES, OF_STUBS, Feature
from snapshotter.overlay.probe import Probe

WANTED = frozenset({"index", "metacopy", "redirect_dir"})
"""On by themselves where they work, and userxattr in a user namespace. The others are only on when asked for: xino
does nothing on one filesystem, nfs_export excludes metacopy, volatile gives up durability."""

_OPTIONS = {
    Feature.METACOPY: "metacopy",
    Feature.REDIRECT_DIR: "redirect_dir",
    Feature.INDEX: "index",
    Feature.DATA_ONLY: "data_only",
}

FLAGS = frozenset({"volatile", "userxattr"})

ABILITIES = ("lowerdir_plus", "data_only", "reflink", "idmapped")
"""No mount options: used where they are, unless turned off."""


@dataclass(frozen=True, slots=True)
class Switches:
    """What is on."""

    on: frozenset[str]

    def for_upper(self) -> dict[str, str | None]:
        """Options of a mount with an upper: the switchable ones said aloud, since kernels' defaults differ."""
        options: dict[str, str | None] = {"index": "on" if "index" in self.on else "off"}
        for name in ("metacopy", "redirect_dir"):
            # Next to userxattr the kernel refuses to hear of them, even that they are off.
            if name in self.on or "userxattr" not in self.on:
                options[name] = "on" if name in self.on else "off"
        for name in ("xino", "nfs_export"):
            if name in self.on:
                options[name] = "on"
        return options | {name: None for name in sorted(FLAGS & self.on)}

    def for_view(self) -> dict[str, str | None]:
        """Options of a mount without an upper."""
        options: dict[str, str | None] = {name: "on" for name in ("redirect_dir", "metacopy") if name in self.on}
        if "userxattr" in self.on:
            options["userxattr"] = None
        return options

    def attribute_names(self) -> Names:
        return USER if "userxattr" in self.on else TRUSTED

    def features(self) -> Feature:
        """What can be mounted under these switches."""
        result = NO_FEATURES
        for feature, option in _OPTIONS.items():
            if option in self.on:
                result |= feature
        return result

    def has_stubs(self) -> bool:
        """Whether layers with stubs can be mounted."""
        return OF_STUBS in self.features()

    def narrowed(self, made_with: Feature) -> Switches:
        """For an upper that was made when less was on: nothing records that it needs what it would come to hold."""
        off = {option for feature, option in _OPTIONS.items() if feature not in made_with}
        if "index" in off:
            off.add("nfs_export")
        return Switches(self.on - off)


def choose(settings: Mapping[str, str], probe: Probe, in_user_namespace: bool) -> Switches:
    """`settings`: each switch "auto", "on" or "off".

    Raises FailedPrecondition, with the kernel's reason, for one that is "on" and does not work, and for
    userxattr where containerd's layers would be misread with it.
    """
    if settings["userxattr"] == "on" and not in_user_namespace:
        raise FailedPrecondition(
            "overlay.userxattr is on, but we are in no user namespace: containerd marks opaque directories with "
            "trusted.overlay.opaque here, which such a mount does not see"
        )
    wanted = WANTED.union(ABILITIES, {"userxattr"} if in_user_namespace else ())
    on = set()
    for name, setting in settings.items():
        if setting == "on" and not probe.has(name):
            raise FailedPrecondition(f"overlay.{name} is on, but does not work here: {probe.missing[name]}")
        if setting == "on" or (setting == "auto" and name in wanted and probe.has(name)):
            on.add(name)
    return Switches(frozenset(_without_conflicts(on, settings)))


def _without_conflicts(on: set[str], settings: Mapping[str, str]) -> set[str]:
    """Drops what is only on by itself where something that was asked for excludes it."""
    excluded = {"userxattr": ("metacopy", "redirect_dir"), "nfs_export": ("metacopy",)}
    for asked, losers in excluded.items():
        if asked in on:
            on -= {name for name in losers if settings[name] == "auto"}
    if "metacopy" in on and "redirect_dir" not in on and settings["metacopy"] == "auto":
        on.discard("metacopy")
    return on
