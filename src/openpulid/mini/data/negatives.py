"""Pictures without a face of the miniature's world: what the finder must learn to refuse.

Half of it is made from nothing (noise of all spectra, gradients, polygons, stripes), half from what is at hand: world
pictures taken apart, and the few photographs that come inside scikit-image and Matplotlib.
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
    "astronaut", "coffee", "chelsea", "rocket", "retina", "hubble_deep_field", "immunohistochemistry", "camera",
    "coins", "moon", "page", "brick", "grass", "gravel", "text", "colorwheel", "clock",
)  # fmt: skip
HELD_OUT = ("camera", "chelsea", *(f"face-{index}" for index in range(80, 100)))
"""Photographs that examine the finder and never train it."""

FACE_POSITIONS = {
    "astronaut": (224, 110, 90),
    "grace_hopper": (256, 190, 120),
    "camera": (265, 140, 45),
}
"""Where real faces are in them: x, y and half a width in pixels. The hardest to refuse, so most crops hold one."""


HEAD_LAYOUT = (
    (0, 0, 0.5, 0.65),
    (-0.22, -0.1, 0.08, 0.05),
    (0.22, -0.1, 0.08, 0.05),
    (0, 0.35, 0.2, 0.05),
)
"""A head, two eyes and a mouth: middles and half-axes in a picture from -1 to 1."""


def load_photographs() -> dict[str, Tensor]:
    """The photographs of the installed packages by name, each (3, H, W) uint8; needs the `train` extra, no network."""
    from matplotlib import cbook
    from skimage import data

    arrays = {
        "grace_hopper": np.array(
            Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))
        )
    }
    folder = Path(data.__file__).parent
    for name in PHOTOGRAPHS:
        # only what the wheel itself holds: the others would be downloaded
        if any((folder / f"{name}{suffix}").exists() for suffix in (".png", ".jpg")):
            arrays[name] = _rgb(getattr(data, name)())
    for index, small in enumerate(
        data.lfw_subset()[:100]
    ):  # 25 x 25 pixels, but a hundred real faces
        arrays[f"face-{index}"] = _rgb((small * 255).astype(np.uint8))
    return {name: torch.from_numpy(array.copy()).permute(2, 0, 1) for name, array in arrays.items()}


def _rgb(array: np.ndarray) -> np.ndarray:
    return np.array(Image.fromarray(array).convert("RGB"))


def sample_int(high: int, generator: Generator) -> int:
    """A whole number below `high`."""
    return int(torch.randint(high, (), generator=generator))


def sample_float(low: float, high: float, generator: Generator) -> float:
    return low + (high - low) * torch.rand((), generator=generator).item()


def crop_photograph(photos: Mapping[str, Tensor], size: int, generator: Generator) -> Tensor:
    """(3, size, size) random crop of a photograph: turned, mirrored, bent; three in four hold a real face."""
    names = list(photos)
    group = sample_int(4, generator)
    people = [name for name in names if name in FACE_POSITIONS]
    small = [name for name in names if name.startswith("face-")]
    chosen = (
        people
        if group < 2
        else small
        if group == 2
        else [name for name in names if name not in small]
    )
    name = chosen[sample_int(len(chosen), generator)]
    image = photos[name].float()[None] / 255
    height, width = image.shape[-2:]
    x, y, half = (
        FACE_POSITIONS.get(name, (width / 2, height / 2, 0.0)) if group < 3 else (0.0, 0.0, 0.0)
    )
    if group == 2:
        half = min(height, width) * 0.42
    if half:
        half *= sample_float(0.9, 2.2, generator)
        x, y = (
            x + half * sample_float(-0.3, 0.3, generator),
            y + half * sample_float(-0.3, 0.3, generator),
        )
    else:
        half = min(height, width) * sample_float(0.1, 0.5, generator)
        x, y = (
            sample_float(half, width - half, generator),
            sample_float(half, height - half, generator),
        )
    turn = (
        sample_float(-0.35, 0.35, generator)
        if sample_int(4, generator)
        else sample_float(-math.pi, math.pi, generator)
    )
    mirror = 1 - 2 * sample_int(2, generator)
    stretch = math.exp(sample_float(-0.2, 0.2, generator))
    axis = torch.linspace(-1, 1, size)
    v, u = torch.meshgrid(axis, axis * mirror, indexing="ij")
    # Two faces are few: bent like rubber they are many.
    bend = sample_float(0.0, 0.16, generator) * torch.randn(1, 2, 5, 5, generator=generator)
    du, dv = interpolate(bend, (size, size), mode="bicubic")[0]
    u, v = u + du, v + dv
    along = x + half * stretch * (math.cos(turn) * u - math.sin(turn) * v)
    down = y + half / stretch * (math.sin(turn) * u + math.cos(turn) * v)
    step = max(1, int(2 * half / size))  # coarse beforehand, or fine texture would turn to noise
    if step > 1:
        image = interpolate(image, scale_factor=1 / step, mode="area")
    grid = torch.stack([2 * along / width - 1, 2 * down / height - 1], -1)[None]
    return grid_sample(image, grid, padding_mode="reflection", align_corners=False)[0]


def sample_noise(size: int, generator: Generator) -> Tensor:
    """(3, size, size): noise whose power falls as 1 / frequency^a, a from 0 (white) to 3 (clouds), often gray."""
    exponent = sample_float(0.0, 1.6, generator)
    frequency = torch.fft.fftfreq(size)[:, None] ** 2 + torch.fft.rfftfreq(size) ** 2
    frequency[0, 0] = 1.0 / size**2
    noise = torch.randn(3, size, size, generator=generator)
    if sample_int(3, generator) == 0:
        noise = noise[:1].expand(3, -1, -1)
    field = torch.fft.irfft2(torch.fft.rfft2(noise) * frequency ** (-exponent / 2), s=(size, size))
    field = field / field.std().clamp(min=1e-6)
    color = torch.rand(3, 1, 1, generator=generator)
    return (color + sample_float(0.05, 0.4, generator) * field).clamp(0, 1)


def sample_gradient(size: int, generator: Generator) -> Tensor:
    """(3, size, size): plain colours, and blends of two along a line or around a point."""
    first, second = torch.rand(2, 3, 1, 1, generator=generator)
    if sample_int(3, generator) == 0:
        return first.expand(3, size, size).clone()
    axis = torch.linspace(-1, 1, size)
    angle = sample_float(0, 2 * math.pi, generator)
    ramp = 0.5 + 0.35 * (math.cos(angle) * axis + math.sin(angle) * axis[:, None])
    if sample_int(2, generator):
        x, y = sample_float(-0.5, 0.5, generator), sample_float(-0.5, 0.5, generator)
        ramp = ((axis - x) ** 2 + (axis[:, None] - y) ** 2).sqrt() * sample_float(
            0.4, 1.2, generator
        )
    return torch.lerp(first, second, ramp.clamp(0, 1))


def sample_shapes(size: int, generator: Generator) -> Tensor:
    """(3, size, size): ellipses, boxes and stripes on a blend; some lie like a head with two eyes, but are none."""
    image = sample_gradient(size, generator)
    axis = torch.linspace(-1, 1, size)
    headlike = sample_int(2, generator)
    spots = HEAD_LAYOUT if headlike else ()
    for index in range(len(spots) or 1 + sample_int(10, generator)):
        if spots:
            x, y, a, b = (value + sample_float(-0.08, 0.08, generator) for value in spots[index])
            a, b = abs(a) + 0.02, abs(b) + 0.02
        else:
            x, y = sample_float(-1, 1, generator), sample_float(-1, 1, generator)
            a, b = sample_float(0.05, 0.8, generator), sample_float(0.05, 0.8, generator)
        turn = sample_float(0, math.pi, generator) if not spots else 0.0
        u = (math.cos(turn) * (axis - x) + math.sin(turn) * (axis[:, None] - y)) / a
        v = (math.cos(turn) * (axis[:, None] - y) - math.sin(turn) * (axis - x)) / b
        power = (2.0, 2.0, 8.0)[sample_int(3, generator)]
        inside = ((1 - u.abs() ** power - v.abs() ** power) * 8).clamp(0, 1)
        image = torch.lerp(image, sample_gradient(size, generator), inside)
    if sample_int(3, generator) == 0:
        wave = torch.sin(
            sample_float(4, 40, generator) * (axis + sample_float(-1, 1, generator) * axis[:, None])
        )
        cover = (wave * 4).clamp(0, 1) * sample_float(0.1, 1, generator)
        image = torch.lerp(image, torch.rand(3, 1, 1, generator=generator), cover)
    return image


def shuffle_tiles(images: Tensor, parts: Tensor, generator: Generator) -> Tensor:
    """World pictures (B, 3, S, S) cut into 3 x 3 to 6 x 6 tiles that are laid out anew; tiles may be turned."""
    size = images.shape[-1]
    tiles = (3, 4, 6)[sample_int(3, generator)]
    side = size // tiles
    cut = (
        images[..., : side * tiles, : side * tiles]
        .unflatten(-1, (tiles, side))
        .unflatten(-3, (tiles, side))
    )
    cut = cut.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # (B, tiles², 3, side, side)
    order = torch.rand(cut.shape[:2], generator=generator).argsort(1).to(images.device)
    cut = cut[torch.arange(len(cut), device=images.device)[:, None], order]
    if sample_int(2, generator):
        cut = cut.flip(-2)
    whole = cut.unflatten(1, (tiles, tiles)).permute(0, 3, 1, 4, 2, 5).flatten(-2).flatten(-3, -2)
    return interpolate(whole, (size, size), mode="bilinear") if side * tiles != size else whole


def remove_person(images: Tensor, parts: Tensor, generator: Generator) -> Tensor:
    """World pictures whose person is gone: the background's mean colour, with some of its texture, in their place."""
    background = (parts == 0)[:, None].float()
    mean = (images * background).sum((2, 3), keepdim=True) / background.sum(
        (2, 3), keepdim=True
    ).clamp(min=1)
    other = images.roll(images.shape[-1] // 2, -1)
    filled = torch.where(background.roll(images.shape[-1] // 2, -1) > 0, other, mean)
    return torch.where(background > 0, images, filled)


def erase_face(images: Tensor, parts: Tensor, generator: Generator) -> Tensor:
    """World people without features: the face becomes its mean colour, shaded, or is turned upside down."""
    face = (parts == 1)[:, None].float()
    mean = (images * face).sum((2, 3), keepdim=True) / face.sum((2, 3), keepdim=True).clamp(min=1)
    shade = interpolate(
        interpolate(images, scale_factor=1 / 16, mode="area"), images.shape[-2:], mode="bilinear"
    )
    smooth = torch.lerp(mean.expand_as(images), shade, 0.5)
    reversed_ = images.flip(-2).roll(sample_int(17, generator) - 8, -2)
    replaced = smooth if sample_int(2, generator) else reversed_
    return torch.where((face > 0) | ((parts == 2)[:, None] & (face.sum() > 0)), replaced, images)


def paste_real_faces(
    images: Tensor, parts: Tensor, photos: Mapping[str, Tensor], generator: Generator
) -> Tensor:
    """World pictures with a real face where theirs was: neither hair nor background may decide."""
    size = images.shape[-1]
    real = torch.stack([crop_photograph(photos, size, generator) for _ in images])
    return torch.where((parts == 1)[:, None] | (parts == 2)[:, None], real, images)
