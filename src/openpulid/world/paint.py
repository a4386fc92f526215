"""Paint the face onto the head: eyes, brows, mouth, nostrils, lines, freckles, beard.

All functions take surface coordinates (B, H, W), measures (B, 1, 1) and the edge softness `e`
(about one pixel), and blend onto a color image (B, 3, H, W). Edges are smooth by construction, so
that few samples per pixel are enough.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openpulid.world.head import Measures, bell, lerp


def inside(distance: Tensor, e: float) -> Tensor:
    """Convert a signed distance (positive inside) to coverage in [0, 1]."""
    return (distance / e + 0.5).clamp(0, 1)


def blend(image: Tensor, color: Tensor, cover: Tensor) -> Tensor:
    """Blend `color` (B, 3, 1, 1) or (B, 3, H, W) over `image` by the coverage `cover` (B, H, W)."""
    return torch.lerp(image, color.expand_as(image), cover[:, None])


def rgb(red: float, green: float, blue: float, like: Tensor) -> Tensor:
    """Create a constant color (1, 3, 1, 1) on the device and in the dtype of `like`."""
    return torch.tensor([red, green, blue], dtype=like.dtype, device=like.device).view(1, 3, 1, 1)


def skin_color(tone: Tensor, warmth: Tensor) -> Tensor:
    """Convert tone and warmth (B, 1, 1) to a color (B, 3, 1, 1); shading can darken every tone."""
    light, middle, dark = (0.98, 0.84, 0.75), (0.83, 0.62, 0.47), (0.50, 0.34, 0.26)
    low, high = (2 * tone).clamp(0, 1), (2 * tone - 1).clamp(0, 1)
    shift = (warmth - 0.5) * 0.09
    channels = [
        lerp(a, 0.0, low) + low * (lerp(b, c, high)) + shift * sign
        for a, b, c, sign in zip(light, middle, dark, (1.0, 0.15, -1.0), strict=True)
    ]
    return torch.stack(channels, dim=1).clamp(0, 1)


def iris_color(hue: Tensor, lightness: Tensor) -> Tensor:
    """Return the iris color (B, 3, 1, 1): brown, hazel, green, blue for `hue` from 0 to 1."""
    stops = torch.tensor(
        [[0.42, 0.22, 0.08], [0.62, 0.46, 0.12], [0.22, 0.62, 0.28], [0.18, 0.46, 0.92]],
        dtype=hue.dtype,
        device=hue.device,
    )
    index = torch.arange(4, dtype=hue.dtype, device=hue.device)
    weights = (1 - (hue * 3 - index).abs()).clamp(min=0)
    color = (weights @ stops).transpose(1, 2)[..., None]
    return (color * lerp(0.55, 1.35, lightness)[:, None]).clamp(0, 1)


def eyes(
    image: Tensor, x: Tensor, y: Tensor, m: Measures, p: Measures, wink: Tensor, e: float
) -> Tensor:
    """Paint both eyes: sclera, iris, pupil, glint, lid line, crease; `wink` closes the left one."""
    iris = iris_color(p["iris_hue"], p["iris_lightness"])
    closed = wink * (x < 0)
    opening = m["eye_o"] * (1 - 0.92 * closed)
    u = (x.abs() - m["eye_x"]) / m["eye_w"]
    v = y - m["eye_y"] - m["eye_tilt"] * m["eye_w"] * u * 0.8
    arc = (1 - u * u).clamp(min=0)
    shut = 0.3 * m["eye_o"] * closed
    upper, lower = opening * arc.sqrt() * 1.05 - shut, -0.72 * opening * arc - shut
    across = inside((1 - u.abs()) * m["eye_w"], e)
    lid = inside(upper - v, e) * inside(v - lower, e) * across
    shade = lerp(0.82, 1.0, inside(upper - v - 0.02, 0.03))[:, None]
    image = blend(image, rgb(0.97, 0.96, 0.95, image) * shade, lid)
    radius = torch.sqrt((u * m["eye_w"]) ** 2 + v**2)
    image = blend(image, iris * shade, lid * inside(0.060 - radius, e))
    image = blend(image, iris * 0.35, lid * inside(0.010 - (radius - 0.058).abs(), e) * 0.7)
    image = blend(image, rgb(0.03, 0.03, 0.04, image), lid * inside(0.027 - radius, e))
    glint = torch.sqrt((u * m["eye_w"] + 0.020 * torch.sign(x)) ** 2 + (v - 0.022) ** 2)
    image = blend(image, rgb(1, 1, 1, image), lid * inside(0.014 - glint, e) * 0.9)
    image = blend(
        image, rgb(0.10, 0.06, 0.05, image), inside(0.013 - (v - upper).abs(), e) * across * 0.95
    )
    below = inside(0.006 - (v - lower).abs(), e) * across * (1 - closed)
    crease = inside(0.007 - (v - upper - 0.030 - 0.02 * arc).abs(), e) * inside(
        (0.9 - u.abs()) * m["eye_w"], e
    )
    return image * (1 - 0.36 * below - 0.22 * crease)[:, None]


def brows(image: Tensor, x: Tensor, y: Tensor, m: Measures, color: Tensor, e: float) -> Tensor:
    """Paint both brows: an arc with the person's angle, arch, length and thickness."""
    u = (x.abs() - m["eye_x"] - 0.01) / m["brow_w"]
    center = m["brow_y"] + m["brow_arch"] * (1 - u * u) + m["brow_angle"] * u
    thick = m["brow_t"] * (1.05 - 0.45 * u).clamp(min=0.3)
    cover = inside(thick - (y - center).abs(), 1.2 * e) * inside(
        (1 - u.abs()) * m["brow_w"], 1.5 * e
    )
    return blend(image, color, cover * 0.92)


def mouth(
    image: Tensor, x: Tensor, y: Tensor, m: Measures, expression: Measures, skin: Tensor, e: float
) -> Tensor:
    """Paint lips, opening and teeth; `smile` raises the corners, `open` parts the lips."""
    u = x / m["mouth_w"]
    arc = (1 - u * u).clamp(min=0)
    tilt = expression["mouth_tilt"] * x
    middle = m["mouth_y"] + expression["smile"] * 0.055 * (u * u - 0.45) + tilt
    gap = expression["open"] * arc.sqrt()
    bow = 1 - 0.30 * bell(u, 0.22) + 0.12 * bell(u.abs() - 0.30, 0.2)
    top = middle + gap * 0.45 + m["upper"] * arc.sqrt() * bow
    bottom = middle - gap - m["lower"] * arc.sqrt()
    across = inside((1 - u.abs()) * m["mouth_w"], e)
    lips = inside(top - y, e) * inside(y - bottom, e) * across
    lip_color = (skin * rgb(0.80, 0.50, 0.50, image) + rgb(0.06, 0.0, 0.01, image)).clamp(0, 1)
    lighter = 1 + 0.14 * (bell(y - bottom - 0.55 * m["lower"], 0.03))[:, None]
    image = blend(image, (lip_color * lighter).clamp(0, 1), lips)
    seam = inside(0.008 - (y - middle).abs(), e) * across * (1 - inside(gap - 0.012, e))
    image = blend(image, lip_color * 0.30, seam)
    hole = (
        inside(middle + 0.45 * gap - y, e)
        * inside(y - middle + gap, e)
        * across
        * inside(gap - 0.006, e)
    )
    image = blend(image, rgb(0.22, 0.05, 0.06, image), hole)
    teeth = (
        hole
        * inside(y - (middle + 0.45 * gap - expression["teeth"]), e)
        * inside((0.9 - u.abs()) * m["mouth_w"], e)
    )
    return blend(image, rgb(0.96, 0.95, 0.92, image), teeth)


def nose(image: Tensor, x: Tensor, y: Tensor, m: Measures, e: float) -> Tensor:
    """Paint the nostrils and the shadow under the tip and along the wings."""
    side = x.abs()
    base = m["nose_y"] - 0.028
    hole = torch.sqrt(((side - 0.52 * m["nose_w"]) / 1.5) ** 2 + (y - base) ** 2)
    image = blend(image, image * 0.35, inside(0.018 - hole, 1.3 * e))
    under = bell(x, 0.9 * m["nose_w"]) * bell(y - base + 0.012, 0.018)
    wing = bell(side - m["nose_w"] - 0.035, 0.02) * bell(y - base - 0.03, 0.05)
    return image * (1 - 0.20 * under - 0.30 * wing)[:, None]


def marks(
    image: Tensor, x: Tensor, y: Tensor, m: Measures, p: Measures, blush: Tensor, e: float
) -> Tensor:
    """Paint age lines, freckles, a mole and blush; blush is part of the scene."""
    side = x.abs()
    red = 0.30 * blush * bell(side - 0.33, 0.13) * bell(y + 0.20, 0.11)
    image = blend(image, image * rgb(1.05, 0.72, 0.70, image), red.clamp(0, 1))
    age = (p["age_lines"] - 0.35).clamp(min=0) / 0.65
    fold_x = m["nose_w"] + 0.05 + 0.55 * (m["nose_y"] - y).clamp(min=0)
    fold = (
        inside(0.009 - (side - fold_x).abs(), 1.5 * e)
        * inside(m["nose_y"] + 0.02 - y, 0.03)
        * inside(y - m["mouth_y"], 0.04)
    )
    brow = sum(
        inside(0.008 - (y - m["brow_y"] - 0.10 - 0.07 * k + 0.25 * x * x).abs(), 1.5 * e)
        for k in (0, 1)
    )
    lines = (
        fold
        + brow * inside(0.26 - side, 0.06)
        + bell(side - m["eye_x"], 0.10)
        * inside(0.010 - (y - m["eye_y"] + 0.11 - 0.5 * (side - m["eye_x"]) ** 2).abs(), 1.5 * e)
    )
    image = image * (1 - 0.42 * age * lines.clamp(0, 1))[:, None]
    speck = torch.sin(61.0 * x + 19.0 * y) * torch.sin(53.0 * y - 23.0 * x)
    area = bell(side - 0.22, 0.17) * bell(y + 0.17, 0.10)
    freckles = (p["freckles"] - 0.35).clamp(min=0) / 0.65 * area * ((speck - 0.35) * 3).clamp(0, 1)
    image = blend(image, image * rgb(0.72, 0.52, 0.42, image), (0.95 * freckles).clamp(0, 1))
    position = (p["mole"] - 0.5) * 2
    mole_x = x - 0.36 * position
    mole_y = y - m["mouth_y"] - 0.07 + 0.10 * position.abs()
    distance = torch.sqrt(mole_x**2 + mole_y**2)
    cover = inside(0.022 - distance, e) * inside(position.abs() - 0.45, 0.1)
    return blend(image, rgb(0.20, 0.11, 0.08, image), cover)


def beard(
    image: Tensor, x: Tensor, y: Tensor, m: Measures, kind: Measures, color: Tensor, e: float
) -> Tensor:
    """Paint a moustache or a full beard in the color of the hair; the lips stay visible."""
    side = x.abs()
    lip = m["mouth_y"] + 0.035 + m["upper"]
    moustache = inside(0.030 - (y - lip - 0.012 + 0.5 * side**2).abs(), 1.5 * e) * inside(
        m["mouth_w"] + 0.035 - side, 2 * e
    )
    line = m["mouth_y"] + 0.03 + 0.9 * (side - m["mouth_w"] - 0.02).clamp(min=0)
    mouth_hole = inside(
        1 - (x / (m["mouth_w"] + 0.025)) ** 2 - ((y - m["mouth_y"]) / (0.075 + m["lower"])) ** 2,
        0.25,
    )
    full = inside(line - y, 3 * e) * (1 - mouth_hole)
    cover = kind["moustache"] * moustache + kind["beard"] * torch.maximum(full, moustache)
    strands = 1 + 0.18 * torch.sin(70 * x) * torch.sin(9 * y + 3 * x)
    return blend(image, color * strands[:, None], cover.clamp(0, 1) * 0.93)
