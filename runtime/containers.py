"""JPEG and PNG files as containers: what of them the decoder is given, and the EXIF orientation that lies beside it.

Comments, profiles, texts, thumbnails and animations change no pixel of ours, but decoders unpack them, in Python and
with the memory of whatever a stranger packed. So only what makes the first picture's pixels goes on.
"""

from __future__ import annotations

import re
import struct

from .errors import InvalidPicture

MAX_SEGMENTS = 4096
"""Of a JPEG before its first scan; 32 MB of full ones are 512. A million empty ones take seconds to look at."""
MAX_TABLES = 1 << 18
"""Bytes of a JPEG's tables before its first scan; an encoder writes less than a thousand."""
MAX_CHUNKS = 1 << 16
"""Of a PNG; encoders write about 8 kB into each."""
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_ORIENTATION, _SHORT = 0x0112, 3
_EXIF = b"Exif\0\0"
_EOI, _SOS, _APP1, _COM = 0xD9, 0xDA, 0xE1, 0xFE
_COLOUR = {0xE0: b"JFIF\0", 0xEE: b"Adobe"}
"""Application segments from which the decoder guesses the colour space, by marker."""
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
"""In a scan's data, what is neither a stuffed byte, nor padding, nor a restart."""


def jpeg_core(data: bytes) -> tuple[bytes, int]:
    """A JPEG without its metadata, and its orientation, 1 to 8 (EXIF 2.32).

    Raises: InvalidPicture for endless segments or tables. What is broken otherwise is left to the decoder.
    """
    orientation = 1
    kept = [data[:2]]
    at, tables, dropped = 2, 0, False
    for _ in range(MAX_SEGMENTS):
        match = _MARKER.search(data, at)
        if match is None or match.end() + 2 > len(data):
            kept.append(data[at:])
            break
        start, marker = match.start(), data[match.end() - 1]
        # what lies between segments is padding
        dropped |= start > at
        if marker in (_SOS, _EOI):
            kept.append(data[start:])
            break
        end = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        application = marker & 0xF0 == 0xE0 or marker == _COM
        if not application or (marker in _COLOUR and data.startswith(_COLOUR[marker], start + 4)):
            kept.append(data[start:end])
            tables += end - start
            if tables > MAX_TABLES:
                raise InvalidPicture(f"the JPEG's tables take more than {MAX_TABLES} bytes")
        else:
            dropped = True
            if marker == _APP1 and orientation == 1 and data.startswith(_EXIF, start + 4):
                orientation = exif_orientation(data[start + 4 : end])
        at = end
    else:
        raise InvalidPicture(f"the JPEG has more than {MAX_SEGMENTS} segments before its first scan")
    return b"".join(kept) if dropped else data, orientation


def jpeg_scans(core: bytes) -> int:
    """How many scans a JPEG has, each of which costs a pass over all its pixels; core: from jpeg_core."""
    count = core.count(b"\xff\xda")
    if count <= 1:
        return count
    # behind the picture's end may lie anything, a film for instance
    scans = at = 0
    while (match := _MARKER.search(core, at)) is not None:
        at = match.end()
        marker = core[at - 1]
        if marker == _EOI:
            break
        scans += marker == _SOS
        at += int.from_bytes(core[at : at + 2], "big")
    return scans


def png_core(data: bytes) -> tuple[bytes, int]:
    """A PNG of its critical chunks and tRNS alone, and its orientation, 1 to 8 (EXIF 2.32).

    An animated PNG's frames are ancillary: what is left is the picture that decoders without animation show.

    Raises: InvalidPicture for endless chunks. What is broken otherwise is left to the decoder.
    """
    orientation = 1
    kept = [data[:8]]
    at, dropped = 8, False
    for _ in range(MAX_CHUNKS):
        kind = data[at + 4 : at + 8]
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if len(kind) < 4 or end > len(data) or kind == b"IEND":
            kept.append(data[at:end])
            dropped |= end < len(data)
            break
        if kind[0] & 0x20 and kind != b"tRNS":
            dropped = True
            if kind == b"eXIf":
                orientation = exif_orientation(data[at + 8 : end - 4])
        else:
            kept.append(data[at:end])
        at = end
    else:
        raise InvalidPicture(f"the PNG has more than {MAX_CHUNKS} chunks")
    return b"".join(kept) if dropped else data, orientation


def exif_orientation(exif: bytes) -> int:
    """The orientation, 1 to 8, in an EXIF block; 1 where it has none or is broken, for metadata spoils no pixels."""
    tiff = exif.removeprefix(_EXIF).removeprefix(_EXIF)
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, directory)
        for at in range(directory + 2, directory + 2 + 12 * entries, 12):
            tag, kind, count, value = struct.unpack_from(order + "HHIH", tiff, at)
            if tag == _ORIENTATION:
                return value if (kind, count) == (_SHORT, 1) and 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1
