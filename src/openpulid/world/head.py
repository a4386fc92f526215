"""The shape of a head in its own frame: X to the right, Y up, Z to the viewer.

One unit is half of the image. The front is a height field `relief(X, Y)` on an ellipsoid whose
half-width depends on Y. So the intersection with a ray is found by solving a quadratic equation a
few times, without ray marching. All tensors broadcast over (B, H, W); parameters are (B, 1, 1).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

CRANIUM = 0.64
DEPTH = 0.58


Vector = tuple[Tensor, ...]
"""Three components that broadcast."""
Measures = Mapping[str, Tensor]


def lerp(low: float, high: float, t: Tensor) -> Tensor:
    """Interpolate linearly between `low` at t = 0 and `high` at t = 1."""
    return low + (high - low) * t


def bell(x: Tensor, width: Tensor | float) -> Tensor:
    """Evaluate a Gaussian of standard deviation `width` / sqrt(2) that is 1 at 0."""
    return torch.exp(-((x / width) ** 2))


def measures(p: Mapping[str, Tensor], expression: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compute lengths of head and features from identity and expression, all (B, 1, 1)."""
    m = {
        "width": lerp(0.50, 0.64, p["face_width"]),
        "chin_y": -lerp(0.66, 0.86, p["face_length"]),
        "jaw": lerp(-0.16, 0.21, p["jaw_width"]),
        "chin": lerp(-0.50, 0.65, p["chin_width"]),
        "cheeks": lerp(-0.05, 0.11, p["cheeks"]),
        "eye_x": lerp(0.185, 0.285, p["eye_distance"]),
        "eye_y": lerp(-0.06, 0.08, p["eye_height"]),
        "eye_w": lerp(0.085, 0.135, p["eye_width"]),
        "eye_o": lerp(0.038, 0.082, p["eye_opening"]) * expression["eyes"],
        "eye_tilt": lerp(-0.32, 0.32, p["eye_tilt"]),
        "brow_t": lerp(0.010, 0.040, p["brow_thickness"]),
        "brow_w": lerp(0.095, 0.165, p["brow_length"]),
        "brow_arch": lerp(-0.01, 0.065, p["brow_arch"]),
        "brow_gap": lerp(0.045, 0.125, p["brow_height"]) + expression["brow_raise"],
        "brow_angle": lerp(-0.055, 0.055, p["brow_angle"]) + expression["brow_angle"],
        "nose_w": lerp(0.055, 0.125, p["nose_width"]),
        "nose_z": lerp(0.09, 0.22, p["nose_projection"]),
        "nose_tip": lerp(0.02, 0.09, p["nose_tip"]),
        "mouth_w": lerp(0.125, 0.24, p["mouth_width"]) * expression["mouth_width"],
        "upper": lerp(0.018, 0.058, p["upper_lip"]),
        "lower": lerp(0.022, 0.072, p["lower_lip"]),
        "ears": lerp(0.08, 0.17, p["ears"]),
    }
    nose_length = lerp(0.19, 0.31, p["nose_length"])
    m["nose_y"] = -nose_length
    floor = m["chin_y"] + 0.165
    m["mouth_y"] = torch.maximum(m["nose_y"] - lerp(0.235, 0.145, p["mouth_height"]), floor)
    m["brow_y"] = m["eye_y"] + 0.05 + m["brow_gap"]
    return m


def half_width(y: Tensor, m: Measures) -> Tensor:
    """Compute the ellipsoid's half-width at height `y`; cheeks, jaw and chin change it."""
    down = y / m["chin_y"]
    shape = 1 + m["cheeks"] * bell(down - 0.28, 0.28) + m["jaw"] * bell(down - 0.72, 0.24)
    return m["width"] * (shape + m["chin"] * bell(down - 1.0, 0.20))


def relief(x: Tensor, y: Tensor, m: Measures) -> Tensor:
    """Compute the height of nose, brow ridge, sockets, cheeks, lips and chin over the ellipsoid."""
    side = x.abs()
    bridge = m["eye_y"] + 0.06
    along = ((bridge - y) / (bridge - m["nose_y"])).clamp(0, 1.6)
    under = torch.sigmoid((y - m["nose_y"] + 0.035) / 0.014)
    width = lerp(0.045, 1.0, along.clamp(max=1)) * m["nose_w"] + 0.035
    height = m["nose_z"] * along.clamp(max=1) ** 1.2 * under
    nose = height * bell(x, width)
    tip = m["nose_tip"] * bell(x, 0.075) * bell(y - m["nose_y"] - 0.03, 0.06)
    wings = 0.05 * bell(side - 0.85 * m["nose_w"], 0.045) * bell(y - m["nose_y"] - 0.015, 0.045)
    sockets = -0.055 * bell(side - m["eye_x"], 0.14) * bell(y - m["eye_y"] + 0.01, 0.09)
    ridge = 0.035 * bell(side - m["eye_x"] + 0.04, 0.20) * bell(y - m["eye_y"] - 0.15, 0.07)
    cheeks = (0.03 + 0.35 * m["cheeks"]) * bell(side - 0.30, 0.14) * bell(y + 0.20, 0.13)
    lips = 0.035 * bell(x, 1.1 * m["mouth_w"]) * bell(y - m["mouth_y"], 0.075)
    chin = 0.06 * bell(x, 0.15) * bell(y - m["chin_y"] - 0.11, 0.09)
    return nose + tip + wings + sockets + ridge + cheeks + lips + chin


def hit_ellipsoid(
    origin: Vector, ray: Vector, radii: Vector, lift: Tensor | float = 0.0
) -> tuple[Tensor, Tensor]:
    """Intersect rays with an ellipsoid that is shifted by `lift` along Z.

    Returns:
        The discriminant (negative if there is no intersection), and the distance along the ray to
        the point closest to the viewer.
    """
    (ox, oy, oz), (dx, dy, dz), (rx, ry, rz) = origin, ray, radii
    ux, uy, uz = ox / rx, oy / ry, (oz - lift) / rz
    vx, vy, vz = dx / rx, dy / ry, dz / rz
    a = vx * vx + vy * vy + vz * vz
    b = ux * vx + uy * vy + uz * vz
    c = ux * ux + uy * uy + uz * uz - 1
    discriminant = b * b - a * c
    return discriminant, (discriminant.clamp(min=0).sqrt() - b) / a


def hit_head(origin: Vector, ray: Vector, m: Measures, rounds: int = 6) -> Vector:
    """Intersect rays with the head.

    This is a fixed-point iteration: each round solves the ellipsoid with half-width and relief of
    the last point. It converges if the relief is not too steep.

    Returns:
        The discriminant, the coordinates X, Y and Z, and the relief.
    """
    (ox, oy, oz), (dx, dy, dz) = origin, ray
    x, y, height = ox, oy, torch.zeros_like(ox)
    for index in range(rounds):
        vertical = torch.where(y > 0, torch.full_like(y, CRANIUM), -m["chin_y"])
        radii = (half_width(y, m), vertical, torch.full_like(y, DEPTH))
        discriminant, t = hit_ellipsoid(origin, ray, radii, height)
        x, y, z = ox + t * dx, oy + t * dy, oz + t * dz
        front = torch.sigmoid((z - 0.12) / 0.05)
        target = relief(x, y, m) * front
        height = target if index == 0 else 0.35 * height + 0.65 * target
    return discriminant, x, y, z, height


def head_normal(
    x: Tensor, y: Tensor, z: Tensor, height: Tensor, m: Measures, step: float = 0.012
) -> Vector:
    """Compute the outward unit normal of the head from the gradient of its implicit function."""
    front = torch.sigmoid((z - 0.12) / 0.05)
    center = relief(x, y, m) * front
    slope_x = (relief(x + step, y, m) * front - center) / step
    slope_y = (relief(x, y + step, m) * front - center) / step
    vertical = torch.where(y > 0, torch.full_like(y, CRANIUM), -m["chin_y"])
    along = (z - height) / DEPTH**2
    n = (x / half_width(y, m) ** 2 - along * slope_x, y / vertical**2 - along * slope_y, along)
    length = torch.sqrt(n[0] ** 2 + n[1] ** 2 + n[2] ** 2).clamp(min=1e-6)
    return tuple(component / length for component in n)


def surface_z(x: Tensor, y: Tensor, m: Measures) -> Tensor:
    """Compute Z of the front surface at (X, Y)."""
    vertical = torch.where(y > 0, torch.full_like(y, CRANIUM), -m["chin_y"])
    inside = (1 - (x / half_width(y, m)) ** 2 - (y / vertical) ** 2).clamp(min=0.0)
    return DEPTH * inside.sqrt() + relief(x, y, m)


def ellipsoid_normal(point: Vector, radii: Vector) -> Vector:
    """Compute the unit normal of an ellipsoid at a point on its surface."""
    n = tuple(component / radius**2 for component, radius in zip(point, radii, strict=True))
    length = torch.sqrt(n[0] ** 2 + n[1] ** 2 + n[2] ** 2).clamp(min=1e-6)
    return tuple(component / length for component in n)
