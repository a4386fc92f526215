"""Random damage to training pictures, so that a network of the clean world also reads generated ones.

Everything takes (B, C, H, W) in [0, 1] and a CPU generator for the whole batch, and works on any device.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor
from torch.nn.functional import avg_pool2d, interpolate

from openpulid.faces.preprocess import luminance


def sample_uniform(
    batch: int, low: float, high: float, generator: Generator, like: Tensor
) -> Tensor:
    """(batch, 1, 1, 1) numbers between low and high."""
    return (low + (high - low) * torch.rand(batch, 1, 1, 1, generator=generator)).to(like.device)


def sample_bool(batch: int, probability: float, generator: Generator, like: Tensor) -> Tensor:
    """(batch,) bool: who is hit."""
    return (torch.rand(batch, generator=generator) < probability).to(like.device)


def color_jitter(
    images: Tensor, generator: Generator, strength: float = 1.0, gray: float = 0.3
) -> Tensor:
    """Brightness, contrast, saturation, a colour cast, and gray with probability `gray`."""
    batch = len(images)
    luma = luminance(images)
    drop = sample_bool(batch, gray, generator, images)[:, None, None, None]
    saturation = (
        sample_uniform(batch, 1 - 0.6 * strength, 1 + 0.4 * strength, generator, images) * ~drop
    )
    images = torch.lerp(luma.expand_as(images), images, saturation)
    cast = (
        1
        + 0.18
        * strength
        * (2 * torch.rand(batch, 3, 1, 1, generator=generator).to(images.device) - 1)
        * ~drop
    )
    contrast = sample_uniform(batch, 1 - 0.35 * strength, 1 + 0.35 * strength, generator, images)
    brightness = sample_uniform(batch, -0.15 * strength, 0.15 * strength, generator, images)
    return ((images - 0.5) * contrast * cast + 0.5 + brightness).clamp(0, 1)


def blur(images: Tensor, generator: Generator) -> Tensor:
    """A blur of up to one pixel for everybody: binomial filters of random width in x and in y."""
    for axis in (-1, -2):
        side = sample_uniform(len(images), 0.0, 0.28, generator, images)
        side = side * (side > 0.06)  # a part stays sharp
        before, after = images.roll(1, axis), images.roll(-1, axis)
        images = images + side * (before + after - 2 * images)
    return images


def downscale(images: Tensor, generator: Generator, smallest: float = 0.4) -> Tensor:
    """Down to a smaller size and up again: one size for the batch, so that it stays one resampling."""
    share = smallest + (1 - smallest) * torch.rand((), generator=generator).item()
    size = images.shape[-2:]
    small = interpolate(
        images, [max(8, round(side * share)) for side in size], mode="bilinear", antialias=True
    )
    return interpolate(small, size, mode="bicubic").clamp(0, 1)


def compress_jpeg(images: Tensor, generator: Generator) -> Tensor:
    """What JPEG does to a picture: 8x8 blocks, cosine transform, coarser steps for higher frequencies."""
    k = torch.arange(8.0, device=images.device)
    basis = (
        torch.cos(math.pi / 8 * (k[None] + 0.5) * k[:, None]) / 2
    )  # (frequency, pixel), orthonormal
    basis[0] /= math.sqrt(2)
    blocks = images.unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8))  # (B, C, h, 8, w, 8)
    step = 0.02 + 0.10 * torch.rand(len(images), 1, 1, 1, 1, 1, generator=generator).to(
        images.device
    )
    step = step * (1 + 0.5 * (k[:, None, None] + k))
    spectrum = torch.einsum("bchiwj,fi,gj->bchfwg", blocks, basis, basis)
    spectrum = torch.round(spectrum / step) * step
    return (
        torch.einsum("bchfwg,fi,gj->bchiwj", spectrum, basis, basis)
        .reshape(images.shape)
        .clamp(0, 1)
    )


def add_noise(images: Tensor, generator: Generator, most: float = 0.06) -> Tensor:
    """Gaussian noise of random strength."""
    sigma = sample_uniform(len(images), 0.0, most, generator, images)
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    return (images + sigma * noise).clamp(0, 1)


def augment(images: Tensor, generator: Generator) -> Tensor:
    """Blur for all; low resolution, JPEG blocks and noise for a quarter each, by turns over the batch.

    The batch must be in random order or hold each kind of picture in every quarter.
    """
    images = blur(images, generator)
    order = torch.randperm(len(images), generator=generator).to(images.device)
    quarters = order.tensor_split(4)
    for part, harm in zip(quarters, (downscale, compress_jpeg, add_noise), strict=False):
        images = images.index_copy(0, part, harm(images[part], generator))
    return images


def dilate(masks: Tensor, generator: Generator, reach: int = 2) -> Tensor:
    """Masks whose edge is moved in or out by up to about `reach` / 2 pixels, as a finder's edge is."""
    width = 2 * reach + 1
    soft = avg_pool2d(masks, width, 1, reach, count_include_pad=False)
    level = sample_uniform(len(masks), 0.3, 0.7, generator, masks)
    return ((soft - level) * width + 0.5).clamp(0, 1)


def random_affine(
    batch: int, size: int, generator: Generator, turn: float, grow: float, shift: float
) -> Tensor:
    """(batch, 3, 3) random similarities of a size x size picture about its centre.

    `turn` in radians, `grow` as a share of the size, `shift` as a share of the width: each the largest value.
    """
    turn_, grow_, x, y = (2 * torch.rand(4, batch, generator=generator) - 1).unbind()
    angle, scale = turn * turn_, torch.exp(math.log1p(grow) * grow_)
    cos, sin = scale * torch.cos(angle), scale * torch.sin(angle)
    middle = size / 2
    matrix = torch.zeros(batch, 3, 3)
    matrix[:, 0, 0], matrix[:, 0, 1], matrix[:, 1, 0], matrix[:, 1, 1], matrix[:, 2, 2] = (
        cos,
        -sin,
        sin,
        cos,
        1,
    )
    matrix[:, 0, 2] = middle * (1 - cos + sin) + size * shift * x
    matrix[:, 1, 2] = middle * (1 - sin - cos) + size * shift * y
    return matrix


def compose_affine(matrix: Tensor, first: Tensor) -> Tensor:
    """(B, 2, 3): `first` (B, 3, 3), then `matrix` (B, 2, 3). Sums of products: autocast leaves them alone."""
    return (matrix[..., None] * first.to(matrix)[:, None]).sum(2)
