"""Where in the image each person of a request acts: masks and boxes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from openpulid.errors import OptionError
from openpulid.faces.face import Face, sort_faces
from openpulid.identity.identity import Identity
from openpulid.methods.pulid import Mask, People, convert_mask, normalize_people, read_mask
from openpulid.pipelines.mask_ratio import crop_mask
from openpulid.pipelines.request import GenerationRequest
from openpulid.pipelines.request_inputs import Person

MIN_COVER = 0.5
"""Share of a face that must be in a region to belong to it."""


def build_masks(
    request: GenerationRequest, images: Sequence[Image.Image | None], size: tuple[int, int]
) -> list[Tensor]:
    """Build the mask of each person, weighted by the person's scale.

    Args:
        request: a resolved request with people.
        images: the opened mask of each person, gray; None for a box, and for the whole image.
        size: width and height of the generated image in pixels.

    Returns:
        For each person (H, W), in [0, 1] or uint8; white is the largest scale of all people.
    """
    scales = request.identity_scales
    largest = max(scales) or 1.0
    return [
        _weight(_build_mask(person, image, size), scale / largest)
        for person, image, scale in zip(request.people, images, scales, strict=True)
    ]


def _build_mask(person: Person, image: Image.Image | None, size: tuple[int, int]) -> Tensor:
    if image is not None:
        return torch.from_numpy(np.array(crop_mask(image, size)))
    width, height = size
    left, top, right, bottom = person.box or (0.0, 0.0, 1.0, 1.0)
    return torch.outer(_cover(top, bottom, height), _cover(left, right, width))


def _weight(mask: Tensor, weight: float) -> Tensor:
    return mask if weight == 1 else convert_mask(mask) * weight


def crop_masks(people: People, size: tuple[int, int]) -> People:
    """Crop the masks of people to the ratio of the generated image, see `crop_mask`.

    Args:
        people: as the adapter accepts them.
        size: width and height of the generated image in pixels.

    Raises:
        ImageError: the file of a mask is not an image.
        OptionError: a mask has another shape, or values out of range.
    """
    if isinstance(people, Identity):
        return people
    return [
        [(identity, _crop(mask, size)) for identity, mask in prompt]
        for prompt in normalize_people(people)
    ]


def _crop(mask: Mask, size: tuple[int, int]) -> Tensor | None:
    if mask is None:
        return None
    image = Image.fromarray(read_mask(mask).detach().cpu().numpy())
    return torch.from_numpy(np.array(crop_mask(image, size)))


def _cover(start: float, end: float, length: int) -> Tensor:
    """Return how much of each of `length` pixels an interval of [0, 1] covers."""
    first = torch.arange(length, dtype=torch.float32)
    covered = (first + 1).clamp(max=end * length) - first.clamp(min=start * length)
    return covered.clamp(min=0)


def assign_faces(
    faces: Sequence[Face],
    people: People | None,
    size: tuple[int, int],
    has_own_person: bool = False,
) -> list[tuple[Face, Identity | None, float]]:
    """Find the face of each person: the largest of those that are mostly in the person's region.

    Args:
        faces: the faces of an image.
        people: its people, as the adapter accepts them. Without any, all faces are nobody's.
        size: width and height of the image in pixels.
        has_own_person: whether the method shows a person of its own, whose face is the largest.

    Returns:
        A face, its person, and the largest value of the person's mask. A person without a face is
        left out.

    Raises:
        OptionError: there is one person per image of a batch.
    """
    if people is None:
        found = sort_faces(faces)[:1] if has_own_person else faces
        return [(face, None, 1.0) for face in found]
    prompts = normalize_people(people)
    if len(prompts) > 1:
        raise OptionError("refine_faces needs people with masks, not one for each image.")
    masks = [convert_mask(mask) for _, mask in prompts[0]]
    owners: dict[int, Face] = {}
    for face in sort_faces(faces):
        covers = [cover_face(mask, face, size) for mask in masks]
        owner = max(range(len(masks)), key=covers.__getitem__)
        if covers[owner] > MIN_COVER:
            owners.setdefault(owner, face)
    return [
        (face, prompts[0][owner][0], float(masks[owner].max())) for owner, face in owners.items()
    ]


def cover_face(mask: Tensor, face: Face, size: tuple[int, int]) -> float:
    """Return the share of a face in the region of a mask (H, W) with any largest value."""
    width, height = size
    full = interpolate(mask[None, None], (height, width), mode="bilinear")[0, 0]
    x1, y1, x2, y2 = (round(value) for value in face.box.tolist())
    inside = full[y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)]
    return float(inside.mean() / full.max().clamp(min=1e-6))
