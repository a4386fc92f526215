"""Where several people of a request act: masks and boxes, weighted by each person's scale."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from openpulid.pipelines.mask_ratio import crop_mask
from openpulid.pipelines.regions import build_masks
from openpulid.pipelines.request import GenerationRequest, IdentityOptions
from openpulid.pipelines.request_inputs import Person


def masks_of(*people: Person, scale: float = 0.8, size: tuple[int, int] = (8, 4)) -> torch.Tensor:
    request = GenerationRequest("portrait", people=people, identity=IdentityOptions(scale=scale))
    return torch.stack(build_masks(request, [None] * len(people), size))


def test_box_covers_its_share_of_each_pixel() -> None:
    left = Person(images=["a.png"], box=(0, 0.5, 0.5, 1))
    uneven = Person(images=["b.png"], box=(0.5, 0, 0.6875, 1))
    masks = masks_of(left, uneven)
    assert masks.shape == (2, 4, 8)
    expected = torch.zeros(4, 8)
    expected[2:, :4] = 1
    assert torch.equal(masks[0], expected)
    assert masks[1, 0].tolist() == [0, 0, 0, 0, 1, 0.5, 0, 0]
    whole = masks_of(Person(images=["a.png"], box=(0, 0, 1, 1)), size=(7, 96))
    assert torch.equal(whole, torch.ones(1, 96, 7))


def test_masks_hold_the_scales_of_people() -> None:
    boxes = {"left": (0, 0, 0.5, 1), "right": (0.5, 0, 1, 1)}
    own = Person(images=["a.png"], box=boxes["left"], scale=0.4)
    default = Person(images=["b.png"], box=boxes["right"])
    masks = masks_of(own, default, scale=0.8)
    assert masks[0, 0].tolist() == [0.5] * 4 + [0] * 4
    assert masks[1, 0].tolist() == [0] * 4 + [1] * 4
    nothing = masks_of(own.model_copy(update={"scale": 0.0}), default, scale=0.0)
    assert torch.equal(nothing, torch.zeros(2, 4, 8))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_mask_of_another_ratio_is_cropped(dtype: type, caplog: pytest.LogCaptureFixture) -> None:
    """A disc stays a disc."""
    y, x = np.mgrid[:64, :128]
    white = 255 if dtype is np.uint8 else 1
    disc = white * ((x - 64) ** 2 + (y - 32) ** 2 < 20**2).astype(dtype)
    mask = np.array(crop_mask(Image.fromarray(disc), (64, 64)))
    assert mask.shape == (64, 64) and mask.dtype == dtype
    assert mask.any(1).sum() == mask.any(0).sum() == 39 and mask.max() == white
    assert (
        "128 x 64 pixels (width over height 2.00) and is cropped to the ratio 1.00" in caplog.text
    )
    caplog.clear()
    assert np.array_equal(crop_mask(Image.fromarray(disc), (32, 16)), disc)
    assert not caplog.records


def test_mask_of_a_few_pixels_has_no_ratio(caplog: pytest.LogCaptureFixture) -> None:
    halves = Image.fromarray(np.array([[0, 255]], np.uint8))
    assert crop_mask(halves, (64, 64)).tobytes() == halves.tobytes()
    assert not caplog.records
