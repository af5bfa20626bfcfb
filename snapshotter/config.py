"""The configuration: a TOML file, overridden by flags, as frozen values.

Every key is a field below; deploy/config.toml shows them with these defaults.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from snapshotter.errors import InvalidArgument, NotFound, from_os_error

DEFAULT_PATH = Path("/etc/dedup-snapshotter/config.toml")

MOUNT_MODES = ("daemon", "client")
SWITCH_SETTINGS = ("auto", "on", "off")

DURABILITIES = ("full", "metadata", "none")

STRIP, REFUSE = "strip", "refuse"

STRATEGIES = ("auto", "stub", "hardlink", "off")

LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("auto", "logfmt", "json")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LogConfig:
    level: str = field(default="info", metadata={"choices": LOG_LEVELS})
    format: str = field(default="auto", metadata={"choices": LOG_FORMATS})


@dataclass(frozen=True, slots=True)
class MountConfig:
    mode: str = field(default="daemon", metadata={"choices": MOUNT_MODES})


def _switch() -> str:
    setting: str = field(default="auto", metadata={"choices": SWITCH_SETTINGS})
    return setting


@dataclass(frozen=True, slots=True)
class OverlayConfig:
    """A field a feature: first the mount options by their names, then what the kernel or the filesystem can do."""

    index: str = _switch()
    metacopy: str = _switch()
    redirect_dir: str = _switch()
    xino: str = _switch()
    nfs_export: str = _switch()
    volatile: str = _switch()
    userxattr: str = _switch()
    lowerdir_plus: str = _switch()
    data_only: str = _switch()
    reflink: str = _switch()
    idmapped: str = _switch()


@dataclass(frozen=True, slots=True)
class DedupConfig:
    strategy: str = field(default="auto", metadata={"choices": STRATEGIES})
    stub_min_bytes: int = field(default=4096, metadata={"least": 1})
    never_link: tuple[str, ...] = ("etc/cron*", "var/spool/cron")


@dataclass(frozen=True, slots=True)
class CallsConfig:
    hang_s: int = field(default=60, metadata={"least": 1})


@dataclass(frozen=True, slots=True)
class Config:
    root: str = "/var/lib/dedup-snapshotter"
    address: str = "/run/dedup-snapshotter/dedup-snapshotter.sock"
    durability: str = field(default="full", metadata={"choices": DURABILITIES})
    untrusted_attributes: str = field(default=STRIP, metadata={"choices": (STRIP, REFUSE)})
    mount: MountConfig = field(default_factory=MountConfig)
    overlay: OverlayConfig = field(default_factory=OverlayConfig)
    dedup: DedupConfig = field(default_factory=DedupConfig)
    calls: CallsConfig = field(default_factory=CallsConfig)
    log: LogConfig = field(default_factory=LogConfig)


def load(path: Path | None, overrides: Mapping[str, str | None]) -> Config:
    """The configuration file at `path`, or the default one if it exists, under `overrides`.

    Overrides are dotted keys ("log.level"); None leaves a key alone. Raises InvalidArgument for a
    file that is not TOML, an unknown key, or a wrong value; NotFound for a `path` that is missing.
    """
    table = _read(path)
    source = str(path or DEFAULT_PATH)
    config = _build(Config, table, "", source)
    for key, value in overrides.items():
        if value is not None:
            config = _replace(config, key.split("."), value, key)
    return config


def _read(path: Path | None) -> dict[str, Any]:
    try:
        return tomllib.loads((path or DEFAULT_PATH).read_text())
    except FileNotFoundError as error:
        if path is None:
            return {}
        raise NotFound(f"configuration file {path} does not exist") from error
    except OSError as error:
        raise from_os_error(f"reading configuration file {path or DEFAULT_PATH}", error) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"configuration file {path or DEFAULT_PATH} is not TOML: {error}") from error


def _build(cls: type[T], table: dict[str, Any], prefix: str, source: str) -> T:
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.0)[0]
            raise InvalidArgument(f'{source}: unknown key "{prefix}{key}"; did you mean "{prefix}{near}"?')
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise InvalidArgument(f'{source}: "{prefix}{key}" is a table: write [{prefix}{key}]')
            values[key] = _build(hints[key], value, f"{prefix}{key}.", source)
        else:
            values[key] = _checked(fields[key], hints[key], value, f'{source}: "{prefix}{key}"')
    return cls(**values)


def _checked(spec: dataclasses.Field[Any], kind: type, value: object, where: str) -> object:
    if kind == tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise InvalidArgument(f"{where} must be an array of strings, not {value!r}")
        return tuple(value)
    if type(value) is not kind:
        raise InvalidArgument(f"{where} must be a {_TOML_NAMES[kind]}, not {value!r}")
    choices = spec.metadata.get("choices")
    if choices and value not in choices:
        raise InvalidArgument(f"{where} must be one of {', '.join(choices)}, not {value!r}")
    least = spec.metadata.get("least")
    if least is not None and isinstance(value, int) and value < least:
        raise InvalidArgument(f"{where} must be at least {least}, not {value}")
    return value


_TOML_NAMES: dict[type, str] = {str: "string", int: "integer", bool: "boolean"}


def _replace(config: Any, path: list[str], value: str, key: str) -> Any:
    name, *rest = path
    if rest:
        inner = _replace(getattr(config, name), rest, value, key)
        return dataclasses.replace(config, **{name: inner})
    spec = next(f for f in dataclasses.fields(config) if f.name == name)
    return dataclasses.replace(config, **{name: _checked(spec, str, value, f"--{name.replace('_', '-')}")})
