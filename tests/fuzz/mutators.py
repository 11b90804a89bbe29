"""Mutations that know a format: they keep checksums and lengths right, so that what lies behind them is reached."""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from random import Random
from typing import Any

from tritonclient.grpc import service_pb2

INTERESTING = (0, 1, 2, 127, 128, 255, 256, 32767, 32768, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1.5, 1e308, -1e-308, 2**31, 2**63, 2**64, 10**40, "", "\0", "\x1b[2J", "\n", "ä" * 300),
    *("..", "/", "model.onnx", "a/b", "clean", "mean", "\u202e", "x" * 2000, [], {}, [[]], [0] * 50, {"a": {"a": {}}}),
)
LINES = (
    *(
        b"max_queue: 0x10",
        b"max_batch: 1:30:00",
        b"host: 2001-99-99",
        b"host: !!python/object:os.system x",
        b"- a",
        b"&a",
    ),
    *(b"bundles: [a, b]", b"bundles: &a [*a]", b"<<: {host: x}", b'host: "\\0"', b"? [a]", b"host: !!binary x", b"---"),
    *(
        b"watch: yes",
        b"kernels: off",
        b"instances: ~",
        b"drain_seconds: .inf",
        b"log_level: debug",
        b"{",
        b"%YAML 9",
        b"...",
    ),
    *(
        b"a" * 64 + b" alice admin",
        b"0" * 64 + b"\tbob",
        b"# comment",
        b"z" * 64 + b" eve",
        b"a" * 64,
        b"\xff\xfe",
        b"\xc2\x85",
    ),
)


def generic(data: bytes, rng: Random) -> bytes:
    """A few bytes or blocks changed, moved, doubled, or gone."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        at = rng.randrange(len(content) + 1)
        size = min(rng.choice((1, 1, 2, 4, 16, 64)), len(content) - at)
        kind = rng.randrange(7)
        if kind == 0 and size:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and size:
            content[at : at + size] = rng.randbytes(size)
        elif kind == 2:
            content[at:at] = rng.randbytes(rng.choice((1, 2, 4, 16)))
        elif kind == 3:
            del content[at : at + size]
        elif kind == 4:
            content[at:at] = content[at : at + size] * rng.choice((1, 2, 20))
        elif kind == 5:
            width = rng.choice((1, 2, 4, 8))
            value = rng.choice(INTERESTING) % (1 << 8 * width)
            content[at : at + width] = value.to_bytes(width, rng.choice(("big", "little")))
        elif rng.random() < 0.3:
            del content[at:]
    return bytes(content)


def picture(data: bytes, rng: Random) -> bytes:
    """A JPEG, PNG or WebP with one of its parts mutated, doubled, moved or gone, its frame right."""
    try:
        if rng.random() < 0.2:
            return generic(data, rng)
        if data.startswith(b"\x89PNG"):
            return data[:8] + b"".join(_shuffled(_png_chunks(data), rng, _png_chunk, _png_body))
        if data.startswith(b"\xff\xd8"):
            return data[:2] + b"".join(_shuffled(_jpeg_segments(data), rng, _jpeg_segment, generic))
        if data.startswith(b"RIFF"):
            body = b"WEBP" + b"".join(_shuffled(_riff_chunks(data[12:]), rng, _riff_chunk, generic))
            return b"RIFF" + struct.pack("<I", len(body)) + body
    except (struct.error, ValueError, IndexError, zlib.error, OverflowError):
        # mutated beyond recognition before
        pass
    return generic(data, rng)


def request(data: bytes, rng: Random) -> bytes:
    """A request changed on the level of the message, or of its bytes."""
    message = service_pb2.ModelInferRequest()
    try:
        message.ParseFromString(data)
    except Exception:
        return generic(data, rng)
    kind = rng.randrange(9)
    tensor = rng.choice(message.inputs) if message.inputs else message.inputs.add(name="image", datatype="UINT8")
    if kind == 0:
        tensor.shape[:] = [rng.choice((-1, 0, 1, 2, 3, 4, 8, 9, 2**40)) for _ in range(rng.choice((1, 4, 4, 5)))]
    elif kind == 1:
        tensor.name = rng.choice(("image", "encoded_image", "", "\n", "x" * 500))
        tensor.datatype = rng.choice(("UINT8", "BYTES", "FP32", "\x1b"))
    elif kind == 2:
        message.inputs.add().CopyFrom(tensor)
    elif kind == 3:
        name = rng.choice(("router", "priority", "timeout", "sequence_id", "\0"))
        field = rng.choice(("bool_param", "int64_param", "string_param", "double_param", "uint64_param"))
        values: dict[str, Any] = {
            "bool_param": True,
            "string_param": rng.choice(("clean", "mean", "\n")),
            "double_param": 1.5,
        }
        setattr(message.parameters[name], field, values.get(field, rng.choice((0, 1, 2, 3, 2**62))))
    elif kind == 4:
        message.outputs.add(name=rng.choice(("probabilities", "label", "energy", "", "\x7f")))
    elif kind == 5:
        message.raw_input_contents.append(rng.randbytes(rng.choice((0, 1, 4, 48, 96))))
    elif kind == 6:
        field = rng.choice(("uint_contents", "bytes_contents", "fp32_contents", "bool_contents"))
        values = {"bytes_contents": b"x", "fp32_contents": 1.0, "bool_contents": True}
        getattr(tensor.contents, field).extend([values.get(field, rng.choice((0, 255, 256)))] * rng.choice((1, 48)))
    elif kind == 7:
        del message.raw_input_contents[:]
    else:
        return generic(data, rng)
    return bytes(message.SerializeToString())


def json_document(data: bytes, rng: Random) -> bytes:
    """A JSON document with a value, anywhere in it, replaced, doubled or gone; or its bytes mutated."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return generic(data, rng)
    if rng.random() < 0.2 or not isinstance(document, dict) or not document:
        return generic(data, rng)
    where: Any = document
    while True:
        keys = list(where) if isinstance(where, dict) else range(len(where))
        key = rng.choice(keys)
        if not isinstance(where[key], dict | list) or not where[key] or rng.random() < 0.2:
            break
        where = where[key]
    kind = rng.randrange(4)
    if kind == 0 and isinstance(where, list):
        where.append(where[key])
    elif kind == 1:
        del where[key]
    elif kind == 2 and isinstance(where, dict):
        where[rng.choice(("x", "\x1b", "clean", "files"))] = where[key]
    else:
        where[key] = rng.choice(ODD_VALUES)
    return json.dumps(document).encode("utf-8", "surrogatepass")


def archive(data: bytes, rng: Random) -> bytes:
    """A zip whose members are mutated and whose checksums are right; or its bytes mutated."""
    if rng.random() < 0.4:
        return generic(data, rng)
    out = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
            names = old.namelist()
            chosen = rng.choice(names)
            for name in names:
                content = old.read(name)
                if name == chosen:
                    content = rng.choice((_npy_header, generic))(content, rng)
                new.writestr(name, content, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))
    except Exception:
        return generic(data, rng)
    return out.getvalue()


def protobuf(data: bytes, rng: Random) -> bytes:
    """Fields wrapped into others, so that messages nest; or bytes mutated."""
    if rng.random() < 0.6:
        return generic(data, rng)
    at, end = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    inner = data[at:end]
    wrapped = bytes([rng.choice((1, 5, 6, 7, 11, 13, 15, 20, 22, 25)) << 3 & 0x7F | 2]) + _varint(len(inner)) + inner
    return data[:at] + wrapped + data[end:]


def lines(data: bytes, rng: Random) -> bytes:
    """A text with lines of interest put in, doubled or gone; or its bytes mutated."""
    if rng.random() < 0.4:
        return generic(data, rng)
    content = data.split(b"\n")
    at = rng.randrange(len(content))
    kind = rng.randrange(4)
    if kind == 0:
        content.insert(at, rng.choice(LINES))
    elif kind == 1:
        content[at] = rng.choice(LINES)
    elif kind == 2:
        del content[at]
    else:
        key, _, _ = content[at].partition(b":")
        content[at] = key + b": " + json.dumps(rng.choice(ODD_VALUES)).encode()
    return b"\n".join(content)


def _shuffled(parts: list[Any], rng: Random, write: Any, mutate: Any) -> list[bytes]:
    at = rng.randrange(len(parts))
    kind = rng.randrange(6)
    if kind == 0:
        del parts[at]
    elif kind == 1:
        parts.insert(rng.randrange(len(parts)), parts[at])
    else:
        parts[at] = (parts[at][0], mutate(parts[at][1], rng) if kind < 5 else generic(parts[at][1], rng))
    return [write(*part) for part in parts]


def _png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    chunks, at = [], 8
    while at + 12 <= len(data):
        (size,) = struct.unpack_from(">I", data, at)
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    return chunks


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png_body(body: bytes, rng: Random) -> bytes:
    if body[:1] == b"x" and len(body) > 13:
        rows = zlib.decompressobj().decompress(body, 1 << 16)
        return zlib.compress(generic(rows, rng))
    return generic(body, rng)


def _jpeg_segments(data: bytes) -> list[tuple[int, bytes]]:
    """(marker, content), the content of a scan with all data behind it; 0 for what is no segment."""
    segments, at = [], 2
    while at + 4 <= len(data):
        marker = data[at + 1]
        size = struct.unpack_from(">H", data, at + 2)[0] if marker not in (0xD9, 0xDA) else len(data) - at - 2
        segments.append((marker, data[at + 4 : at + 2 + size] if marker not in (0xD9, 0xDA) else data[at + 2 :]))
        at += 2 + max(size, 2)
    return segments


def _jpeg_segment(marker: int, body: bytes) -> bytes:
    if marker in (0xD9, 0xDA):
        return bytes([0xFF, marker]) + body
    return bytes([0xFF, marker]) + struct.pack(">H", min(len(body) + 2, 0xFFFF)) + body


def _riff_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    chunks, at = [], 0
    while at + 8 <= len(data):
        (size,) = struct.unpack_from("<I", data, at + 4)
        chunks.append((data[at : at + 4], data[at + 8 : at + 8 + size]))
        at += 8 + size + size % 2
    return chunks


def _riff_chunk(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


def _npy_header(content: bytes, rng: Random) -> bytes:
    """An .npy member with another dtype or shape in its header."""
    kinds = ("|u1", "<f4", "<f8", ">i2", "|O", "<U3", "|S4", "<M8[s]", "<c8", "|V9", "<f2", "[('a', '<f4')]")
    shapes = ("()", "(0,)", "(1,)", "(-1,)", "(2, 3)", "(99999999999999,)", "(" * 200, "(True,)", "(1e9,)", "None")
    text = (
        f"{{'descr': '{rng.choice(kinds)}', 'fortran_order': {rng.choice((True, False, 3))}, "
        f"'shape': {rng.choice(shapes)}, }}\n"
    ).encode()
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text + content[128:]


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
