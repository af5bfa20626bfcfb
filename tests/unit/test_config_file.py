"""deploy/config.toml and docs/configuration.md tell the truth about every key."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from snapshotter.config import LOG_FORMATS, LOG_LEVELS, STRATEGIES, Config, load
from snapshotter.errors import InvalidArgument
from tests.rig.namespace import CHECKOUT

FILE = CHECKOUT / "deploy/config.toml"


def keys(value: object = None, prefix: str = "") -> dict[str, object]:
    """Every key with its default, tables dotted."""
    found: dict[str, object] = {}
    value = Config() if value is None else value
    for field in dataclasses.fields(value):  # type: ignore[arg-type]
        inner = getattr(value, field.name)
        if dataclasses.is_dataclass(inner):
            found |= keys(inner, f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = inner
    return found


def uncommented() -> str:
    """The file with its keys in effect: `#key = …` and `#[table]`; prose has a blank after the #."""
    return re.sub(r"(?m)^#(?=\w|\[)", "", FILE.read_text())


def test_the_installed_file_changes_nothing() -> None:
    assert load(FILE, {}) == Config()


def test_the_file_shows_every_key_with_its_default(base: Path) -> None:
    (base / "config.toml").write_text(uncommented())
    assert load(base / "config.toml", {}) == Config()
    shown = re.findall(r"(?m)^(\w+) = ", uncommented())
    assert sorted(shown) == sorted(key.rpartition(".")[2] for key in keys())


def test_every_key_in_the_file_is_explained() -> None:
    blocks = FILE.read_text().split("\n\n")
    bare = [block for block in blocks if re.search(r"(?m)^#\w+ = ", block) and not block.startswith("# ")]
    assert bare == []


def test_the_file_names_every_choice() -> None:
    for choice in (*LOG_LEVELS, *LOG_FORMATS, *STRATEGIES):
        assert f'"{choice}"' in FILE.read_text()


def test_the_page_shows_every_key_with_its_default() -> None:
    page = (CHECKOUT / "docs/configuration.md").read_text()
    shown = dict(re.findall(r"(?m)^\| `([\w.]+)` \| `([^`]+)` \|", page))
    assert shown == {key: toml(value) for key, value in keys().items()}


def toml(value: object) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('rot = "/x"', 'unknown key "rot"; did you mean "root"?'),
        ('[log]\nlevle = "info"', 'unknown key "log.levle"; did you mean "log.level"?'),
        ('[log]\nlevel = "loud"', '"log.level" must be one of debug, info, warning, error'),
        ("root = 1", '"root" must be a string, not 1'),
        ('log = "info"', '"log" is a table'),
        ("root =", "is not TOML"),
        ('[dedup]\nstrategy = "links"', '"dedup.strategy" must be one of auto, stub, hardlink, off'),
        ("[dedup]\nstub_min_bytes = 0", '"dedup.stub_min_bytes" must be at least 1, not 0'),
        ('[dedup]\nnever_link = "etc"', '"dedup.never_link" must be an array of strings'),
    ],
)
def test_a_mistake_is_named(base: Path, text: str, complaint: str) -> None:
    (base / "config.toml").write_text(text)
    with pytest.raises(InvalidArgument) as raised:
        load(base / "config.toml", {})
    assert complaint in str(raised.value)
    assert "\n" not in str(raised.value)


def test_flags_override_the_file(base: Path) -> None:
    (base / "config.toml").write_text('root = "/a"\naddress = "/b"\n[log]\nlevel = "error"\n')
    config = load(base / "config.toml", {"root": "/c", "address": None, "log.level": "debug"})
    assert (config.root, config.address, config.log.level) == ("/c", "/b", "debug")
