"""Decode untrusted images; every failure is an `UnusableFile` with its reason.

Limits are checked before any pixel is decoded, so a small file cannot claim much memory or time.
The steps, in order: drop what does not change the pixels, read the header, check the number of
pixels, decode the first frame completely, apply the EXIF orientation, scale to 8 bits, convert to
sRGB by the profile, composite alpha.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import import_module
from io import BytesIO

import numpy as np
from PIL import ExifTags, Image, ImageChops, JpegImagePlugin, UnidentifiedImageError

from openpulid.errors import first_line
from openpulid.io.color import scale_to_8_bit, split_alpha, to_8_bit, to_srgb
from openpulid.io.containers import (
    JPEG_SIGNATURE,
    MAX_EXIF_BYTES,
    PixelData,
    UnusableFile,
    reduce_to_pixels,
)

MAX_PIXELS = 64_000_000
MIN_SIDE = 16

MAX_REDUCTION = 8
"""A larger JPEG is decoded at a half, a quarter or an eighth of its size."""

MAX_PROGRESSIVE_FACTOR = 2
"""A progressive JPEG has at most this multiple of the maximum number of pixels: its decoder keeps
all coefficients in memory, whatever the reduction."""

DARK_LEVEL = 16
"""16-bit colors whose upper 8 bits are all below this value may be 8 or 12 bits without scaling."""

JPEG_FORMATS = ("JPEG", "MPO")
# Photo formats only, next to JPEG. Pillow also opens programs (EPS runs Ghostscript) and formats
# without a magic number (TGA).
FORMATS = ("PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "HEIF", "JPEG2000")

# Brands in the first box of a HEIF file: the HEIC of phones, and the generic form.
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
AVIF_BRANDS = (b"avif", b"avis")

# The first bytes of files that people take for images of a supported format.
UNSUPPORTED_FORMATS = {
    b"8BPS": "a Photoshop file",
    b"gimp xcf": "a GIMP file",
    b"%PDF": "a PDF file",
    b"\0\0\0\x0cJXL ": "a JPEG XL file",
    b"\xff\x0a": "a JPEG XL file",
    b"\x76\x2f\x31\x01": "an OpenEXR file",
    b"FUJIFILMCCD-RAW": "a raw photo",
    b"IIRO": "a raw photo",
    b"IIU\0": "a raw photo",
}

WHITE_OF_FEW_BITS = {"L;2": 3, "L;4": 15}
"""White in gray PNG files of 2 and 4 bits."""

TIFF_PHOTOMETRIC = 262
WHITE_IS_ZERO = 0

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

# Appended to a JPEG without its end marker. If the pixels depend on it, pixels are missing.
FILLERS = (b"\xaa" * 1024, b"\x55" * 1024)


@dataclass(frozen=True)
class DecodeOptions:
    """What to decode an image to, and limits.

    Attributes:
        is_mask: decode to gray, for a mask: transparent pixels are black, and the profile is
            ignored, since values are weights. Otherwise to sRGB, with transparent pixels white.
        max_pixels: maximum width times height.
        min_side: minimum of width and height in pixels.
    """

    is_mask: bool = False
    max_pixels: int = MAX_PIXELS
    min_side: int = MIN_SIDE


@dataclass(frozen=True)
class DecodedImage:
    """A decoded image.

    Attributes:
        image: upright, mode RGB or L, without metadata.
        notes: what the user should know about it.
    """

    image: Image.Image
    notes: tuple[str, ...] = ()


def decode_file(data: bytes, options: DecodeOptions) -> DecodedImage:
    """Decode the content of an image file.

    Raises:
        UnusableFile: the file cannot be used.
    """
    with _plain_reasons(options):
        pixel_data = reduce_to_pixels(data)
        if data.startswith(JPEG_SIGNATURE):
            image = _decode_jpeg(pixel_data, options)
        else:
            image = _decode_other(pixel_data, options)
        return _convert(image, options)


def decode_image(image: Image.Image, options: DecodeOptions) -> DecodedImage:
    """Check and convert a PIL image like a file. An animation is taken at its current frame.

    Raises:
        UnusableFile: the image cannot be used.
    """
    with _plain_reasons(options):
        _check_size(image.size, options)
        image.load()
        return _convert(image, options)


@contextmanager
def _plain_reasons(options: DecodeOptions) -> Iterator[None]:
    """Turn whatever a decoder raises into an `UnusableFile`."""
    with warnings.catch_warnings():
        # `max_pixels` replaces Pillow's own limit; warnings about odd metadata do not matter.
        warnings.simplefilter("ignore")
        try:
            yield
        except UnusableFile:
            raise
        except Image.DecompressionBombError:
            limit = f"{options.max_pixels / 1e6:.0f} million"
            raise UnusableFile(f"has more than {limit} pixels") from None
        except MemoryError:
            raise UnusableFile("needs more memory than is available") from None
        except Exception as error:  # OSError, SyntaxError, struct.error, zlib.error ...
            raise UnusableFile(f"is damaged or cut short ({first_line(error)})") from None


def _check_size(size: tuple[int, int], options: DecodeOptions, reduction: int = 1) -> None:
    """Check the number of pixels, and that of the image reduced by a factor."""
    width, height = size
    if width * height > options.max_pixels * reduction**2:
        limit = f"{options.max_pixels / 1e6:.0f} million pixels"
        raise UnusableFile(f"has {width} x {height} pixels, more than the limit of {limit}")
    if min(size) < options.min_side:
        raise UnusableFile(f"has {width} x {height} pixels, too few to show a face")


def _decode_jpeg(pixel_data: PixelData, options: DecodeOptions) -> Image.Image:
    """Decode a JPEG, reduced if it is larger than the limit."""
    image = _decode_jpeg_bytes(pixel_data, options)
    if not pixel_data.is_complete:
        for filler in FILLERS:
            longer = pixel_data.data[:-2] + filler + pixel_data.data[-2:]
            filled = _decode_jpeg_bytes(replace(pixel_data, data=longer), options)
            if ImageChops.difference(image, filled).getbbox():
                raise UnusableFile("is damaged or cut short (pixels are missing)")
    return image


def _decode_jpeg_bytes(pixel_data: PixelData, options: DecodeOptions) -> Image.Image:
    # not `Image.open`, which refuses large images that can be reduced
    image = JpegImagePlugin.JpegImageFile(BytesIO(pixel_data.data))
    reduction = 1
    while math.prod(_divide(image.size, reduction)) > options.max_pixels:
        reduction *= 2
        if reduction > MAX_REDUCTION:
            break
    is_too_large = pixel_data.is_progressive and (
        math.prod(image.size) > MAX_PROGRESSIVE_FACTOR * options.max_pixels
    )
    _check_size(image.size, options, 1 if is_too_large else min(reduction, MAX_REDUCTION))
    if reduction > 1:
        image.draft(None, (image.width // reduction, image.height // reduction))
    image.load()
    return image


def _divide(size: tuple[int, int], divisor: int) -> tuple[int, int]:
    return -(-size[0] // divisor), -(-size[1] // divisor)


def _decode_other(pixel_data: PixelData, options: DecodeOptions) -> Image.Image:
    """Decode an image of another format than JPEG."""
    data = pixel_data.data
    try:
        image = Image.open(BytesIO(data), formats=_supported_formats())
    except UnidentifiedImageError:
        if pixel_data.size is None:
            raise UnusableFile(_explain_unknown(data)) from None
        _check_size(pixel_data.size, options)
        return _decode_with_opencv(data)
    _check_size(image.size, options)
    if pixel_data.profile:
        image.info["icc_profile"] = pixel_data.profile
    if len(image.info.get("exif", b"")) > MAX_EXIF_BYTES:
        image.info["exif"] = image.info["exif"][:MAX_EXIF_BYTES]
    mode = _raw_mode(image)
    image.load()
    if ";16" in mode:
        return _restore_depth(image, data)
    if mode in WHITE_OF_FEW_BITS and isinstance(image.info.get("transparency"), int):
        # Pillow scales the levels to 8 bits, but not the transparent one
        image.info["transparency"] *= 255 // WHITE_OF_FEW_BITS[mode]
    elif image.mode == "1" and image.info.get("transparency") == 1:
        image.info["transparency"] = 255  # as Pillow says itself since version 12
    return image


def _raw_mode(image: Image.Image) -> str:
    """Return the layout of the pixels in the file, such as "RGB;16B"; empty if it is unknown."""
    tile = image.tile[0] if getattr(image, "tile", None) else None  # type: ignore[attr-defined]
    if tile is None:
        return ""
    arguments = tile[3]
    return str(arguments[0] if isinstance(arguments, tuple) else arguments)


def _restore_depth(image: Image.Image, data: bytes) -> Image.Image:
    """Correct what Pillow loses of 16 bits.

    Colors are decoded again if Pillow, which drops the lower 8 bits, returns black: programs store
    8 or 12 bits in 16 without scaling them. Gray in a TIFF is inverted if 0 is white.
    """
    if image.mode.startswith("I"):
        is_negative = getattr(image, "tag_v2", {}).get(TIFF_PHOTOMETRIC) == WHITE_IS_ZERO
        return ImageChops.invert(to_8_bit(image)) if is_negative else image
    if image.mode not in ("RGB", "RGBA", "LA"):
        return image
    transparent = image.info.get("transparency")
    if isinstance(transparent, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    colors = image.getbands()[:-1] if image.mode.endswith("A") else image.getbands()
    if any(np.asarray(image.getchannel(band)).max() >= DARK_LEVEL for band in colors):
        return image
    restored = _decode_with_opencv(data)
    if restored.size != image.size:  # OpenCV has applied the orientation
        return image
    restored.info = {**image.info}
    return restored


def _decode_with_opencv(data: bytes) -> Image.Image:
    """Decode pixels of kinds that Pillow does not read: float colors, colors of 16 bits."""
    import cv2

    logging = getattr(cv2.utils, "logging", cv2)  # OpenCV 4 has its functions elsewhere
    level = logging.getLogLevel()
    logging.setLogLevel(0)  # it would print what is wrong with a damaged file
    try:
        values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    finally:
        logging.setLogLevel(level)
    if values is None or (values.ndim == 3 and values.shape[2] not in (3, 4)):
        raise UnusableFile("has pixels of a kind that cannot be read; save it with 8 bits")
    if values.ndim == 2:
        return Image.fromarray(scale_to_8_bit(values))
    colors = Image.fromarray(cv2.cvtColor(scale_to_8_bit(values[..., :3]), cv2.COLOR_BGR2RGB))
    if values.shape[2] == 4:
        colors.putalpha(Image.fromarray(scale_to_8_bit(values[..., 3])))
    return colors


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
    brand = data[8:12] if data[4:8] == b"ftyp" else b""
    if brand in HEIF_BRANDS and "HEIF" not in Image.OPEN:
        return "is HEIC; run `pip install pillow-heif`, or save the image as JPEG"
    if brand in AVIF_BRANDS and "AVIF" not in Image.OPEN:
        return "is AVIF; run `pip install -U pillow`, or save the image as JPEG"
    for start, name in UNSUPPORTED_FORMATS.items():
        if data.startswith(start):
            return f"is {name}; save the image as JPEG or PNG"
    if brand == b"crx ":
        return "is a raw photo; save the image as JPEG or PNG"
    if b"<svg" in data[:1024]:
        return "is an SVG file; save the image as PNG"
    return "is not an image of a supported format (JPEG, PNG, WebP ...)"


def _convert(image: Image.Image, options: DecodeOptions) -> DecodedImage:
    """Convert a decoded image to upright sRGB or gray."""
    image = to_8_bit(_apply_orientation(image))
    colors, alpha = split_alpha(image)
    if alpha is not None and alpha.getextrema() == (255, 255):
        alpha = None
    notes: tuple[str, ...] = ()
    if options.is_mask:
        result = colors if colors.mode == "L" else to_srgb(colors, {}).convert("L")
        if alpha is not None:
            result = ImageChops.multiply(result, alpha)
    else:
        result = to_srgb(colors, image.info)
        if alpha is not None:
            if alpha.getextrema()[1] == 0:
                notes = ("is transparent everywhere; it is read as white",)
            result.putalpha(alpha)
            background = Image.new("RGBA", result.size, "white")
            result = Image.alpha_composite(background, result).convert("RGB")
    if result is image:
        result = image.copy()
    result.info = {}  # otherwise the next reader would apply orientation and profile again
    return DecodedImage(result, notes)


def _apply_orientation(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; ignore unreadable EXIF, since the pixels are good."""
    try:
        transform = ORIENTATIONS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # hostile EXIF may raise anything
        return image
    return image if transform is None else image.transpose(transform)
