"""People of a generation and their masks: what `use` accepts, in one form."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from openpulid.errors import OptionError
from openpulid.identity.identity import Identity
from openpulid.io.images import Source, open_mask
from openpulid.methods.hooks import MIN_RATIO_SIDE, expand_per_image, is_other_ratio

MIN_WEIGHT = 0.02
"""A mask whose largest weight is below this one hides the identity."""

logger = logging.getLogger(__name__)

Mask = Tensor | Source | None
Person = tuple[Identity, Mask]
People = Identity | Sequence[Any]


def normalize_people(people: People) -> list[list[Person]]:
    """Convert what `use` accepts to one list of (identity, mask) per prompt.

    - an identity: in every image
    - [(identity, mask), (identity, mask)]: all of them in every image, each in its region
    - [identity, identity]: one per prompt
    - [[(identity, mask), ...], identity]: one entry per prompt, some with several people

    Raises:
        OptionError: The argument has none of these forms.
    """
    if isinstance(people, Identity):
        return [[(people, None)]]
    if not isinstance(people, Sequence) or not people:
        raise OptionError(
            "pass an identity, a list of (identity, mask), or a list with one identity per prompt."
        )
    if all(_is_person(entry) for entry in people):
        return [list(people)]
    return [_people_of_prompt(entry) for entry in people]


def _is_person(entry: Any) -> bool:
    return isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], Identity)


def _people_of_prompt(entry: Any) -> list[Person]:
    if isinstance(entry, Identity):
        return [(entry, None)]
    if isinstance(entry, list) and entry and all(_is_person(person) for person in entry):
        return entry
    raise OptionError(
        "expected an identity or a list of (identity, mask) per prompt, got "
        f"{type(entry).__name__}; `Studio.identify` makes one identity of one or several images."
    )


def encode_people(
    prompts: Sequence[Sequence[Person]], encode: Callable[[Identity], Tensor]
) -> Tensor:
    """Encode every identity once. Prompts with fewer people are padded with zeros.

    Args:
        prompts: per prompt its identities and masks.
        encode: identity -> tokens (1, T, width).

    Returns:
        (P, J, T, width).

    Raises:
        OptionError: The identities have different numbers of tokens.
        IdentityError: The features of an identity are not finite.
    """
    tokens: dict[int, Tensor] = {}
    for prompt in prompts:
        for identity, _ in prompt:
            if id(identity) not in tokens:
                identity.check_values()
                tokens[id(identity)] = encode(identity)[0]
    if len({len(x) for x in tokens.values()}) > 1:
        raise OptionError("identities used together must have the same number of reference images.")
    padding = torch.zeros_like(next(iter(tokens.values())))
    max_people = max(map(len, prompts))
    rows = []
    for prompt in prompts:
        row = [tokens[id(identity)] for identity, _ in prompt]
        row += [padding] * (max_people - len(prompt))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def read_mask(mask: Tensor | Source) -> Tensor:
    """Read an image, array or tensor as (H, W), float32 in [0, 1] or uint8.

    Images are opened by `open_mask`.

    Raises:
        ImageError: The file is not an image.
        OptionError: The mask does not have two axes, or values outside [0, 1].
    """
    if not isinstance(mask, (Tensor, np.ndarray)):
        mask = np.array(open_mask(mask))
    shape = tuple(mask.shape)
    try:
        # PyTorch warns of arrays that are read-only, such as those of PIL images
        values = torch.as_tensor(mask if isinstance(mask, Tensor) else mask.copy())
    except TypeError:  # an array of text
        values = torch.empty(0)
    is_8_bit = values.dtype == torch.uint8
    if not is_8_bit:
        values = values.float()
    if values.ndim > 2 and set(values.shape[:-2]) == {1}:  # leading axes of length 1
        values = values.reshape(values.shape[-2:])
    is_in_range = is_8_bit or bool(((values >= 0) & (values <= 1)).all())
    if values.ndim != 2 or not values.numel() or not is_in_range:
        raise OptionError(
            "a mask must have the shape (H, W) and values from 0 to 1, or from 0 to 255 as uint8; "
            f"got the shape {shape} and the type {mask.dtype}."
        )
    return values


def convert_mask(mask: Mask) -> Tensor:
    """Convert an image, array or tensor to (H, W) float in [0, 1].

    8-bit values are divided by 255. None is a mask of ones. A mask that is black everywhere is
    logged as a warning.

    Raises:
        ImageError: The file is not an image.
        OptionError: The mask does not have two axes, or values outside [0, 1].
    """
    if mask is None:
        return torch.ones(1, 1)
    values = read_mask(mask)
    is_8_bit = values.dtype == torch.uint8
    values = values.float() / 255 if is_8_bit else values
    highest = float(values.max())
    if highest < MIN_WEIGHT:
        scale = " of 255" if is_8_bit else ""
        logger.warning(
            "the mask is black: its largest value is %g%s, so the identity has no effect; "
            "the mask must be white where the identity may act.",
            round(highest * 255) if is_8_bit else highest,
            scale,
        )
    return values


def convert_masks(masks: Tensor | None) -> Tensor | None:
    """Convert one mask (H, W), or one per image (M, H, W), to (M, H, W) float in [0, 1].

    Raises:
        OptionError: The masks have another shape, or values outside [0, 1].
    """
    if masks is None:
        return None
    if masks.ndim != 3:
        return convert_mask(masks)[None]
    # as one tall mask: a person may be in some images only, so one black mask is no warning
    return convert_mask(masks.flatten(0, 1)).unflatten(0, masks.shape[:2])


def stack_masks(prompts: Sequence[Sequence[Person]]) -> Tensor | None:
    """Stack all masks at the largest height and width among them.

    A prompt with fewer people than another is padded with empty masks.

    Returns:
        (P, J, H, W) in [0, 1], or None if no mask restricts anything.

    Raises:
        OptionError: masks have different ratios of their sides.
    """
    max_people = max(map(len, prompts))
    all_masks = [mask for prompt in prompts for _, mask in prompt]
    if max_people == 1 and all(mask is None for mask in all_masks):
        return None
    rows = []
    for prompt in prompts:
        row = [convert_mask(mask) for _, mask in prompt]
        row += [torch.zeros(1, 1)] * (max_people - len(row))
        rows.append(row)
    height = max(mask.shape[0] for row in rows for mask in row)
    width = max(mask.shape[1] for row in rows for mask in row)
    _check_ratios([mask for row in rows for mask in row])
    return torch.stack(
        [torch.stack([_resize(mask, height, width) for mask in row]) for row in rows]
    )


def _check_ratios(masks: Sequence[Tensor]) -> None:
    sizes = [mask.shape for mask in masks if min(mask.shape) >= MIN_RATIO_SIDE]
    for size in sizes:
        if is_other_ratio(size, sizes[0]):
            first, other = (f"{width} x {height}" for height, width in (sizes[0], size))
            raise OptionError(
                f"the masks have {first} and {other} pixels, which are different ratios of width "
                "to height; use the ratio of the image for all of them."
            )


def resize_masks(masks: Tensor, grid: tuple[int, int], batch_size: int) -> Tensor:
    """Resize masks to the image tokens of a batch.

    Args:
        masks: (P, J, H, W).
        grid: rows and columns of the tokens.
        batch_size: B; the images of each prompt are in sequence.

    Returns:
        (J, B, L, 1).
    """
    resized = interpolate(masks.float(), grid, mode="area")
    rows = expand_per_image(resized, batch_size, is_guided=False)
    return rows.flatten(2).transpose(0, 1)[..., None]


def _resize(mask: Tensor, height: int, width: int) -> Tensor:
    return interpolate(mask[None, None], (height, width), mode="area")[0, 0]
