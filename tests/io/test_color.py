"""Images of other programs: color profiles, bit depth, gamma, alpha, in images and masks."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms

from openpulid.errors import ImageError
from openpulid.io.color import scale_to_8_bit
from openpulid.io.images import open_image, open_mask
from tests.support.image_files import (
    ADOBE_RGB,
    DISPLAY_P3,
    IMAGES,
    cmyk_profile,
    encode,
    from_srgb,
    gray_profile,
    insert_chunks,
    png_chunk,
    rgb_profile,
)

PLAIN_TIFF = (cv2.IMWRITE_TIFF_COMPRESSION, 1)
PATCHES = ((200, 120, 90), (40, 160, 60), (60, 70, 190))


def patches(colors: object = PATCHES, size: int = 16) -> Image.Image:
    """Three squares in one row."""
    row = np.asarray(colors, np.uint8)[None].repeat(size, 0).repeat(size, 1)
    return Image.fromarray(np.ascontiguousarray(row))


def read_patches(image: Image.Image) -> np.ndarray:
    return np.array([image.getpixel((8 + 16 * index, 8)) for index in range(3)], int)


def assert_patches(image: Image.Image, tolerance: int = 3) -> None:
    assert np.abs(read_patches(image) - PATCHES).max() <= tolerance


# --- profiles


def test_prophoto_profile_is_applied() -> None:
    assert_patches(open_image(IMAGES / "profile-prophoto.png"))


@pytest.mark.parametrize("primaries", [ADOBE_RGB, DISPLAY_P3], ids=["adobe", "p3"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("JPEG", {"quality": 100, "subsampling": 0}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {"lossless": True}),
    ],
)
def test_profile_is_applied_in_every_format(
    kind: str, options: dict[str, object], primaries: np.ndarray
) -> None:
    colors = from_srgb(np.array(PATCHES), primaries, 2.2)
    assert np.abs(colors.astype(int) - PATCHES).max() > 10
    profile = rgb_profile(primaries, 2.2)
    data = encode(patches(colors), kind, icc_profile=profile, **options)
    image = open_image(data)
    assert_patches(image)
    assert open_image(image).tobytes() == image.tobytes()  # never converted twice


def test_profile_of_a_pil_image_is_applied() -> None:
    image = patches(from_srgb(np.array(PATCHES), ADOBE_RGB, 2.2))
    image.info["icc_profile"] = rgb_profile(ADOBE_RGB, 2.2)
    assert_patches(open_image(image))
    assert image.info["icc_profile"] and read_patches(image)[0, 1] != 120  # it is unchanged


def test_profile_and_transparency() -> None:
    profile = rgb_profile(ADOBE_RGB, 2.2)
    image = patches(from_srgb(np.array(PATCHES), ADOBE_RGB, 2.2)).convert("RGBA")
    image.putpixel((0, 0), (10, 20, 30, 0))
    opened = open_image(encode(image, icc_profile=profile))
    assert_patches(opened)
    assert opened.getpixel((0, 0)) == (255, 255, 255)


def test_palette_with_profile() -> None:
    colors = from_srgb(np.array(PATCHES), ADOBE_RGB, 2.2)
    image = patches(colors).quantize(8)
    assert_patches(open_image(encode(image, icc_profile=rgb_profile(ADOBE_RGB, 2.2))), 5)


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {"quality": 100}), ("TIFF", {})])
def test_cmyk_profile(kind: str, options: dict[str, object]) -> None:
    """In this profile cyan is a gray of lightness 75; without it, it is cyan."""
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    plain = open_image(encode(cyan, kind, **options))
    assert plain.getpixel((5, 5)) == pytest.approx((0, 255, 255), abs=2)
    gray = open_image(encode(cyan, kind, icc_profile=cmyk_profile(), **options))
    assert gray.getpixel((5, 5)) == pytest.approx((185, 185, 185), abs=3)


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_gray_profile(mode: str) -> None:
    image = Image.new("L", (16, 16), 128).convert(mode)
    linear = open_image(encode(image, icc_profile=gray_profile(1.0)))
    assert linear.getpixel((5, 5)) == pytest.approx((188,) * 3, abs=2)
    assert open_image(encode(image)).getpixel((5, 5)) == (128,) * 3


def test_gray_profile_of_16_bits() -> None:
    image = Image.fromarray(np.full((16, 16), 128 * 257, np.uint16))
    opened = open_image(encode(image, icc_profile=gray_profile(1.0)))
    assert opened.getpixel((5, 5)) == pytest.approx((188,) * 3, abs=2)


def test_srgb_profile_changes_no_pixel() -> None:
    values = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    opened = open_image(encode(Image.fromarray(values), icc_profile=profile))
    assert (np.asarray(opened) == values).all()


def test_lab_tiff() -> None:
    to_lab = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
    )
    lab = ImageCms.applyTransform(patches(), to_lab)
    assert_patches(open_image(encode(lab, "TIFF")), 8)  # 8 bits of Lab
    assert open_mask(encode(lab, "TIFF")).mode == "L"


@pytest.mark.parametrize(
    "profile",
    [
        b"no profile",
        gray_profile(1.0),  # of other colors
        rgb_profile(ADOBE_RGB, 2.2)[:300],
        rgb_profile(ADOBE_RGB, 2.2).replace(b"RGB ", b"CMYK"),
    ],
    ids=["text", "gray", "cut", "cmyk"],
)
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_unusable_profile_is_ignored(kind: str, profile: bytes) -> None:
    assert_patches(open_image(encode(patches(), kind, icc_profile=profile)), 0)


def test_large_metadata_is_ignored() -> None:
    for name in ("text-2mb.png", "icc-2mb.png"):
        assert open_image(IMAGES / name).getpixel((5, 5)) == (200, 120, 90)


def test_large_compressed_xmp_keeps_its_orientation() -> None:
    import zlib

    xmp = b'<x tiff:Orientation="6"/>' + b" " * 500_000
    content = b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp)
    assert open_image(insert_chunks(encode(patches()), (b"iTXt", content))).size == (16, 48)
    huge = b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp * 10)
    assert open_image(insert_chunks(encode(patches()), (b"iTXt", huge))).size == (48, 16)


# --- gamma


def gamma_png(gamma: float, *chunks: tuple[bytes, bytes]) -> bytes:
    content = struct.pack(">I", round(gamma * 100_000))
    return insert_chunks(
        encode(Image.new("RGB", (16, 16), (128, 128, 128))), (b"gAMA", content), *chunks
    )


def test_gamma_of_a_png_is_applied() -> None:
    assert open_image(gamma_png(1.0)).getpixel((5, 5)) == pytest.approx((186,) * 3, abs=2)
    assert open_image(gamma_png(1 / 1.8)).getpixel((5, 5)) == pytest.approx((145,) * 3, abs=2)


def test_gamma_that_is_usual_or_overridden_changes_nothing() -> None:
    for data in (gamma_png(1 / 2.2), gamma_png(1.0, (b"sRGB", b"\0")), gamma_png(0)):
        assert open_image(data).getpixel((5, 5)) == (128, 128, 128)


# --- bit depth


def test_8_bits_in_16_bit_gray() -> None:
    assert np.asarray(open_image(IMAGES / "gray-8-in-16.png")).mean() == pytest.approx(105, abs=1)


@pytest.mark.parametrize("white", [255, 1023, 4095, 65535])
@pytest.mark.parametrize("kind", ["gray", "rgb", "rgba", "tiff-gray", "tiff-rgb"])
def test_fewer_bits_in_16(kind: str, white: int) -> None:
    """A ramp to white is the same ramp, whatever range the program used."""
    ramp = np.linspace(0, white, 256).round().astype(np.uint16)[None].repeat(16, 0)
    values = ramp if "gray" in kind else np.stack([ramp] * 3, -1)
    if kind == "rgba":
        values = np.concatenate([values, np.full_like(values[..., :1], white)], -1)
    suffix = ".tiff" if "tiff" in kind else ".png"
    opened = np.asarray(open_image(cv2.imencode(suffix, values)[1].tobytes()), int)
    assert np.abs(opened - np.arange(256)[None, :, None]).max() <= 1


def test_dark_16_bit_colors_keep_their_channels() -> None:
    values = np.zeros((16, 16, 3), np.uint16)
    values[:] = (90, 120, 200)  # blue, green, red
    image = open_image(cv2.imencode(".png", values)[1].tobytes())
    assert image.getpixel((5, 5)) == (200, 120, 90)


def test_float_tiff() -> None:
    ramp = np.linspace(0, 1, 256, dtype=np.float32)[None].repeat(16, 0)
    for white, highest in ((1.0, 1.0), (255.0, 255.0), (1.0, 1.2)):
        values = ramp * white
        values[0] = highest  # highlights are clipped, they do not darken the rest
        opened = np.asarray(open_image(encode(Image.fromarray(values), "TIFF")), int)
        assert np.abs(opened[8, :, 0] - np.arange(256)).max() <= 1


def test_float_colors_in_a_tiff() -> None:
    values = np.empty((16, 48, 3), np.float32)
    values[:] = np.asarray(patches(), np.float32)[..., ::-1] / 255
    assert_patches(open_image(cv2.imencode(".tiff", values, PLAIN_TIFF)[1].tobytes()), 1)
    with pytest.raises(ImageError, match="48 x 16 pixels, more than the limit"):
        open_image(cv2.imencode(".tiff", values, PLAIN_TIFF)[1].tobytes(), max_pixels=500)


def test_16_bit_gray_with_transparent_level() -> None:
    values = np.full((16, 16), 30000, np.uint16)
    values[:, :8] = 5
    data = insert_chunks(encode(Image.fromarray(values)), (b"tRNS", struct.pack(">H", 5)))
    image = open_image(data)
    assert image.getpixel((2, 2)) == (255,) * 3 and image.getpixel((12, 2)) == (117,) * 3
    assert open_mask(data).getpixel((2, 2)) == 0


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_gray_of_few_bits_with_transparent_level(bits: int) -> None:
    """Level 0 is transparent in one file, level 1 in the other. The left half is 0."""
    row = b"\0" * (2 * bits) + bytes([sum(1 << shift for shift in range(0, 8, bits))]) * (2 * bits)
    one = 255 // (2**bits - 1)
    header = struct.pack(">IIBBBBB", 32, 16, bits, 0, 0, 0, 0)
    for level, left, right in ((0, 255, one), (1, 0, 255)):
        data = b"\x89PNG\r\n\x1a\n" + b"".join(
            png_chunk(name, content)
            for name, content in (
                (b"IHDR", header),
                (b"tRNS", struct.pack(">H", level)),
                (b"IDAT", zlib.compress((b"\0" + row) * 16)),
                (b"IEND", b""),
            )
        )
        image = open_image(data)
        assert image.getpixel((4, 4)) == (left,) * 3 and image.getpixel((28, 4)) == (right,) * 3
        assert open_mask(data).getpixel((28, 4)) == (0 if level else one)


def test_scale_to_8_bit_of_integers_and_floats() -> None:
    assert scale_to_8_bit(np.array([True, False])).tolist() == [255, 0]
    assert scale_to_8_bit(np.array([0, 2**32 - 1], np.uint32)).tolist() == [0, 255]
    assert scale_to_8_bit(np.array([-5, 128, 255], np.int32)).tolist() == [0, 128, 255]
    with pytest.raises(ValueError, match="not numbers"):
        scale_to_8_bit(np.array([np.inf]))


# --- masks


def square_mask(mode: str) -> Image.Image:
    """White 8 x 8 square in the middle of 32 x 32, on black or on transparent."""
    alpha = np.zeros((32, 32), np.uint8)
    alpha[12:20, 12:20] = 255
    image = Image.fromarray(alpha)
    if mode == "1":
        return image.convert("1")
    if mode in ("LA", "RGBA"):
        white = Image.new(mode.removesuffix("A"), (32, 32), "white")
        white.putalpha(image)
        return white
    if mode == "P":
        return image.convert("RGB").quantize(2)
    if mode == "I;16":
        return Image.fromarray(alpha.astype(np.uint16) * 257)
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "P", "I;16"])
def test_mask_of_every_mode(mode: str) -> None:
    expected = np.asarray(square_mask("L"))
    image = square_mask(mode)
    assert (np.asarray(open_mask(encode(image))) == expected).all()
    assert (np.asarray(open_mask(image)) == expected).all()


def test_mask_white_on_transparent_equals_white_on_black() -> None:
    transparent = open_mask(IMAGES / "mask-white-on-transparent.png")
    black = open_mask(IMAGES / "mask-white-on-black.png")
    assert transparent.mode == "L" and transparent.tobytes() == black.tobytes()
    assert transparent.getextrema() == (0, 255)


def test_soft_edge_on_transparent_and_hidden_colors() -> None:
    image = Image.new("RGBA", (16, 16), (255, 255, 255, 0))  # white where it is transparent
    image.putpixel((3, 3), (255, 255, 255, 128))
    mask = open_mask(encode(image))
    assert mask.getpixel((3, 3)) == 128 and mask.getpixel((0, 0)) == 0


def test_transparent_palette_of_a_mask_is_black() -> None:
    image = Image.new("P", (16, 16), 0)
    image.putpalette([255, 255, 255, 255, 255, 255])
    image.paste(1, (0, 0, 8, 16))
    mask = open_mask(encode(image, transparency=0))
    assert mask.getpixel((2, 2)) == 255 and mask.getpixel((12, 2)) == 0


def test_profile_of_a_mask_is_ignored() -> None:
    """Values of a mask are weights, not colors."""
    image = Image.new("L", (16, 16), 128)
    assert open_mask(encode(image, icc_profile=gray_profile(1.0))).getpixel((0, 0)) == 128


def test_small_mask_is_accepted() -> None:
    assert open_mask(Image.new("L", (2, 1), 255)).size == (2, 1)


def test_orientation_of_a_mask_with_alpha() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGBA", (32, 16), (255, 255, 255, 0))
    image.paste((255, 255, 255, 255), (0, 0, 8, 16))  # the left becomes the top
    mask = open_mask(encode(image, exif=exif))
    assert mask.size == (16, 32)
    assert mask.getpixel((8, 4)) == 255 and mask.getpixel((8, 28)) == 0


# --- alpha


def test_control_image_is_composited_over_white() -> None:
    assert open_image(IMAGES / "alpha-control.png").getpixel((0, 0)) == (255, 255, 255)


def test_transparent_everywhere_is_noted(caplog: pytest.LogCaptureFixture) -> None:
    image = Image.new("RGBA", (16, 16), (200, 30, 40, 0))
    assert open_image(encode(image), name="a.png").getpixel((0, 0)) == (255, 255, 255)
    assert caplog.messages == ["a.png: is transparent everywhere; it is read as white"]


def test_premultiplied_tiff() -> None:
    """Extra samples of type 1 are alpha by which the colors are multiplied."""
    values = np.zeros((16, 16, 4), np.uint8)
    values[:] = (100, 60, 45, 128)
    entries = [
        (256, 3, (16,)),
        (257, 3, (16,)),
        (258, 3, (8, 8, 8, 8)),
        (259, 3, (1,)),
        (262, 3, (2,)),
        (273, 4, (8,)),
        (277, 3, (4,)),
        (278, 3, (16,)),
        (279, 4, (1024,)),
        (338, 3, (1,)),
    ]
    pixels = values.tobytes()
    offset = 8 + len(pixels) + 8
    directory = struct.pack("<H", len(entries))
    for tag, kind, numbers in entries:
        content = struct.pack(f"<{len(numbers)}{'HI'[kind == 4]}", *numbers)
        if len(content) > 4:
            content = struct.pack("<I", 8 + len(pixels))
        directory += struct.pack("<HHI", tag, kind, len(numbers)) + content.ljust(4, b"\0")
    depth = struct.pack("<4H", 8, 8, 8, 8)
    data = b"II*\0" + struct.pack("<I", offset) + pixels + depth + directory + bytes(4)
    # (100, 60, 45) is (199, 120, 90) times alpha; the rest is white
    assert open_image(data).getpixel((5, 5)) == pytest.approx((227, 187, 172), abs=2)


def test_animation_with_transparency_is_its_first_frame() -> None:
    first = Image.new("RGBA", (16, 16), (0, 0, 255, 255))
    second = Image.new("RGBA", (16, 16), (255, 0, 0, 255))
    for kind in ("PNG", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encode(first, kind, save_all=True, append_images=[second], **options)
        assert open_image(data).getpixel((5, 5)) == (0, 0, 255)


def test_current_frame_of_a_pil_animation_is_taken() -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in ("blue", "red")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    image = Image.open(BytesIO(data))
    image.seek(1)
    assert open_image(image).getpixel((5, 5)) == (255, 0, 0)
    assert image.tell() == 1


def test_damaged_metadata_of_a_png_is_ignored() -> None:
    chunk = png_chunk(b"eXIf", b"MM\0*" + bytes(20))
    data = encode(patches())
    assert_patches(open_image(data[:33] + chunk[:-1] + b"x" + data[33:]), 0)
