"""Log lines: one a record whatever a client sends, with the fields of the request."""

from __future__ import annotations

import json
import logging
from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from trivium.runtime.logs import ID_LENGTH, JsonFormatter, TextFormatter, about, printable, request_id

EVIL = [
    "a\n2026-01-01T00:00:00.000Z ERROR the disk burns",
    "a\r\n{}",
    "\x1b[2J\x1b]0;title\x07",
    "a\u2028b\u2029c\u0085d\x0be",
    "\u202eright to left",
    'quoted" status=OK x="',
    "\ud800",
    "\x00",
]


def record(message: str, *, level: int = logging.INFO, **fields: str | int | float | None) -> logging.LogRecord:
    return logging.getLogger("trivium.test").makeRecord(
        "trivium.test", level, __file__, 1, "%s", (message,), None, extra=about(**fields)
    )


def test_json_says_who_when_and_what() -> None:
    line = JsonFormatter().format(
        record("gone", level=logging.WARNING, request_id="r1", model="m", version="", pictures=0, queue_ms=1.5)
    )
    document = json.loads(line)
    moment = datetime.fromisoformat(document.pop("time").replace("Z", "+00:00"))
    assert abs(datetime.now(timezone.utc) - moment) < timedelta(minutes=5)
    assert document == {
        "level": "warning", "logger": "trivium.test", "message": "gone", "request_id": "r1", "model": "m",
        "pictures": 0, "queue_ms": 1.5,
    }  # fmt: skip


def test_text_reads_as_words() -> None:
    line = TextFormatter().format(record("gone", request_id="r 1", head="a", queue_ms=1.5))
    time, level, rest = line.split(" ", 2)
    assert time.endswith("Z")
    assert (level, rest) == ("INFO", 'gone request_id="r 1" head=a queue_ms=1.500')


@pytest.mark.parametrize("text", EVIL)
@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()])
def test_nothing_a_client_sends_makes_another_line_or_field(formatter: logging.Formatter, text: str) -> None:
    line = formatter.format(record(text, request_id=text, model="m"))
    assert line.isprintable()
    assert len(line.splitlines()) == 1
    if isinstance(formatter, JsonFormatter):
        document = json.loads(line)
        assert (document["message"], document["request_id"], document["model"]) == (text, text, "m")
    else:
        assert " status=OK" not in line.split(" request_id=")[1].replace(json.dumps(text), "")
        assert line.endswith(" model=m")


@given(st.text())
def test_printable_is_printable_and_leaves_the_rest_alone(text: str) -> None:
    assert printable(text).isprintable()
    if text.isprintable():
        assert printable(text) == text


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()])
def test_a_traceback_cannot_pose_as_a_record(formatter: logging.Formatter) -> None:
    one = record("failed")
    try:
        raise ValueError("x\n2026-01-01T00:00:00.000Z ERROR forged")
    except ValueError as error:
        one.exc_info = (type(error), error, error.__traceback__)
    first, *rest = formatter.format(one).splitlines()
    if isinstance(formatter, JsonFormatter):
        assert not rest
        assert "ValueError: x\n" in json.loads(first)["exception"]
    else:
        assert any("ValueError: x" in line for line in rest)
        assert all(line.startswith("    ") for line in rest)


def test_a_request_keeps_the_id_it_came_with_or_was_given() -> None:
    named, nameless = service_pb2.ModelInferRequest(id="x" * 1000), service_pb2.ModelInferRequest()
    assert request_id(named) == "x" * ID_LENGTH
    made_up = request_id(nameless)
    assert len(made_up) == 16
    assert request_id(nameless) == made_up
    assert request_id(service_pb2.ModelInferRequest()) != made_up
