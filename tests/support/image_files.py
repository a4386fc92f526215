"""Image files as other programs write them, and color profiles to write into them."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

IMAGES = Path(__file__).parents[1] / "data" / "images"

D50 = (0.9642, 1.0, 0.8249)

# Columns are the primaries in XYZ, adapted to D50.
SRGB = np.array(
    [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]]
)
ADOBE_RGB = np.array(
    [[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]]
)
DISPLAY_P3 = np.array(
    [[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]]
)


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_chunk(name: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


def insert_chunks(png: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """Insert chunks after the header of a PNG."""
    header_end = 8 + 25
    return png[:header_end] + b"".join(png_chunk(*chunk) for chunk in chunks) + png[header_end:]


def rgb_profile(primaries: np.ndarray, gamma: float) -> bytes:
    """Build an ICC profile of three primaries and a gamma."""
    tags = {b"wtpt": _xyz(D50)}
    for name, color in zip((b"r", b"g", b"b"), primaries.T, strict=True):
        tags[name + b"XYZ"] = _xyz(tuple(color))
        tags[name + b"TRC"] = _curve(gamma)
    return _profile(b"RGB ", tags)


def gray_profile(gamma: float) -> bytes:
    """Build an ICC profile of gray with a gamma."""
    return _profile(b"GRAY", {b"wtpt": _xyz(D50), b"kTRC": _curve(gamma)})


def cmyk_profile() -> bytes:
    """Build a profile in which every ink is gray: lightness falls by a quarter for each."""
    identity = b"".join(map(_fixed, (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    ramp = bytes(range(256))
    grid = b""
    for inks in np.ndindex(2, 2, 2, 2):  # (lightness, a, b) in 8 bits
        grid += bytes([round(255 * (1 - sum(inks) / 4)), 128, 128])
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + ramp * 4 + grid + ramp * 3
    return _profile(
        b"CMYK", {b"wtpt": _xyz(D50), b"A2B0": table.ljust(len(table) + 2, b"\0")}, b"Lab "
    )


def from_srgb(colors: np.ndarray, primaries: np.ndarray, gamma: float) -> np.ndarray:
    """Convert sRGB colors (..., 3) uint8 to the color space of a profile."""
    values = colors / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    converted = linear @ (np.linalg.inv(primaries) @ SRGB).T
    return (255 * converted.clip(0, 1) ** (1 / gamma)).round().astype(np.uint8)


def _fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def _xyz(values: tuple[float, ...]) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(map(_fixed, values))


def _curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"


def _profile(space: bytes, tags: dict[bytes, bytes], connection: bytes = b"XYZ ") -> bytes:
    offset = 128 + 4 + 12 * len(tags)
    table = struct.pack(">I", len(tags))
    content = b""
    for name, tag in tags.items():
        table += name + struct.pack(">II", offset + len(content), len(tag))
        content += tag
    size = offset + len(content)
    kinds = (b"mntr" if space != b"CMYK" else b"prtr", space, connection)
    header = struct.pack(">I4sI4s4s4s", size, b"", 0x02100000, *kinds)
    header += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28)
    header += b"".join(map(_fixed, D50))
    return header.ljust(128, b"\0") + table + content
