"""Who is in which image, and where: what `use` accepts, brought to one form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from openpulid.errors import OptionError
from openpulid.identity.identity import Identity

Mask = Tensor | np.ndarray | Image.Image | None
Person = tuple[Identity, Mask]
People = Identity | Sequence[Any]


def normalize_people(people: People) -> list[list[Person]]:
    """One list of (identity, mask) per prompt.

    an identity                          -> it is in every image
    [(identity, mask), (identity, mask)] -> all of them in every image, each in its region
    [identity, identity]                 -> one per prompt
    [[(identity, mask), ...], identity]  -> one entry per prompt, some with several people

    Raises:
        OptionError: it is none of these.
    """
    if isinstance(people, Identity):
        return [[(people, None)]]
    if not isinstance(people, Sequence) or not people:
        raise OptionError(
            "give an identity, a list of (identity, mask), or a list with one identity per prompt."
        )
    if all(_is_person(entry) for entry in people):
        return [list(people)]
    return [_one_prompt(entry) for entry in people]


def _is_person(entry: Any) -> bool:
    return isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], Identity)


def _one_prompt(entry: Any) -> list[Person]:
    if isinstance(entry, Identity):
        return [(entry, None)]
    if isinstance(entry, list) and entry and all(_is_person(person) for person in entry):
        return entry
    raise OptionError(
        f"{type(entry).__name__} is not an identity, nor a list of (identity, mask) pairs."
    )


def as_mask(mask: Mask) -> Tensor:
    """A picture, array or tensor as (H, W) float in [0, 1]; 8-bit values are divided by 255.

    Raises:
        OptionError: it has no two axes, or values outside [0, 1].
    """
    if mask is None:
        return torch.ones(1, 1)
    if isinstance(mask, Image.Image):
        mask = np.asarray(mask.convert("L"))
    mask = torch.as_tensor(mask)
    values = mask.float() / 255 if mask.dtype == torch.uint8 else mask.float()
    values = values.reshape(values.shape[-2:]) if values[..., 0, 0].numel() == 1 else values
    if values.ndim != 2 or values.min() < 0 or values.max() > 1:
        raise OptionError(
            f"a mask is one picture with values from 0 to 1; this one has the shape {tuple(mask.shape)}."
        )
    return values


def stack_masks(people: list[list[Person]]) -> Tensor | None:
    """The masks as (P, J, H, W) at the largest height and width among them, or None where everybody is everywhere.

    A prompt with fewer people than another is filled up with empty regions.
    """
    most = max(map(len, people))
    if most == 1 and all(mask is None for [(_, mask)] in people):
        return None
    masks = [[as_mask(mask) for _, mask in prompt] for prompt in people]
    empty = torch.zeros(1, 1)
    rows = [prompt + [empty] * (most - len(prompt)) for prompt in masks]
    height, width = (max(mask.shape[axis] for row in rows for mask in row) for axis in (0, 1))
    return torch.stack(
        [torch.stack([_resized(mask, height, width) for mask in row]) for row in rows]
    )


def _resized(mask: Tensor, height: int, width: int) -> Tensor:
    return interpolate(mask[None, None], (height, width), mode="area")[0, 0]
