"""Convert pixels of any depth, mode and color space to 8-bit sRGB or gray."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageCms

WHITE_LEVELS = (255, 1023, 4095, 65535, 2**32 - 1)
"""White of images with 8, 10, 12, 16 and 32 bits. Programs store fewer bits in 16 unscaled."""

MAX_FLOAT_WHITE = 16.0
"""Float images are scaled to 1, or to 255 and above. Values above 1 are highlights, up to here."""

SRGB_TOLERANCE = 2
"""Largest change in 8 bits by a profile that counts as sRGB."""

DISPLAY_GAMMA = 2.2
GAMMA_TOLERANCE = 0.05


def scale_to_8_bit(values: np.ndarray) -> np.ndarray:
    """Scale integers of more than 8 bits, or floats, to uint8 of the same shape.

    White is the smallest level of `WHITE_LEVELS` that no value exceeds, so that a 16-bit image in
    which a program stored 8 or 12 bits is not black. In a float image it is 1 unless values are
    far above.

    Raises:
        ValueError: values are not finite.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return values.astype(np.uint8) * 255
    is_float = np.issubdtype(values.dtype, np.floating)
    if is_float and not np.isfinite(values).all():
        raise ValueError("has values that are not numbers")
    highest = float(values.max(initial=0))
    if is_float and highest <= MAX_FLOAT_WHITE:
        white = 1.0
    else:
        white = float(next((level for level in WHITE_LEVELS if highest <= level), highest))
    if values.dtype == np.uint16:
        return _scale(np.arange(65536), white)[values]  # a table needs the least memory
    return _scale(values, white)


def _scale(values: np.ndarray, white: float) -> np.ndarray:
    scaled = values.astype(np.float32)
    scaled *= 255 / white
    np.rint(scaled, out=scaled)
    np.clip(scaled, 0, 255, out=scaled)
    return scaled.astype(np.uint8)


def to_8_bit(image: Image.Image) -> Image.Image:
    """Scale gray images of 16 and 32 bits to 8 bits, where `Image.convert` would clip.

    Other images are returned as they are.

    Raises:
        ValueError: values are not finite.
    """
    if not image.mode.startswith("I") and image.mode != "F":
        return image
    values = np.asarray(image)
    gray = Image.fromarray(scale_to_8_bit(values))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        opaque = np.where(values == transparent, 0, 255).astype(np.uint8)
        gray = Image.merge("LA", (gray, Image.fromarray(opaque)))
    gray.info = {**image.info}
    gray.info.pop("transparency", None)
    return gray


def split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Separate colors and alpha.

    Returns:
        The colors, in a mode that a profile can apply to, and the alpha channel in mode L, or None
        if the image is opaque.
    """
    if image.mode in ("RGBa", "La"):  # multiplied by alpha
        image = image.convert("RGBA" if image.mode == "RGBa" else "LA")
    if not image.has_transparency_data:
        if image.mode in ("P", "PA", "RGBX", "HSV", "YCbCr"):
            return image.convert("RGB"), None
        return (image.convert("L"), None) if image.mode == "1" else (image, None)
    colors = image.convert("RGBA")
    alpha = colors.getchannel("A")
    is_gray = image.mode in ("L", "LA", "1")
    return colors.getchannel("R") if is_gray else colors.convert("RGB"), alpha


def to_srgb(image: Image.Image, info: dict[Any, Any]) -> Image.Image:
    """Convert colors to sRGB by their profile, or by the gamma of a PNG file.

    A profile that cannot be read, or that is for other colors, is ignored.

    Args:
        image: opaque image.
        info: `Image.info` of the file.

    Returns:
        Image in mode RGB.
    """
    if image.mode == "LAB":
        return _apply_profile(image, ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")))
    if profile := info.get("icc_profile"):
        try:
            return _apply_profile(image, ImageCms.ImageCmsProfile(BytesIO(profile)))
        except Exception:  # hostile profiles may raise anything
            return image.convert("RGB")
    image = image.convert("RGB")
    gamma = info.get("gamma")
    if not gamma or "srgb" in info:
        return image
    exponent = 1 / (gamma * DISPLAY_GAMMA)
    if abs(exponent - 1) < GAMMA_TOLERANCE or not 0.1 < exponent < 10:
        return image
    curve = [round(255 * (level / 255) ** exponent) for level in range(256)]
    return image.point(curve * 3)


def _apply_profile(image: Image.Image, profile: Any) -> Image.Image:
    """Convert an image from a profile to sRGB.

    Raises:
        ImageCms.PyCMSError: the profile is not for this mode.
    """
    srgb = ImageCms.createProfile("sRGB")
    transform = ImageCms.buildTransform(
        profile, srgb, image.mode, "RGB", ImageCms.Intent.PERCEPTUAL
    )
    if image.mode == "RGB":
        # Do not round the pixels of sRGB again.
        probe = _color_cube()
        changed = ImageCms.applyTransform(probe, transform)
        assert changed is not None, "not in place"
        if np.asarray(ImageChops.difference(probe, changed)).max() <= SRGB_TOLERANCE:
            return image
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None, "not in place"
    return converted


def _color_cube() -> Image.Image:
    """Return an image of 9 x 9 x 9 colors."""
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(27, 27, 3)
    return Image.fromarray(cube)
