"""Renderer of procedural people: batched, on any device, with exact labels and landmarks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from openpulid.world import paint
from openpulid.world.head import (  # fmt: skip
    CRANIUM,
    DEPTH,
    Measures,
    Vector,
    ellipsoid_normal,
    head_normal,
    hit_ellipsoid,
    hit_head,
    lerp,
    measures,
    surface_z,
)
from openpulid.world.paint import bell, blend, inside, rgb
from openpulid.world.person import PARAMETERS, Person
from openpulid.world.scene import Scene
from openpulid.world.scene_tensors import SceneTensors
from openpulid.world.style import apply_style, ink_lines

PARTS = ("background", "face", "eyewear", "hair", "hat", "ears", "neck", "clothes")
"""Labels of `Rendering.parts`; the face is skin, brows, eyes, nose, mouth and beard."""


@dataclass(frozen=True)
class Rendering:
    """A batch of images with their labels and landmarks.

    Attributes:
        image: (B, 3, S, S) in [0, 1].
        parts: (B, S, S) uint8 labels of `PARTS`.
        landmarks: (B, 5, 2) pixels (x, y): both eyes, nose tip, both mouth corners; of a pair, the
            one with the smaller x is first.
    """

    image: Tensor
    parts: Tensor
    landmarks: Tensor

    @property
    def face(self) -> Tensor:
        """(B, 1, S, S) one on the pixels of the face."""
        return (self.parts == 1)[:, None].float()

    @property
    def person(self) -> Tensor:
        """(B, 1, S, S) one on the person, including hair, hat and clothes."""
        return (self.parts > 0)[:, None].float()


SUPERSAMPLE = 2
"""Samples per pixel and axis, for silhouettes and ink lines; other edges are smooth already."""


class Canvas:
    """The image being painted: the color, label and normal of each sample."""

    def __init__(self, background: Tensor):
        self.color = background
        batch, _, height, width = background.shape
        self.label = background.new_zeros(batch, height, width)
        self.normal = background.new_zeros(batch, 3, height, width)
        self.normal[:, 2] = 1

    def put(self, part: str, color: Tensor, cover: Tensor, normal: Vector | None = None) -> None:
        """Paint a part with `color` where `cover` (B, H, W) is one."""
        self.color = blend(self.color, color, cover)
        solid = cover > 0.5
        self.label = torch.where(solid, torch.full_like(self.label, PARTS.index(part)), self.label)
        if normal is not None:
            self.normal = torch.where(
                solid[:, None], torch.stack(torch.broadcast_tensors(*normal), 1), self.normal
            )


@torch.no_grad()
def render(
    people: Sequence[Person],
    scenes: Sequence[Scene],
    size: int = 96,
    device: str | torch.device = "cpu",
    *,
    compiled: bool = False,
) -> Rendering:
    """Render person k in scene k. The same arguments give the same images.

    Args:
        people: B people.
        scenes: B scenes.
        size: width and height of the images in pixels.
        device: where to render.
        compiled: compile the renderer; about a minute per process and batch size for twice the
            speed.

    Raises:
        ValueError: the lists differ in length, or the size is not positive.
    """
    if len(people) != len(scenes) or size < 1:
        raise ValueError(
            "render needs as many people as scenes and a positive size, "
            f"got {len(people)}, {len(scenes)}, {size}."
        )
    values = torch.tensor([person.vector() for person in people], device=device)
    return render_stage(
        values, SceneTensors.from_scenes(scenes, values.device), size, compiled=compiled
    )


@torch.no_grad()
def render_stage(
    values: Tensor, stage: SceneTensors, size: int = 96, *, compiled: bool = False
) -> Rendering:
    """Render people with `values` (B, P), in the order of `PARAMETERS`, in B scenes."""
    p = {name: values[:, index, None, None] for index, name in enumerate(PARAMETERS)}
    p["skin_tone"] = (p["skin_tone"] + stage.skin_shift).clamp(0, 1)
    m = measures(p, stage.expression)
    draw = _compiled_draw() if compiled else _draw
    color, label, normal = draw(p, m, stage, size * SUPERSAMPLE)
    image = F.avg_pool2d(color, SUPERSAMPLE)
    parts = label[:, 1::SUPERSAMPLE, 1::SUPERSAMPLE].to(torch.uint8)
    edges = F.avg_pool2d(ink_lines(label, normal), SUPERSAMPLE)
    return Rendering(
        apply_style(image, edges, parts, stage.style), parts, _landmarks(m, stage, size)
    )


@functools.cache
def _compiled_draw() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return torch.compile(_draw, dynamic=False)


def _draw(
    p: dict[str, Tensor], m: dict[str, Tensor], stage: SceneTensors, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Paint all parts from back to front; return color, labels and normals per sample."""
    e = 2.2 / size
    sx, sy = _axes(size, stage.yaw.device)
    canvas = Canvas(_background(stage, sx, sy))
    origin, ray = stage.rays(sx, sy)
    skin = paint.skin_color(p["skin_tone"], p["skin_warmth"])
    _hair_behind(canvas, origin, ray, m, stage, e)
    _body(canvas, sx, sy, m, stage, skin, e)
    _ears(canvas, origin, ray, m, stage, skin)
    _head(canvas, p, m, stage, skin, e)
    _hair(canvas, origin, ray, m, stage, e)
    _glasses(canvas, origin, ray, m, stage, e)
    _hat(canvas, origin, ray, m, stage, e)
    return canvas.color.clamp(0, 1), canvas.label, canvas.normal


def _axes(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return sample centers in [-1, 1]: x (1, 1, W) to the right, y (1, H, 1) up."""
    axis = (torch.arange(size, device=device, dtype=torch.float32) + 0.5) / size * 2 - 1
    return axis.view(1, 1, -1), -axis.view(1, -1, 1)


def _background(stage: SceneTensors, sx: Tensor, sy: Tensor) -> Tensor:
    base = stage.background
    stripes = inside(torch.sin(9.0 * (sx + 0.6 * sy)), 0.5)
    cell_x, cell_y = torch.remainder(sx * 3.5, 1) - 0.5, torch.remainder(sy * 3.5, 1) - 0.5
    dots = inside(0.25 - torch.sqrt(cell_x**2 + cell_y**2), 0.12)
    marks = stage.pattern["stripes"] * stripes + stage.pattern["dots"] * dots
    luminance = base.mean(1, keepdim=True)
    second = torch.where(luminance > 0.45, base * 0.62, base * 0.6 + 0.34)
    image = torch.lerp(
        base.expand(-1, -1, *marks.shape[1:]),
        second.expand(-1, -1, *marks.shape[1:]),
        marks[:, None],
    )
    glow = 1.06 - 0.16 * (sx**2 + sy**2)
    return (image * glow[:, None] * stage.ambience).clamp(0, 1)


def _lit(stage: SceneTensors, normal: Vector, gloss: float = 0.0) -> tuple[Tensor, Tensor]:
    """Compute lighting for normals in head coordinates.

    Returns:
        Light (B, 3, H, W) to multiply a color with, and gloss (B, 1, H, W) to add.
    """
    n = stage.to_image_axes(normal)
    light = stage.ambient * lerp(0.80, 1.0, (n[1] * 0.5 + 0.5).clamp(0, 1))[:, None]
    shine = torch.zeros_like(n[0])
    for direction, color in stage.lamps:
        facing = dot(n, direction)
        light = light + color * (0.78 * facing.clamp(min=0) + 0.22 * (0.5 + 0.5 * facing))[:, None]
        half = direction + torch.tensor([0.0, 0.0, 1.0], device=direction.device)
        half = half / half.norm(dim=1, keepdim=True)
        glint = dot(n, half).clamp(0, 1) ** 24
        shine = shine + glint * color.mean(1)
    return light, (gloss * shine)[:, None]


def dot(vector: Vector, direction: Tensor) -> Tensor:
    """Compute the dot product of vectors (three (B, H, W)) and one direction (B, 3) per image."""
    x, y, z = (direction[:, i, None, None] for i in range(3))
    return vector[0] * x + vector[1] * y + vector[2] * z


def _head(
    canvas: Canvas, p: Measures, m: Measures, stage: SceneTensors, skin: Tensor, e: float
) -> None:
    size = canvas.label.shape[-1]
    # The surface is smooth: half of the samples are enough.
    origin, ray = stage.rays(*_axes(size // 2, stage.yaw.device))
    discriminant, x, y, z, height = hit_head(origin, ray, m)
    field = torch.stack([discriminant, x, y, z, *head_normal(x, y, z, height, m)], 1)
    discriminant, x, y, z, *turned = F.interpolate(
        field, size=(size, size), mode="bilinear"
    ).unbind(1)
    normal = tuple(turned)
    cover = inside(discriminant * 0.30, e) * (z > -0.30)
    color = skin.expand(-1, -1, *x.shape[1:])
    color = paint.marks(color, x, y, m, p, stage.blush, e)
    color = paint.nose(color, x, y, m, e)
    color = paint.mouth(color, x, y, m, stage.expression, skin, e)
    color = paint.beard(color, x, y, m, stage.beard, stage.hair * 0.85, e)
    color = paint.eyes(color, x, y, m, p, stage.wink, e)
    color = paint.brows(
        color, x, y, m, 0.6 * stage.hair * 0.55 + 0.4 * rgb(0.13, 0.08, 0.06, color), e
    )
    light, shine = _lit(stage, normal, gloss=0.16)
    canvas.put("face", (color * light + shine).clamp(0, 1), cover, normal)


def _ears(
    canvas: Canvas, origin: Vector, ray: Vector, m: Measures, stage: SceneTensors, skin: Tensor
) -> None:
    for sign in (-1.0, 1.0):
        moved = (
            origin[0] - sign * (m["width"] * 0.98),
            origin[1] - m["eye_y"] + 0.10,
            origin[2] + 0.02,
        )
        radii = (m["ears"] * 0.75, m["ears"] * 1.25, torch.full_like(m["ears"], 0.07))
        discriminant, t = hit_ellipsoid(moved, ray, radii)
        point = tuple(o + t * d for o, d in zip(moved, ray, strict=True))
        normal = ellipsoid_normal(point, radii)
        inner = bell(point[0] / radii[0], 0.55) * bell(point[1] / radii[1], 0.6)
        light, shine = _lit(stage, normal, gloss=0.05)
        color = (skin * rgb(0.96, 0.86, 0.84, skin)) * (1 - 0.35 * inner)[:, None]
        canvas.put("ears", (color * light + shine).clamp(0, 1), (discriminant > 0).float(), normal)


def _body(
    canvas: Canvas, sx: Tensor, sy: Tensor, m: Measures, stage: SceneTensors, skin: Tensor, e: float
) -> None:
    x, y = sx - 0.55 * stage.shift_x, sy - 0.6 * stage.shift_y
    neck_w = m["width"] * (0.62 + 0.06 * ((-0.6 - y) * 6).clamp(0, 2))
    bend = (x / neck_w).clamp(-1, 1)
    cover = inside(neck_w - x.abs(), 2 * e) * (y < -0.2)
    normal = (
        bend,
        torch.zeros_like(bend + y),
        (1 - bend**2).clamp(min=0.05).sqrt() + torch.zeros_like(y),
    )
    light, _ = _lit(stage, normal)
    under_chin = 1 - 0.45 * bell((y - m["chin_y"] - stage.shift_y).clamp(max=0.3), 0.20)
    canvas.put("neck", (skin * 0.92 * light * under_chin[:, None]).clamp(0, 1), cover, normal)
    top = -0.84 - 0.26 * (x.abs() / 0.9) ** 2.2 + 0.05 * stage.shift_y
    collar = -0.93 + 0.30 * (x.abs() / 0.42) ** 2
    cover = inside(torch.minimum(top, collar.clamp(max=9)) - y, 2 * e)
    bend = (x / 1.05).clamp(-1, 1)
    normal = (
        bend * 0.8,
        0.45 + torch.zeros_like(bend + y),
        (1 - 0.8 * bend**2).clamp(min=0.1).sqrt() + torch.zeros_like(y),
    )
    light, _ = _lit(stage, normal)
    hem = 1 - 0.25 * inside(0.02 - (collar - y - 0.03).abs(), 2 * e)
    canvas.put("clothes", (stage.clothing * light * hem[:, None]).clamp(0, 1), cover, normal)


def _cap(
    origin: Vector, ray: Vector, m: Measures, grow: Tensor | float, lift: float
) -> tuple[Tensor, Vector, Vector]:
    """Intersect an ellipsoid a little larger than the skull; return discriminant, point, normal."""
    moved = (origin[0], origin[1] - lift, origin[2] + 0.05)
    radii = (
        m["width"] + grow,
        CRANIUM + grow - lift + 0 * m["width"],
        DEPTH + grow + 0 * m["width"],
    )
    discriminant, t = hit_ellipsoid(moved, ray, radii)
    point = tuple(o + t * d for o, d in zip(moved, ray, strict=True))
    return (
        discriminant,
        (point[0], point[1] + lift, point[2] - 0.05),
        ellipsoid_normal(point, radii),
    )


def _hair_color(stage: SceneTensors, x: Tensor, y: Tensor, normal: Vector) -> Tensor:
    light, shine = _lit(stage, normal, gloss=0.14)
    strands = 1 + 0.13 * torch.sin(34 * x + 5 * torch.sin(4 * y)) + 0.06 * torch.sin(13 * x - 6 * y)
    return (stage.hair * strands[:, None] * light + shine).clamp(0, 1)


def _hair_behind(
    canvas: Canvas, origin: Vector, ray: Vector, m: Measures, stage: SceneTensors, e: float
) -> None:
    """Paint the hair behind neck and head: none if short, to the jaw for a bob, or long."""
    fall = stage.length["bob"] * 0.62 + stage.length["long"] * 1.25
    moved = (origin[0], origin[1] - 0.1 + 0.45 * fall, origin[2] + 0.22)
    radii = (m["width"] + 0.11 + 0.05 * stage.volume, 0.52 + 0.5 * fall, 0.36 + 0 * fall)
    discriminant, t = hit_ellipsoid(moved, ray, radii)
    point = tuple(o + t * d for o, d in zip(moved, ray, strict=True))
    y = point[1] + 0.1 - 0.45 * fall
    cover = (
        inside(discriminant * 0.3, e)
        * inside(y + 0.58 + 1.2 * stage.length["long"], 3 * e)
        * (fall > 0)
    )
    color = _hair_color(stage, point[0], y, ellipsoid_normal(point, radii))
    canvas.put("hair", color * 0.72, cover)


def _hair(
    canvas: Canvas, origin: Vector, ray: Vector, m: Measures, stage: SceneTensors, e: float
) -> None:
    """Paint the hair above a hairline that drops at the temples, lower for longer hair."""
    grow = 0.055 + 0.03 * stage.volume
    discriminant, (x, y, z), normal = _cap(origin, ray, m, grow, 0.02)
    side = (x.abs() / (m["width"] + grow)).clamp(0, 1)
    low = -0.02 - 0.50 * stage.length["bob"] - 0.95 * stage.length["long"]
    temple = torch.sigmoid((side - 0.86 + 0.10 * (z < 0)) / 0.035) * torch.sigmoid(
        (0.45 - z) / 0.05
    )
    fringe = 0.028 * torch.sin(21 * x + 6 * stage.parting) + 0.05 * stage.parting * x
    line = torch.lerp(
        0.365 + 0.05 * stage.hairline + fringe - 0.10 * x**2, low.expand_as(x), temple
    )
    cover = inside(discriminant * 0.3, e) * inside(y - line, 2 * e) * (1 - stage.length["bald"])
    shadow = (
        inside(line - y, 0.07)
        * inside(y - line + 0.06, 0.04)
        * (canvas.label == 1)
        * (1 - stage.length["bald"])
    )
    canvas.color = canvas.color * (1 - 0.30 * shadow * (z > 0))[:, None]
    canvas.put("hair", _hair_color(stage, x, y, normal), cover, normal)


def _glasses(
    canvas: Canvas, origin: Vector, ray: Vector, m: Measures, stage: SceneTensors, e: float
) -> None:
    """Paint glasses: two round lenses on a plane before the eyes, a bridge, and two temples."""
    plane = surface_z(m["eye_x"], m["eye_y"], m) + 0.05
    t = (plane - origin[2]) / ray[2]
    x, y = origin[0] + t * ray[0], origin[1] + t * ray[1] - m["eye_y"]
    radius_x, radius_y = m["eye_x"] * 0.20 + 0.118, 0.125
    u, v = (x.abs() - m["eye_x"]) / radius_x, y / radius_y
    distance = (1 - (u.abs() ** 3 + v.abs() ** 3).clamp(min=1e-6) ** (1 / 3)) * radius_y
    worn = stage.glasses["glasses"] + stage.glasses["sunglasses"]
    frame = inside(0.017 - distance.abs(), e)
    bridge = inside(0.014 - (y - 0.03 - 0.5 * x**2).abs(), e) * inside(
        m["eye_x"] - radius_x - x.abs(), e
    )
    arm = (
        inside(0.014 - (y - 0.03).abs(), e)
        * inside(x.abs() - m["eye_x"] - radius_x, e)
        * inside(m["width"] * 1.02 - x.abs(), e)
    )
    lens = inside(distance, e)
    dark = rgb(0.07, 0.07, 0.09, canvas.color)
    canvas.color = blend(
        canvas.color, canvas.color * 0.9 + 0.10, lens * stage.glasses["glasses"] * 0.35
    )
    tint = dark + 0.25 * bell(u + 0.35, 0.35)[:, None] * bell(v - 0.35, 0.35)[:, None]
    canvas.put("eyewear", tint * stage.ambience, lens * stage.glasses["sunglasses"] * 0.96)
    canvas.put(
        "eyewear",
        dark * stage.ambience,
        torch.maximum(torch.maximum(frame, bridge), arm * (canvas.label > 0)) * worn,
    )


def _hat(
    canvas: Canvas, origin: Vector, ray: Vector, m: Measures, stage: SceneTensors, e: float
) -> None:
    """Paint a beanie with a turned-up band, or a hat with a wide brim."""
    beanie, brimmed = stage.hat["beanie"], stage.hat["brimmed"]
    grow = 0.105 + 0 * beanie
    discriminant, (x, y, z), normal = _cap(origin, ray, m, grow, 0.03)
    line = 0.33 + 0.10 * z
    light, _ = _lit(stage, normal)
    ribs = 1 + 0.07 * torch.sin(30 * x) * beanie
    band = inside(line + 0.16 - y, e)
    cover = inside(discriminant * 0.3, e) * inside(y - line, 2 * e) * (beanie + brimmed)
    tone = ribs * (1 - 0.22 * band * beanie - 0.45 * band * brimmed)
    canvas.put("hat", (stage.hat_color * tone[:, None] * light).clamp(0, 1), cover, normal)
    middle = 0.36 - stage.pitch * 0.55
    px, py = stage.in_plane(origin)
    flat = 1 - (px / (m["width"] + 0.36)) ** 2 - ((py - middle) / 0.075) ** 2
    up = (torch.zeros_like(px), torch.full_like(px, 0.75), torch.full_like(px, 0.65))
    light, _ = _lit(stage, up)
    edge = lerp(0.72, 1.0, inside(py - middle + 0.01, 0.06))
    canvas.put(
        "hat",
        (stage.hat_color * edge[:, None] * light).clamp(0, 1),
        inside(flat * 0.06, e) * brimmed,
        up,
    )


def _landmarks(m: dict[str, Tensor], stage: SceneTensors, size: int) -> Tensor:
    zero = torch.zeros_like(m["width"])
    corner = 0.97 * m["mouth_w"]
    corner_y = m["mouth_y"] + stage.expression["smile"] * 0.055 * 0.5
    points = [
        (-m["eye_x"], m["eye_y"]),
        (m["eye_x"], m["eye_y"]),
        (zero, m["nose_y"] + 0.03),
        (-corner, corner_y),
        (corner, corner_y),
    ]
    landmarks = []
    for x, y in points:
        image_point = stage.to_image_axes((x, y, surface_z(x, y, m)))
        px, py = (
            stage.zoom * image_point[0] + stage.shift_x,
            stage.zoom * image_point[1] + stage.shift_y,
        )
        landmarks.append(torch.cat([(px + 1) / 2, (1 - py) / 2], -1)[:, 0] * size)
    return torch.stack(landmarks, 1)
