"""Batches of one shape each, from images of many aspect ratios (aspect ratio bucketing)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openpulid.training.rng import StepRNG, check_shared, generator_for

RATIOS = (1 / 2, 9 / 16, 2 / 3, 3 / 4, 4 / 5, 1.0, 5 / 4, 4 / 3, 3 / 2, 16 / 9, 2.0)
"""Width over height."""

MULTIPLE = 64
"""Of both sides in pixels."""


@dataclass(frozen=True)
class Size:
    """Width and height of an image in pixels."""

    width: int
    height: int

    @property
    def log_ratio(self) -> float:
        """Logarithm of width over height."""
        return math.log(self.width / self.height)


def list_sizes(pixels: int, multiple: int = MULTIPLE) -> list[Size]:
    """List the sizes of all ratios with about as many pixels as a square.

    Args:
        pixels: side of the square.
        multiple: of both sides.
    """
    sizes = []
    for ratio in RATIOS:
        width, height = (
            max(multiple, round(pixels * root / multiple) * multiple)
            for root in (ratio**0.5, ratio**-0.5)
        )
        sizes.append(Size(width, height))
    return list(dict.fromkeys(sizes))


class Buckets:
    """Images grouped by the size to which they are cropped.

    An epoch has every image once; the last batch of a size is filled from its beginning.

    Args:
        images: size of each image.
        sizes: to choose from.
        batch_size: of the global batch. Sizes with fewer images are left out.

    Attributes:
        rows: size -> indices of its images.
        batches: size and first row of each batch of an epoch.
    """

    def __init__(self, images: Sequence[Size], sizes: Sequence[Size], batch_size: int) -> None:
        self.batch_size = batch_size
        self.rows = _group(images, sizes)
        while len(self.rows) > 1:
            smallest = min(self.rows, key=lambda size: len(self.rows[size]))
            if len(self.rows[smallest]) >= batch_size:
                break
            self.rows = _group(images, [size for size in self.rows if size != smallest])
        self.batches = [
            (size, start)
            for size, rows in self.rows.items()
            for start in range(0, len(rows), batch_size)
        ]

    def sample(self, rng: StepRNG) -> tuple[Size, Tensor]:
        """Return the size of a step's global batch, and the rank's part of its images, (B,).

        Raises:
            OptionError: the ranks cannot share the batch evenly.
        """
        check_shared(self.batch_size, rng.world_size)
        epoch, index = divmod(rng.step, len(self.batches))
        order = torch.randperm(
            len(self.batches), generator=generator_for(rng.seed, "buckets", "epoch", epoch)
        )
        size, start = self.batches[int(order[index])]
        rows = self.rows[size]
        key = (rng.seed, "buckets", size.width, size.height, "epoch", epoch)
        permuted = rows[torch.randperm(len(rows), generator=generator_for(*key))]
        chosen = permuted[torch.arange(start, start + self.batch_size) % len(rows)]
        return size, rng.record("bucket.indices", rng.local_slice(chosen))


def _group(images: Sequence[Size], sizes: Sequence[Size]) -> dict[Size, Tensor]:
    """Give each image to the size of the nearest ratio."""
    groups: dict[Size, list[int]] = {}
    for index, image in enumerate(images):
        nearest = min(sizes, key=lambda size: abs(size.log_ratio - image.log_ratio))
        groups.setdefault(nearest, []).append(index)
    return {size: torch.tensor(groups[size]) for size in sizes if size in groups}
