"""One function for each command: arguments in, calls, output, exit status."""

from __future__ import annotations

import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from snapshotter import errors
from snapshotter.cli import shapes, space, tree
from snapshotter.cli.arguments import build, parse_label_changes, parse_labels
from snapshotter.cli.output import JsonValue, Output
from snapshotter.cli.tables import Column
from snapshotter.cli.text import (
    display_width,
    escape,
    human_age,
    human_size,
    local_time,
    local_time_exact,
    printable,
    shorten,
)
from snapshotter.model import Info, Mount, SnapshotSpace, Space, Usage

if TYPE_CHECKING:
    from snapshotter.client import Client, Feature

_NO_PARENT = "-"
_USAGE_COLUMNS = (Column("SIZE", right=True), Column("INODES", right=True))


def report(error: Exception) -> None:
    """Says on stderr, in one line, what went wrong."""
    print(f"snapctl: {printable(str(error))}", file=sys.stderr)


class Failures:
    """Reports what fails while others go on; `status` is that of the first failure."""

    def __init__(self) -> None:
        self.status = 0

    def add(self, error: errors.SnapshotterError) -> None:
        report(error)
        self.status = self.status or error.exit_status


def _connect(args: Namespace) -> Client:
    """gRPC takes longer to import than all the rest, so only commands that need it do."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # it would write to stderr what `errors` says better
    from snapshotter.client import Client

    return Client(args.address)


def _prepare(args: Namespace, out: Output) -> int:
    with _connect(args) as client:
        _show_mounts(client.prepare(args.key, args.parent, parse_labels(args.labels)), out)
    return 0


def _view(args: Namespace, out: Output) -> int:
    with _connect(args) as client:
        _show_mounts(client.view(args.key, args.parent, parse_labels(args.labels)), out)
    return 0


def _mounts(args: Namespace, out: Output) -> int:
    with _connect(args) as client:
        _show_mounts(client.mounts(args.key), out)
    return 0


def _commit(args: Namespace, out: Output) -> int:
    with _connect(args) as client:
        client.commit(args.name, args.key, args.parent, parse_labels(args.labels))
    if out.json:
        out.object({"name": args.name, "key": args.key})
    return 0


def _rm(args: Namespace, out: Output) -> int:
    failures = Failures()
    with _connect(args) as client:
        results = _removals(client, args.keys, failures)
        if out.json:
            out.array(results)
        else:
            for _ in results:
                pass
    return failures.status


def _removals(client: Client, keys: Sequence[str], failures: Failures) -> Iterator[JsonValue]:
    for key in keys:
        error = None
        try:
            client.remove(key)
        except errors.SnapshotterError as failed:
            failures.add(failed)
            error = str(failed)
        yield {"key": key, "removed": error is None, "error": error}


def _ls(args: Namespace, out: Output) -> int:
    with _connect(args) as client:
        infos = client.list(args.filters)
        if args.names:
            names = (info.name for info in infos)
            if out.json:
                out.array(names)
            else:
                for name in names:
                    out.line(escape(name))
        elif out.json:
            out.array(_listed(client, infos, args.size))
        else:
            _list_table(client, list(infos), args, out)
    return 0


def _listed(client: Client, infos: Iterable[Info], size: bool) -> Iterator[dict[str, JsonValue]]:
    for info in infos:
        usage = _usage_if_there(client, info.name) if size else None
        yield shapes.snapshot(info) | (shapes.usage(usage) if usage else {})


def _list_table(client: Client, infos: Sequence[Info], args: Namespace, out: Output) -> None:
    columns = [Column("NAME", flexible=True), Column("KIND"), Column("CREATED")]
    if args.size:
        columns += _USAGE_COLUMNS
    columns.append(Column("PARENT", flexible=True))
    rows = []
    for info in infos:
        row = [escape(info.name), _kind(info), local_time(info.created_ns)]
        if args.size:
            row += _usage_cells(_usage_if_there(client, info.name))
        rows.append([*row, escape(info.parent) or _NO_PARENT])
    out.table(columns, rows, fit=not args.no_trunc)


def _stat(args: Namespace, out: Output) -> int:
    with _connect(args) as client:
        _show_snapshot(client.stat(args.key), out)
    return 0


def _label(args: Namespace, out: Output) -> int:
    labels, removed = parse_label_changes(args.changes)
    with _connect(args) as client:
        _show_snapshot(client.update_labels(args.key, labels, removed), out)
    return 0


def _usage(args: Namespace, out: Output) -> int:
    failures = Failures()
    with _connect(args) as client:
        usages = _named_usages(client, args.keys, failures) if args.keys else _all_usages(client)
        if out.json:
            out.array({"name": name} | shapes.usage(usage) for name, usage in usages)
        else:
            out.table(
                [Column("NAME", flexible=True), *_USAGE_COLUMNS],
                [[escape(name), *_usage_cells(usage)] for name, usage in usages],
            )
    return failures.status


def _named_usages(client: Client, keys: Sequence[str], failures: Failures) -> Iterator[tuple[str, Usage]]:
    for key in keys:
        try:
            yield key, client.usage(key)
        except errors.SnapshotterError as error:
            failures.add(error)


def _all_usages(client: Client) -> Iterator[tuple[str, Usage]]:
    for info in client.list():
        usage = _usage_if_there(client, info.name)
        if usage:
            yield info.name, usage


def _usage_if_there(client: Client, name: str) -> Usage | None:
    """None where it was removed since it was listed."""
    try:
        return client.usage(name)
    except errors.NotFound:
        return None


def _df(args: Namespace, out: Output) -> int:
    failures = Failures()
    with _connect(args) as client:
        found = client.space(args.now)
    snapshots = space.by_exclusive(_chosen(found, args, failures))
    if out.json:
        out.object(
            {"store": shapes.store_space(found), "snapshots": [shapes.snapshot_space(each) for each in snapshots]}
        )
        return failures.status
    fit = not args.no_trunc
    out.fields(space.store_fields(found, time.time_ns()))
    out.line("")
    out.table(space.COLUMNS, [space.row(each) for each in snapshots], fit)
    if args.why:
        out.line("")
        out.table(space.WHY_COLUMNS, space.why_rows(found.private), fit)
        out.line("")
        rows = [[escape(each.name), *row] for each in snapshots for row in space.why_rows(each.private)]
        out.table(space.WHY_COLUMNS_BY_NAME, rows, fit)
    return failures.status


def _chosen(found: Space, args: Namespace, failures: Failures) -> Iterable[SnapshotSpace]:
    """The snapshots of these keys, each once; all without keys."""
    if not args.keys:
        return found.snapshots
    by_name = {each.name: each for each in found.snapshots}
    hint = "" if args.now else "; --now looks again"
    for key in args.keys:
        if key not in by_name:
            message = f"snapshot {errors.quote(key)} did not exist at {local_time(found.as_of_ns)}{hint}"
            failures.add(errors.NotFound(message))
    return [by_name[key] for key in dict.fromkeys(args.keys) if key in by_name]


def _tree(args: Namespace, out: Output) -> int:
    with _connect(args) as client:
        nodes = tree.arrange(client.list())
        if out.json:
            out.array(_tree_elements(client, nodes, args.size))
            return 0
        width = None if args.no_trunc else out.width
        for node in nodes:
            usage = _usage_if_there(client, node.info.name) if args.size else None
            out.line(_tree_line(node, usage, width, out.unicode))
    return 0


def _tree_elements(client: Client, nodes: Iterable[tree.Node], size: bool) -> Iterator[JsonValue]:
    for node in nodes:
        for element in _listed(client, [node.info], size):
            yield {"depth": len(node.last), **element}


def _tree_line(node: tree.Node, usage: Usage | None, width: int | None, unicode: bool) -> str:
    before = tree.branch(node.last, unicode, width // 2 if width else None)
    after = f"  {_kind(node.info)}" + (f"  {human_size(usage.size_bytes)}" if usage else "")
    name = escape(node.info.name)
    if width:
        name = shorten(name, max(12, width - display_width(before) - len(after)), "…" if unicode else "~")
    return before + name + after


def _mount(args: Namespace, out: Output) -> int:
    from snapshotter.cli.mounting import mount_all

    with _connect(args) as client:
        mounts = client.mounts(args.key)
    mount_all(mounts, args.target)
    if out.json:
        shown = [shapes.mount(each) for each in mounts]
        out.object({"key": args.key, "target": args.target, "mounts": shown})
    return 0


def _umount(args: Namespace, out: Output) -> int:
    from snapshotter.cli.mounting import unmount

    unmount(args.target, args.lazy)
    if out.json:
        out.object({"target": args.target})
    return 0


def _cleanup(args: Namespace, out: Output) -> int:
    with _connect(args) as client:
        client.cleanup()
    if out.json:
        out.object({})
    return 0


def _gc(args: Namespace, out: Output) -> int:
    with _connect(args) as client:
        freed = client.collect(args.dry_run)
    if out.json:
        out.object(shapes.freed(freed, args.dry_run))
    else:
        out.line(space.freed(freed, args.dry_run))
    return 0


def _fsck(args: Namespace, out: Output) -> int:
    from snapshotter.cli.fsck import run

    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    return run(args, out)


def _info(args: Namespace, out: Output) -> int:
    with _connect(args) as client:
        info = client.info()
    shape = shapes.daemon(info)
    if out.json:
        out.object(shape)
        return 0
    now_ns = time.time_ns()
    shape["started_at"] = f"{local_time(info.started_ns)} ({human_age(now_ns - info.started_ns)} ago)"
    del shape["features"]
    shape |= {f.name: _feature(f) for f in info.features}
    out.fields((name.replace("_", " "), escape(str(value))) for name, value in shape.items())
    return 0


def _feature(feature: Feature) -> str:
    if not feature.works:
        return f"does not work: {feature.reason}"
    return "on" if feature.on else "works"


def _completion(args: Namespace, out: Output) -> int:
    from snapshotter.cli.completion import script

    out.line(script(build()[0], args.shell).rstrip("\n"))
    return 0


COMMANDS: dict[str, Callable[[Namespace, Output], int]] = {
    "prepare": _prepare,
    "view": _view,
    "commit": _commit,
    "rm": _rm,
    "ls": _ls,
    "stat": _stat,
    "mounts": _mounts,
    "usage": _usage,
    "label": _label,
    "df": _df,
    "tree": _tree,
    "mount": _mount,
    "umount": _umount,
    "cleanup": _cleanup,
    "gc": _gc,
    "fsck": _fsck,
    "info": _info,
    "completion": _completion,
}


def _show_mounts(mounts: Sequence[Mount], out: Output) -> None:
    if out.json:
        out.array(map(shapes.mount, mounts))
        return
    columns = [Column("TYPE"), Column("SOURCE"), Column("OPTIONS")]
    out.table(columns, [[escape(m.type), escape(m.source), escape(",".join(m.options))] for m in mounts])


def _show_snapshot(info: Info, out: Output) -> None:
    if out.json:
        out.object(shapes.snapshot(info))
        return
    now_ns = time.time_ns()
    fields = [
        ("name", escape(info.name)),
        ("kind", _kind(info)),
        ("parent", escape(info.parent) or _NO_PARENT),
        ("created", f"{local_time_exact(info.created_ns)} ({human_age(now_ns - info.created_ns)} ago)"),
        ("updated", f"{local_time_exact(info.updated_ns)} ({human_age(now_ns - info.updated_ns)} ago)"),
    ]
    labels = [f"{escape(key)}={escape(value)}" for key, value in sorted(info.labels.items())] or ["-"]
    out.fields([*fields, *zip(["labels"] + [""] * len(labels), labels, strict=False)])


def _usage_cells(usage: Usage | None) -> list[str]:
    return [human_size(usage.size_bytes), str(usage.inodes)] if usage else ["-", "-"]


def _kind(info: Info) -> str:
    return info.kind.name.lower()
