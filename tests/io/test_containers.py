"""Hostile and unusual files: small files that take minutes, missing ends, other formats."""

from __future__ import annotations

import io
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from openpulid.errors import ImageError
from openpulid.io.containers import (
    MAX_PROFILE_BYTES,
    MAX_SCANS,
    UnusableFile,
    reduce_to_pixels,
)
from openpulid.io.images import open_image
from openpulid.io.xmp import MAX_XMP_BYTES
from tests.support.image_files import IMAGES, encode, insert_chunks, png_chunk

RED = Image.new("RGB", (64, 64), (200, 30, 40))
JPEG = encode(RED, "JPEG", quality=95)


@contextmanager
def faster_than(seconds: float) -> Iterator[None]:
    start = time.process_time()
    yield
    assert time.process_time() - start < seconds


def assert_red(data: bytes) -> None:
    assert open_image(data).getpixel((5, 5)) == pytest.approx((200, 30, 40), abs=3)


# --- JPEG


def with_scans(count: int) -> bytes:
    """Repeat the last scan of a progressive JPEG of 4 megapixels."""
    data = encode(Image.new("RGB", (2048, 2048)), "JPEG", progressive=True)
    end = data.rindex(b"\xff\xd9")
    scan = data[data.rindex(b"\xff\xda") : end]
    return data[:end] + scan * (count - data.count(b"\xff\xda")) + data[end:]


def test_many_scans_are_refused_before_decoding() -> None:
    with faster_than(0.2), pytest.raises(ImageError, match="has more than 32 scans"):
        open_image(with_scans(400))
    with pytest.raises(ImageError, match="scans"):
        open_image(with_scans(MAX_SCANS + 1))
    assert reduce_to_pixels(with_scans(MAX_SCANS)).is_progressive


def test_usual_progressive_jpeg_is_opened() -> None:
    values = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    image = Image.fromarray(values)
    progressive = open_image(encode(image, "JPEG", progressive=True, quality=90))
    assert progressive.tobytes() == open_image(encode(image, "JPEG", quality=90)).tobytes()
    assert_red(encode(RED.convert("CMYK"), "JPEG", progressive=True))


def segment(code: int, content: bytes) -> bytes:
    return bytes([0xFF, code]) + struct.pack(">H", len(content) + 2) + content


@pytest.mark.parametrize(
    "header",
    [
        segment(0xE1, b"Exif\0\0" + b"MM\0*\0\0\0\x08" + bytes(65_000)) * 900,
        segment(0xFE, bytes(65_000)) * 900,
        segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + bytes(65_000)) * 900,
        segment(0xE2, b"ICC_PROFILE\0" + bytes(65_000)) * 900,
        b"\xff" * 8_000_000,
    ],
    ids=["exif", "comments", "xmp", "profiles", "padding"],
)
def test_large_jpeg_header_costs_no_time(header: bytes) -> None:
    with faster_than(2):
        assert_red(JPEG[:2] + header + JPEG[2:])


def test_very_many_segments_are_refused() -> None:
    with faster_than(2), pytest.raises(ImageError, match="more than 100000 segments"):
        open_image(JPEG[:2] + segment(0xFE, b"") * 1_000_000 + JPEG[2:])


def test_orientation_and_profile_of_a_jpeg_survive() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.new("RGB", (64, 32)), "JPEG", exif=exif, icc_profile=b"profile")
    noisy = (
        data[:2] + segment(0xFE, b"\xff\xda comment") * 3 + data[2:] + data
    )  # and a second image
    reduced = Image.open(io.BytesIO(reduce_to_pixels(noisy).data))
    assert reduced.info["icc_profile"] == b"profile" and "comment" not in reduced.info
    assert open_image(noisy).size == (32, 64)


def test_jpeg_without_end_marker_is_opened() -> None:
    data = (IMAGES / "no-end-marker.jpg").read_bytes()
    whole = open_image(data + b"\xff\xd9")
    assert open_image(data).tobytes() == whole.tobytes()
    assert open_image(data + b"\xff").tobytes() == whole.tobytes()  # half of the marker
    for cut in (1, 2, 10, 100, 1000):
        with pytest.raises(ImageError, match="damaged or cut short"):
            open_image(data[:-cut])


def test_jpeg_that_ends_in_zeros() -> None:
    """Space for the file that was reserved and never written."""
    data = (IMAGES / "no-end-marker.jpg").read_bytes()
    whole = open_image(data + b"\xff\xd9")
    assert open_image(data + bytes(5000)).tobytes() == whole.tobytes()
    with pytest.raises(ImageError, match="cut short"):
        open_image(data[:1500] + bytes(5000))


def test_progressive_jpeg_without_end_marker() -> None:
    values = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = encode(Image.fromarray(values), "JPEG", progressive=True)
    assert open_image(data[:-2]).tobytes() == open_image(data).tobytes()
    with pytest.raises(ImageError, match="cut short"):
        open_image(data[:-500])


def test_large_jpeg_is_decoded_at_a_fraction() -> None:
    """12000 x 9000 pixels are within the limit at a half, 17000 x 16000 at a quarter."""
    whole = encode(Image.new("L", (1200, 900), 105), "JPEG")
    half = open_image(whole, max_pixels=640_000)
    assert half.size == (600, 450) and half.getpixel((5, 5)) == (105, 105, 105)
    assert open_image(whole, max_pixels=100_000).size == (300, 225)
    assert open_image(whole, max_pixels=20_000).size == (150, 113)
    with pytest.raises(ImageError, match="1200 x 900 pixels, more than the limit"):
        open_image(whole, max_pixels=10_000)
    # a progressive one needs memory for all of its coefficients
    progressive = encode(Image.new("RGB", (1200, 900)), "JPEG", progressive=True)
    assert open_image(progressive, max_pixels=600_000).size == (600, 450)
    with pytest.raises(ImageError, match="more than the limit"):
        open_image(progressive, max_pixels=500_000)


def test_very_large_jpeg_is_not_a_bomb_for_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)  # its limit is twice this
    data = encode(Image.new("L", (1600, 1200), 105), "JPEG")
    assert open_image(data, max_pixels=500_000).size == (800, 600)


def test_first_image_of_a_stereo_photo_is_used() -> None:
    blue = Image.new("RGB", (64, 64), "blue")
    assert_red(encode(RED, "MPO", save_all=True, append_images=[blue], quality=95))


def test_orientation_of_a_reduced_jpeg() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.new("RGB", (1200, 900)), "JPEG", exif=exif)
    assert open_image(data, max_pixels=640_000).size == (450, 600)


# --- PNG


def test_png_with_very_many_chunks_is_refused() -> None:
    data = encode(RED)
    many = data[:33] + png_chunk(b"tEXt", b"") * 1_000_000 + data[33:]
    with faster_than(2), pytest.raises(ImageError, match="more than 100000 chunks"):
        open_image(many)


def test_bombs_in_png_metadata_are_ignored() -> None:
    bomb = zlib.compress(bytes(50_000_000))
    entries = b"".join(struct.pack("<HHII", tag, 7, 500_000, 8) for tag in range(1, 40_000))
    data = insert_chunks(
        encode(RED),
        (b"iCCP", b"profile\0\0" + bomb),
        (b"zTXt", b"Raw profile type exif\0\0" + bomb),
        (b"eXIf", b"II*\0\x08\0\0\0" + struct.pack("<H", 39_999) + entries),
        (b"acTL", struct.pack(">II", 2**31, 0)),
    )
    with faster_than(2):
        assert_red(data)


@pytest.mark.parametrize(
    ("name", "start", "size"),
    [
        (b"iCCP", b"profile\0\0", MAX_PROFILE_BYTES + 1),
        (b"zTXt", b"XML:com.adobe.xmp\0\0", MAX_XMP_BYTES),
        (b"zTXt", b"Raw profile type exif\0\0", MAX_XMP_BYTES),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0", MAX_XMP_BYTES),
    ],
)
def test_repeated_bombs_in_a_png_are_inflated_once(name: bytes, start: bytes, size: int) -> None:
    bomb = start + zlib.compress(bytes(size))
    data = insert_chunks(encode(RED), *[(name, bomb)] * 500)
    with faster_than(1):
        assert_red(data)


def test_first_orientation_and_profile_of_a_png_count() -> None:
    exif = [b"II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0%c\0\0\0\0\0\0\0" % n for n in (6, 1)]
    data = insert_chunks(encode(Image.new("RGB", (40, 20))), *((b"eXIf", e) for e in exif))
    assert open_image(data).size == (20, 40)


def test_png_without_end_chunk_is_opened() -> None:
    assert_red(encode(RED)[:-12])


# --- GIF


def gif_with_extension(blocks: bytes) -> bytes:
    data = encode(RED, "GIF")
    start = 13 + 3 * (2 << (data[10] & 7))
    return data[:start] + b"\x21\xfe" + blocks + b"\0" + data[start:]


def test_large_comment_of_a_gif_costs_no_time() -> None:
    with faster_than(1):
        assert_red(gif_with_extension((b"\xff" + bytes(255)) * 40_000))
    with faster_than(1), pytest.raises(ImageError, match="blocks of comments"):
        open_image(gif_with_extension(b"\1a" * 1_000_000))


def test_very_many_empty_extensions_of_a_gif_are_refused() -> None:
    with faster_than(0.5), pytest.raises(ImageError, match="more than 100000 extensions"):
        open_image(gif_with_extension(b"\0\x21\xfe" * 1_000_000))


def test_transparency_of_a_gif_survives() -> None:
    image = Image.new("P", (16, 16), 0)
    image.putpalette([200, 30, 40, 0, 0, 255])
    image.paste(1, (0, 0, 8, 16))
    opened = open_image(encode(image, "GIF", transparency=0, comment=b"a comment"))
    assert opened.getpixel((2, 2)) == (0, 0, 255) and opened.getpixel((12, 2)) == (255, 255, 255)


# --- TIFF, BMP, JPEG 2000


def tiff(*entries: tuple[int, int, bytes], byte_order: str = "<", big: bool = False) -> bytes:
    """Build a directory of (tag, type, value); the pixels are 64 x 64 gray bytes at 16."""
    size = {1: 1, 3: 2, 4: 4, 16: 8}
    inline = 8 if big else 4
    number = byte_order + ("Q" if big else "I")
    header = (b"II" if byte_order == "<" else b"MM") + struct.pack(
        byte_order + "H", 43 if big else 42
    )
    header += struct.pack(byte_order + "HH", 8, 0) if big else b""
    pixels = bytes([105]) * 4096
    content = b""
    directory = struct.pack(byte_order + ("Q" if big else "H"), len(entries))
    for tag, kind, value in entries:
        field = value.ljust(inline, b"\0")
        if len(value) > inline:
            field = struct.pack(number, 16 + len(pixels) + len(content))
            content += value
        count = struct.pack(number, len(value) // size[kind])
        directory += struct.pack(byte_order + "HH", tag, kind) + count + field
    offset = 16 + len(pixels) + len(content)
    start = (header + struct.pack(number, offset)).ljust(16, b"\0")
    return start + pixels + content + directory + struct.pack(number, 0)


def gray_entries(byte_order: str = "<") -> dict[int, tuple[int, int, bytes]]:
    def entry(tag: int, kind: int, value: int) -> tuple[int, int, bytes]:
        return tag, kind, struct.pack(byte_order + ("H" if kind == 3 else "I"), value)

    short = {256: 64, 257: 64, 258: 8, 259: 1, 262: 1, 277: 1, 278: 64}
    entries = {tag: entry(tag, 3, value) for tag, value in short.items()}
    return entries | {273: entry(273, 4, 16), 279: entry(279, 4, 4096)}


@pytest.mark.parametrize("byte_order", ["<", ">"])
@pytest.mark.parametrize("big", [False, True])
def test_tiff_and_big_tiff(byte_order: str, big: bool) -> None:
    entries = gray_entries(byte_order)
    data = tiff(*entries.values(), byte_order=byte_order, big=big)
    assert open_image(data).getpixel((5, 5)) == (105, 105, 105)


def test_tiff_with_very_many_strips_is_refused() -> None:
    entries = gray_entries()
    entries[273] = (273, 4, struct.pack("<I", 16) * 4_000_000)
    entries[279] = (279, 4, struct.pack("<I", 64) * 4_000_000)
    with faster_than(0.5), pytest.raises(ImageError, match="more than 100000 strips"):
        open_image(tiff(*entries.values()))


def test_tiff_with_one_strip_per_row_is_opened() -> None:
    entries = gray_entries()
    entries[278] = (278, 3, struct.pack("<H", 1))
    entries[273] = (273, 4, struct.pack("<64I", *range(16, 16 + 4096, 64)))
    entries[279] = (279, 4, struct.pack("<I", 64) * 64)
    assert open_image(tiff(*entries.values())).getpixel((5, 60)) == (105, 105, 105)


def test_hostile_tiff_tags_are_refused_or_ignored() -> None:
    entries = gray_entries()
    depths = entries | {258: (258, 3, struct.pack("<H", 8) * 4_000_000)}
    with faster_than(0.5), pytest.raises(ImageError, match="values of tag 258"):
        open_image(tiff(*depths.values()))
    tiles = entries | {322: (322, 4, struct.pack("<I", 46_000)), 323: (323, 4, b"\xb0\xb3\0\0")}
    with pytest.raises(ImageError, match="tiles of 46000 x 46000"):
        open_image(tiff(*tiles.values()))
    unknown = {tag: (tag, 1, bytes(1_000_000)) for tag in range(60_000, 60_010)}
    with faster_than(1):
        assert open_image(tiff(*entries.values(), *unknown.values())).size == (64, 64)


def test_preview_of_a_raw_photo_is_not_taken_for_the_photo() -> None:
    entries = {254: (254, 4, struct.pack("<I", 1))} | gray_entries()
    with pytest.raises(ImageError, match="holds no image but a preview"):
        open_image(tiff(*entries.values()))


def test_pages_of_a_tiff() -> None:
    pages = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    data = encode(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    assert open_image(data).getpixel((5, 5)) == (255, 0, 0)
    assert Image.open(io.BytesIO(reduce_to_pixels(data).data)).n_frames == 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "LAB"])
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate"])
def test_tiff_of_every_mode_is_unchanged(mode: str, compression: str) -> None:
    values = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    image = Image.fromarray(values)
    image = Image.merge("LAB", image.split()) if mode == "LAB" else image.convert(mode)
    data = encode(image, "TIFF", compression=compression)
    expected = Image.open(io.BytesIO(data))
    assert Image.open(io.BytesIO(reduce_to_pixels(data).data)).tobytes() == expected.tobytes()


def test_16_bit_tiff_in_which_zero_is_white() -> None:
    entries = gray_entries()
    entries[257] = (257, 3, struct.pack("<H", 32))
    entries[258] = (258, 3, struct.pack("<H", 16))
    entries[262] = (262, 3, struct.pack("<H", 0))
    # 0x6969 of 0xFFFF is 105 of 255
    assert open_image(tiff(*entries.values())).getpixel((5, 5)) == (150, 150, 150)


def test_damaged_tiff_directory_is_refused() -> None:
    for data in (b"II*\0", b"II*\0\xff\xff\xff\xff", b"MM\0+" + b"\xff" * 40):
        with pytest.raises(UnusableFile, match="TIFF directory"):
            reduce_to_pixels(data)


def test_large_compressed_bmp_is_refused() -> None:
    header = struct.pack("<IiiHHIIiiII", 40, 6000, 1000, 1, 8, 1, 0, 0, 0, 0, 0)
    data = b"BM" + struct.pack("<IHHI", 0, 0, 0, 54 + 1024) + header + bytes(1024)
    with faster_than(0.5), pytest.raises(ImageError, match="compressed BMP"):
        open_image(data + b"\1\5" * 3_000_000)
    assert_red(encode(RED, "BMP"))


def test_jpeg_2000_with_very_many_boxes_or_markers_is_refused() -> None:
    if "JPEG2000" not in Image.SAVE:
        pytest.skip("this Pillow has no JPEG 2000")
    data = encode(RED, "JPEG2000")
    header = data.index(b"jp2h") - 4
    boxes = data[:header] + struct.pack(">I4s", 8, b"free") * 1_000_000 + data[header:]
    with faster_than(1), pytest.raises(ImageError, match="more than 100000 boxes"):
        open_image(boxes)
    quantization = data.index(b"\xff\x52")
    markers = data[:quantization] + b"\xff\x64\0\2" * 1_000_000 + data[quantization:]
    with faster_than(1), pytest.raises(ImageError, match="more than 100000 markers"):
        open_image(markers)


# --- other formats


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"8BPS\0\1", "is a Photoshop file; save the image as JPEG or PNG"),
        (b"%PDF-1.7", "is a PDF file"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "is a JPEG XL file"),
        (b"\0\0\0\x18ftypcrx \0\0", "is a raw photo"),
        (b'<?xml version="1.0"?><svg width="5">', "is an SVG file"),
    ],
)
def test_unsupported_format_is_named(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        open_image(data)
