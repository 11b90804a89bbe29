"""The HTTP/2 engine against the h2 package as client, and against frames that no client should send."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable

import h2.config
import h2.connection
import h2.events
import h2.settings
import hpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trivium.runtime.http2 import END, HEADERS, MESSAGE, NO_ROOM, RESET, TOO_LONG, Connection, Event, Limits

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
REQUEST = [
    (":method", "POST"),
    (":scheme", "http"),
    (":path", "/inference.GRPCInferenceService/ModelInfer"),
    (":authority", "127.0.0.1"),
    ("content-type", "application/grpc"),
    ("te", "trailers"),
]
DATA, HEADERS_FRAME, PRIORITY, RST, SETTINGS, PUSH, PING, GOAWAY, WINDOW, CONTINUATION = range(10)
PROTOCOL_ERROR, FLOW_CONTROL_ERROR, STREAM_CLOSED, FRAME_SIZE_ERROR, REFUSED, COMPRESSION, CALM = 1, 3, 5, 6, 7, 9, 11


def limits(message: int = 1 << 20, held: int = 64 << 20, streams: int = 100, headers: int = 16384) -> Limits:
    return Limits(message, held, streams, headers)


def feed(connection: Connection, data: bytes, pieces: int | None = None) -> list[Event] | None:
    found: list[Event] = []
    step = pieces or max(1, len(data))
    for at in range(0, len(data), step):
        part = data[at : at + step]
        buffer = ctypes.create_string_buffer(part, len(part))
        events = connection.receive(ctypes.addressof(buffer), len(part))
        if events is None:
            return None
        found += events
    return found


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def block(headers: Iterable[tuple[str, str]] = REQUEST) -> bytes:
    return bytes(hpack.Encoder().encode(list(headers)))


def grpc_message(data: bytes) -> bytes:
    return b"\0" + struct.pack(">I", len(data)) + data


def frames(data: bytes) -> list[tuple[int, int, int, bytes]]:
    found = []
    while data:
        size = int.from_bytes(data[:3], "big")
        found.append((data[3], data[4], int.from_bytes(data[5:9], "big"), data[9 : 9 + size]))
        data = data[9 + size :]
    return found


def begun(given: Limits | None = None) -> Connection:
    """A connection after the client's preface and settings."""
    connection = Connection(given or limits())
    assert feed(connection, PREFACE + frame(SETTINGS, 0, 0)) == []
    connection.output()
    return connection


class Peer:
    """The h2 package's client at the other end of a connection."""

    def __init__(self, given: Limits | None = None, window: int | None = None) -> None:
        self.server = Connection(given or limits())
        self.client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="latin-1"))
        if window is not None:
            self.client.local_settings = h2.settings.Settings(
                client=True, initial_values={h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window}
            )
        self.client.initiate_connection()
        self.heard: list[Event] = []
        self.told: list[h2.events.Event] = []

    def exchange(self, pieces: int | None = None) -> None:
        while True:
            out = self.client.data_to_send()
            if out:
                events = feed(self.server, out, pieces)
                assert events is not None
                self.heard += events
            back = self.server.output()
            if back:
                self.told += self.client.receive_data(back)
            if not out and not back:
                return

    def ask(self, data: bytes, headers: list[tuple[str, str]] = REQUEST, pieces: int | None = None) -> int:
        stream: int = self.client.get_next_available_stream_id()
        self.client.send_headers(stream, headers)
        body = grpc_message(data)
        while body:
            size = min(
                len(body), self.client.local_flow_control_window(stream), self.client.max_outbound_frame_size, 10_000
            )
            self.client.send_data(stream, body[:size])
            body = body[size:]
            self.exchange(pieces)
        self.client.end_stream(stream)
        self.exchange(pieces)
        return stream


@pytest.mark.parametrize("size", [0, 1, 5, 16384, 300_000, 5_000_000])
def test_a_question_and_its_answer_of_any_length(size: int) -> None:
    peer = Peer(limits(message=8 << 20))
    question = bytes(i * 7 % 251 for i in range(size))
    stream = peer.ask(question)
    assert [event.kind for event in peer.heard] == [HEADERS, MESSAGE, END]
    flat = peer.heard[0].data.decode().split("\0")
    assert list(zip(flat[::2], flat[1::2], strict=False)) == REQUEST
    assert peer.heard[1].data == question
    peer.server.message(stream, question)
    peer.server.finish(stream, b"grpc-status\x000\0x\0y\0")
    answer = b""
    for _ in range(10_000):
        peer.exchange()
        for event in peer.told:
            if isinstance(event, h2.events.DataReceived):
                answer += event.data
                peer.client.acknowledge_received_data(event.flow_controlled_length, stream)
        done = any(isinstance(event, h2.events.StreamEnded) for event in peer.told)
        trailers = [event.headers for event in peer.told if isinstance(event, h2.events.TrailersReceived)]
        peer.told.clear()
        if done:
            break
    assert answer == grpc_message(question)
    assert trailers == [[("grpc-status", "0"), ("x", "y")]]
    assert peer.server.streams == 0


@pytest.mark.parametrize("pieces", [1, 2, 7, 1000])
def test_how_bytes_arrive_does_not_matter(pieces: int) -> None:
    peer = Peer()
    peer.ask(b"question" * 100, pieces=pieces)
    assert [event.kind for event in peer.heard] == [HEADERS, MESSAGE, END]
    assert peer.heard[1].data == b"question" * 100


def test_a_small_window_lets_an_answer_out_piece_by_piece() -> None:
    peer = Peer(window=10)
    stream = peer.ask(b"q")
    peer.server.message(stream, b"0123456789abcdef")
    peer.server.finish(stream, b"grpc-status\x000\0")
    peer.exchange()
    sizes = [len(event.data) for event in peer.told if isinstance(event, h2.events.DataReceived)]
    assert sizes == [10]
    assert not any(isinstance(event, h2.events.StreamEnded) for event in peer.told)
    peer.client.increment_flow_control_window(100, stream)
    peer.exchange()
    data = b"".join(event.data for event in peer.told if isinstance(event, h2.events.DataReceived))
    assert data == grpc_message(b"0123456789abcdef")
    assert any(isinstance(event, h2.events.StreamEnded) for event in peer.told)


def test_an_answer_without_messages_is_trailers_alone() -> None:
    peer = Peer()
    stream = peer.ask(b"q")
    peer.server.finish(stream, b"grpc-status\x0012\0")
    peer.exchange()
    (headers,) = [event.headers for event in peer.told if isinstance(event, h2.events.ResponseReceived)]
    assert headers == [(":status", "200"), ("content-type", "application/grpc"), ("grpc-status", "12")]


def test_many_streams_take_turns() -> None:
    peer = Peer()
    streams = [peer.ask(b"q") for _ in range(3)]
    peer.server.pause(True)
    for stream in streams:
        peer.server.message(stream, bytes(40_000))
        peer.server.finish(stream, b"grpc-status\x000\0")
    peer.server.pause(False)
    order = [stream for kind, _, stream, _ in frames(peer.server.output()) if kind == DATA]
    # the connection's window of 65,535 bytes is shared, not spent on the first
    assert set(order[:3]) == set(streams)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(
            st.tuples(
                st.text(st.sampled_from("abcxyz-_.0189"), min_size=1, max_size=20).map(lambda name: "x" + name),
                st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=60),
            ),
            max_size=8,
        ),
        min_size=1,
        max_size=6,
    ),
    st.integers(0, 4096),
    st.booleans(),
)
def test_headers_are_what_the_hpack_package_encoded(
    lists: list[list[tuple[str, str]]], table: int, huffman: bool
) -> None:
    connection = begun()
    encoder = hpack.Encoder()
    for number, extra in enumerate(lists):
        if number == 1:
            encoder.header_table_size = table
        headers = [
            *((a.encode(), b.encode()) for a, b in REQUEST),
            *((a.encode(), b.encode("latin-1")) for a, b in extra),
        ]
        encoded = encoder.encode(headers, huffman=huffman)
        events = feed(connection, frame(HEADERS_FRAME, 5, 2 * number + 1, encoded))
        assert events is not None
        assert [event.kind for event in events] == [HEADERS, END]
        flat = events[0].data.split(b"\0")
        assert list(zip(flat[::2], flat[1::2], strict=False)) == headers


def test_padding_priority_and_continuations_are_understood() -> None:
    connection = begun()
    encoded = block()
    first = bytes([3]) + bytes(5) + encoded[:10] + bytes(3)
    events = feed(
        connection,
        frame(HEADERS_FRAME, 8 | 32, 1, first)
        + frame(CONTINUATION, 0, 1, encoded[10:20])
        + frame(CONTINUATION, 4, 1, encoded[20:])
        + frame(DATA, 8, 1, bytes([4]) + grpc_message(b"abc")[:6] + bytes(4))
        + frame(DATA, 1, 1, grpc_message(b"abc")[6:]),
    )
    assert events is not None
    assert [event.kind for event in events] == [HEADERS, MESSAGE, END]
    assert events[1].data == b"abc"


def test_unknown_frames_and_settings_are_ignored() -> None:
    connection = begun()
    assert feed(connection, frame(200, 255, 7, b"what") + frame(SETTINGS, 0, 0, struct.pack(">HI", 0x99, 1))) == []
    assert frames(connection.output()) == [(SETTINGS, 1, 0, b"")]


def test_a_ping_is_answered_and_one_can_be_sent() -> None:
    connection = begun()
    assert feed(connection, frame(PING, 0, 0, b"12345678")) == []
    assert frames(connection.output()) == [(PING, 1, 0, b"12345678")]
    connection.ping()
    assert frames(connection.output()) == [(PING, 0, 0, bytes(8))]
    assert feed(connection, frame(PING, 1, 0, bytes(8))) == []


OPEN = frame(HEADERS_FRAME, 4, 1, block())
FAULTS: dict[str, tuple[bytes, int]] = {
    "data on stream 0": (frame(DATA, 0, 0, b"x"), PROTOCOL_ERROR),
    "data on an idle stream": (frame(DATA, 0, 1, b"x"), PROTOCOL_ERROR),
    "padding longer than its frame": (OPEN + frame(DATA, 8, 1, bytes([9]) + b"x"), PROTOCOL_ERROR),
    "padded without padding": (OPEN + frame(DATA, 8, 1), FRAME_SIZE_ERROR),
    "headers on stream 0": (frame(HEADERS_FRAME, 4, 0, block()), PROTOCOL_ERROR),
    "a server's stream": (frame(HEADERS_FRAME, 4, 2, block()), PROTOCOL_ERROR),
    "headers padded beyond": (frame(HEADERS_FRAME, 12, 1, bytes([255]) + b"x"), PROTOCOL_ERROR),
    "headers without their priority": (frame(HEADERS_FRAME, 36, 1, b"x"), FRAME_SIZE_ERROR),
    "no HPACK": (frame(HEADERS_FRAME, 4, 1, b"\xff\xff\xff\xff\xff\xff\xff"), COMPRESSION),
    "an index beyond the tables": (frame(HEADERS_FRAME, 4, 1, b"\xbe"), COMPRESSION),
    "index 0": (frame(HEADERS_FRAME, 4, 1, b"\x80"), COMPRESSION),
    "a table larger than allowed": (frame(HEADERS_FRAME, 4, 1, b"\x3f\xff\xff\x03"), COMPRESSION),
    "Huffman padding of zeros": (frame(HEADERS_FRAME, 4, 1, b"\x00\x81\x00\x00"), COMPRESSION),
    "a frame between headers": (frame(HEADERS_FRAME, 0, 1, block()) + frame(PING, 0, 0, bytes(8)), PROTOCOL_ERROR),
    "a continuation of nothing": (frame(CONTINUATION, 4, 1, b""), PROTOCOL_ERROR),
    "endless continuations": (frame(HEADERS_FRAME, 0, 1) + 100 * frame(CONTINUATION, 0, 1), CALM),
    "an endless block": (frame(HEADERS_FRAME, 0, 1) + 9 * frame(CONTINUATION, 0, 1, bytes(16000)), CALM),
    "priority of stream 0": (frame(PRIORITY, 0, 0, bytes(5)), PROTOCOL_ERROR),
    "reset of stream 0": (frame(RST, 0, 0, bytes(4)), PROTOCOL_ERROR),
    "reset of an idle stream": (frame(RST, 0, 1, bytes(4)), PROTOCOL_ERROR),
    "reset of 3 bytes": (OPEN + frame(RST, 0, 1, bytes(3)), FRAME_SIZE_ERROR),
    "settings of a stream": (frame(SETTINGS, 0, 1), PROTOCOL_ERROR),
    "settings of 5 bytes": (frame(SETTINGS, 0, 0, bytes(5)), FRAME_SIZE_ERROR),
    "an acknowledgement with content": (frame(SETTINGS, 1, 0, bytes(6)), FRAME_SIZE_ERROR),
    "a frame size of 1": (frame(SETTINGS, 0, 0, struct.pack(">HI", 5, 1)), PROTOCOL_ERROR),
    "push of 2": (frame(SETTINGS, 0, 0, struct.pack(">HI", 2, 2)), PROTOCOL_ERROR),
    "a window of 2^31": (frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 1 << 31)), FLOW_CONTROL_ERROR),
    "a push": (frame(PUSH, 4, 1, bytes(4)), PROTOCOL_ERROR),
    "a ping of 7 bytes": (frame(PING, 0, 0, bytes(7)), FRAME_SIZE_ERROR),
    "a ping of a stream": (frame(PING, 0, 1, bytes(8)), PROTOCOL_ERROR),
    "a goodbye of a stream": (frame(GOAWAY, 0, 1, bytes(8)), PROTOCOL_ERROR),
    "a window update of 0": (frame(WINDOW, 0, 0, bytes(4)), PROTOCOL_ERROR),
    "a window update of 3 bytes": (frame(WINDOW, 0, 0, bytes(3)), FRAME_SIZE_ERROR),
    "a window beyond 2^31": (frame(WINDOW, 0, 0, b"\x7f\xff\xff\xff"), FLOW_CONTROL_ERROR),
    "a window update of an idle stream": (frame(WINDOW, 0, 1, b"\0\0\0\1"), PROTOCOL_ERROR),
    "a frame that is too long": (b"\xff\xff\xff" + bytes(6), FRAME_SIZE_ERROR),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_connection_ends_with_the_fault_named(fault: str) -> None:
    data, code = FAULTS[fault]
    for pieces in (None, 1):
        connection = begun()
        assert feed(connection, data, pieces) is None
        kind, _, stream, payload = frames(connection.output())[-1]
        assert (kind, stream) == (GOAWAY, 0)
        assert int.from_bytes(payload[4:8], "big") == code
        assert feed(connection, frame(PING, 0, 0, bytes(8))) is None
        connection.close()


MALFORMED: dict[str, list[tuple[str, str]]] = {
    "an upper-case name": [*REQUEST, ("X-Big", "1")],
    "an empty name": [*REQUEST, ("", "1")],
    "a line break": [*REQUEST, ("x", "a\r\nb")],
    "a zero": [*REQUEST, ("x", "a\0b")],
    "a pseudo-header that is none": [(":what", "x"), *REQUEST],
    "a pseudo-header at the end": [*REQUEST, (":authority", "x")],
    "no path": [header for header in REQUEST if header[0] != ":path"],
    "two paths": [REQUEST[2], *REQUEST],
    "connection": [*REQUEST, ("connection", "close")],
    "te: gzip": [*REQUEST[:-1], ("te", "gzip")],
}


@pytest.mark.parametrize("fault", MALFORMED)
def test_headers_that_make_no_request_are_reset_and_the_connection_goes_on(fault: str) -> None:
    connection = begun()
    encoder = hpack.Encoder()
    assert feed(connection, frame(HEADERS_FRAME, 5, 1, encoder.encode(MALFORMED[fault]))) == []
    assert frames(connection.output()) == [(RST, 0, 1, struct.pack(">I", PROTOCOL_ERROR))]
    events = feed(connection, frame(HEADERS_FRAME, 5, 3, encoder.encode(REQUEST)))
    assert events is not None
    assert [event.kind for event in events] == [HEADERS, END]


@pytest.mark.parametrize("start", [b"GET / HTTP/1.1\r\n\r\n", PREFACE + frame(PING, 0, 0, bytes(8)), b"\x16\x03\x01"])
def test_what_does_not_begin_as_http2_is_ended(start: bytes) -> None:
    connection = Connection(limits())
    assert not connection.settled
    assert feed(connection, start) is None


def test_faults_of_a_stream_are_its_own() -> None:
    connection = begun()
    assert feed(connection, frame(HEADERS_FRAME, 5, 1, block())) is not None
    connection.output()
    # data after the end
    events = feed(connection, frame(DATA, 0, 1, b"x"))
    assert events is not None
    assert [(event.kind, event.detail) for event in events] == [(RESET, STREAM_CLOSED)]
    assert frames(connection.output()) == [(RST, 0, 1, struct.pack(">I", STREAM_CLOSED))]
    # and of what is over already, nothing
    assert feed(connection, frame(RST, 0, 1, bytes(4)) + frame(WINDOW, 0, 1, b"\0\0\0\1")) == []


def test_a_message_over_the_limit_is_told_before_it_is_there() -> None:
    connection = begun(limits(message=100))
    events = feed(connection, OPEN + frame(DATA, 0, 1, b"\0" + struct.pack(">I", 101)))
    assert events is not None
    assert [(event.kind, event.size) for event in events[1:]] == [(TOO_LONG, 101)]
    connection.finish(1, b"grpc-status\x008\0")
    assert [kind for kind, *_ in frames(connection.output())] == [HEADERS_FRAME, RST]
    assert feed(connection, frame(DATA, 1, 1, bytes(96))) == []


def test_messages_on_their_way_share_an_account() -> None:
    shared = limits(message=1 << 20, held=250_000)
    one, two = begun(shared), begun(shared)
    start = OPEN + frame(DATA, 0, 1, b"\0" + struct.pack(">I", 200_000) + b"x")
    assert feed(one, start) is not None
    assert shared.held == 200_000
    events = feed(two, start)
    assert events is not None
    assert [event.kind for event in events] == [HEADERS, NO_ROOM]
    assert shared.held == 200_000
    one.close()
    assert shared.held == 0
    events = feed(two, frame(HEADERS_FRAME, 4, 3, block()) + frame(DATA, 0, 3, b"\0" + struct.pack(">I", 9) + b"x"))
    assert events is not None
    assert [event.kind for event in events] == [HEADERS]
    assert feed(two, frame(RST, 0, 3, bytes(4))) is not None
    assert shared.held == 0


def test_memory_for_a_long_message_is_not_taken_on_its_word() -> None:
    shared = limits(message=1 << 30, held=1 << 30)
    connection = begun(shared)
    assert feed(connection, OPEN + frame(DATA, 0, 1, b"\0" + struct.pack(">I", 1 << 30) + b"x")) is not None
    assert shared.held < 1000


def test_streams_beyond_the_limit_may_be_tried_again() -> None:
    connection = begun(limits(streams=2))
    for stream in (1, 3, 5):
        assert feed(connection, frame(HEADERS_FRAME, 4, stream, block())) is not None
    assert frames(connection.output()) == [(RST, 0, 5, struct.pack(">I", REFUSED))]
    assert connection.streams == 2


def test_headers_over_the_limit_end_their_stream_alone() -> None:
    connection = begun(limits(headers=1000))
    encoder = hpack.Encoder()
    long = encoder.encode([*REQUEST, ("x", "y" * 2000)])
    assert feed(connection, frame(HEADERS_FRAME, 5, 1, long)) == []
    assert frames(connection.output()) == [(RST, 0, 1, struct.pack(">I", CALM))]
    # the table has gone on with the client's
    events = feed(connection, frame(HEADERS_FRAME, 5, 3, encoder.encode(REQUEST)))
    assert events is not None
    assert [event.kind for event in events] == [HEADERS, END]


def test_a_client_that_only_takes_back_is_sent_away() -> None:
    connection = begun()
    for number in range(20_000):
        stream = 2 * number + 1
        events = feed(connection, frame(HEADERS_FRAME, 5, stream, block()) + frame(RST, 0, stream, bytes(4)))
        if events is None:
            break
    assert 9_000 < number < 11_000
    assert int.from_bytes(frames(connection.output())[-1][3][4:8], "big") == CALM


def test_acknowledgements_do_not_pile_up_for_one_who_does_not_read() -> None:
    connection = begun()
    connection.pause(True)
    for count in range(100_000):  # noqa: B007
        if feed(connection, frame(PING, 0, 0, bytes(8))) is None:
            break
    assert count < 5_000


def test_answers_wait_while_paused() -> None:
    connection = begun()
    assert feed(connection, frame(HEADERS_FRAME, 5, 1, block())) is not None
    connection.output()
    connection.pause(True)
    connection.message(1, b"x" * 1000)
    connection.finish(1, b"grpc-status\x000\0")
    assert sum(len(payload) for kind, _, _, payload in frames(connection.output()) if kind == DATA) == 0
    connection.pause(False)
    assert sum(len(payload) for kind, _, _, payload in frames(connection.output()) if kind == DATA) == 1005


def test_shutdown_lets_go_of_new_calls_only() -> None:
    connection = begun()
    assert feed(connection, frame(HEADERS_FRAME, 5, 1, block())) is not None
    connection.output()
    connection.shutdown()
    ((kind, _, _, payload),) = frames(connection.output())
    assert (kind, int.from_bytes(payload[:4], "big")) == (GOAWAY, 1)
    assert feed(connection, frame(HEADERS_FRAME, 5, 3, block())) == []
    assert frames(connection.output()) == [(RST, 0, 3, struct.pack(">I", REFUSED))]
    connection.finish(1, b"grpc-status\x000\0")
    assert connection.streams == 0


KINDS = st.integers(0, 11)
SOME_FRAME = st.builds(
    lambda kind, flags, stream, payload, good: frame(kind, flags, stream, block() if good and kind == 1 else payload),
    KINDS,
    st.sampled_from([0, 1, 4, 5, 8, 9, 12, 13, 32, 37, 45]),
    st.sampled_from([0, 1, 1, 3, 5, 7, 2]),
    st.one_of(st.binary(max_size=40), st.binary(max_size=30).map(grpc_message)),
    st.booleans(),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(SOME_FRAME, max_size=25), st.integers(1, 50))
def test_no_frames_break_it_and_nothing_is_held_in_the_end(found: list[bytes], pieces: int) -> None:
    shared = limits()
    connection = begun(shared)
    for one in found:
        events = feed(connection, one, pieces)
        if events is None:
            break
        for event in events:
            assert event.kind in (HEADERS, MESSAGE, END, RESET, TOO_LONG, NO_ROOM)
            if event.kind == END:
                connection.message(event.stream, b"answer")
                connection.finish(event.stream, b"grpc-status\x000\0")
        frames(connection.output())
    connection.close()
    assert shared.held == 0
