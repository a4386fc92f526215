"""Opening pictures that somebody else made: the good ones end as RGB, the others as one `ImageError`.

Limits are checked before any pixel is decoded, so a small file cannot ask for much memory. What happens, in
order: bytes counted, header read, pixels counted, first frame decoded in full, orientation applied, 16 bit
scaled to 8, colour brought to RGB (CMYK, palette, gray), alpha laid over white.
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

# Photographs only. Pillow also opens programs (EPS runs Ghostscript) and formats without a mark (TGA).
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "HEIF", "JPEG2000")

# What a HEIF file's first box says it is: telephones' HEIC, and the plain form.
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

# What makes a picture upright, by its orientation in EXIF; 1 is upright.
ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Where Pillow keeps what it reads the orientation from.
EXIF_KEYS = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")

Source = str | PathLike[str] | bytes | BinaryIO | Image.Image


def open_image(
    source: Source,
    *,
    name: str | None = None,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Open a picture as RGB, upright, 8 bit.

    Args:
        source: a path, the file's bytes, an open binary file, or a PIL image (checked and converted alike).
        name: what error messages call it; the path by default.
        max_bytes, max_pixels: refused above these, before decoding.

    Raises:
        PictureError: for everything that can be wrong with it, naming the file and the reason.
    """
    label = name or _label(source)
    with warnings.catch_warnings():
        # The pixel limit here replaces Pillow's own; its notes about odd metadata are nobody's concern.
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
    """The picture with a longer side of at most `longest` pixels, averaged, not sampled; a smaller one as it is."""
    share = longest / max(image.size)
    if share >= 1:
        return image
    width, height = (max(round(side * share), 1) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _label(source: Source) -> str:
    if isinstance(source, (str, PathLike)):
        return str(source)
    return str(getattr(source, "filename", "") or getattr(source, "name", "") or "picture")


def _supported_formats() -> list[str]:
    """Those of `FORMATS` that this Pillow can decode: AVIF is not everywhere, and HEIF comes with a package of its own."""
    Image.init()
    if "HEIF" not in Image.OPEN:
        with suppress(ImportError):
            import_module("pillow_heif").register_heif_opener()
    return [name for name in FORMATS if name in Image.OPEN]


def _explain_unknown(data: bytes) -> str:
    """Why nothing opens these bytes."""
    if data[4:8] == b"ftyp" and data[8:12] in HEIF_BRANDS and "HEIF" not in Image.OPEN:
        return "is HEIC, which needs a package of its own; install it with `pip install pillow-heif`, or save it as JPEG"
    return "is not a picture of a known kind (JPEG, PNG, WebP ...)"


def _read(source: str | PathLike[str] | bytes | BinaryIO, label: str, max_bytes: int) -> bytes:
    """The file's bytes; at most one more than the limit is ever read."""
    try:
        if isinstance(source, bytes):
            data = source[: max_bytes + 1]
        elif isinstance(source, (str, PathLike)):
            path = Path(source)
            if path.is_dir():
                raise ImageError(label, "is a folder, not a picture")
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
        image.load()  # the whole file: a truncated one fails here, never as a half picture
        return _to_rgb(_apply_orientation(image))
    except MemoryError:
        raise ImageError(label, "needs more memory than there is") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error ...
        raise ImageError(label, f"is damaged or cut short ({_first_line(error)})") from None


def _apply_orientation(image: Image.Image) -> Image.Image:
    """Turned as its EXIF says, which is then taken off; EXIF that nobody can read says nothing, the pixels are good."""
    try:
        turn = ORIENTATIONS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a hostile one may raise anything
        return image
    if turn is None:
        return image
    upright = image.transpose(turn)
    for note in EXIF_KEYS:
        upright.info.pop(note, None)  # whoever opens the picture again would turn it again
    return upright


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to 8-bit RGB; transparent pixels over white."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit(image)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        paper = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(paper, layer).convert("RGB")
    if image.mode == "RGB":
        return image.copy()
    return image.convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """16-bit gray (65535 is white) and float gray (1 or 255 is white) to 8 bit; `convert` would clip."""
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
