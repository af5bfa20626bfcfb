"""Logging: events with fields, to stderr."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import structlog

from snapshotter.config import LogConfig

# sd-daemon(3): a line that begins with <N> has that syslog priority.
_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}


def configure(config: LogConfig) -> None:
    """Sets up structlog for the process. "auto" is journal lines where stderr is the journal, else logfmt."""
    journal = config.format == "auto" and "JOURNAL_STREAM" in os.environ
    stamp: list[Any] = [] if journal else [structlog.processors.TimeStamper(fmt="iso", utc=True, key="time")]
    renderer = (
        structlog.processors.JSONRenderer()
        if config.format == "json"
        else structlog.processors.LogfmtRenderer(key_order=["time", "level", "event"], drop_missing=True)
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            *stamp,
            structlog.processors.format_exc_info,
            _journal_line(renderer) if journal else renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, config.level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


def _journal_line(renderer: Any) -> Any:
    def render(logger: Any, method: str, event: dict[str, Any]) -> str:
        priority = _PRIORITIES[event.pop("level")]
        return f"<{priority}>{renderer(logger, method, event)}"

    return render
