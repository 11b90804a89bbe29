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

from .bundle import Preprocessing
from .errors import InvalidPicture

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
"""Of the files that a directory of pictures is searched for, lower case."""
MAX_SCANS = 64
"""Of a JPEG. An encoder writes about ten; each costs a pass over all pixels but only a hundred bytes, so that 300 kB
of them can keep a core busy for half a minute."""
_ORIENTATION = 0x0112

# Pillow warns of broken metadata with texts taken from it: strangers would write into the log, and Python would keep
# every text for ever.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


@dataclass(frozen=True)
class Limits:
    """What a picture may cost before it is refused."""

    max_bytes: int = 32 << 20
    """Of the encoded picture."""
    max_pixels: int = 64_000_000
    """Of the decoded picture, known from its header; 64 million take 192 MB while they are decoded."""


DEFAULT_LIMITS = Limits()


def decode(data: bytes, preprocessing: Preprocessing, limits: Limits = DEFAULT_LIMITS) -> NDArray[np.uint8]:
    """Decode a JPEG, PNG or WebP and prepare it: uint8 [H, W, 3], RGB.

    Raises: InvalidPicture, one line, for other formats, broken or truncated bytes and pictures over the limits.
    """
    return prepare(open_picture(data, limits), preprocessing)


def open_picture(data: bytes, limits: Limits = DEFAULT_LIMITS) -> Image.Image:
    """Decode a JPEG, PNG or WebP: RGB, upright, in its own size.

    The EXIF orientation is applied and an animation's first frame taken. Colour profiles are not applied, as in the
    usual training pipelines; CMYK is converted without one.

    Raises: InvalidPicture, as decode.
    """
    if not data:
        raise InvalidPicture("the picture is empty: 0 bytes")
    if len(data) > limits.max_bytes:
        raise InvalidPicture(f"the picture has {len(data)} bytes, more than the limit of {limits.max_bytes}")
    reader, format_name = _reader(data)
    try:
        picture = reader(BytesIO(data))
        width, height = picture.size
        if min(width, height) < 1:
            raise InvalidPicture(f"the {format_name} has {width} x {height} pixels")
        if width * height > limits.max_pixels:
            raise InvalidPicture(
                f"the {format_name} has {width} x {height} pixels, more than the limit of {limits.max_pixels}"
            )
        picture.load()
        return upright_rgb(picture)
    except InvalidPicture:
        raise
    except Exception as error:  # hostile bytes: a decoder may fail in any way, and each way is the picture's fault
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise InvalidPicture(f"the {format_name} cannot be decoded: {reason}") from None


def upright_rgb(picture: Image.Image) -> Image.Image:
    """A picture as `prepare` wants it: RGB, and turned as its EXIF orientation says."""
    return _rgb(_upright(picture))


def prepare(picture: Image.Image, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Convert to RGB, bring the shorter side to `resize` pixels and crop the centre: uint8 [H, W, 3].

    A picture that has the model's size already is left as it is. The convention is torchvision's (Resize, then
    CenterCrop), but only the pixels inside the crop are computed, so that a sliver of a picture cannot fill the memory.
    Transparent pictures are laid on white; 16-bit greys are scaled to 8 bits.
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


def _reader(data: bytes) -> tuple[Callable[[BytesIO], Image.Image], str]:
    # The plugin itself, not Image.open: that tries other formats and has a process-wide pixel limit of its own.
    if data.startswith(b"\xff\xd8\xff"):
        if (scans := data.count(b"\xff\xda")) > MAX_SCANS:
            raise InvalidPicture(f"the JPEG has {scans} scans, more than the limit of {MAX_SCANS}")
        from PIL.JpegImagePlugin import JpegImageFile

        return JpegImageFile, "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        from PIL.PngImagePlugin import PngImageFile

        return PngImageFile, "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        from PIL.WebPImagePlugin import WebPImageFile

        return WebPImageFile, "WebP"
    raise InvalidPicture(f"not a JPEG, PNG or WebP picture: it begins with the bytes {data[:8].hex(' ')}")


def _upright(picture: Image.Image) -> Image.Image:
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    try:
        orientation = picture.getexif().get(_ORIENTATION, 1)
    except Exception:  # broken metadata does not spoil the pixels
        return picture
    return picture.transpose(turns[orientation]) if orientation in turns else picture


def _rgb(picture: Image.Image) -> Image.Image:
    from PIL import Image

    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode.startswith("I"):
        grey = np.asarray(picture).astype(np.int64)
        return Image.fromarray(((grey + 128) // 257).clip(0, 255).astype(np.uint8)).convert("RGB")
    if "transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
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
