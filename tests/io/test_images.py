"""Loading of untrusted images: supported formats, and the errors of unusable files."""

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
)  # the first box of a phone's image


def sample_image(mode: str = "RGB") -> Image.Image:
    """Left half red, right half blue."""
    image = Image.new("RGB", SIZE, (200, 30, 40))
    image.paste((20, 40, 210), (SIZE[0] // 2, 0, *SIZE))
    return image.quantize(4) if mode == "P" else image.convert(mode)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def is_close(image: Image.Image, expected: Image.Image, tolerance: int = 12) -> bool:
    a, b = (np.asarray(x.convert("RGB"), dtype=int)[::4, 4::8] for x in (image, expected))
    return a.shape == b.shape and bool(np.abs(a - b).max() <= tolerance)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000", "AVIF"])
def test_supported_formats(kind: str, tmp_path: Path) -> None:
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow has no {kind}")
    path = tmp_path / "a.image"  # the content determines the format, not the name
    path.write_bytes(encode(sample_image(), kind))
    image = open_image(path)
    assert (image.mode, image.size) == ("RGB", SIZE)
    assert is_close(image, sample_image(), 40 if kind == "WEBP" else 12)


@pytest.mark.parametrize(
    ("mode", "kind"), [("CMYK", "JPEG"), ("CMYK", "TIFF"), ("P", "PNG"), ("P", "TIFF")]
)
def test_color_spaces(mode: str, kind: str) -> None:
    assert is_close(open_image(encode(sample_image(mode), kind)), sample_image(), 16)


@pytest.mark.parametrize("mode", ["1", "L", "LA"])
def test_gray(mode: str) -> None:
    image = open_image(encode(sample_image(mode), "PNG"))
    red, green, blue = image.getpixel((3, 3))
    assert image.mode == "RGB" and red == green == blue


def test_alpha_is_composited_over_white() -> None:
    image = sample_image("RGBA")
    image.putalpha(Image.fromarray(np.full(SIZE[::-1], 0, np.uint8)))
    assert open_image(encode(image, "PNG")).getpixel((1, 1)) == (255, 255, 255)
    image.putalpha(128)
    assert open_image(encode(image, "WEBP", lossless=True)).getpixel((1, 1)) == pytest.approx(
        (227, 142, 147), abs=2
    )


def test_transparent_palette_color_becomes_white() -> None:
    image = sample_image("P")
    data = encode(image, "PNG", transparency=image.getpixel((1, 1)))
    assert open_image(data).getpixel((1, 1)) == (255, 255, 255)
    assert is_close(open_image(data).crop((32, 0, *SIZE)), sample_image().crop((32, 0, *SIZE)))


def test_sixteen_bit_is_scaled_not_clipped() -> None:
    values = np.full(SIZE[::-1], 32768, np.uint16)
    values[0] = 65535
    image = open_image(encode(Image.fromarray(values), "PNG"))
    assert image.getpixel((5, 0)) == (255, 255, 255)
    assert image.getpixel((5, 5)) == pytest.approx((128, 128, 128), abs=1)


def test_sixteen_bit_color() -> None:
    values = np.zeros((*SIZE[::-1], 3), np.uint16)
    values[:, :32] = (65535, 32768, 0)  # blue, green, red
    image = open_image(cv2.imencode(".png", values)[1].tobytes())
    assert image.getpixel((5, 5)) == pytest.approx((0, 128, 255), abs=1) and image.getpixel(
        (60, 5)
    ) == (0, 0, 0)


@pytest.mark.parametrize("white", [1.0, 255.0])
def test_float_images_are_scaled_and_nan_is_rejected(white: float) -> None:
    values = np.full(SIZE[::-1], white / 2, np.float32)
    values[0] = white
    image = open_image(encode(Image.fromarray(values), "TIFF"))
    assert image.getpixel((5, 0)) == (255, 255, 255) and image.getpixel((5, 5)) == pytest.approx(
        (128, 128, 128), abs=1
    )
    values[1] = np.nan
    with pytest.raises(ImageError, match="not numbers"):
        open_image(encode(Image.fromarray(values), "TIFF"))


def test_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was rotated: the left side of the file is the top
    image = open_image(encode(sample_image(), "JPEG", exif=exif, quality=95))
    assert image.size == SIZE[::-1]
    assert image.getpixel((16, 8))[0] > 150 and image.getpixel((16, 56))[2] > 150


@pytest.mark.parametrize("value", range(1, 9))
def test_every_orientation(value: int) -> None:
    original = sample_image()
    original.paste("green", (0, 0, 20, 12))  # no two orientations look alike
    exif = Image.Exif()
    exif[0x0112] = value
    data = encode(original, "PNG", exif=exif)
    image, expected = open_image(data), ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert image.size == expected.size and image.tobytes() == expected.tobytes()
    assert open_image(image).tobytes() == image.tobytes()  # never rotated twice


@pytest.mark.parametrize(
    ("kind", "options"), [("JPEG", {"dpi": (72, 72)}), ("PNG", {}), ("WEBP", {"lossless": True})]
)
def test_broken_exif_is_ignored(kind: str, options: dict[str, object]) -> None:
    data = encode(sample_image(), kind, exif=b"Exif\0\0" + bytes(8), **options)
    assert is_close(open_image(data), sample_image())


def test_limit_size_averages_pixels() -> None:
    stripes = np.zeros((1000, 4000, 3), np.uint8)
    stripes[:, ::2] = 255
    small = limit_size(Image.fromarray(stripes), 1000)
    assert small.size == (1000, 250)
    assert (
        np.abs(np.asarray(small, dtype=int)[:, 20:-20] - 127).max() < 8
    )  # sampling would give only white or black
    assert limit_size(Image.new("RGB", (40_000, 16)), 1024).size == (1024, 1)
    small = sample_image()
    assert limit_size(small, SIZE[0]) is small


@pytest.mark.parametrize("kind", ["GIF", "TIFF"])
def test_first_frame_is_used(kind: str) -> None:
    frames = [Image.new("RGB", SIZE, "green")] * 2
    assert is_close(
        open_image(encode(sample_image(), kind, save_all=True, append_images=frames)),
        sample_image(),
    )


def test_pil_image_and_open_file_are_accepted() -> None:
    assert is_close(open_image(sample_image("RGBA")), sample_image())
    assert is_close(open_image(io.BytesIO(encode(sample_image(), "PNG"))), sample_image())
    original = sample_image()
    open_image(original).putpixel((0, 0), (0, 0, 0))
    assert original.getpixel((0, 0)) == (200, 30, 40)


def test_heic_without_package_explains_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if not installed
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    with pytest.raises(
        ImageError, match=r"a\.heic: is HEIC; run `pip install pillow-heif`"
    ) as error:
        open_image(HEIC, name="a.heic")
    assert "\n" not in str(error.value)


def test_heic_is_opened() -> None:
    heif = pytest.importorskip("pillow_heif")
    file = io.BytesIO()
    heif.from_pillow(sample_image()).save(file)
    image = open_image(file.getvalue())
    assert (image.mode, image.size) == ("RGB", SIZE) and is_close(image, sample_image(), 40)
    with pytest.raises(ImageError) as error:
        open_image(HEIC)
    assert "pip install" not in str(error.value)


def png_with_size(width: int, height: int) -> bytes:
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
    "text": (b"hello, I am an image", "not an image"),
    "cut.jpg": (encode(sample_image(), "JPEG")[:-80], "damaged or cut short"),
    "cut.png": (encode(sample_image(), "PNG")[:60], "damaged or cut short"),
    "bomb.png": (png_with_size(60_000, 60_000), "pixels"),
    "large.png": (png_with_size(9_000, 9_000), "9000 x 9000"),
    "nothing.png": (png_with_size(400, 400), "damaged or cut short"),
    "tiny.png": (encode(Image.new("RGB", (4, 4)), "PNG"), "too few"),
    "program.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n", "not an image"),
    "page.html": (b"<!DOCTYPE html><html></html>", "not an image"),
}


@pytest.mark.parametrize("name", WRONG)
def test_unusable_file_reports_reason(name: str, tmp_path: Path) -> None:
    data, reason = WRONG[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ImageError) as error:
        open_image(tmp_path / name)
    message = str(error.value)
    assert str(tmp_path / name) in message and reason in message and "\n" not in message


def test_unusable_path_reports_reason(tmp_path: Path) -> None:
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
    data = encode(sample_image(), "PNG")
    with pytest.raises(ImageError, match="MB"):
        open_image(data, max_bytes=len(data) - 1)
    with pytest.raises(ImageError, match="64 x 32"):
        open_image(data, max_pixels=2047)
    assert open_image(data, max_bytes=len(data), max_pixels=2048).size == SIZE


def test_random_damage_raises_only_image_error() -> None:
    """Overwrite random bytes of a hundred files: no other exception is raised."""
    rng = np.random.default_rng(0)
    originals = [encode(sample_image(), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF")]
    for index in range(100):
        data = bytearray(originals[index % len(originals)])
        for position in rng.integers(0, len(data), 8):
            data[position] = rng.integers(256)
        try:
            assert open_image(bytes(data)).mode == "RGB"
        except ImageError as error:
            assert str(error)
