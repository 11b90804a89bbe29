"""Where an ONNX file says that its weights lie: the names of the files outside it, read without the onnx package.

ONNX Runtime before 1.24 follows such a name out of the model's directory, so it must be known before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

MESSAGES: dict[str, dict[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TensorProto": {13: "StringStringEntryProto"},
}
"""Message -> number of each field that leads to a tensor's external_data -> message in it (onnx.proto3)."""
BLOCK = 1 << 20


def external_files(path: Path) -> set[str]:
    """Locations that any tensor of the model names, relative to the model's directory; empty for most models.

    Raises: ValueError where the file is no protobuf message; OSError.
    """
    # read, not mapped: a disk that fails, or a file that shrinks, beneath a map ends the process
    with path.open("rb") as file:
        # a tensor outside has an entry of this very key: most files need no walk
        if not _holds(file, b"location"):
            return set()
        file.seek(0)
        return set(_locations(file.read()))


def _holds(file: BinaryIO, word: bytes) -> bool:
    # one block for all, begun by the end of the one before; zeros at first, of which the word has none
    kept = len(word) - 1
    block = bytearray(kept + BLOCK)
    while count := file.readinto(memoryview(block)[kept:]):  # type: ignore[attr-defined]
        if block.find(word, 0, kept + count) >= 0:
            return True
        block[:kept] = block[count : kept + count]
    return False


def _locations(data: bytes) -> Iterator[str]:
    waiting = [("ModelProto", 0, len(data))]
    while waiting:
        message, start, end = waiting.pop()
        if message == "StringStringEntryProto":
            entry = {number: data[a:b] for number, a, b in _fields(data, start, end)}
            if entry.get(1) == b"location":
                yield entry.get(2, b"").decode("utf-8", "replace")
            continue
        inner = MESSAGES[message]
        waiting += [(inner[number], a, b) for number, a, b in _fields(data, start, end) if number in inner]


def _fields(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, start and end of the length-delimited fields of one message."""
    at = start
    while at < end:
        key, at = _varint(data, at, end)
        wire = key & 7
        if wire == 0:
            _, at = _varint(data, at, end)
        elif wire == 1:
            at += 8
        elif wire == 2:
            size, at = _varint(data, at, end)
            yield key >> 3, at, at + size
            at += size
        elif wire == 5:
            at += 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
    if at != end:
        raise ValueError(f"a field reaches beyond its message at byte {at}")


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError(f"a number without end at byte {at}")
