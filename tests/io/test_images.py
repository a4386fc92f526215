"""Opening pictures: every kind that is right, every way of being wrong."""

from __future__ import annotations

import io
import os
import struct
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from openpulid.errors import ImageError
from openpulid.io.images import limit_size, open_image

SIZE = (64, 32)
HEIC = (
    struct.pack(">I", 24) + b"ftypheic" + bytes(4) + b"mif1heic"
)  # the first box of a telephone's picture


def picture(mode: str = "RGB") -> Image.Image:
    """Left half red, right half blue."""
    image = Image.new("RGB", SIZE, (200, 30, 40))
    image.paste((20, 40, 210), (SIZE[0] // 2, 0, *SIZE))
    return image.quantize(4) if mode == "P" else image.convert(mode)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def close(image: Image.Image, expected: Image.Image, tolerance: int = 12) -> bool:
    a, b = (np.asarray(x.convert("RGB"), dtype=int)[::4, 4::8] for x in (image, expected))
    return a.shape == b.shape and bool(np.abs(a - b).max() <= tolerance)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000", "AVIF"])
def test_kinds(kind: str, tmp_path: Path) -> None:
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow has no {kind}")
    path = tmp_path / "a.picture"  # the content decides, not the name
    path.write_bytes(saved(picture(), kind))
    image = open_image(path)
    assert (image.mode, image.size) == ("RGB", SIZE)
    assert close(image, picture(), 40 if kind == "WEBP" else 12)


@pytest.mark.parametrize(
    ("mode", "kind"), [("CMYK", "JPEG"), ("CMYK", "TIFF"), ("P", "PNG"), ("P", "TIFF")]
)
def test_colour_spaces(mode: str, kind: str) -> None:
    assert close(open_image(saved(picture(mode), kind)), picture(), 16)


@pytest.mark.parametrize("mode", ["1", "L", "LA"])
def test_gray(mode: str) -> None:
    image = open_image(saved(picture(mode), "PNG"))
    red, green, blue = image.getpixel((3, 3))
    assert image.mode == "RGB" and red == green == blue


def test_alpha_lies_over_white() -> None:
    image = picture("RGBA")
    image.putalpha(Image.fromarray(np.full(SIZE[::-1], 0, np.uint8)))
    assert open_image(saved(image, "PNG")).getpixel((1, 1)) == (255, 255, 255)
    image.putalpha(128)
    assert open_image(saved(image, "WEBP", lossless=True)).getpixel((1, 1)) == pytest.approx(
        (227, 142, 147), abs=2
    )


def test_transparent_palette_colour_is_white() -> None:
    image = picture("P")
    data = saved(image, "PNG", transparency=image.getpixel((1, 1)))
    assert open_image(data).getpixel((1, 1)) == (255, 255, 255)
    assert close(open_image(data).crop((32, 0, *SIZE)), picture().crop((32, 0, *SIZE)))


def test_sixteen_bit_is_scaled_not_clipped() -> None:
    values = np.full(SIZE[::-1], 32768, np.uint16)
    values[0] = 65535
    image = open_image(saved(Image.fromarray(values), "PNG"))
    assert image.getpixel((5, 0)) == (255, 255, 255)
    assert image.getpixel((5, 5)) == pytest.approx((128, 128, 128), abs=1)


def test_sixteen_bit_colour() -> None:
    values = np.zeros((*SIZE[::-1], 3), np.uint16)
    values[:, :32] = (65535, 32768, 0)  # blue, green, red
    image = open_image(cv2.imencode(".png", values)[1].tobytes())
    assert image.getpixel((5, 5)) == pytest.approx((0, 128, 255), abs=1) and image.getpixel(
        (60, 5)
    ) == (0, 0, 0)


@pytest.mark.parametrize("white", [1.0, 255.0])
def test_floats_are_scaled_and_must_be_numbers(white: float) -> None:
    values = np.full(SIZE[::-1], white / 2, np.float32)
    values[0] = white
    image = open_image(saved(Image.fromarray(values), "TIFF"))
    assert image.getpixel((5, 0)) == (255, 255, 255) and image.getpixel((5, 5)) == pytest.approx(
        (128, 128, 128), abs=1
    )
    values[1] = np.nan
    with pytest.raises(ImageError, match="not numbers"):
        open_image(saved(Image.fromarray(values), "TIFF"))


def test_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the left side of the file is the top of the picture
    image = open_image(saved(picture(), "JPEG", exif=exif, quality=95))
    assert image.size == SIZE[::-1]
    assert image.getpixel((16, 8))[0] > 150 and image.getpixel((16, 56))[2] > 150


@pytest.mark.parametrize("value", range(1, 9))
def test_every_orientation(value: int) -> None:
    original = picture()
    original.paste("green", (0, 0, 20, 12))  # no turn of it looks like another
    exif = Image.Exif()
    exif[0x0112] = value
    data = saved(original, "PNG", exif=exif)
    image, expected = open_image(data), ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert image.size == expected.size and image.tobytes() == expected.tobytes()
    assert open_image(image).tobytes() == image.tobytes()  # never turned twice


@pytest.mark.parametrize(
    ("kind", "options"), [("JPEG", {"dpi": (72, 72)}), ("PNG", {}), ("WEBP", {"lossless": True})]
)
def test_broken_exif_is_no_broken_picture(kind: str, options: dict[str, object]) -> None:
    data = saved(picture(), kind, exif=b"Exif\0\0" + bytes(8), **options)
    assert close(open_image(data), picture())


def test_a_large_picture_is_averaged() -> None:
    stripes = np.zeros((1000, 4000, 3), np.uint8)
    stripes[:, ::2] = 255
    small = limit_size(Image.fromarray(stripes), 1000)
    assert small.size == (1000, 250)
    assert (
        np.abs(np.asarray(small, dtype=int)[:, 20:-20] - 127).max() < 8
    )  # every fourth column would be white, or black
    assert limit_size(Image.new("RGB", (40_000, 16)), 1024).size == (1024, 1)
    as_it_is = picture()
    assert limit_size(as_it_is, SIZE[0]) is as_it_is


@pytest.mark.parametrize("kind", ["GIF", "TIFF"])
def test_first_frame(kind: str) -> None:
    others = [Image.new("RGB", SIZE, "green")] * 2
    assert close(open_image(saved(picture(), kind, save_all=True, append_images=others)), picture())


def test_a_pil_image_and_an_open_file() -> None:
    assert close(open_image(picture("RGBA")), picture())
    assert close(open_image(io.BytesIO(saved(picture(), "PNG"))), picture())
    original = picture()
    open_image(original).putpixel((0, 0), (0, 0, 0))
    assert original.getpixel((0, 0)) == (200, 30, 40)


def test_a_telephones_picture_needs_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as where it is not installed
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    with pytest.raises(
        ImageError, match=r"a\.heic: is HEIC, .* `pip install pillow-heif`"
    ) as caught:
        open_image(HEIC, name="a.heic")
    assert "\n" not in str(caught.value)


def test_a_telephones_picture() -> None:
    heif = pytest.importorskip("pillow_heif")
    file = io.BytesIO()
    heif.from_pillow(picture()).save(file)
    image = open_image(file.getvalue())
    assert (image.mode, image.size) == ("RGB", SIZE) and close(image, picture(), 40)
    with pytest.raises(ImageError) as caught:
        open_image(HEIC)
    assert "pip install" not in str(caught.value)


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


WRONG = {
    "empty": (b"", "is empty"),
    "text": (b"hello, I am a picture", "not a picture"),
    "cut.jpg": (saved(picture(), "JPEG")[:-80], "damaged or cut short"),
    "cut.png": (saved(picture(), "PNG")[:60], "damaged or cut short"),
    "bomb.png": (png_that_claims(60_000, 60_000), "pixels"),
    "large.png": (png_that_claims(9_000, 9_000), "9000 x 9000"),
    "nothing.png": (png_that_claims(400, 400), "damaged or cut short"),
    "tiny.png": (saved(Image.new("RGB", (4, 4)), "PNG"), "too few"),
    "program.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n", "not a picture"),
    "page.html": (b"<!DOCTYPE html><html></html>", "not a picture"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_say_why(name: str, tmp_path: Path) -> None:
    data, reason = WRONG[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ImageError) as caught:
        open_image(tmp_path / name)
    message = str(caught.value)
    assert str(tmp_path / name) in message and reason in message and "\n" not in message


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="does not exist"):
        open_image(tmp_path / "none.png")
    with pytest.raises(ImageError, match="folder"):
        open_image(tmp_path)
    with pytest.raises(ImageError, match="cannot be read"):
        open_image("a\0b.png")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageError, match="regular file"):
        open_image(tmp_path / "pipe")


def test_limits_are_arguments() -> None:
    data = saved(picture(), "PNG")
    with pytest.raises(ImageError, match="MB"):
        open_image(data, max_bytes=len(data) - 1)
    with pytest.raises(ImageError, match="64 x 32"):
        open_image(data, max_pixels=2047)
    assert open_image(data, max_bytes=len(data), max_pixels=2048).size == SIZE


def test_every_damaged_byte_is_a_picture_or_a_picture_error() -> None:
    """A hundred files with random bytes overwritten: never another exception."""
    rng = np.random.default_rng(0)
    originals = [saved(picture(), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF")]
    for turn in range(100):
        data = bytearray(originals[turn % len(originals)])
        for position in rng.integers(0, len(data), 8):
            data[position] = rng.integers(256)
        try:
            assert open_image(bytes(data)).mode == "RGB"
        except ImageError as error:
            assert str(error)
