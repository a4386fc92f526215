"""Masks of every kind: files, PIL images, arrays, tensors; and the notes about useless ones."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from openpulid.errors import ImageError, OptionError
from openpulid.identity.identity import Identity
from openpulid.methods.hooks import crop_to_ratio
from openpulid.methods.pulid.flux_attention import FluxIdentity
from openpulid.methods.pulid.masks import convert_mask, resize_masks, stack_masks
from tests.support.image_files import IMAGES, encode

ANNA = Identity(torch.zeros(1, 1, 4), (torch.zeros(1, 2, 4),))


def gradient() -> torch.Tensor:
    return torch.linspace(0, 1, 16).expand(16, 16)


@pytest.mark.parametrize(
    "mask",
    [
        gradient(),
        gradient()[None, None],
        gradient().numpy(),
        (gradient() * 255).round().byte(),
        Image.fromarray((gradient() * 255).round().byte().numpy()),
        encode(Image.fromarray((gradient() * 255).round().byte().numpy())),
    ],
    ids=["tensor", "batch", "array", "uint8", "image", "bytes"],
)
def test_every_form_of_a_mask_is_the_same(mask: Any) -> None:
    torch.testing.assert_close(convert_mask(mask), gradient(), atol=0.002, rtol=0)


def test_read_only_array_gives_no_warning() -> None:
    """PyTorch warns once per process, so a new one is needed."""
    code = (
        "import numpy as np; from PIL import Image; "
        "from openpulid.methods.pulid.masks import convert_mask; "
        "convert_mask(np.asarray(Image.new('L', (4, 4), 255)))"
    )
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], check=True)


def test_transparent_mask_equals_black_one(caplog: pytest.LogCaptureFixture) -> None:
    expected = convert_mask(IMAGES / "mask-white-on-black.png")
    transparent = Image.open(IMAGES / "mask-white-on-transparent.png")
    assert torch.equal(convert_mask(transparent), expected)
    assert torch.equal(convert_mask(str(IMAGES / "mask-white-on-transparent.png")), expected)
    assert expected.min() == 0 and expected.max() == 1
    assert not caplog.messages


@pytest.mark.parametrize(
    ("mask", "value"),
    [
        (IMAGES / "mask-0-1.png", "1 of 255"),
        (np.ones((4, 4), np.uint8), "1 of 255"),
        (torch.full((4, 4), 0.01), "0.01"),
        (Image.new("RGBA", (4, 4), (0, 0, 0, 255)), "0 of 255"),
        (Image.new("LA", (4, 4), (255, 0)), "0 of 255"),  # transparent everywhere
    ],
    ids=["file", "array", "tensor", "black on transparent", "transparent"],
)
def test_black_mask_is_noted(mask: Any, value: str, caplog: pytest.LogCaptureFixture) -> None:
    assert convert_mask(mask).max() < 0.02
    (message,) = caplog.messages
    assert f"the mask is black: its largest value is {value}, so" in message


def test_16_bit_mask_with_8_bits(caplog: pytest.LogCaptureFixture) -> None:
    values = (gradient() * 255).round().numpy().astype(np.uint16)
    mask = convert_mask(encode(Image.fromarray(values)))
    torch.testing.assert_close(mask, gradient(), atol=0.002, rtol=0)
    assert not caplog.messages


@pytest.mark.parametrize(
    "mask",
    [
        torch.full((2, 2), 1.5),
        torch.full((2, 2), -0.1),
        torch.full((2, 2), float("nan")),
        torch.zeros(3, 2, 2),
        torch.zeros(2),
        torch.zeros(0, 2),
        np.array(["a"]),
    ],
)
def test_unusable_mask_is_refused(mask: Any) -> None:
    with pytest.raises(OptionError, match="a mask must have the shape"):
        convert_mask(mask)


def test_file_that_is_no_mask_is_refused() -> None:
    with pytest.raises(ImageError, match=r"none\.png: does not exist"):
        convert_mask("none.png")
    with pytest.raises(OptionError, match="expected an image, got list"):
        convert_mask([[0, 1]])  # type: ignore[arg-type]


def test_masks_have_one_ratio() -> None:
    tall = torch.ones(64, 32)
    halves = torch.ones(1, 2)
    for other in (tall, tall[:40, :20], halves, None):
        assert stack_masks([[(ANNA, tall), (ANNA, other)]]).shape == (1, 2, 64, 32)
    with pytest.raises(OptionError, match="the masks have 32 x 64 and 64 x 32 pixels"):
        stack_masks([[(ANNA, tall), (ANNA, tall.T)]])


def test_mask_of_another_ratio_is_cropped(caplog: pytest.LogCaptureFixture) -> None:
    mask = torch.rand(3, 16, 32)
    assert torch.equal(crop_to_ratio(mask, (8, 8)), mask[..., 8:24])
    assert torch.equal(crop_to_ratio(mask, (5, 20)), mask[:, 4:12])
    assert ["cropped to the ratio 1.00" in message for message in caplog.messages] == [True, False]
    assert torch.equal(crop_to_ratio(mask, (512, 1024)), mask)
    halves = torch.rand(1, 2)
    assert torch.equal(crop_to_ratio(halves, (512, 512)), halves)
    assert len(caplog.messages) == 2


def test_cropped_mask_is_noted_once_for_flux(caplog: pytest.LogCaptureFixture) -> None:
    mask = torch.rand(1, 1, 64, 128)
    identity = FluxIdentity({}, {}, dict, masks=mask)
    expected = resize_masks(mask[..., 48:80], (8, 4), 1)
    for _ in range(2):  # steps
        assert torch.equal(identity.resize_masks((8, 4), 1), expected)
    (message,) = caplog.messages
    assert (
        "has 128 x 64 pixels (width over height 2.00) and is cropped to the ratio 0.50" in message
    )
