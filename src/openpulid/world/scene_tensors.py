"""Scene attributes as tensors: the numbers behind the class names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openpulid.world.scene import ATTRIBUTES, Scene

Lamp = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Direction and color."""

DARK_LAMP: Lamp = ((0.0, 0.0, 1.0), (0.0, 0.0, 0.0))

POSES = {
    "front": (0.0, 0.0),
    "left": (-0.46, 0.0),
    "right": (0.46, 0.0),
    "up": (0.0, -0.30),
    "down": (0.0, 0.28),
}
"""Yaw to the right of the image and pitch downwards, in radians."""

EXPRESSION_VALUES = (
    "smile",
    "open",
    "teeth",
    "mouth_width",
    "eyes",
    "brow_raise",
    "brow_angle",
    "mouth_tilt",
)
EXPRESSIONS = {
    # smile, open, teeth, mouth width, eyes, brow raise, brow angle, mouth tilt
    "neutral": (0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0),
    "smile": (1.0, 0.0, 0.0, 1.12, 0.92, 0.0, 0.0, 0.0),
    "laugh": (0.9, 0.105, 0.045, 1.15, 0.72, 0.015, 0.0, 0.0),
    "sad": (-1.1, 0.0, 0.0, 0.95, 0.80, 0.005, -0.055, 0.0),
    "angry": (-0.7, 0.040, 0.20, 1.0, 0.78, -0.030, 0.065, 0.0),
    "surprised": (-0.1, 0.095, 0.0, 0.62, 1.35, 0.055, 0.0, 0.0),
    "wink": (0.6, 0.0, 0.0, 1.05, 1.0, 0.0, 0.0, 0.13),
}

LIGHTS: dict[
    str, tuple[tuple[float, float, float], tuple[Lamp, ...], tuple[float, float, float]]
] = {
    # ambient light on the person, lamps, tint of the background
    "studio": ((0.50, 0.50, 0.51), (((0.25, 0.45, 0.86), (0.56, 0.55, 0.54)),), (1.0, 1.0, 1.0)),
    "left": ((0.40, 0.40, 0.42), (((-0.86, 0.25, 0.44), (0.80, 0.79, 0.76)),), (0.92, 0.92, 0.93)),
    "right": ((0.40, 0.40, 0.42), (((0.86, 0.25, 0.44), (0.80, 0.79, 0.76)),), (0.92, 0.92, 0.93)),
    "sunset": ((0.54, 0.40, 0.34), (((0.50, 0.20, 0.84), (0.72, 0.45, 0.20)),), (1.02, 0.84, 0.68)),
    "moon": ((0.36, 0.44, 0.62), (((-0.40, 0.60, 0.69), (0.34, 0.44, 0.66)),), (0.66, 0.74, 0.94)),
    "neon": (
        (0.48, 0.42, 0.56),
        (((-0.85, 0.10, 0.52), (0.72, 0.12, 0.55)), ((0.85, 0.10, 0.52), (0.05, 0.62, 0.66))),
        (0.86, 0.76, 0.96),
    ),
}

COLORS = {
    "white": (0.93, 0.93, 0.91),
    "gray": (0.55, 0.56, 0.58),
    "black": (0.12, 0.12, 0.14),
    "red": (0.80, 0.13, 0.13),
    "orange": (0.95, 0.52, 0.12),
    "yellow": (0.95, 0.83, 0.22),
    "green": (0.16, 0.58, 0.27),
    "teal": (0.10, 0.60, 0.62),
    "blue": (0.16, 0.34, 0.82),
    "purple": (0.48, 0.20, 0.68),
    "pink": (0.96, 0.56, 0.72),
    "brown": (0.43, 0.27, 0.16),
}
HAIR = {
    "black": (0.10, 0.09, 0.10),
    "brown": (0.38, 0.23, 0.13),
    "blond": (0.86, 0.68, 0.34),
    "red": (0.72, 0.27, 0.08),
    "gray": (0.72, 0.72, 0.74),
}


@dataclass(frozen=True)
class SceneTensors:
    """Attributes of B scenes.

    Scalars are (B, 1, 1), colors (B, 3, 1, 1), and classes dicts of 0/1 values (B, 1, 1) by class
    name.
    """

    yaw: Tensor
    pitch: Tensor
    roll: Tensor
    zoom: Tensor
    shift_x: Tensor
    shift_y: Tensor
    rotation: Tensor
    expression: dict[str, Tensor]
    wink: Tensor
    skin_shift: Tensor
    blush: Tensor
    ambient: Tensor
    ambience: Tensor
    lamps: tuple[tuple[Tensor, Tensor], ...]
    background: Tensor
    clothing: Tensor
    hat_color: Tensor
    hair: Tensor
    volume: Tensor
    hairline: Tensor
    parting: Tensor
    pattern: dict[str, Tensor]
    glasses: dict[str, Tensor]
    hat: dict[str, Tensor]
    length: dict[str, Tensor]
    beard: dict[str, Tensor]
    style: dict[str, Tensor]

    def rays(self, sx: Tensor, sy: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return origins and directions of the rays through image points, in head coordinates.

        Args:
            sx: (1, 1, W) image coordinates to the right.
            sy: (1, H, 1) image coordinates up.
        """
        x, y = (sx - self.shift_x) / self.zoom, (sy - self.shift_y) / self.zoom
        r = self.rotation
        origin = tuple(r[:, 0, i, None, None] * x + r[:, 1, i, None, None] * y for i in range(3))
        ray = tuple(r[:, 2, i, None, None] + torch.zeros_like(origin[i]) for i in range(3))
        return origin, ray

    def to_image_axes(self, vector: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Rotate a vector from head coordinates to the axes of the image, without zoom."""
        r = self.rotation
        x, y, z = vector
        return tuple(
            r[:, i, 0, None, None] * x + r[:, i, 1, None, None] * y + r[:, i, 2, None, None] * z
            for i in range(3)
        )

    def in_plane(self, origin: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Return image coordinates relative to the center of the head, rolled with the head."""
        x, y, _ = self.to_image_axes(origin)
        return x, y

    @classmethod
    def from_scenes(cls, scenes: Sequence[Scene], device: torch.device) -> SceneTensors:
        """Convert scenes to tensors on a device."""
        classes = [
            [names.index(getattr(scene, attribute)) for attribute, names in ATTRIBUTES.items()]
            for scene in scenes
        ]
        jitter = [scene.jitter for scene in scenes]
        return cls.from_classes(
            torch.tensor(classes, device=device),
            torch.tensor(jitter, device=device, dtype=torch.float32),
        )

    @classmethod
    def from_classes(cls, attributes: Tensor, jitter: Tensor) -> SceneTensors:
        """Convert class indices to the values of the classes, on the device of the indices.

        Args:
            attributes: (B, A) int64 class indices, in the order of `ATTRIBUTES`.
            jitter: (B, 12) float in [-1, 1], see `Scene`.
        """
        device = attributes.device
        j = jitter.float().T[..., None, None]
        index = dict(zip(ATTRIBUTES, attributes.T, strict=True))  # attribute -> (B,)

        def look_up(attribute: str, table: Sequence[Sequence[float]]) -> Tensor:
            """Return the row (D,) of each scene's class in a table (classes, D), (B, D)."""
            return torch.tensor(table, dtype=torch.float32, device=device)[index[attribute]]

        def colors(attribute: str, table: Mapping[str, tuple[float, float, float]]) -> Tensor:
            values = look_up(attribute, [table[name] for name in ATTRIBUTES[attribute]])
            return values[..., None, None]

        def classes(attribute: str) -> dict[str, Tensor]:
            return {
                name: (index[attribute] == k).float()[:, None, None]
                for k, name in enumerate(ATTRIBUTES[attribute])
            }

        poses = look_up("pose", [POSES[name] for name in ATTRIBUTES["pose"]]).T[..., None, None]
        yaw = poses[0] + 0.10 * j[0]
        pitch = poses[1] + 0.06 * j[1]
        roll = 0.07 * j[2]
        expressions = look_up(
            "expression", [EXPRESSIONS[name] for name in ATTRIBUTES["expression"]]
        )
        ambient = colors("light", {name: light[0] for name, light in LIGHTS.items()})
        ambience = colors("light", {name: light[2] for name, light in LIGHTS.items()})
        lamps = []
        for k in range(2):
            # The second lamp is dark if a light has only one.
            table = {name: [*light[1], DARK_LAMP][k] for name, light in LIGHTS.items()}
            direction = look_up("light", [table[name][0] for name in ATTRIBUTES["light"]])
            color = colors("light", {name: lamp[1] for name, lamp in table.items()})
            lamps.append((direction / direction.norm(dim=1, keepdim=True), color))
        brightness = 1 + 0.07 * j[8][:, None]
        hair_tint = 1 + 0.10 * j[9][:, None]
        return cls(
            yaw=yaw,
            pitch=pitch,
            roll=roll,
            zoom=1.14 + 0.05 * j[3],
            shift_x=0.05 * j[4],
            shift_y=0.075 + 0.035 * j[5],
            rotation=_rotation(yaw, pitch, roll),
            expression=dict(zip(EXPRESSION_VALUES, expressions.T[..., None, None], strict=True)),
            wink=classes("expression")["wink"],
            skin_shift=0.06 * j[6],
            blush=0.5 + 0.5 * j[7],
            ambient=ambient * brightness,
            ambience=ambience,
            lamps=tuple(lamps),
            background=colors("background", COLORS),
            clothing=colors("clothing", COLORS),
            hat_color=colors("hat_color", COLORS),
            hair=colors("hair_color", HAIR) * hair_tint,
            volume=j[10],
            hairline=j[11],
            parting=j[9],
            pattern=classes("pattern"),
            glasses=classes("glasses"),
            hat=classes("hat"),
            length=classes("hair_length"),
            beard=classes("beard"),
            style=classes("style"),
        )


def _rotation(yaw: Tensor, pitch: Tensor, roll: Tensor) -> Tensor:
    """Return rotations (B, 3, 3) from head axes to image axes: yaw, then pitch, then roll."""
    cy, cp, cr = (torch.cos(angle[:, 0, 0]) for angle in (yaw, pitch, roll))
    sy, sp, sr = (torch.sin(angle[:, 0, 0]) for angle in (yaw, pitch, roll))
    zero = torch.zeros_like(cy)
    one = torch.ones_like(cy)

    def matrix(*rows: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return torch.stack([torch.stack(row, -1) for row in rows], -2)

    yaw_matrix = matrix((cy, zero, sy), (zero, one, zero), (-sy, zero, cy))
    pitch_matrix = matrix((one, zero, zero), (zero, cp, -sp), (zero, sp, cp))
    roll_matrix = matrix((cr, -sr, zero), (sr, cr, zero), (zero, zero, one))
    return roll_matrix @ pitch_matrix @ yaw_matrix
