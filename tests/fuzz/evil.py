"""Pictures that people and attackers send, made from code, each with what must come of it."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 48
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Evil:
    """A file and its outcome: the pixels of the whole upright picture, or the error's line as a regular expression."""

    data: bytes
    pixels: Pixels | None = None
    line: str | None = None
    tolerance: int = 0
    """Largest difference of a pixel."""


def pattern(height: int = SIDE, width: int = SIDE) -> Pixels:
    """No symmetry in it, smooth enough for JPEG: uint8 [height, width, 3]."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    return np.stack([255 * x, 255 * y, 128 + 100 * np.sin(5 * x + 2 * y)], axis=2).astype(np.uint8)


def encoded(pixels: Pixels | Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    picture.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *before: bytes, interlace: int = 0) -> bytes:
    """A PNG of unfiltered rows (each with its leading zero), by its specification and not by Pillow."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(before) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def rows(array: NDArray[Any]) -> bytes:
    return b"".join(b"\0" + row.tobytes() for row in array)


def evil_pictures() -> dict[str, Evil]:
    """All of them by name."""
    cases = _colours() | _oriented() | _animated() | _shapes() | _metadata() | _bombs() | _truncated() | _impostors()
    return cases | _jpegs()


def _colours() -> dict[str, Evil]:
    colour = pattern()
    grey = np.ascontiguousarray(colour[..., 0])
    alpha = np.ascontiguousarray(colour[..., 1])
    wide = (np.arange(SIDE * SIDE).reshape(SIDE, SIDE) * 28 % 65536).astype(np.uint16)
    indices = grey // 64
    palette = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9]], np.uint8)
    bits = grey > 100
    on_white = _on_white(colour, alpha)
    seen = palette[indices]
    seen[indices == 1] = 255
    plte = chunk(b"PLTE", palette.tobytes())
    keyed = grey[..., None].repeat(3, 2)
    keyed[grey == grey[0, 7]] = 255
    return {
        "rgb.png": Evil(encoded(colour, "PNG"), colour),
        "grey.png": Evil(encoded(grey, "PNG"), grey[..., None].repeat(3, 2)),
        "1-bit.png": Evil(png(SIDE, SIDE, 1, 0, rows(np.packbits(bits, axis=1))), _grey(np.where(bits, 255, 0))),
        "interlaced.png": Evil(_interlaced(colour), colour),
        "palette.png": Evil(png(SIDE, SIDE, 8, 3, rows(indices), plte), palette[indices]),
        "palette with transparency.png": Evil(
            png(SIDE, SIDE, 8, 3, rows(indices), plte, chunk(b"tRNS", b"\xff\x00")), seen
        ),
        "grey with a transparent level.png": Evil(
            png(SIDE, SIDE, 8, 0, rows(grey), chunk(b"tRNS", bytes([0, int(grey[0, 7])]))), keyed
        ),
        "LA.png": Evil(encoded(np.dstack([grey, alpha]), "PNG"), _on_white(_grey(grey), alpha), tolerance=1),
        "RGBA.png": Evil(encoded(np.dstack([colour, alpha]), "PNG"), on_white, tolerance=1),
        "RGBA lossless.webp": Evil(
            encoded(np.dstack([colour, alpha]), "WEBP", lossless=True, exact=True), on_white, tolerance=1
        ),
        "lossless.webp": Evil(encoded(colour, "WEBP", lossless=True), colour),
        "16-bit grey.png": Evil(
            png(SIDE, SIDE, 16, 0, rows(wide.astype(">u2"))), _grey(np.rint(wide / 257).astype(np.uint8))
        ),
        "16-bit grey with a transparent level.png": Evil(
            png(SIDE, SIDE, 16, 0, rows(wide.astype(">u2")), chunk(b"tRNS", b"\0\0")),
            _grey(np.where(wide == 0, 255, np.rint(wide / 257)).astype(np.uint8)),
        ),
        "16-bit colour.png": Evil(
            png(SIDE, SIDE, 16, 2, rows(_grey(wide).astype(">u2"))), _grey((wide >> 8).astype(np.uint8))
        ),
        "gamma and sRGB are not applied.png": Evil(
            png(SIDE, SIDE, 8, 2, rows(colour), chunk(b"gAMA", struct.pack(">I", 20000)), chunk(b"sRGB", b"\0")), colour
        ),
    }


def _oriented() -> dict[str, Evil]:
    colour = pattern(SIDE, SIDE + 16)
    stored = {  # what lies in the file where `colour` is to be seen: EXIF 2.32, tag 0x0112
        1: colour,
        2: colour[:, ::-1],
        3: colour[::-1, ::-1],
        4: colour[::-1],
        5: colour.transpose(1, 0, 2),
        6: np.rot90(colour),
        7: np.rot90(colour, 2).transpose(1, 0, 2),
        8: np.rot90(colour, -1),
    }
    cases: dict[str, Evil] = {}
    for orientation, pixels in stored.items():
        content = np.ascontiguousarray(pixels)
        options: dict[str, dict[str, Any]] = {
            "PNG": {},
            "WEBP": {"lossless": True},
            "JPEG": {"quality": 100, "subsampling": 0},
        }
        for kind, more in options.items():
            data = encoded(content, kind, exif=exif(orientation), **more)
            cases[f"orientation {orientation}.{kind.lower()}"] = Evil(data, colour, tolerance=4 * (kind == "JPEG"))
    data = encoded(colour, "PNG", exif=exif(9))
    return cases | {
        "orientation 9.png": Evil(data, colour),
        "orientation of the other byte order.png": Evil(
            encoded(np.ascontiguousarray(stored[6]), "PNG", exif=exif(6, big=True)), colour
        ),
    }


def exif(orientation: int, big: bool = False) -> bytes:
    order, mark = (">", b"MM\0*") if big else ("<", b"II*\0")
    entry = struct.pack(order + "HHIHH", 0x0112, 3, 1, orientation, 0)
    return b"Exif\0\0" + mark + struct.pack(order + "IH", 8, 1) + entry + bytes(4)


def _animated() -> dict[str, Evil]:
    first, second = Image.fromarray(pattern()), Image.fromarray(pattern()[::-1].copy())
    more: dict[str, Any] = {"save_all": True, "append_images": [second, first]}
    hidden = encoded(first, "PNG", default_image=True, **more)
    return {
        "animated.png": Evil(encoded(first, "PNG", **more), pattern()),
        "animation with another default.png": Evil(hidden, pattern()),
        "animated.webp": Evil(encoded(first, "WEBP", lossless=True, **more), pattern()),
        "animated.gif": Evil(encoded(first, "GIF", **more), line=_no_picture("47 49 46 38")),
    }


def _shapes() -> dict[str, Evil]:
    one = np.array([[[10, 200, 30]]], np.uint8)
    sliver = pattern(1, 30_000)
    tall = pattern(30_000, 1)
    return {
        "1x1.png": Evil(encoded(one, "PNG"), one),
        "1x1.jpeg": Evil(encoded(one, "JPEG", quality=100, subsampling=0), one, tolerance=3),
        "1x1.webp": Evil(encoded(one, "WEBP", lossless=True), one),
        "30000x1.png": Evil(encoded(sliver, "PNG"), sliver),
        "1x30000.png": Evil(encoded(tall, "PNG"), tall),
        "0x0.png": Evil(png(0, 0, 8, 2, b""), line=r"^the PNG (has 0 x 0 pixels|cannot be decoded: .+)$"),
        "zero bytes": Evil(b"", line=r"^the picture is empty: 0 bytes$"),
        "wrong extension.jpg": Evil(encoded(pattern(), "PNG"), pattern()),
    }


def _metadata() -> dict[str, Evil]:
    colour = pattern()
    body = rows(colour)
    bomb = zlib.compress(bytes(60_000_000), 9)
    jpeg = encoded(colour, "JPEG")
    broken = chunk(b"tEXt", b"Comment\0x")[:-1] + b"?"
    return {
        "text bomb.png": Evil(png(SIDE, SIDE, 8, 2, body, chunk(b"zTXt", b"Comment\0\0" + bomb)), colour),
        "profile bomb.png": Evil(png(SIDE, SIDE, 8, 2, body, chunk(b"iCCP", b"p\0\0" + bomb)), colour),
        "huge text.png": Evil(png(SIDE, SIDE, 8, 2, body, chunk(b"tEXt", b"Comment\0" + b"x" * 2_000_000)), colour),
        "text with a wrong checksum.png": Evil(png(SIDE, SIDE, 8, 2, body, broken), colour),
        "exif bomb.png": Evil(png(SIDE, SIDE, 8, 2, body, chunk(b"eXIf", _exif_bomb(20_000, 100_000))), colour),
        "exif bomb.jpeg": Evil(
            jpeg[:2] + _segment(0xE1, b"Exif\0\0" + _exif_bomb(2000, 40_000)) + jpeg[2:], _pillow(jpeg)
        ),
        "endless chunks.png": Evil(
            png(SIDE, SIDE, 8, 2, body, *[chunk(b"prVt", b"")] * 70_000), line=r"^the PNG has more than 65536 chunks$"
        ),
        "endless comments.jpeg": Evil(
            jpeg[:2] + _segment(0xFE, b"") * 100_000 + jpeg[2:],
            line=r"^the JPEG has more than 4096 segments before its first scan$",
        ),
        "endless tables.jpeg": Evil(
            jpeg[:2] + _segment(0xDB, (b"\0" + b"\1" * 64) * 1000) * 10 + jpeg[2:],
            line=r"^the JPEG's tables take more than 262144 bytes$",
        ),
    }


def _bombs() -> dict[str, Evil]:
    huge = 2**31 - 1
    jpeg = bytearray(encoded(pattern(), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
    webp = bytearray(encoded(pattern(), "WEBP", lossless=True))
    webp[21:25] = (int.from_bytes(webp[21:25], "little") | 0xFFFFFFF).to_bytes(4, "little")
    progressive = encoded(pattern(), "JPEG", progressive=True)
    scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    return {
        "bomb.png": Evil(
            png(50_000, 50_000, 8, 2, bytes(1000)),
            line=r"^the PNG has 50000 x 50000 pixels, more than the limit of 64000000$",
        ),
        "largest.png": Evil(
            png(huge, huge, 8, 2, bytes(1000)),
            line=rf"^the PNG has {huge} x {huge} pixels, more than the limit of \d+$",
        ),
        "bomb.jpeg": Evil(bytes(jpeg), line=r"^the JPEG has 65535 x 65535 pixels, more than the limit of 64000000$"),
        "bomb.webp": Evil(bytes(webp), line=r"^the WebP (cannot be decoded: .+|has \d+ x \d+ pixels, more than .+)$"),
        "thousands of scans.jpeg": Evil(
            progressive[:-2] + scan * 3000 + progressive[-2:],
            line=r"^the JPEG has 30\d\d scans, more than the limit of 64$",
        ),
    }


def _truncated() -> dict[str, Evil]:
    cases: dict[str, Evil] = {}
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    for kind, name in (("JPEG", "JPEG"), ("PNG", "PNG"), ("WEBP", "WebP")):
        data = encoded(noise, kind)
        for eighth in range(1, 8):
            cases[f"{eighth} eighths.{kind.lower()}"] = Evil(
                data[: len(data) * eighth // 8], line=rf"^the {name} cannot be decoded: .+$"
            )
    return cases


def _impostors() -> dict[str, Evil]:
    zipped = b"PK\3\4" + bytes(40)
    return {
        "script.png": Evil(b"<html><script>alert(1)</script></html>", line=_no_picture("3c 68 74 6d 6c 3e 3c 73")),
        "svg.png": Evil(b'<svg xmlns="http://www.w3.org/2000/svg"/>', line=_no_picture("3c 73 76 67")),
        "zip.jpg": Evil(zipped, line=_no_picture("50 4b 03 04")),
        "tiff.jpg": Evil(encoded(pattern(), "TIFF"), line=_no_picture("(49 49 2a 00|4d 4d 00 2a)")),
        "icon.ico": Evil(encoded(pattern(), "ICO"), line=_no_picture("00 00 01 00")),
        "bitmap.bmp": Evil(encoded(pattern(), "BMP"), line=_no_picture("42 4d")),
        "sound.webp": Evil(b"RIFF\x24\0\0\0WAVEfmt " + bytes(30), line=_no_picture("52 49 46 46")),
        "signature alone.png": Evil(b"\x89PNG\r\n\x1a\n", line=r"^the PNG cannot be decoded: .+$"),
        "signature alone.jpeg": Evil(b"\xff\xd8\xff", line=r"^the JPEG cannot be decoded: .+$"),
        "signature alone.webp": Evil(b"RIFF\4\0\0\0WEBP", line=r"^the WebP cannot be decoded: .+$"),
        "escape sequence": Evil(b"\x1b[2J\x1b[31mhello", line=_no_picture("1b 5b 32 4a")),
    }


def _jpegs() -> dict[str, Evil]:
    colour = pattern()
    plain = encoded(colour, "JPEG", quality=90)
    cmyk = encoded(Image.fromarray(colour).convert("CMYK"), "JPEG", quality=95)
    with_profile = encoded(Image.fromarray(colour).convert("CMYK"), "JPEG", quality=95, icc_profile=b"no profile" * 20)
    at = cmyk.index(b"\xff\xee")
    unmarked = cmyk[:at] + cmyk[at + 2 + struct.unpack(">H", cmyk[at + 2 : at + 4])[0] :]
    progressive = encoded(colour, "JPEG", quality=90, progressive=True)
    return {
        "plain.jpeg": Evil(plain, _pillow(plain)),
        "progressive.jpeg": Evil(progressive, _pillow(progressive)),
        "grey.jpeg": Evil(encoded(colour[..., 0].copy(), "JPEG", quality=100), _grey(colour[..., 0]), tolerance=2),
        "CMYK.jpeg": Evil(cmyk, colour, tolerance=12),
        "CMYK with a profile.jpeg": Evil(with_profile, colour, tolerance=12),
        "CMYK without Adobe's marker.jpeg": Evil(unmarked, colour, tolerance=12),
        "trailing garbage.jpeg": Evil(plain + np.random.default_rng(3).bytes(5000) + b"\xff\xda" * 200, _pillow(plain)),
        "junk between segments.jpeg": Evil(plain[:2] + b"\xff\xff\xff" + plain[2:], _pillow(plain)),
        "a second picture behind.jpeg": Evil(plain + encoded(colour[::-1].copy(), "JPEG"), _pillow(plain)),
        "12 bits.jpeg": Evil(
            plain.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"),
            line=r"^the JPEG cannot be decoded: .*12-bit.*$",
        ),
    }


def _pillow(data: bytes) -> Pixels:
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture.convert("RGB"))


def _grey(values: NDArray[Any]) -> NDArray[Any]:
    values = values.astype(np.uint8) if values.dtype != np.uint16 else values
    return values[..., None].repeat(3, 2)


def _on_white(colour: Pixels, alpha: Pixels) -> Pixels:
    share = alpha[..., None] / 255
    return np.rint(colour * share + 255 * (1 - share)).astype(np.uint8)


def _interlaced(colour: Pixels) -> bytes:
    """Adam7: seven passes of start and step in x and y (PNG specification, 8.2)."""
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    body = b"".join(rows(colour[y::dy, x::dx]) for x, y, dx, dy in passes)
    return png(colour.shape[1], colour.shape[0], 8, 2, body, interlace=1)


def _segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def _exif_bomb(entries: int, size: int) -> bytes:
    """Entries that all name one large value: a reader that keeps each needs their product."""
    where = 8 + 2 + 12 * entries + 4
    directory = b"".join(struct.pack("<HHII", 0x1000 + i, 7, size, where) for i in range(entries))
    return b"II*\0" + struct.pack("<IH", 8, entries) + directory + bytes(4) + b"x" * size


def _no_picture(first: str) -> str:
    return rf"^not a JPEG, PNG or WebP picture: it begins with the bytes {first}"
