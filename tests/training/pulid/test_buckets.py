"""Batches of one shape each, from images of many aspect ratios."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from openpulid.errors import OptionError
from openpulid.training.pulid.buckets import Buckets, Size, list_sizes
from openpulid.training.rng import StepRNG

SIZES = list_sizes(512)
IMAGES = [
    *[Size(600, 800)] * 10,
    *[Size(1000, 1000)] * 9,
    *[Size(1920, 1080)] * 4,
    Size(300, 900),
]


def test_sizes_have_the_area_of_the_square() -> None:
    assert Size(512, 512) in SIZES and len(SIZES) == 7  # some ratios give the same size
    sizes = list_sizes(1024)
    assert len(sizes) == 9
    for size in sizes:
        assert size.width % 64 == 0 and size.height % 64 == 0
        assert 0.9 < size.width * size.height / 1024**2 < 1.1
    assert {Size(size.height, size.width) for size in sizes} == set(sizes)


def test_images_go_to_the_nearest_ratio() -> None:
    buckets = Buckets(IMAGES, SIZES, batch_size=4)
    counts = {(size.width, size.height): len(rows) for size, rows in buckets.rows.items()}
    # a single narrow image is no batch: it joins the next ratio
    assert counts == {(448, 576): 11, (512, 512): 9, (704, 384): 4}


def test_epoch_has_every_image() -> None:
    buckets = Buckets(IMAGES, SIZES, batch_size=4)
    num_batches = 3 + 3 + 1
    orders = []
    for epoch in range(2):
        seen: Counter[int] = Counter()
        order = []
        for step in range(epoch * num_batches, (epoch + 1) * num_batches):
            size, rows = buckets.sample(StepRNG(0, step))
            assert len(rows) == 4 and set(rows.tolist()) <= set(buckets.rows[size].tolist())
            seen.update(rows.tolist())
            order.append((size, tuple(rows.tolist())))
        assert set(seen) == set(range(len(IMAGES)))
        assert sum(count - 1 for count in seen.values()) == 1 + 3  # the last batches are filled
        orders.append(order)
    assert orders[0] != orders[1]


def test_sampling_depends_on_the_step_alone() -> None:
    buckets = Buckets(IMAGES, SIZES, batch_size=4)
    for step in (0, 5, 11):
        size, rows = buckets.sample(StepRNG(3, step))
        parts = [buckets.sample(StepRNG(3, step, rank, 2)) for rank in range(2)]
        assert {part[0] for part in parts} == {size}
        assert torch.equal(torch.cat([part[1] for part in parts]), rows)


def test_batch_that_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(OptionError, match="a batch of 4 cannot be shared by 3 processes"):
        Buckets(IMAGES, SIZES, batch_size=4).sample(StepRNG(0, 0, 1, 3))


def test_few_images_share_one_size() -> None:
    buckets = Buckets(IMAGES[-3:], SIZES, batch_size=8)
    ((size, rows),) = buckets.rows.items()
    assert rows.tolist() == [0, 1, 2] and len(buckets.sample(StepRNG(0, 0))[1]) == 8
    assert size.width > size.height
