"""containerd's filters, which select snapshots in List.

    filter    = selector *( "," selector )          all of them must hold
    selector  = path [ operator value ]             without an operator: the field is there
    path      = field *( "." field )
    field     = 1*( letter / digit / "_" ) / string in double quotes
    operator  = "==" / "!=" / "~="                  equal, not equal, matches a regular expression
    value     = word / string                       a word ends before a comma or a space
    string    = "…", for ~= also /…/ and |…|        with Go's escapes, on one line

A path is `name`, `parent`, `kind` (active, view or committed) or `labels.KEY`, where the rest of the path,
joined with ".", is the key. Letters and digits of a bare field are ASCII's; spaces may stand before a field,
an operator and a value, and nowhere else. A field that a snapshot does not have counts as empty for `!=` and
`~=`. Several filters select what any of them matches; none, or an empty one, select everything.

Behaves as containerd's pkg/filters and the adaptor in core/snapshots/storage/bolt.go, down to the offsets
of errors, but for regular expressions: see `regex`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from snapshotter.errors import InvalidArgument
from snapshotter.filters.match import Matcher
from snapshotter.filters.parser import MAX_FIELDS, BadFilter, Parser
from snapshotter.model import Info

__all__ = ["BadFilter", "compile_filters"]


def compile_filters(filters: Sequence[str]) -> Callable[[Info], bool]:
    """What tells whether a snapshot is selected. Takes time linear in the length of `filters`; the result
    may be used by several threads.

    Raises: errors.InvalidArgument for a filter or a regular expression that is wrong, or too many of them.
    """
    if len(filters) > MAX_FIELDS:  # most have a field, but an empty one, which has none, takes time too
        raise InvalidArgument(f"more than {MAX_FIELDS} filters in one call; use several calls")
    parser = Parser()
    return Matcher([parser.parse(text) for text in filters])
