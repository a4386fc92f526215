"""Images to tune on, and their captions: of the person, and of the class word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from openpulid.errors import FaceError
from openpulid.identity.detection import FaceDetection
from openpulid.identity.reference import ReferenceImage
from openpulid.io.image_grid import to_tensor
from openpulid.training.pulid import SDXLModel
from openpulid.training.rng import generator_for

TEMPLATES = (
    "a photo of {}",
    "a portrait of {}",
    "a close-up photo of {}",
    "a photo of the face of {}",
    "a bright photo of {}",
    "a cropped photo of {}",
)
"""Captions for SDXL; `{}` stands for the person."""

MINIATURE_TEMPLATES = (
    "photo, portrait of a {}",
    "portrait of a {}, photo",
    "photo, a {}",
    "a {}, color photo",
    "portrait of a {}, color photo, facing the camera",
)
"""Captions with words that the miniature knows."""

MIN_CROP = 0.8
"""Side of the smallest random crop, as a share of the square."""

MIN_MASK = 0.5
"""A pixel of a crop belongs to the face from this value on."""


@dataclass(frozen=True)
class TuningImages:
    """Images as the base model sees them.

    Attributes:
        latents: (N, c, h, w).
        masks: (N, 1, h, w), the share of face pixels at each position; None weighs all alike.
    """

    latents: Tensor
    masks: Tensor | None = None

    def __len__(self) -> int:
        return len(self.latents)


@torch.no_grad()
def encode_person(
    model: SDXLModel,
    references: Sequence[ReferenceImage],
    num_crops: int = 1,
    detection: FaceDetection | None = None,
    seed: int = 0,
) -> TuningImages:
    """Cut squares from the images of a person, and encode them.

    Args:
        model: the base model.
        references: the images.
        num_crops: squares per image: the largest one around the center, then random parts of it.
        detection: finds the faces for the masks; None makes none.
        seed: of the crops.

    Raises:
        FaceError: an image has no face.
    """
    generator = generator_for(seed, "crops")
    crops = []
    masks = []
    for reference in references:
        square = _center_square(reference.image)
        pixels = to_tensor([square])[0]
        mask = None if detection is None else _face_mask(detection, pixels, reference.label)
        for k in range(num_crops):
            rows, columns = _crop(square.width, k, generator)
            crops.append(_resize(pixels[:, rows, columns], model.pixels))
            if mask is not None:
                masks.append(_resize(mask[:, rows, columns], model.pixels))
    latents = torch.cat([model.encode(crop[None].to(model.device)) for crop in crops])
    if detection is None:
        return TuningImages(latents)
    stride = model.pixels // latents.shape[-1]
    return TuningImages(latents, avg_pool2d(torch.stack(masks), stride).to(model.device))


@torch.no_grad()
def generate_class_images(
    model: SDXLModel,
    prompts: Sequence[str],
    count: int,
    options: dict[str, Any],
    seed: int = 0,
    batch: int = 8,
) -> TuningImages:
    """Generate images of the class word with the untuned model, for prior preservation.

    Args:
        model: the base model.
        prompts: image k has the prompt k modulo their number.
        count: number of images.
        options: further arguments of the pipeline, such as the number of steps.
        seed: of the first image.
        batch: images at a time.
    """
    latents = []
    for start in range(0, count, batch):
        numbers = range(start, min(start + batch, count))
        result = model.pipe(
            prompt=[prompts[k % len(prompts)] for k in numbers],
            generator=[torch.Generator().manual_seed(seed + k) for k in numbers],
            output_type="latent",
            **options,
        )
        latents.append(result.images.float())
    return TuningImages(torch.cat(latents))


def fill_templates(phrase: str, is_miniature: bool = False) -> list[str]:
    """Return the captions with a phrase, such as "sks person", or the class word alone."""
    templates = MINIATURE_TEMPLATES if is_miniature else TEMPLATES
    return [template.format(phrase) for template in templates]


def _center_square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left = (image.width - side) // 2
    top = (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _crop(side: int, number: int, generator: torch.Generator) -> tuple[slice, slice]:
    """Return rows and columns of a random square; the first is the whole one."""
    if number == 0:
        return slice(0, side), slice(0, side)
    share, x, y = torch.rand(3, generator=generator).tolist()
    length = round(side * (MIN_CROP + (1 - MIN_CROP) * share))
    top = round(y * (side - length))
    left = round(x * (side - length))
    return slice(top, top + length), slice(left, left + length)


def _resize(pixels: Tensor, side: int) -> Tensor:
    """Resize (C, S, S) to (C, side, side)."""
    resized = interpolate(pixels[None], size=(side, side), mode="bilinear", antialias=True)
    return resized[0].clamp(0, 1)


def _face_mask(detection: FaceDetection, pixels: Tensor, label: str) -> Tensor:
    """Return the mask (1, S, S) of the largest face; without a parser, its box.

    Raises:
        FaceError: there is no face.
    """
    faces = detection.detect_all(pixels)
    if not faces:
        raise FaceError(f"no face in the square at the center of {label}; use another image.")
    face = max(faces, key=lambda face: face.longer_side)
    if face.mask is not None and face.mask.shape[1:] == pixels.shape[1:]:
        return (face.mask >= MIN_MASK).float()
    x1, y1, x2, y2 = (round(value) for value in face.box.tolist())
    mask = torch.zeros(1, *pixels.shape[1:])
    mask[:, max(y1, 0) : max(y2, 0), max(x1, 0) : max(x2, 0)] = 1
    return mask
