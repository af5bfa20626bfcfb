"""Processes of their own for long work on trees, so that no call waits for the interpreter's lock."""

from __future__ import annotations

import struct

HEAD = struct.Struct("<Q")
"""Before each message between the daemon and a worker: its length in bytes. A message is a pickle."""
