"""Pictures of every kind that people and attackers send: each has its expected pixels or its one line of refusal."""

import io
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from trivium.runtime.bundle import Preprocessing
from trivium.runtime.errors import InvalidPicture
from trivium.runtime.preprocess import Limits, _rgb, decode, prepare, read_picture

PLAIN = Preprocessing(height=32, width=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def sized(height: int, width: int, **changes: Any) -> Preprocessing:
    return Preprocessing.model_validate(PLAIN.model_dump() | {"height": height, "width": width} | changes)


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def noise(height: int = 32, width: int = 32) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, depth: int, color: int, rows: bytes, *before: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    body = chunk(b"IHDR", header) + b"".join(before) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_a_lossless_picture_of_the_models_size_comes_back_as_it_is(kind: str, options: dict[str, Any]) -> None:
    pixels = noise()
    data = encoded(Image.fromarray(pixels), kind, **options)
    np.testing.assert_array_equal(decode(data, PLAIN), pixels)
    # whatever resize and crop say
    np.testing.assert_array_equal(decode(data, sized(32, 32, resize=36)), pixels)


def test_a_jpeg_is_what_pillow_decodes() -> None:
    data = encoded(Image.fromarray(noise()), "JPEG", quality=90)
    np.testing.assert_array_equal(decode(data, PLAIN), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(("height", "width"), [(50, 71), (71, 50), (20, 333), (33, 33), (643, 481), (5, 9)])
def test_resize_and_centre_crop_are_torchvisions(height: int, width: int, interpolation: str) -> None:
    preprocessing = sized(32, 28, resize=36, interpolation=interpolation)
    picture = Image.fromarray(noise(height, width))
    short, long = min(height, width), max(height, width)
    size = (36, 36 * long // short) if width <= height else (36 * long // short, 36)
    whole = picture.resize(size, Image.Resampling[interpolation.upper()])
    left, top = round((size[0] - 28) / 2), round((size[1] - 32) / 2)
    expected = np.asarray(whole.crop((left, top, left + 28, top + 32))).astype(int)
    difference = np.abs(prepare(picture, preprocessing).astype(int) - expected)
    # the box is computed in float32: a weight may round the other way, and nearest may pick the neighbour at a tie
    assert (difference > 1).mean() < (0.05 if interpolation == "nearest" else 1e-9)


def test_without_resize_the_whole_picture_is_scaled() -> None:
    picture = Image.fromarray(noise(40, 80))
    expected = np.asarray(picture.resize((32, 32), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(prepare(picture, PLAIN), expected)


def test_height_comes_before_width() -> None:
    assert prepare(Image.fromarray(noise(100, 90)), sized(24, 40, resize=48)).shape == (24, 40, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation(kind: str, orientation: int) -> None:
    corners = np.zeros((32, 32, 3), np.uint8)
    corners[:16, :16], corners[:16, 16:], corners[16:, :16], corners[16:, 16:] = RED, GREEN, BLUE, WHITE
    upright = {  # how the stored pixels are brought upright, EXIF 2.32, tag 0x0112
        1: corners,
        2: corners[:, ::-1],
        3: corners[::-1, ::-1],
        4: corners[::-1],
        5: corners.transpose(1, 0, 2),
        6: np.rot90(corners, -1),
        7: np.rot90(corners, 2).transpose(1, 0, 2),
        8: np.rot90(corners),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    kinds: dict[str, dict[str, Any]] = {
        "PNG": {},
        "JPEG": {"quality": 95, "subsampling": 0},
        "WEBP": {"lossless": True},
    }
    found = decode(encoded(Image.fromarray(corners), kind, exif=exif, **kinds[kind]), PLAIN)
    middles = np.ix_([8, 24], [8, 24])
    assert np.abs(found[middles].astype(int) - upright[middles]).max() <= 3


def test_orientation_turns_the_picture_before_the_crop() -> None:
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:, :16] = RED
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(pixels), "PNG", exif=exif)
    np.testing.assert_array_equal(decode(data, sized(64, 32))[:16], np.broadcast_to(RED, (16, 32, 3)))


@pytest.mark.parametrize("exif", [b"Exif\0\0" + b"\xff" * 40, b"Exif\0\0II*\0" + b"\xff" * 200, b"Exif\0\0MM\0*\0\0"])
def test_broken_metadata_does_not_spoil_the_pixels(exif: bytes) -> None:
    pixels = np.full((32, 32, 3), 200, np.uint8)
    found = decode(encoded(Image.fromarray(pixels), "JPEG", exif=exif), PLAIN)
    np.testing.assert_array_equal(found, pixels)


def test_grey_one_bit_and_palette() -> None:
    grey = np.arange(1024, dtype=np.uint32).reshape(32, 32).astype(np.uint8)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(grey), "PNG"), PLAIN), grey[..., None].repeat(3, 2))
    bits = grey > 127
    expected = np.where(bits, 255, 0)[..., None].repeat(3, 2)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(bits), "PNG"), PLAIN), expected)
    palette = Image.fromarray(noise() // 128 * 255).quantize(8)
    np.testing.assert_array_equal(decode(encoded(palette, "PNG"), PLAIN), np.asarray(palette.convert("RGB")))


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    values = np.linspace(0, 65535, 32 * 32).astype(">u2").reshape(32, 32)
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    expected = np.rint(values.astype(float) / 257)[..., None].repeat(3, 2)
    found = decode(png(32, 32, 16, 0, rows), PLAIN)
    np.testing.assert_array_equal(found, expected)
    colour = values[..., None].repeat(3, 2)
    rows = b"".join(b"\0" + row.tobytes() for row in colour)
    found = decode(png(32, 32, 16, 2, rows), PLAIN)
    assert np.abs(found.astype(float) - expected).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparent_pictures_lie_on_white(kind: str) -> None:
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[:16] = (255, 0, 0, 255)
    pixels[16:24] = (0, 0, 0, 0)
    pixels[24:] = (0, 0, 0, 128)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    found = decode(encoded(Image.fromarray(pixels), kind, **options), PLAIN)
    assert [tuple(found[row, 5].tolist()) for row in (0, 20, 30)] == [RED, WHITE, (127, 127, 127)]


def test_transparency_of_grey_colour_and_palette_pngs() -> None:
    rows = (b"\0" + b"\x00" * 16 + b"\x50" * 16) * 32
    grey = decode(png(32, 32, 8, 0, rows, chunk(b"tRNS", b"\0\0")), PLAIN)
    assert (grey[0, 0].tolist(), grey[0, 31].tolist()) == ([255] * 3, [0x50] * 3)
    rows = (b"\0" + b"\x01\x02\x03" * 16 + b"\x50\x60\x70" * 16) * 32
    colour = decode(png(32, 32, 8, 2, rows, chunk(b"tRNS", b"\0\x01\0\x02\0\x03")), PLAIN)
    assert (colour[0, 0].tolist(), colour[0, 31].tolist()) == ([255] * 3, [0x50, 0x60, 0x70])
    rows = (b"\0" + b"\x00" * 16 + b"\x01" * 16) * 32
    palette = chunk(b"PLTE", bytes([9, 9, 9, 10, 20, 30])) + chunk(b"tRNS", b"\0")
    indexed = decode(png(32, 32, 8, 3, rows, palette), PLAIN)
    assert (indexed[0, 0].tolist(), indexed[0, 31].tolist()) == ([255] * 3, [10, 20, 30])


def test_cmyk() -> None:
    data = encoded(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), "JPEG", quality=95)
    assert np.abs(decode(data, PLAIN).astype(int) - RED).max() <= 3


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in (RED, GREEN, BLUE)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    np.testing.assert_array_equal(decode(data, PLAIN), np.broadcast_to(RED, (32, 32, 3)))


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "ICO", "JPEG2000", "TGA", "PDF"])
def test_other_formats_are_refused(kind: str) -> None:
    with pytest.raises(InvalidPicture, match=r"^not a JPEG, PNG or WebP picture: it begins with the bytes "):
        decode(encoded(Image.fromarray(noise()), kind), PLAIN)


@pytest.mark.parametrize(
    "data", [b"\0", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"RIFF\0\0\0\0WAVE", b"GIF89a", b"%PDF", b"\xff\xd8"]
)
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidPicture, match=r"^not a JPEG, PNG or WebP picture"):
        decode(data, PLAIN)


def test_no_bytes() -> None:
    with pytest.raises(InvalidPicture, match="0 bytes"):
        decode(b"", PLAIN)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.97])
def test_truncated_pictures_are_refused(kind: str, share: float) -> None:
    data = encoded(Image.fromarray(noise()), kind)
    with pytest.raises(InvalidPicture, match=r"^the (JPEG|PNG|WebP) cannot be decoded: .+$"):
        decode(data[: max(16, int(len(data) * share))], PLAIN)


def test_too_many_bytes_are_refused_unread() -> None:
    with pytest.raises(InvalidPicture, match="101 bytes, more than the limit of 100"):
        decode(b"\xff\xd8\xff" + b"\0" * 98, PLAIN, Limits(max_bytes=100))


def test_the_limit_of_pixels_is_exact() -> None:
    data = encoded(Image.fromarray(noise(10, 10)), "PNG")
    assert decode(data, PLAIN, Limits(max_pixels=100)).shape == (32, 32, 3)
    with pytest.raises(InvalidPicture, match="10 x 10 pixels, more than the limit of 99"):
        decode(data, PLAIN, Limits(max_pixels=99))


def bombs() -> dict[str, bytes]:
    """Small files that name enormous pictures: 65535 x 65535, 2^31 - 1 squared, and 16384 x 16384."""
    jpeg = bytearray(encoded(Image.fromarray(noise()), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
    huge = 2**31 - 1
    webp = bytearray(encoded(Image.fromarray(noise()), "WEBP", lossless=True))
    bits = int.from_bytes(webp[21:25], "little") | 0xFFFFFFF
    webp[21:25] = bits.to_bytes(4, "little")
    return {"jpeg": bytes(jpeg), "png": png(huge, huge, 8, 2, b"\0" * 1000), "webp": bytes(webp)}


def test_a_jpeg_of_endless_scans_is_refused_at_once() -> None:
    data = encoded(Image.fromarray(noise()), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    assert decode(data[:-2] + scan * 20 + data[-2:], PLAIN).shape == (32, 32, 3)
    with pytest.raises(InvalidPicture, match=r"^the JPEG has 1\d\d scans, more than the limit of 64$"):
        decode(data[:-2] + scan * 100 + data[-2:], PLAIN)


def growth(data: bytes) -> tuple[str, int]:
    """What becomes of decoding data in a process of its own, and how much memory that took beyond the imports, kB."""
    code = (
        "import sys\n"
        "from PIL import JpegImagePlugin, PngImagePlugin, WebPImagePlugin\n"
        "from trivium.runtime.bundle import Preprocessing\n"
        "from trivium.runtime.preprocess import decode\n"
        "def peak():\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return next(int(line.split()[1]) for line in lines if line.startswith('VmHWM'))\n"
        "p = Preprocessing(height=224, width=224, resize=256, mean=(0, 0, 0), std=(1, 1, 1))\n"
        "data, before = sys.stdin.buffer.read(), peak()\n"
        "try: outcome = decode(data, p).shape\n"
        "except Exception as error: outcome = f'{type(error).__name__}: {error}'\n"
        "print(outcome, peak() - before, sep='|')"
    )
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True)
    outcome, kilobytes = done.stdout.decode().split("|")
    return outcome, int(kilobytes)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
@pytest.mark.parametrize("name", ["jpeg", "png", "webp"])
def test_a_bomb_is_refused_from_its_header(name: str) -> None:
    outcome, kilobytes = growth(bombs()[name])
    assert outcome.startswith("InvalidPicture: the ")
    assert "pixels, more than the limit" in outcome or "cannot be decoded" in outcome
    assert kilobytes < 20_000


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
def test_a_sliver_within_the_limit_of_pixels_does_not_fill_the_memory() -> None:
    # resized as a whole it would have 256 x 768 million pixels
    outcome, kilobytes = growth(png(1, 3_000_000, 8, 0, b"\0\x7f" * 3_000_000))
    assert outcome == "(224, 224, 3)"
    assert kilobytes < 100_000


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
@pytest.mark.parametrize("color", [0, 4], ids=["16-bit grey", "grey with alpha"])
def test_converting_needs_one_more_picture_and_not_several(color: int) -> None:
    side, depth = 4000, 16 if color == 0 else 8
    outcome, kilobytes = growth(png(side, side, depth, color, bytes(side * (1 + 2 * side))))
    assert outcome == "(224, 224, 3)"
    # four bytes a pixel, twice, and the tiles
    assert kilobytes < 2.5 * 4 * side * side / 1024


def test_texts_and_profiles_of_a_png_are_not_unpacked() -> None:
    bomb = zlib.compress(b"\0" * 50_000_000, 9)
    texts = chunk(b"zTXt", b"Comment\0\0" + bomb) + chunk(b"iCCP", b"profile\0\0" + bomb)
    found = decode(png(32, 32, 8, 0, (b"\0" + b"\x33" * 32) * 32, texts), PLAIN)
    np.testing.assert_array_equal(found, np.full((32, 32, 3), 0x33, np.uint8))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_endless_metadata_is_refused(kind: str) -> None:
    data = encoded(Image.fromarray(noise()), kind)
    many = b"\xff\xfe\0\2" * 5000 if kind == "JPEG" else chunk(b"prVt", b"") * 70_000
    start = 2 if kind == "JPEG" else 33
    with pytest.raises(InvalidPicture, match=rf"^the {kind} has more than \d+ (segments|chunks)"):
        decode(data[:start] + many + data[start:], PLAIN)


def test_a_jpegs_tables_are_limited() -> None:
    data = encoded(Image.fromarray(noise()), "JPEG")
    table = data[data.index(b"\xff\xdb") : data.index(b"\xff\xdb") + 69]
    assert decode(data[:2] + table * 100 + data[2:], PLAIN).shape == (32, 32, 3)
    with pytest.raises(InvalidPicture, match=r"^the JPEG's tables take more than 262144 bytes$"):
        decode(data[:2] + table * 4000 + data[2:], PLAIN)


def test_a_film_behind_a_jpeg_is_no_scan() -> None:
    data = encoded(Image.fromarray(noise()), "JPEG")
    film = np.random.default_rng(1).bytes(10_000) + b"\xff\xda" * 100
    np.testing.assert_array_equal(decode(data + film, PLAIN), decode(data, PLAIN))


def test_scans_of_a_large_jpeg_are_limited_by_its_pixels() -> None:
    data = encoded(Image.new("RGB", (5000, 5000)), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    with pytest.raises(InvalidPicture, match=r"^the JPEG has \d+ scans of 25000000 pixels, more than the limit"):
        decode(data[:-2] + scan * 50 + data[-2:], PLAIN)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16", "CMYK"])
def test_large_pictures_are_converted_as_small_ones(mode: str) -> None:
    picture = Image.fromarray(noise(7, 2500)).resize((2500, 70)).convert("RGBA" if mode == "LA" else "RGB")
    if mode == "I;16":
        values = np.random.default_rng(2).integers(0, 65536, (70, 2500)).astype(np.uint16)
        picture = Image.fromarray(values)
    else:
        picture = picture.convert(mode)
        if "A" in mode:
            picture.putalpha(Image.fromarray(noise(70, 2500)[..., 0]))
    parts = [np.asarray(_rgb(picture.crop((x, 0, x + 500, 70)))) for x in range(0, 2500, 500)]
    np.testing.assert_array_equal(np.asarray(_rgb(picture)), np.concatenate(parts, axis=1))


VALID = [encoded(Image.fromarray(noise(16, 16)), kind) for kind in ("JPEG", "PNG", "WEBP")]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_mutated_pictures_decode_or_are_refused(data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from(VALID)))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = decode(bytes(content), PLAIN, Limits(max_pixels=1_000_000))
    except InvalidPicture as error:
        found = None
        line = str(error)
    if found is None:
        assert "\n" not in line
    else:
        assert found.shape == (32, 32, 3)


def test_many_threads_decode_alike() -> None:
    data = [encoded(Image.fromarray(noise(40 + i, 60)), kind) for i in range(8) for kind in ("JPEG", "PNG", "WEBP")]
    expected = [decode(one, sized(32, 32, resize=36)) for one in data]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda one: decode(one, sized(32, 32, resize=36)), data * 5))
    for one, other in zip(expected * 5, found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_file_is_named_where_it_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidPicture, match=r"absent\.png: No such file or directory$"):
        read_picture(tmp_path / "absent.png", PLAIN)
    with pytest.raises(InvalidPicture, match=r": Is a directory$"):
        read_picture(tmp_path, PLAIN)
    (tmp_path / "bad.png").write_bytes(b"text")
    with pytest.raises(InvalidPicture, match=r"bad\.png: not a JPEG, PNG or WebP picture"):
        read_picture(tmp_path / "bad.png", PLAIN)
