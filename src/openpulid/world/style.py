"""Styles of rendered images: photo, film noir, pencil sketch, poster."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from openpulid.io.image_grid import luminance


def apply_style(image: Tensor, edges: Tensor, parts: Tensor, style: Mapping[str, Tensor]) -> Tensor:
    """Apply the style of each image.

    Args:
        image: (B, 3, H, W) in [0, 1].
        edges: (B, 1, H, W) ink lines.
        parts: (B, H, W) labels.
        style: style name -> (B, 1, 1) 0 or 1.
    """
    looks = {
        "noir": noir(image),
        "pencil": pencil(image, edges, parts),
        "poster": poster(image, edges),
    }
    for name, look in looks.items():
        image = torch.lerp(image, look, style[name][:, None])
    return image.clamp(0, 1)


def noir(image: Tensor) -> Tensor:
    """Convert to black and white with deep shadows and a dark rim; faces keep their midtones."""
    gray = luminance(image)
    curve = gray.clamp(0, 1) ** 0.8
    curve = curve * curve * (3 - 2 * curve)
    curve = 0.35 * gray + 0.65 * curve
    axis_y = torch.linspace(-1, 1, image.shape[2], device=image.device).view(1, 1, -1, 1)
    axis_x = torch.linspace(-1, 1, image.shape[3], device=image.device).view(1, 1, 1, -1)
    rim = 1.05 - 0.30 * (axis_x**2 + axis_y**2).clamp(max=1.6)
    return (curve * rim).expand_as(image)


def pencil(image: Tensor, edges: Tensor, parts: Tensor) -> Tensor:
    """Draw with graphite: outlines, local contrast as lines, hatching in dark areas."""
    gray = luminance(image)
    blurred = F.avg_pool2d(F.pad(gray, (3, 3, 3, 3), mode="replicate"), 7, 1)
    detail = ((blurred - gray) * 2.6).clamp(0, 1)
    height, width = image.shape[2:]
    ys, xs = (
        torch.arange(height, device=image.device).view(1, 1, -1, 1),
        torch.arange(width, device=image.device).view(1, 1, 1, -1),
    )
    hatch = 0.5 + 0.5 * torch.sin((xs + ys) * (2 * torch.pi / 6))
    person = (parts > 0)[:, None].to(image.dtype)
    shade = (0.62 - gray).clamp(min=0) * (0.35 + 0.55 * hatch) * person
    ink = (0.85 * edges + 1.0 * detail * person + shade).clamp(0, 0.88)
    return (0.95 - ink).expand_as(image)


def poster(image: Tensor, edges: Tensor) -> Tensor:
    """Reduce to few tones of lightness with the same hue, strong colors and dark outlines."""
    gray = luminance(image).clamp(0.02, 1)
    levels = 4.0
    scaled = gray * levels
    fraction = scaled - scaled.floor()
    tone = (scaled.floor() + ((fraction - 0.5) * 5 + 0.5).clamp(0, 1) + 0.15) / levels
    flat = image * (tone / gray)
    vivid = luminance(flat) + (flat - luminance(flat)) * 1.35
    return (vivid.clamp(0, 1) * (1 - 0.85 * edges)).clamp(0, 1)


def ink_lines(label: Tensor, normal: Tensor) -> Tensor:
    """Compute ink lines (B, 1, s, s) where the label or the surface normal changes sharply."""
    field = torch.cat([label[:, None] * 0.6, normal], 1)
    right = (field - field.roll(-1, 3)).abs().amax(1, keepdim=True)
    down = (field - field.roll(-1, 2)).abs().amax(1, keepdim=True)
    edge = ((torch.maximum(right, down) - 0.22) * 3).clamp(0, 1)
    edge[..., -1:], edge[..., -1:, :] = 0, 0
    return F.max_pool2d(edge, 3, 1, 1)
