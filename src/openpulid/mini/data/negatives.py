"""Images without a face of the miniature's world, which its face detector must learn to reject.

Half of them are generated (noise of all spectra, gradients, shapes, stripes). The other half are
world images taken apart, and the few photos that come with scikit-image and Matplotlib.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor
from torch.nn.functional import grid_sample, interpolate

PHOTOGRAPHS = (
    "astronaut",
    "coffee",
    "chelsea",
    "rocket",
    "retina",
    "hubble_deep_field",
    "immunohistochemistry",
    "camera",
    "coins",
    "moon",
    "page",
    "brick",
    "grass",
    "gravel",
    "text",
    "colorwheel",
    "clock",
)
HELD_OUT = ("camera", "chelsea", *(f"face-{index}" for index in range(80, 100)))
"""Photos that are used to evaluate the detector and never to train it."""

FACE_POSITIONS = {
    "astronaut": (224, 110, 90),
    "grace_hopper": (256, 190, 120),
    "camera": (265, 140, 45),
}
"""Real faces in the photos: center x and y, and half width, in pixels.

They are the hardest images to reject, so most crops hold one."""

HEAD_LAYOUT = (
    (0, 0, 0.5, 0.65),
    (-0.22, -0.1, 0.08, 0.05),
    (0.22, -0.1, 0.08, 0.05),
    (0, 0.35, 0.2, 0.05),
)
"""Ellipses laid out like a head, two eyes and a mouth: center x, y and half-axes, in [-1, 1]."""

BACKGROUND_LABEL = 0
FACE_LABEL = 1
EYEWEAR_LABEL = 2


def load_photographs() -> dict[str, Tensor]:
    """Load the photos of the installed packages, offline.

    Needs the extra `train`.

    Returns:
        name -> (3, H, W) uint8.
    """
    from matplotlib import cbook
    from skimage import data

    grace_hopper = cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    arrays = {"grace_hopper": np.array(Image.open(grace_hopper))}
    folder = Path(data.__file__).parent
    for name in PHOTOGRAPHS:
        # Only the files of the wheel itself: scikit-image would download the others.
        if any((folder / f"{name}{suffix}").exists() for suffix in (".png", ".jpg")):
            arrays[name] = _to_rgb(getattr(data, name)())
    # 25 x 25 pixels, but a hundred real faces.
    for index, face in enumerate(data.lfw_subset()[:100]):
        arrays[f"face-{index}"] = _to_rgb((face * 255).astype(np.uint8))
    return {name: torch.from_numpy(array.copy()).permute(2, 0, 1) for name, array in arrays.items()}


def sample_int(high: int, generator: Generator) -> int:
    """Sample an integer in [0, high)."""
    return int(torch.randint(high, (), generator=generator))


def sample_float(low: float, high: float, generator: Generator) -> float:
    """Sample a number between low and high."""
    return low + (high - low) * torch.rand((), generator=generator).item()


def crop_photograph(photos: Mapping[str, Tensor], size: int, generator: Generator) -> Tensor:
    """Sample a crop of a photo: rotated, mirrored, stretched and bent.

    Three of four crops hold a real face.

    Args:
        photos: the photos of `load_photographs`.
        size: width and height of the crop.
        generator: source of randomness.

    Returns:
        (3, size, size) in [0, 1].
    """
    name, x, y, half = _sample_window(photos, generator)
    image = photos[name].float()[None] / 255
    height, width = image.shape[-2:]
    max_turn = 0.35 if sample_int(4, generator) else math.pi
    turn = sample_float(-max_turn, max_turn, generator)
    mirror = 1 - 2 * sample_int(2, generator)
    stretch = math.exp(sample_float(-0.2, 0.2, generator))
    axis = torch.linspace(-1, 1, size)
    v, u = torch.meshgrid(axis, axis * mirror, indexing="ij")

    # There are few faces, but smooth deformation makes many of them.
    bend = sample_float(0.0, 0.16, generator) * torch.randn(1, 2, 5, 5, generator=generator)
    du, dv = interpolate(bend, (size, size), mode="bicubic")[0]
    u = u + du
    v = v + dv
    column = x + half * stretch * (math.cos(turn) * u - math.sin(turn) * v)
    row = y + half / stretch * (math.sin(turn) * u + math.cos(turn) * v)

    # Shrink the image before sampling, or fine texture would become noise.
    step = max(1, int(2 * half / size))
    if step > 1:
        image = interpolate(image, scale_factor=1 / step, mode="area")
    grid = torch.stack([2 * column / width - 1, 2 * row / height - 1], -1)[None]
    return grid_sample(image, grid, padding_mode="reflection", align_corners=False)[0]


def sample_noise(size: int, generator: Generator) -> Tensor:
    """Sample noise whose power falls as 1 / frequency^a, with a from 0 (white) to 3 (clouds).

    A third of the images are gray.

    Returns:
        (3, size, size) in [0, 1].
    """
    exponent = sample_float(0.0, 1.6, generator)
    frequency = torch.fft.fftfreq(size)[:, None] ** 2 + torch.fft.rfftfreq(size) ** 2
    frequency[0, 0] = 1.0 / size**2
    noise = torch.randn(3, size, size, generator=generator)
    if sample_int(3, generator) == 0:
        noise = noise[:1].repeat(3, 1, 1)
    spectrum = torch.fft.rfft2(noise) * frequency ** (-exponent / 2)
    field = torch.fft.irfft2(spectrum, s=(size, size))
    field = field / field.std().clamp(min=1e-6)
    color = torch.rand(3, 1, 1, generator=generator)
    return (color + sample_float(0.05, 0.4, generator) * field).clamp(0, 1)


def sample_gradient(size: int, generator: Generator) -> Tensor:
    """Sample a plain color, or a blend of two colors along a line or around a point.

    Returns:
        (3, size, size) in [0, 1].
    """
    first, second = torch.rand(2, 3, 1, 1, generator=generator)
    if sample_int(3, generator) == 0:
        return first.expand(3, size, size).clone()
    axis = torch.linspace(-1, 1, size)
    angle = sample_float(0, 2 * math.pi, generator)
    ramp = 0.5 + 0.35 * (math.cos(angle) * axis + math.sin(angle) * axis[:, None])
    if sample_int(2, generator):
        x = sample_float(-0.5, 0.5, generator)
        y = sample_float(-0.5, 0.5, generator)
        distance = ((axis - x) ** 2 + (axis[:, None] - y) ** 2).sqrt()
        ramp = distance * sample_float(0.4, 1.2, generator)
    return torch.lerp(first, second, ramp.clamp(0, 1))


def sample_shapes(size: int, generator: Generator) -> Tensor:
    """Sample ellipses, boxes and stripes on a gradient.

    Half of the images are laid out like a head with two eyes and a mouth.

    Returns:
        (3, size, size) in [0, 1].
    """
    image = sample_gradient(size, generator)
    axis = torch.linspace(-1, 1, size)
    layout = HEAD_LAYOUT if sample_int(2, generator) else ()
    for index in range(len(layout) or 1 + sample_int(10, generator)):
        if layout:
            x, y, a, b = (value + sample_float(-0.08, 0.08, generator) for value in layout[index])
            a = abs(a) + 0.02
            b = abs(b) + 0.02
            turn = 0.0
        else:
            x = sample_float(-1, 1, generator)
            y = sample_float(-1, 1, generator)
            a = sample_float(0.05, 0.8, generator)
            b = sample_float(0.05, 0.8, generator)
            turn = sample_float(0, math.pi, generator)
        u = (math.cos(turn) * (axis - x) + math.sin(turn) * (axis[:, None] - y)) / a
        v = (math.cos(turn) * (axis[:, None] - y) - math.sin(turn) * (axis - x)) / b
        power = (2.0, 2.0, 8.0)[sample_int(3, generator)]
        cover = ((1 - u.abs() ** power - v.abs() ** power) * 8).clamp(0, 1)
        image = torch.lerp(image, sample_gradient(size, generator), cover)
    if sample_int(3, generator) == 0:
        image = _add_stripes(image, axis, generator)
    return image


def shuffle_tiles(images: Tensor, parts: Tensor, generator: Generator) -> Tensor:
    """Cut images (B, 3, S, S) into 3 x 3 to 6 x 6 tiles and shuffle them; half are flipped."""
    size = images.shape[-1]
    num_tiles = (3, 4, 6)[sample_int(3, generator)]
    side = size // num_tiles
    cropped = images[..., : side * num_tiles, : side * num_tiles]
    tiles = cropped.unflatten(-1, (num_tiles, side)).unflatten(-3, (num_tiles, side))
    tiles = tiles.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # (B, num_tiles², 3, side, side)
    order = torch.rand(tiles.shape[:2], generator=generator).argsort(1).to(images.device)
    tiles = tiles[torch.arange(len(tiles), device=images.device)[:, None], order]
    if sample_int(2, generator):
        tiles = tiles.flip(-2)
    grid = tiles.unflatten(1, (num_tiles, num_tiles)).permute(0, 3, 1, 4, 2, 5)
    shuffled = grid.flatten(-2).flatten(-3, -2)
    if side * num_tiles == size:
        return shuffled
    return interpolate(shuffled, (size, size), mode="bilinear")


def remove_person(images: Tensor, parts: Tensor, generator: Generator) -> Tensor:
    """Replace the person in images (B, 3, S, S) by texture or mean color of the background."""
    background = (parts == BACKGROUND_LABEL)[:, None].float()
    area = background.sum((2, 3), keepdim=True).clamp(min=1)
    mean = (images * background).sum((2, 3), keepdim=True) / area
    half = images.shape[-1] // 2
    shifted = images.roll(half, -1)
    filled = torch.where(background.roll(half, -1) > 0, shifted, mean)
    return torch.where(background > 0, images, filled)


def erase_face(images: Tensor, parts: Tensor, generator: Generator) -> Tensor:
    """Replace faces in images (B, 3, S, S) by their shaded mean color, or flip them vertically."""
    face = (parts == FACE_LABEL)[:, None].float()
    area = face.sum((2, 3), keepdim=True).clamp(min=1)
    mean = (images * face).sum((2, 3), keepdim=True) / area
    coarse = interpolate(images, scale_factor=1 / 16, mode="area")
    shade = interpolate(coarse, images.shape[-2:], mode="bilinear")
    smooth = torch.lerp(mean.expand_as(images), shade, 0.5)
    flipped = images.flip(-2).roll(sample_int(17, generator) - 8, -2)
    replacement = smooth if sample_int(2, generator) else flipped
    eyewear = (parts == EYEWEAR_LABEL)[:, None] & (face.sum() > 0)
    return torch.where((face > 0) | eyewear, replacement, images)


def paste_real_faces(
    images: Tensor, parts: Tensor, photos: Mapping[str, Tensor], generator: Generator
) -> Tensor:
    """Replace faces by photos of real faces, so that hair and background do not decide.

    Args:
        images: (B, 3, S, S).
        parts: (B, S, S) labels.
        photos: the photos of `load_photographs`.
        generator: source of randomness.
    """
    size = images.shape[-1]
    crops = torch.stack([crop_photograph(photos, size, generator) for _ in images])
    is_face = (parts == FACE_LABEL) | (parts == EYEWEAR_LABEL)
    return torch.where(is_face[:, None], crops, images)


def _sample_window(
    photos: Mapping[str, Tensor], generator: Generator
) -> tuple[str, float, float, float]:
    """Sample a photo and a square in it: name, center x and y, and half width in pixels.

    Two of four windows are around `FACE_POSITIONS`, one is a small face, one is anywhere in a
    photo.
    """
    group = sample_int(4, generator)
    small_faces = [name for name in photos if name.startswith("face-")]
    if group < 2:
        names = [name for name in photos if name in FACE_POSITIONS]
    elif group == 2:
        names = small_faces
    else:
        names = [name for name in photos if name not in small_faces]
    name = names[sample_int(len(names), generator)]
    height, width = photos[name].shape[-2:]
    if group == 3:
        half = min(height, width) * sample_float(0.1, 0.5, generator)
        x = sample_float(half, width - half, generator)
        y = sample_float(half, height - half, generator)
        return name, x, y, half
    if group == 2:
        center_x, center_y, half = width / 2, height / 2, min(height, width) * 0.42
    else:
        center_x, center_y, half = FACE_POSITIONS[name]
    half *= sample_float(0.9, 2.2, generator)
    x = center_x + half * sample_float(-0.3, 0.3, generator)
    y = center_y + half * sample_float(-0.3, 0.3, generator)
    return name, x, y, half


def _add_stripes(image: Tensor, axis: Tensor, generator: Generator) -> Tensor:
    frequency = sample_float(4, 40, generator)
    slope = sample_float(-1, 1, generator)
    wave = torch.sin(frequency * (axis + slope * axis[:, None]))
    cover = (wave * 4).clamp(0, 1) * sample_float(0.1, 1, generator)
    return torch.lerp(image, torch.rand(3, 1, 1, generator=generator), cover)


def _to_rgb(array: np.ndarray) -> np.ndarray:
    return np.array(Image.fromarray(array).convert("RGB"))
