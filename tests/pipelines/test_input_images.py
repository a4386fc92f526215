"""Photos and masks of other programs in a whole request, with the shipped miniature."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from openpulid import load
from openpulid.pipelines.request import GenerationRequest
from openpulid.pipelines.request_inputs import Person
from openpulid.pipelines.studio import Studio
from tests.support.image_files import IMAGES, encode

ANNA = IMAGES / "person-1000007.png"


@pytest.fixture(scope="module")
def studio() -> Studio:
    return load("mini-lightning", device="cpu")


def generate(studio: Studio, mask: Any = None, **options: Any) -> np.ndarray:
    request = GenerationRequest(
        prompt="portrait of a person",
        seed=3,
        num_inference_steps=2,
        people=[Person(images=[ANNA], mask=mask)],
        **options,
    )
    return np.asarray(studio.generate(request).images[0]).astype(int)


def test_mask_on_transparent_is_the_mask_on_black(studio, caplog) -> None:
    everywhere = generate(studio)
    black = generate(studio, IMAGES / "mask-white-on-black.png")
    transparent = generate(studio, IMAGES / "mask-white-on-transparent.png")
    assert np.array_equal(transparent, black)
    assert np.abs(black - everywhere).max() > 10
    assert not caplog.messages


def test_masks_without_effect_or_of_another_ratio_are_noted(studio, caplog) -> None:
    generate(studio, IMAGES / "mask-0-1.png")
    (message,) = caplog.messages
    assert message.startswith("the mask is black: its largest value is 1 of 255, so the identity")
    caplog.clear()
    generate(studio, IMAGES / "mask-landscape.png", width=64, height=128)
    (message,) = caplog.messages
    assert "the mask has 128 x 64 pixels (width over height 2.00) and is cropped" in message


def test_the_same_photo_in_other_files_is_the_same_person(studio, tmp_path) -> None:
    """Depth, alpha and mode of a file do not change who it shows."""
    photo = Image.open(ANNA).convert("RGB")
    identity = studio.identify(photo)
    opaque = photo.copy()
    opaque.putalpha(255)
    deep = np.asarray(photo).astype(np.uint16) * 257
    for copy in (encode(opaque), encode(photo, "TIFF"), encode(photo, "BMP"), deep):
        assert (studio.identify(copy).id_cond == identity.id_cond).all()
