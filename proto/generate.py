"""Build hook: generates snapshotter/api/*_pb2*.py from the protocol definitions beside this file.

The files' import paths are the Python ones (proto/snapshotter/api/x.proto becomes
snapshotter/api/x_pb2.py), so the generated modules import each other without being edited.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class GenerateProtos(BuildHookInterface):  # type: ignore[type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        from grpc_tools import protoc

        root = Path(self.root)
        proto = root / "proto"
        sources = sorted(str(p.relative_to(proto)) for p in proto.glob("snapshotter/api/*.proto"))
        services = [s for s in sources if "service " in (proto / s).read_text()]
        include = str(Path(protoc.__file__).parent / "_proto")
        common = ["protoc", f"-I{proto}", f"-I{include}"]
        for arguments in (
            [*common, f"--python_out={root}", f"--pyi_out={root}", *sources],
            [*common, f"--grpc_python_out={root}", *services],
        ):
            if protoc.main(arguments) != 0:
                sys.exit(f"protoc failed: {' '.join(arguments)}")
