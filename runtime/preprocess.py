"""From the bytes of a picture to the model's input, with limits; training's evaluation calls the same functions.

Bytes come from strangers: only three formats are decoded, sizes are checked before pixels are, and whatever is wrong
with them ends as InvalidPicture. All functions may run in several threads at once.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .bundle import Preprocessing, printable
from .containers import PNG_SIGNATURE, exif_orientation, jpeg_core, jpeg_scans, png_core
from .errors import InvalidPicture

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
"""Of the files that a directory of pictures is searched for, lower case."""
MAX_SCANS = 64
"""Of a JPEG. An encoder writes about ten; each costs a pass over all pixels but only a hundred bytes, so that 300 kB
of them can keep a core busy for half a minute."""
MAX_SCANNED = 1 << 30
"""Pixels of a JPEG times its scans."""
TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
"""What brings a picture upright, by its EXIF orientation; 1 is upright."""
TILE = 1024
"""Pixels, the side of the squares in which large pictures are converted: a whole one would need several copies."""

# Pillow warns of broken metadata with texts taken from it: strangers would write into the log, and Python would keep
# every text for ever.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


@dataclass(frozen=True)
class Limits:
    """What a picture may cost before it is refused."""

    max_bytes: int = 32 << 20
    """Of the encoded picture."""
    max_pixels: int = 64_000_000
    """Of the decoded picture, known from its header; 64 million take up to 512 MB while they are decoded, for Pillow
    keeps four bytes a pixel, and converting or turning a picture needs a second one."""


DEFAULT_LIMITS = Limits()


def decode(data: bytes, preprocessing: Preprocessing, limits: Limits = DEFAULT_LIMITS) -> NDArray[np.uint8]:
    """Decode a JPEG, PNG or WebP and prepare it: uint8 [H, W, 3], RGB.

    Raises: InvalidPicture, one line, for other formats, broken or truncated bytes and pictures over the limits.
    """
    return prepare(open_picture(data, limits), preprocessing)


def open_picture(data: bytes, limits: Limits = DEFAULT_LIMITS) -> Image.Image:
    """Decode a JPEG, PNG or WebP: RGB, upright, in its own size.

    Training reads its files with this very function. What of a picture is its pixels is decided as browsers do:

    - The EXIF orientation is applied, that of other metadata is not. Broken metadata spoils no pixels.
    - Of an animation the first frame is taken, of an animated PNG the picture shown where animation is unknown.
    - Transparent pictures are laid on white, as colours of 8 bits: a 16-bit RGB's transparent colour is ignored.
    - 16-bit greys are scaled, not clipped; of other 16-bit channels the upper byte is taken.
    - Colour profiles and gamma are not applied, as in the usual training pipelines. CMYK is converted without one and
      read as Adobe writes it, inverted, with or without Adobe's marker.

    Raises: InvalidPicture, as decode.
    """
    if not data:
        raise InvalidPicture("the picture is empty: 0 bytes")
    if len(data) > limits.max_bytes:
        raise InvalidPicture(f"the picture has {len(data)} bytes, more than the limit of {limits.max_bytes}")
    reader, format_name, data, orientation = _container(data)
    try:
        picture = reader(BytesIO(data))
        width, height = picture.size
        if min(width, height) < 1:
            raise InvalidPicture(f"the {format_name} has {width} x {height} pixels")
        if width * height > limits.max_pixels:
            raise InvalidPicture(
                f"the {format_name} has {width} x {height} pixels, more than the limit of {limits.max_pixels}"
            )
        if format_name == "JPEG":
            _check_scans(data, width * height)
        picture.load()
        if format_name == "WebP":
            orientation = exif_orientation(picture.info.get("exif", b""))
        if orientation != 1:
            from PIL.Image import Transpose

            picture = picture.transpose(Transpose[TURNS[orientation]])
        return _rgb(picture)
    except InvalidPicture:
        raise
    except Exception as error:  # hostile bytes: a decoder may fail in any way, and each way is the picture's fault
        reason = printable(str(error) or type(error).__name__)[:200]
        raise InvalidPicture(f"the {format_name} cannot be decoded: {reason}") from None


def prepare(picture: Image.Image, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Convert to RGB, bring the shorter side to `resize` pixels and crop the centre: uint8 [H, W, 3].

    A picture that has the model's size already is left as it is. The convention is torchvision's (Resize, then
    CenterCrop), but only the pixels inside the crop are computed, so that a sliver of a picture cannot fill the memory.
    """
    from PIL import Image

    picture = _rgb(picture)
    width, height = preprocessing.width, preprocessing.height
    if picture.size != (width, height):
        box = _crop_box(picture.size, preprocessing)
        resample = Image.Resampling[preprocessing.interpolation.upper()]
        picture = picture.resize((width, height), resample, box=box)
    return np.array(picture, np.uint8)


def read_picture(
    path: str | os.PathLike[str], preprocessing: Preprocessing, limits: Limits = DEFAULT_LIMITS
) -> NDArray[np.uint8]:
    """Read, decode and prepare a picture file: uint8 [H, W, 3].

    Raises: InvalidPicture, which names the file.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(limits.max_bytes + 1)
    except OSError as error:
        raise InvalidPicture(f"{path}: {error.strerror or error}") from None
    try:
        return decode(data, preprocessing, limits)
    except InvalidPicture as error:
        raise InvalidPicture(f"{path}: {error}") from None


def _container(data: bytes) -> tuple[Callable[[BytesIO], Image.Image], str, bytes, int]:
    """Who reads a picture, its format, what the reader is given of it, and the orientation known so far."""
    # The plugin itself, not Image.open: that tries other formats and has a process-wide pixel limit of its own.
    if data.startswith(b"\xff\xd8\xff"):
        from PIL.JpegImagePlugin import JpegImageFile

        return JpegImageFile, "JPEG", *jpeg_core(data)
    if data.startswith(PNG_SIGNATURE):
        from PIL.PngImagePlugin import PngImageFile

        return PngImageFile, "PNG", *png_core(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        from PIL.WebPImagePlugin import WebPImageFile

        return WebPImageFile, "WebP", data, 1
    raise InvalidPicture(f"not a JPEG, PNG or WebP picture: it begins with the bytes {data[:8].hex(' ')}")


def _check_scans(core: bytes, pixels: int) -> None:
    scans = jpeg_scans(core)
    if scans > MAX_SCANS:
        raise InvalidPicture(f"the JPEG has {scans} scans, more than the limit of {MAX_SCANS}")
    if scans * pixels > MAX_SCANNED:
        raise InvalidPicture(f"the JPEG has {scans} scans of {pixels} pixels, more than the limit of {MAX_SCANNED}")


def _rgb(picture: Image.Image) -> Image.Image:
    from PIL import Image

    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    width, height = picture.size
    if width * height <= TILE * TILE:
        return _converted(picture)
    whole = Image.new("RGB", picture.size)
    for top in range(0, height, TILE):
        for left in range(0, width, TILE):
            box = left, top, min(left + TILE, width), min(top + TILE, height)
            whole.paste(_converted(picture.crop(box)), box)
    return whole


def _converted(picture: Image.Image) -> Image.Image:
    from PIL import Image

    transparent = picture.info.get("transparency")
    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.int32)
        grey = ((values + 128) // 257).clip(0, 255).astype(np.uint8)
        if isinstance(transparent, int):
            grey[values == transparent] = 255
        return Image.fromarray(grey).convert("RGB")
    if transparent is not None or picture.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        layer = picture.convert("RGBA")
        white = Image.new("RGB", layer.size, (255, 255, 255))
        white.paste(layer, mask=layer.getchannel("A"))
        return white
    return picture.convert("RGB")


def _crop_box(size: tuple[int, int], preprocessing: Preprocessing) -> tuple[float, float, float, float]:
    """The part of the picture, in its own pixels, that resize and centre crop would keep."""
    width, height = size
    if preprocessing.resize is None:
        return 0, 0, width, height
    shorter, longer = min(size), max(size)
    scaled_longer = preprocessing.resize * longer // shorter
    scaled = (preprocessing.resize, scaled_longer) if width <= height else (scaled_longer, preprocessing.resize)
    left = round((scaled[0] - preprocessing.width) / 2)
    top = round((scaled[1] - preprocessing.height) / 2)
    x, y = width / scaled[0], height / scaled[1]
    return left * x, top * y, (left + preprocessing.width) * x, (top + preprocessing.height) * y
