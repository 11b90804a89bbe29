"""Log lines on stderr: text for people, or one JSON object a line for machines.

What a line knows of the request it belongs to stands in its fields. Nothing that a client sends can end a line, start
another, or move a terminal's cursor.
"""

from __future__ import annotations

import json
import logging
import secrets
import sys
from datetime import datetime, timezone
from typing import Any, Literal

Value = str | int | float | list[Any]
ID_LENGTH = 128
"""Characters of a client's request id that are kept."""


def about(**fields: Value | None) -> dict[str, dict[str, Value]]:
    """`extra` of a log call: request_id, model, version, trace_id and the like; those that are empty are left out."""
    return {"fields": {name: value for name, value in fields.items() if value not in (None, "")}}


def request_id(request: Any) -> str:
    """What the log calls a ModelInferRequest: its own id, or one made up now and kept in the message."""
    if not request.id:
        request.id = secrets.token_hex(8)
    return str(request.id[:ID_LENGTH])


class TextFormatter(logging.Formatter):
    """TIME LEVEL message key=value ..., a traceback indented below."""

    def format(self, record: logging.LogRecord) -> str:
        parts = [_time(record), record.levelname, printable(record.getMessage())]
        parts += [f"{name}={_word(value)}" for name, value in _fields(record).items()]
        line = " ".join(part for part in parts if part)
        if trace := _traceback(self, record):
            line += "".join(f"\n    {printable(one)}" for one in trace.splitlines())
        return line


class JsonFormatter(logging.Formatter):
    """An object with time (RFC 3339), level, logger, message, the fields, and the traceback as `exception`."""

    def format(self, record: logging.LogRecord) -> str:
        document: dict[str, Value] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if trace := _traceback(self, record):
            document["exception"] = trace
        return json.dumps(document)


def configure(level: str, form: Literal["text", "json"]) -> None:
    """Write the lines of trivium from `level` on, and of everything else from warning on, to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    # the libraries' warnings too: one line in another format would end a JSON reader
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.captureWarnings(True)
    # what no formatter here shows need not be found out (Logging HOWTO, Optimization)
    logging.logThreads = logging.logMultiprocessing = logging.logProcesses = False
    logging._srcfile = None
    logging.getLogger("trivium").setLevel(level.upper())


def printable(text: str) -> str:
    """The text with whatever is not printable, line ends and terminal sequences among it, as Python escapes."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def _fields(record: logging.LogRecord) -> dict[str, Value]:
    return getattr(record, "fields", {})


def _time(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, timezone.utc)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _word(value: Value) -> str:
    """A field's value such that spaces and equal signs in it make no other field."""
    text = f"{value:.3f}" if isinstance(value, float) else printable(str(value))
    return json.dumps(text) if any(one in text for one in ' ="') else text


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    return formatter.formatException(record.exc_info) if record.exc_info else ""
