"""Reduce untrusted image files to their pixels, before a decoder reads them.

Decoders parse comments, previews and further pages in time that grows with their number, some of
them with its square, so a small file can occupy a machine for minutes. What does not change the
pixels is dropped, and what takes long to decode is refused. Orientation and color profile stay.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from openpulid.io.xmp import MAX_XMP_BYTES

MAX_PARTS = 100_000
"""Maximum number of segments, chunks, blocks or boxes of a file. PNG encoders write a chunk for
every 8 kB."""

MAX_SCANS = 32
"""Maximum number of scans of a JPEG, each of which takes time. Encoders write 1 to 20."""

MAX_STRIPS = 100_000
"""Maximum number of strips or tiles of a TIFF."""

MAX_PROFILE_BYTES = 8 * 2**20
"""Larger color profiles are ignored. Those of printing presses have 0.5 to 3 MB."""

MAX_EXIF_BYTES = 2**16
"""EXIF beyond this size, the maximum of a JPEG, is ignored; the orientation is at its start."""

MAX_RLE_BYTES = 2 * 2**20


class UnusableFile(ValueError):
    """A file that is not decoded. The message is the reason, without the name of the file."""


@dataclass(frozen=True)
class PixelData:
    """What a decoder needs of a file.

    Attributes:
        data: a file of the same format.
        profile: a color profile that is not in `data`.
        is_complete: whether the file has the end marker of its format; False only for JPEG.
        is_progressive: whether a JPEG is decoded in several passes over all its coefficients.
        size: width and height of a TIFF in pixels.
    """

    data: bytes
    profile: bytes | None = None
    is_complete: bool = True
    is_progressive: bool = False
    size: tuple[int, int] | None = None


PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_SIGNATURE = b"\xff\xd8\xff"
JP2_SIGNATURE = b"\0\0\0\x0cjP  \r\n\x87\n"
JPEG2000_CODESTREAM = b"\xff\x4f\xff\x51"
TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def reduce_to_pixels(data: bytes) -> PixelData:
    """Return a file without what does not change its pixels. Unknown formats are unchanged.

    Raises:
        UnusableFile: decoding would take long, or the structure of the file is damaged.
    """
    if data.startswith(JPEG_SIGNATURE):
        return _reduce_jpeg(data)
    if data.startswith(PNG_SIGNATURE):
        return _reduce_png(data)
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return PixelData(_reduce_gif(data))
    if data[:4] in TIFF_SIGNATURES:
        return _reduce_tiff(data)
    if data.startswith(b"BM"):
        _check_bmp(data)
    if data.startswith((JP2_SIGNATURE, JPEG2000_CODESTREAM)):
        _check_jpeg2000(data)
    return PixelData(data)


def _check_parts(number: int, kind: str) -> None:
    if number > MAX_PARTS:
        raise UnusableFile(f"has more than {MAX_PARTS} {kind}; save it again")


# --- JPEG (ITU-T T.81, annex B)

# A marker is 0xFF and its code. 0xFF00 is a 0xFF in the compressed data, 0xFFFF is padding, and
# 0xD0 to 0xD7 are restart markers within the compressed data.
JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
ZEROS = bytes(16)
START_OF_SCAN = 0xDA
END_OF_IMAGE = 0xD9
PROGRESSIVE_FRAMES = (0xC2, 0xC6, 0xCA, 0xCE)
MARKERS_WITHOUT_LENGTH = (0x01, 0xD8)
EXIF_HEADER = b"Exif\0\0"
XMP_HEADER = b"http://ns.adobe.com/xap/1.0/\0"
PROFILE_HEADER = b"ICC_PROFILE\0"


def _reduce_jpeg(data: bytes) -> PixelData:
    """Keep the first image, its orientation and its profile; drop comments and all that follows."""
    is_needed = _JpegSegmentFilter()
    kept = [data[:2]]
    position = 2
    number = 0
    scans = 0
    is_complete = False
    is_progressive = False
    while match := JPEG_MARKER.search(data, position):
        number += 1
        _check_parts(number, "segments")
        if scans:
            kept.append(data[position : match.start()])  # the compressed data of the scan
        code = match[0][1]
        position = match.end()
        if code == END_OF_IMAGE:
            is_complete = True
            break
        if code in MARKERS_WITHOUT_LENGTH:
            continue
        length = max(int.from_bytes(data[position : position + 2], "big"), 2)
        position += length
        scans += code == START_OF_SCAN
        is_progressive = is_progressive or code in PROGRESSIVE_FRAMES
        if scans > MAX_SCANS:
            raise UnusableFile(
                f"has more than {MAX_SCANS} scans; save it again, not as a progressive JPEG"
            )
        segment = data[match.start() : position]
        if is_needed(code, segment[4:]):
            kept.append(segment)
    if not is_complete:
        rest = data[position:]
        if rest.endswith(ZEROS):  # space for a file that was never written completely
            rest = rest.rstrip(b"\0")
        kept.append(rest.rstrip(b"\xff"))
    kept.append(b"\xff\xd9")
    return PixelData(b"".join(kept), None, is_complete, is_progressive)


class _JpegSegmentFilter:
    """Decides which segments of a JPEG are kept."""

    def __init__(self) -> None:
        self.has_exif = False
        self.has_xmp = False
        self.profile_bytes = 0

    def __call__(self, code: int, segment: bytes) -> bool:
        """Return whether to keep a segment."""
        if code == 0xE1 and segment.startswith(EXIF_HEADER) and not self.has_exif:
            self.has_exif = True
            return True
        if code == 0xE1 and segment.startswith(XMP_HEADER) and not self.has_xmp:
            self.has_xmp = True
            return True
        if code == 0xE2 and segment.startswith(PROFILE_HEADER):
            self.profile_bytes += len(segment)
            return self.profile_bytes <= MAX_PROFILE_BYTES
        # 0xE0 and 0xEE, of JFIF and Adobe, describe the color space; 0xFE is a comment
        return not (0xE1 <= code <= 0xED or code in (0xEF, 0xFE))


# --- PNG (W3C Portable Network Graphics, third edition)

PNG_CHUNKS = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"cICP")
PNG_ORIENTATION_TEXTS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")


def _reduce_png(data: bytes) -> PixelData:
    """Keep the pixels and what they mean; drop texts and the further frames of an animation."""
    kept = [PNG_SIGNATURE]
    profile = None
    described: set[bytes] = set()
    position = len(PNG_SIGNATURE)
    number = 0
    while position + 8 <= len(data):
        number += 1
        _check_parts(number, "chunks")
        length = int.from_bytes(data[position : position + 4], "big")
        name = data[position + 4 : position + 8]
        content = data[position + 8 : position + 8 + length]
        end = position + 12 + length
        if name in PNG_CHUNKS:
            kept.append(data[position:end])
        elif (kind := _description(name, content)) and kind not in described:
            # a second one has no meaning, and inflating thousands would take minutes
            described.add(kind)
            if name == b"iCCP":
                profile = _inflate(content.partition(b"\0")[2][1:], MAX_PROFILE_BYTES)
            elif name == b"eXIf":
                kept.append(_png_chunk(name, content[:MAX_EXIF_BYTES]))
            else:
                kept.append(_uncompressed_text(name, content))
        if name == b"IEND":
            break
        position = end
    return PixelData(b"".join(kept), profile)


def _description(name: bytes, content: bytes) -> bytes:
    """Return which profile or orientation a chunk holds: its name or keyword; empty for others."""
    if name in (b"iCCP", b"eXIf"):
        return name
    if name in (b"tEXt", b"zTXt", b"iTXt"):
        return next((key for key in PNG_ORIENTATION_TEXTS if content.startswith(key)), b"")
    return b""


def _uncompressed_text(name: bytes, content: bytes) -> bytes:
    """Return a text chunk without compression; empty if it is damaged or too large."""
    keyword, _, rest = content.partition(b"\0")
    text: bytes | None = rest
    if name == b"zTXt":
        text = _inflate(rest[1:], MAX_XMP_BYTES)
    elif name == b"iTXt":
        is_compressed = rest[:1] == b"\1"
        text = rest[2:].partition(b"\0")[2].partition(b"\0")[2]  # after language and keyword
        if is_compressed:
            text = _inflate(text, MAX_XMP_BYTES)
    if text is None or len(text) > MAX_XMP_BYTES:
        return b""
    if name == b"iTXt":
        return _png_chunk(b"iTXt", keyword + b"\0\0\0\0\0" + text)
    return _png_chunk(b"tEXt", keyword + b"\0" + text)


def _inflate(compressed: bytes, max_bytes: int) -> bytes | None:
    """Decompress at most `max_bytes`; None if there is more, or the data is damaged."""
    decompressor = zlib.decompressobj()
    try:
        content = decompressor.decompress(compressed, max_bytes)
    except zlib.error:
        return None
    return None if decompressor.unconsumed_tail else content


def _png_chunk(name: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


# --- GIF (GIF89a specification)

GIF_EXTENSION = 0x21
GIF_GRAPHIC_CONTROL = 0xF9


def _reduce_gif(data: bytes) -> bytes:
    """Drop the extensions before the first frame, but for the one with its transparency."""
    has_palette = len(data) > 10 and data[10] & 0x80
    start = 13 + (3 * (2 << (data[10] & 7)) if has_palette else 0)
    control = b""
    position = start
    number = 0
    while data[position : position + 1] == bytes([GIF_EXTENSION]):
        number += 1
        _check_parts(number, "extensions")
        is_control = data[position + 1 : position + 2] == bytes([GIF_GRAPHIC_CONTROL])
        end = position + 2
        while end < len(data) and data[end]:
            end += 1 + data[end]
            number += 1
            _check_parts(number, "blocks of comments")
        end += 1
        if is_control:
            control = data[position:end]
        position = end
    return data[:start] + control + data[position:]


# --- TIFF (revision 6.0, and BigTIFF)

TIFF_PROFILE = 34675
# Of the first page: size, samples, compression, color, orientation, strips and tiles, profile.
TIFF_TAGS = (
    frozenset([256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320])
    | frozenset([322, 323, 324, 325, 332, 338, 339, 347, 529, 530, 531, 532, TIFF_PROFILE])
    | frozenset(range(512, 522))
)
TIFF_SUBFILE_TYPE = 254
TIFF_SIZE_TAGS = (256, 257)
TIFF_STRIP_TAGS = (273, 279, 324, 325)
TIFF_TILE_TAGS = (322, 323)
TIFF_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}
MAX_TIFF_VALUE_BYTES = 2**20
MAX_TILE_PIXELS = 2**24
MAX_PAGES = 16


@dataclass(frozen=True)
class _TiffLayout:
    """Sizes of numbers in a TIFF."""

    byte_order: str
    is_big: bool

    @property
    def entry_bytes(self) -> int:
        return 20 if self.is_big else 12

    def offset_format(self) -> str:
        return self.byte_order + ("Q" if self.is_big else "I")

    def count_format(self) -> str:
        return self.byte_order + ("Q" if self.is_big else "H")

    def entry_format(self) -> str:
        return self.byte_order + ("HHQ8s" if self.is_big else "HHI4s")

    def header_bytes(self) -> int:
        """Return the position of the offset of the first directory."""
        return 8 if self.is_big else 4


@dataclass(frozen=True)
class _TiffEntry:
    """One tag of a directory: its raw entry, and the number that a short value is."""

    raw: bytes
    type: int
    count: int
    number: int

    @property
    def value_bytes(self) -> int:
        return self.count * TIFF_TYPE_BYTES.get(self.type, 8)


def _reduce_tiff(data: bytes) -> PixelData:
    """Append a directory with the tags of the pixels alone, and make it the only one."""
    layout = _TiffLayout("<" if data.startswith(b"II") else ">", data[2:4] in (b"+\0", b"\0+"))
    try:
        entries = _read_main_directory(data, layout)
    except (struct.error, OverflowError):
        raise UnusableFile("is damaged or cut short (no TIFF directory)") from None
    tags = {tag for tag in entries if tag in TIFF_TAGS}
    if TIFF_PROFILE in tags and entries[TIFF_PROFILE].value_bytes > MAX_PROFILE_BYTES:
        tags.remove(TIFF_PROFILE)
    for tag in tags - {TIFF_PROFILE}:
        count = entries[tag].count
        if tag in TIFF_STRIP_TAGS and count > MAX_STRIPS:
            raise UnusableFile(f"has more than {MAX_STRIPS} strips; save it again")
        if entries[tag].value_bytes > MAX_TIFF_VALUE_BYTES:
            raise UnusableFile(f"is damaged or cut short ({count} values of tag {tag})")
    sides = [entries[tag].number for tag in TIFF_TILE_TAGS if tag in entries]
    if len(sides) == 2 and sides[0] * sides[1] > MAX_TILE_PIXELS:
        raise UnusableFile(f"has tiles of {sides[0]} x {sides[1]} pixels; save it again")
    kept = [entries[tag].raw for tag in sorted(tags)]
    directory = struct.pack(layout.count_format(), len(kept)) + b"".join(kept)
    directory += struct.pack(layout.offset_format(), 0)
    body = data[layout.header_bytes() + struct.calcsize(layout.offset_format()) :]
    body += bytes(len(data) % 2)  # directories begin at even positions
    offset = struct.pack(layout.offset_format(), len(data) + len(data) % 2)
    reduced = data[: layout.header_bytes()] + offset + body + directory
    size = [entries[tag].number for tag in TIFF_SIZE_TAGS if tag in entries]
    return PixelData(reduced, size=(size[0], size[1]) if len(size) == 2 else None)


def _read_main_directory(data: bytes, layout: _TiffLayout) -> dict[int, _TiffEntry]:
    """Read the first page that is not a reduced copy of another."""
    position = layout.header_bytes()
    for _ in range(MAX_PAGES):
        (position,) = struct.unpack_from(layout.offset_format(), data, position)
        if not position:
            break
        (count,) = struct.unpack_from(layout.count_format(), data, position)
        _check_parts(count, "tags")
        position += struct.calcsize(layout.count_format())
        entries = dict(_read_entries(data, layout, position, count))
        is_reduced = TIFF_SUBFILE_TYPE in entries and entries[TIFF_SUBFILE_TYPE].number & 1
        if not is_reduced:
            return entries
        position += count * layout.entry_bytes
    raise UnusableFile("holds no image but a preview, as raw photos do; convert it to JPEG or PNG")


def _read_entries(
    data: bytes, layout: _TiffLayout, position: int, count: int
) -> Iterator[tuple[int, _TiffEntry]]:
    for _ in range(count):
        tag, kind, values, value = struct.unpack_from(layout.entry_format(), data, position)
        # a value that fits into the entry is stored at its beginning
        size = min(TIFF_TYPE_BYTES.get(kind, 8), len(value))
        number = int.from_bytes(value[:size], "little" if layout.byte_order == "<" else "big")
        raw = data[position : position + layout.entry_bytes]
        yield tag, _TiffEntry(raw, kind, values, number)
        position += layout.entry_bytes


# --- BMP and JPEG 2000: nothing is dropped


def _check_bmp(data: bytes) -> None:
    """Refuse large files with run-length encoding, which Pillow decodes in Python."""
    has_compression = int.from_bytes(data[14:18], "little") >= 40  # bytes of the header
    compression = int.from_bytes(data[30:34], "little")
    if has_compression and compression in (1, 2) and len(data) > MAX_RLE_BYTES:
        raise UnusableFile(f"is a compressed BMP of more than {MAX_RLE_BYTES >> 20} MB; use PNG")


def _check_jpeg2000(data: bytes) -> None:
    """Refuse files with very many boxes or markers before the pixels."""
    position = 0
    end = len(data)
    number = 0
    while data.startswith(JP2_SIGNATURE) and position + 8 <= end:
        number += 1
        _check_parts(number, "boxes")
        length = int.from_bytes(data[position : position + 4], "big")
        name = data[position + 4 : position + 8]
        if name == b"jp2c":
            position += 16 if length == 1 else 8
            break
        # the header is a box of boxes
        position += 8 if name == b"jp2h" else max(length, 8)
    if data[position : position + 4] != JPEG2000_CODESTREAM:
        return
    position += 2
    while data[position : position + 1] == b"\xff" and data[position + 1] not in (0x90, 0xD9):
        number += 1
        _check_parts(number, "markers")
        position += 2 + max(int.from_bytes(data[position + 2 : position + 4], "big"), 2)
