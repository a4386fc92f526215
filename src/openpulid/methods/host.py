"""An identity in a network that another program runs, such as ComfyUI.

The program calls back in each cross-attention (SDXL) or after each block (FLUX and other
transformers), with its own queries or image tokens, and adds what it gets. It says which rows of
the batch are negative, so any layout of the batch works.

Shapes: B rows of the batch, L image positions or tokens, N identity tokens, h heads of width d,
D = h * d.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from openpulid.errors import OptionError
from openpulid.methods.hooks import check_scale, crop_to_ratio

Value = TypeVar("Value")

Grid = tuple[int, int]
"""Rows and columns of the image positions."""


@dataclass(eq=False)
class PlacedTensors:
    """Tensors on the device and in the dtype of the calls that use them.

    They are copied when a call first needs them, and stay there until `release`.
    """

    _placed: dict[object, Tensor | tuple[Tensor, ...]] = field(default_factory=dict)

    def get(self, key: object, create: Callable[[], Value]) -> Value:
        """Return the value of a key; create it when it is first needed."""
        if key not in self._placed:
            self._placed[key] = create()  # type: ignore[assignment]
        return self._placed[key]  # type: ignore[return-value]

    def release(self) -> None:
        """Free the copies."""
        self._placed.clear()


@dataclass(frozen=True, eq=False)
class HostIdentity:
    """What the identities of both families share: scale, masks and copies of their tensors.

    Attributes:
        scale: weight of the identity.
        masks: (M, H, W) in [0, 1], one for all images of the batch or one per image; None for
            everywhere.
        placed: copies on the device of the calls.
    """

    scale: float
    masks: Tensor | None = None
    placed: PlacedTensors = field(default_factory=PlacedTensors)

    def __post_init__(self) -> None:
        check_scale(self.scale)

    def release(self) -> None:
        """Free the copies on the device of the calls; the next call creates them again."""
        self.placed.release()

    def region(self, grid: Grid, reference: Tensor, num_images: int) -> Tensor | None:
        """Resize the masks to the positions of a layer.

        Args:
            grid: rows and columns of the positions.
            reference: (B, L, ...), whose device is used.
            num_images: of the batch; the rows repeat them once per prompt.

        Returns:
            (1, L, 1) or (B, L, 1) in float32, or None without a mask.

        Raises:
            OptionError: The positions are not a grid of this size, or the number of masks is
                neither one nor that of the images.
        """
        if self.masks is None:
            return None
        if grid[0] * grid[1] != reference.shape[1]:
            raise OptionError(
                "masks need the network's own image positions, and a patch has changed their "
                "number (token merging, tiles); use the model without the patch, or no mask."
            )
        masks = self.masks
        if len(masks) not in (1, num_images):
            raise OptionError(
                f"an identity has {len(masks)} masks, and the batch has {num_images} images; "
                "use one mask for all images, or one per image."
            )

        def resize() -> Tensor:
            cropped = crop_to_ratio(masks, grid)[:, None]
            resized = interpolate(cropped, grid, mode="area")
            return resized.flatten(2).transpose(1, 2).to(reference.device)

        regions = self.placed.get((grid, reference.device), resize)
        if len(regions) == 1:
            return regions
        return regions.repeat(len(reference) // num_images, 1, 1)


def select_rows(pair: Tensor, is_negative: Sequence[bool]) -> Tensor:
    """Return for each row the values of the identity, or of no identity.

    Args:
        pair: (2, ...), of the identity, then of no identity.
        is_negative: per row of the batch.

    Returns:
        (B, ...); a view if all rows are the same.
    """
    if len(set(is_negative)) == 1:
        return pair[int(is_negative[0])].expand(len(is_negative), *pair.shape[1:])
    return torch.stack([pair[int(negative)] for negative in is_negative])


def pair_on_cpu(positive: Tensor, negative: Tensor) -> Tensor:
    """Concatenate values (1, ...) of the identity and of no identity, on the CPU."""
    return torch.cat([positive, negative]).cpu()
