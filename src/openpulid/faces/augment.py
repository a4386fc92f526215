"""Random augmentation of images.

It makes networks of the clean world work on generated images, and textures that only please a face
recognition model useless in its next view. All functions are differentiable in the images.

All functions take images (B, C, H, W) in [0, 1] and one CPU generator for the batch, and work on
any device.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor
from torch.nn.functional import avg_pool2d, interpolate

from openpulid.faces.align import GRAY
from openpulid.io.image_grid import luminance

JPEG_BLOCK = 8


def sample_uniform(
    batch: int, low: float, high: float, generator: Generator, like: Tensor
) -> Tensor:
    """Sample (batch, 1, 1, 1) numbers between low and high on the device of `like`."""
    return (low + (high - low) * torch.rand(batch, 1, 1, 1, generator=generator)).to(like.device)


def sample_bool(batch: int, probability: float, generator: Generator, like: Tensor) -> Tensor:
    """Sample (batch,) bools that are true with a probability."""
    return (torch.rand(batch, generator=generator) < probability).to(like.device)


def color_jitter(
    images: Tensor, generator: Generator, strength: float = 1.0, gray: float = 0.3
) -> Tensor:
    """Change brightness, contrast, saturation and color balance.

    Args:
        images: (B, 3, H, W).
        generator: source of randomness.
        strength: scale of all changes.
        gray: probability of a gray image.
    """
    batch = len(images)
    luma = luminance(images)
    is_gray = sample_bool(batch, gray, generator, images)[:, None, None, None]
    low, high = 1 - 0.6 * strength, 1 + 0.4 * strength
    saturation = sample_uniform(batch, low, high, generator, images) * ~is_gray
    images = torch.lerp(luma.expand_as(images), images, saturation)
    shift = 2 * torch.rand(batch, 3, 1, 1, generator=generator).to(images.device) - 1
    balance = 1 + 0.18 * strength * shift * ~is_gray
    low, high = 1 - 0.35 * strength, 1 + 0.35 * strength
    contrast = sample_uniform(batch, low, high, generator, images)
    brightness = sample_uniform(batch, -0.15 * strength, 0.15 * strength, generator, images)
    return ((images - 0.5) * contrast * balance + 0.5 + brightness).clamp(0, 1)


def blur(images: Tensor, generator: Generator) -> Tensor:
    """Blur images by up to one pixel: binomial filters of random width in x and in y."""
    for axis in (-1, -2):
        weight = sample_uniform(len(images), 0.0, 0.28, generator, images)
        weight = weight * (weight > 0.06)  # some images stay sharp
        neighbors = images.roll(1, axis) + images.roll(-1, axis)
        images = images + weight * (neighbors - 2 * images)
    return images


def downscale(images: Tensor, generator: Generator, smallest: float = 0.4) -> Tensor:
    """Resize images down and up again, by one factor for the batch.

    Args:
        images: (B, C, H, W).
        generator: source of randomness.
        smallest: smallest scale.
    """
    scale = smallest + (1 - smallest) * torch.rand((), generator=generator).item()
    size = images.shape[-2:]
    small_size = [max(8, round(side * scale)) for side in size]
    small = interpolate(images, small_size, mode="bilinear", antialias=True)
    return interpolate(small, size, mode="bicubic").clamp(0, 1)


def compress_jpeg(images: Tensor, generator: Generator) -> Tensor:
    """Imitate JPEG compression: quantize the cosine transform of 8x8 blocks.

    Higher frequencies have coarser steps. The gradient ignores the rounding.
    """
    k = torch.arange(float(JPEG_BLOCK), device=images.device)
    basis = torch.cos(math.pi / 8 * (k[None] + 0.5) * k[:, None]) / 2  # (frequency, pixel)
    basis[0] /= math.sqrt(2)  # orthonormal
    blocks = images.unflatten(-1, (-1, JPEG_BLOCK)).unflatten(-3, (-1, JPEG_BLOCK))
    quality = torch.rand(len(images), 1, 1, 1, 1, 1, generator=generator).to(images.device)
    step = (0.02 + 0.10 * quality) * (1 + 0.5 * (k[:, None, None] + k))
    # blocks are (B, C, h, 8, w, 8)
    spectrum = torch.einsum("bchiwj,fi,gj->bchfwg", blocks, basis, basis)
    rounded = torch.round(spectrum / step) * step
    spectrum = spectrum + (rounded - spectrum).detach()
    decoded = torch.einsum("bchfwg,fi,gj->bchiwj", spectrum, basis, basis)
    return decoded.reshape(images.shape).clamp(0, 1)


def add_noise(images: Tensor, generator: Generator, max_sigma: float = 0.06) -> Tensor:
    """Add Gaussian noise of a random standard deviation of up to `max_sigma`."""
    sigma = sample_uniform(len(images), 0.0, max_sigma, generator, images)
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    return (images + sigma * noise).clamp(0, 1)


def drop_patches(images: Tensor, generator: Generator, largest: float = 0.35) -> Tensor:
    """Make a rectangle gray in half of the images.

    Args:
        images: (B, C, H, W).
        generator: source of randomness.
        largest: side of the largest rectangle as a share of the image's.
    """
    batch = len(images)
    inside = sample_bool(batch, 0.5, generator, images)[:, None, None, None]
    for axis in (-1, -2):
        size = images.shape[axis]
        pixels = torch.arange(size, device=images.device) + 0.5
        length = sample_uniform(batch, 0.1 * size, largest * size, generator, images)
        start = sample_uniform(batch, 0.0, 1.0, generator, images) * (size - length)
        is_inside = (pixels >= start) & (pixels < start + length)  # (B, 1, 1, size)
        inside = inside & (is_inside if axis == -1 else is_inside.transpose(-1, -2))
    return torch.where(inside, GRAY, images)


def vary_face(faces: Tensor, generator: Generator) -> Tensor:
    """Change colors, sharpness and noise of face crops, and hide a patch of some."""
    colors = color_jitter(faces, generator, strength=0.6, gray=0.2)
    return drop_patches(degrade(colors, generator), generator)


def sample_jitter(batch: int, size: int, generator: Generator) -> Tensor:
    """Sample how face crops are turned, resized and shifted, (batch, 3, 3)."""
    return random_affine(batch, size, generator, turn=0.10, grow=0.08, shift=0.03)


def degrade(images: Tensor, generator: Generator) -> Tensor:
    """Blur all images; apply low resolution, JPEG blocks and noise to a quarter each."""
    images = blur(images, generator)
    order = torch.randperm(len(images), generator=generator).to(images.device)
    quarters = order.tensor_split(4)
    for rows, transform in zip(quarters, (downscale, compress_jpeg, add_noise), strict=False):
        if len(rows):
            images = images.index_copy(0, rows, transform(images[rows], generator))
    return images


def dilate(masks: Tensor, generator: Generator, reach: int = 2) -> Tensor:
    """Move the edges of masks in or out by up to about `reach` / 2 pixels, like detector errors."""
    width = 2 * reach + 1
    soft = avg_pool2d(masks, width, 1, reach, count_include_pad=False)
    level = sample_uniform(len(masks), 0.3, 0.7, generator, masks)
    return ((soft - level) * width + 0.5).clamp(0, 1)


def random_affine(
    batch: int, size: int, generator: Generator, turn: float, grow: float, shift: float
) -> Tensor:
    """Sample similarity transforms of an image about its center.

    Args:
        batch: number of transforms.
        size: width and height of the image in pixels.
        generator: source of randomness.
        turn: largest rotation in radians.
        grow: largest relative change of the size.
        shift: largest shift as a share of the width.

    Returns:
        (batch, 3, 3) matrices.
    """
    turns, grows, x, y = (2 * torch.rand(4, batch, generator=generator) - 1).unbind()
    angle = turn * turns
    scale = torch.exp(math.log1p(grow) * grows)
    cos = scale * torch.cos(angle)
    sin = scale * torch.sin(angle)
    center = size / 2
    matrix = torch.zeros(batch, 3, 3)
    matrix[:, 0, 0] = cos
    matrix[:, 0, 1] = -sin
    matrix[:, 1, 0] = sin
    matrix[:, 1, 1] = cos
    matrix[:, 2, 2] = 1
    matrix[:, 0, 2] = center * (1 - cos + sin) + size * shift * x
    matrix[:, 1, 2] = center * (1 - sin - cos) + size * shift * y
    return matrix
