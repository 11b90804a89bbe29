"""One HTTP/2 connection's state, in C: the ABI of csrc/http2.h through ctypes."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import NamedTuple

from trivium.kernels.native import find_library

HEADERS, MESSAGE, END, RESET, TOO_LONG, NO_ROOM = range(1, 7)
_POINTER = ctypes.c_void_p
_LONG = ctypes.c_int64


class _Event(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_int32),
        ("stream", ctypes.c_uint32),
        ("data", _POINTER),
        ("object", ctypes.py_object),
        ("size", _LONG),
        ("detail", _LONG),
    ]


class _Memory(ctypes.Structure):
    _fields_ = [("make", _POINTER), ("bytes", _POINTER), ("drop", _POINTER)]


class _Limits(ctypes.Structure):
    _fields_ = [
        ("max_message", _LONG),
        ("max_held", _LONG),
        ("held", ctypes.POINTER(_LONG)),
        ("max_streams", ctypes.c_int32),
        ("max_headers", ctypes.c_int32),
        ("memory", _Memory),
    ]


class Event(NamedTuple):
    """Something that a client did."""

    kind: int
    """HEADERS, MESSAGE, END, RESET, TOO_LONG or NO_ROOM; see csrc/http2.h."""
    stream: int
    data: bytes
    """Of HEADERS name, 0, value, 0 for each; of MESSAGE the message."""
    size: int
    """Bytes of a message, also of one that is TOO_LONG or has NO_ROOM."""
    detail: int
    """Of MESSAGE 1 where it is compressed; of RESET the error code."""


class Limits:
    """What clients may ask for; connections share the account of bytes that are still arriving.

    Args:
        max_message: bytes of one message.
        max_held: bytes of messages that are not complete, of all connections together.
        max_streams: calls open at once on a connection.
        max_headers: bytes of a call's headers, each counted as name + value + 32.
    """

    def __init__(self, max_message: int, max_held: int, max_streams: int, max_headers: int = 16384) -> None:
        self.max_message = max_message
        self._held = _LONG(0)
        held = ctypes.pointer(self._held)
        self.struct = _Limits(max_message, max_held, held, max_streams, max_headers, _bytes_objects())

    @property
    def held(self) -> int:
        """Bytes of messages that are still arriving."""
        return int(self._held.value)


class Connection:
    """The server's side of a connection, without its socket: bytes in, events out; answers in, bytes out.

    Raises: MemoryError.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._library = library()
        self._handle = self._library.http2_open(ctypes.byref(limits.struct))
        if not self._handle:
            raise MemoryError
        self._events = ctypes.POINTER(_Event)()
        self._size = _LONG()

    def close(self) -> None:
        """Free what it holds. Nothing else may be called after it."""
        handle, self._handle = self._handle, None
        self._library.http2_close(handle)

    def receive(self, address: int, size: int) -> list[Event] | None:
        """What `size` bytes at `address` mean; None where the connection is at its end, with a last output to send."""
        events = self._events
        count = self._library.http2_receive(self._handle, address, size, ctypes.byref(events))
        if count < 0:
            return None
        found = []
        for i in range(count):
            event = events[i]
            if event.kind == MESSAGE:
                data = event.object
                # the reference that came with the event
                _drop(data)
            else:
                data = ctypes.string_at(event.data, event.size) if event.data else b""
            found.append(Event(event.kind, event.stream, data, event.size, event.detail))
        return found

    def message(self, stream: int, data: bytes) -> None:
        """Send a message of an answer; nothing happens where the call is over."""
        self._library.http2_message(self._handle, stream, data, len(data))

    def finish(self, stream: int, trailers: bytes) -> None:
        """End an answer; trailers are name, 0, value, 0 for each."""
        self._library.http2_finish(self._handle, stream, trailers, len(trailers))

    def shutdown(self) -> None:
        """Take no more calls; those that run go on."""
        self._library.http2_shutdown(self._handle)

    def ping(self) -> None:
        """Ask for a sign of life."""
        self._library.http2_ping(self._handle)

    def pause(self, paused: bool) -> None:
        """Whether answers wait here instead of becoming output."""
        self._library.http2_pause(self._handle, paused)

    def output(self) -> bytes:
        """Bytes for the client since the last call."""
        data = self._library.http2_output(self._handle, ctypes.byref(self._size))
        size = self._size.value
        return ctypes.string_at(data, size) if size else b""

    @property
    def settled(self) -> bool:
        """Whether the client has begun as HTTP/2 asks for."""
        return bool(self._library.http2_settled(self._handle))

    @property
    def streams(self) -> int:
        """Calls that are not over."""
        return int(self._library.http2_streams(self._handle))


_drop = ctypes.pythonapi.Py_DecRef
_drop.restype, _drop.argtypes = None, [ctypes.py_object]


def _bytes_objects() -> _Memory:
    """Memory of messages: Python's own bytes."""
    api = ctypes.pythonapi
    functions = api.PyBytes_FromStringAndSize, api.PyBytes_AsString, api.Py_DecRef
    return _Memory(*(ctypes.cast(function, _POINTER) for function in functions))


@cache
def library() -> ctypes.PyDLL:
    """The library with its functions declared. Its calls are short and keep the interpreter's lock.

    Raises: FileNotFoundError where it was never built; OSError where it cannot be loaded.
    """
    lib = ctypes.PyDLL(str(find_library(__package__, "libtrivium_http2.so")))
    for name, result, arguments in (
        ("open", _POINTER, [ctypes.POINTER(_Limits)]),
        ("close", None, [_POINTER]),
        ("receive", _LONG, [_POINTER, _POINTER, _LONG, ctypes.POINTER(ctypes.POINTER(_Event))]),
        ("message", None, [_POINTER, ctypes.c_uint32, ctypes.c_char_p, _LONG]),
        ("finish", None, [_POINTER, ctypes.c_uint32, ctypes.c_char_p, _LONG]),
        ("shutdown", None, [_POINTER]),
        ("ping", None, [_POINTER]),
        ("pause", None, [_POINTER, ctypes.c_int32]),
        ("output", _POINTER, [_POINTER, ctypes.POINTER(_LONG)]),
        ("settled", ctypes.c_int32, [_POINTER]),
        ("streams", _LONG, [_POINTER]),
    ):
        function = getattr(lib, f"http2_{name}")
        function.restype, function.argtypes = result, arguments
    return lib
