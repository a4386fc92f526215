"""Load untrusted images as RGB; every failure is an `ImageError`.

Limits are checked before any pixel is decoded, so a small file cannot claim much memory. The steps,
in
order: check the file size, read the header, check the number of pixels, decode the first frame
completely, apply the EXIF orientation, scale 16 bit to 8 bit, convert to RGB (CMYK, palette, gray),
composite alpha over white.
"""

from __future__ import annotations

import warnings
from contextlib import suppress
from importlib import import_module
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from openpulid.errors import ImageError

MAX_BYTES = 64 * 2**20
MAX_PIXELS = 64_000_000
MIN_SIDE = 16

# Photo formats only. Pillow also opens programs (EPS runs Ghostscript) and formats without a magic
# number (TGA).
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "HEIF", "JPEG2000")

# Brands in the first box of a HEIF file: the HEIC of phones, and the generic form.
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

# The transform that makes an image upright, by its EXIF orientation; 1 is upright.
ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Entries of `Image.info` from which Pillow reads the orientation.
EXIF_KEYS = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")

Source = str | PathLike[str] | bytes | BinaryIO | Image.Image


def open_image(
    source: Source,
    *,
    name: str | None = None,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Open an image as upright 8-bit RGB.

    Args:
        source: a path, the content of a file, an open binary file, or a PIL image. A PIL image is
            checked and converted in the same way.
        name: the name used in error messages; the path by default.
        max_bytes: maximum file size in bytes.
        max_pixels: maximum width times height. Both limits are checked before decoding.

    Raises:
        ImageError: the image cannot be used; the message names the file and the reason.
    """
    label = name or _label(source)
    with warnings.catch_warnings():
        # `max_pixels` replaces Pillow's own limit; warnings about odd metadata do not matter.
        warnings.simplefilter("ignore")
        if isinstance(source, Image.Image):
            return _decode(source, label, max_pixels)
        data = _read(source, label, max_bytes)
        try:
            image = Image.open(BytesIO(data), formats=_supported_formats())
        except UnidentifiedImageError:
            raise ImageError(label, _explain_unknown(data)) from None
        except Image.DecompressionBombError:
            raise ImageError(
                label, f"has more than {max_pixels / 1e6:.0f} million pixels"
            ) from None
        except Exception as error:  # a hostile header may raise anything
            raise ImageError(label, f"is damaged or cut short ({_first_line(error)})") from None
        with image:
            return _decode(image, label, max_pixels)


def limit_size(image: Image.Image, longest: int) -> Image.Image:
    """Shrink an image to a longer side of at most `longest` pixels.

    Pixels are averaged, not sampled. A smaller image is returned unchanged.
    """
    scale = longest / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(round(side * scale), 1) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _label(source: Source) -> str:
    if isinstance(source, (str, PathLike)):
        return str(source)
    return str(getattr(source, "filename", "") or getattr(source, "name", "") or "image")


def _supported_formats() -> list[str]:
    """Return the formats that the installed Pillow can decode.

    Not every Pillow has AVIF, and HEIF needs the package pillow-heif.
    """
    Image.init()
    if "HEIF" not in Image.OPEN:
        with suppress(ImportError):
            import_module("pillow_heif").register_heif_opener()
    return [name for name in FORMATS if name in Image.OPEN]


def _explain_unknown(data: bytes) -> str:
    """Return the reason why no decoder opens these bytes."""
    is_heif = data[4:8] == b"ftyp" and data[8:12] in HEIF_BRANDS
    if is_heif and "HEIF" not in Image.OPEN:
        return "is HEIC; run `pip install pillow-heif`, or save the image as JPEG"
    return "is not an image of a supported format (JPEG, PNG, WebP ...)"


def _read(source: str | PathLike[str] | bytes | BinaryIO, label: str, max_bytes: int) -> bytes:
    """Read a file completely, but at most one byte more than the limit."""
    try:
        if isinstance(source, bytes):
            data = source[: max_bytes + 1]
        elif isinstance(source, (str, PathLike)):
            path = Path(source)
            if path.is_dir():
                raise ImageError(label, "is a folder, not an image")
            if path.exists() and not path.is_file():
                raise ImageError(label, "is not a regular file")
            with path.open("rb") as file:
                data = file.read(max_bytes + 1)
        else:
            data = source.read(max_bytes + 1)
    except FileNotFoundError:
        raise ImageError(label, "does not exist") from None
    except (OSError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        reason = getattr(error, "strerror", None) or _first_line(error)
        raise ImageError(label, f"cannot be read ({reason})") from None
    if not data:
        raise ImageError(label, "is empty")
    if len(data) > max_bytes:
        raise ImageError(label, f"is larger than {max_bytes / 2**20:.0f} MB")
    return data


def _decode(image: Image.Image, label: str, max_pixels: int) -> Image.Image:
    width, height = image.size
    if width * height > max_pixels:
        limit = f"{max_pixels / 1e6:.0f} million pixels"
        raise ImageError(label, f"has {width} x {height} pixels, more than the limit of {limit}")
    if min(width, height) < MIN_SIDE:
        raise ImageError(label, f"has {width} x {height} pixels, too few to show a face")
    try:
        image.seek(0)  # animations and multi-page files: the first frame
        image.load()  # decodes everything, so that a truncated file fails here
        return _to_rgb(_apply_orientation(image))
    except MemoryError:
        raise ImageError(label, "needs more memory than is available") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error ...
        raise ImageError(label, f"is damaged or cut short ({_first_line(error)})") from None


def _apply_orientation(image: Image.Image) -> Image.Image:
    """Apply and strip the EXIF orientation; ignore unreadable EXIF, since the pixels are good."""
    try:
        transform = ORIENTATIONS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # hostile EXIF may raise anything
        return image
    if transform is None:
        return image
    upright = image.transpose(transform)
    for key in EXIF_KEYS:
        upright.info.pop(key, None)  # otherwise the next reader would rotate the image again
    return upright


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB, with transparent pixels over white."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit(image)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        background = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(background, layer).convert("RGB")
    if image.mode == "RGB":
        return image.copy()
    return image.convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Scale gray images to 8 bit, where `Image.convert` would clip.

    White is 65535 in 16-bit images, and 1 or 255 in float images.
    """
    values = np.asarray(image, dtype=np.float32)
    if not np.isfinite(values).all():
        raise ValueError("has values that are not numbers")
    if image.mode == "F":
        white = 1.0 if values.max(initial=0) <= 1 else 255.0
    else:
        white = 255.0 if image.mode == "I" and values.max(initial=0) <= 255 else 65535.0
    return Image.fromarray((255 * (values / white).clip(0, 1)).round().astype(np.uint8))


def _first_line(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0]
    return text.rstrip(".") or type(error).__name__
