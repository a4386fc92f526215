"""Masks of another ratio than their image: cropped evenly, wherever they come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from openpulid.identity.identity import Identity
from openpulid.pipelines.init_image import InitImageInput
from openpulid.pipelines.inputs import open_inputs
from openpulid.pipelines.presets import sdxl
from openpulid.pipelines.request import GenerationRequest
from openpulid.pipelines.request_fields import RequestError
from openpulid.pipelines.request_inputs import InitImage, Person
from openpulid.pipelines.studio import Studio
from tests.support.people import anna, someone
from tests.support.studios import SIDE, pixels, sdxl_studio

NOTE = "and is cropped to the ratio 1.00 of the image; use one of the same ratio."


def left_mask(columns: int, width: int = SIDE) -> np.ndarray:
    mask = np.zeros((SIDE, width), np.uint8)
    mask[:, :columns] = 255
    return mask


WIDE = left_mask(24, 2 * SIDE)
"""The middle of it is white in 8 columns of 32; stretched, it would be in 12."""


@pytest.fixture(scope="module")
def studio(tiny_pipeline: Any) -> Studio:
    return sdxl_studio(tiny_pipeline())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("masks")
    Image.fromarray(WIDE).save(path / "wide.png")
    Image.fromarray(left_mask(8)).save(path / "quarter.png")
    room = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), np.uint8)
    Image.fromarray(room).save(path / "room.png")
    anna.save(path / "anna.safetensors")
    return path


def generate(studio: Studio, people: Any) -> np.ndarray:
    return pixels(studio.generate("portrait", people, seed=5, scale=1.0).images[0])


@pytest.mark.parametrize("form", ["array", "tensor", "image", "file", "list"])
def test_mask_with_an_identity_is_cropped(
    form: str, studio: Studio, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    forms: dict[str, Any] = {
        "array": [(anna, WIDE)],
        "tensor": [(anna, torch.tensor(WIDE / 255.0))],
        "image": [(anna, Image.fromarray(WIDE))],
        "file": [(anna, folder / "wide.png")],
        "list": [[(anna, WIDE)]],
    }
    cropped = generate(studio, [(anna, left_mask(8))])
    assert not caplog.messages
    assert np.array_equal(generate(studio, forms[form]), cropped)
    (message,) = caplog.messages
    assert message.startswith("the mask has 64 x 32 pixels") and message.endswith(NOTE)
    assert np.abs(cropped - generate(studio, [(anna, left_mask(12))])).max() > 2


def test_mask_of_a_request_is_cropped_alike(studio: Studio, folder: Path) -> None:
    person = Person(identity=folder / "anna.safetensors", mask=folder / "wide.png", scale=1.0)
    request = GenerationRequest("portrait", seed=5, people=[person])
    image = pixels(studio.generate(request).images[0])
    assert np.array_equal(image, generate(studio, [(anna, WIDE)]))


def test_masks_of_several_ratios_are_cropped_each(studio: Studio) -> None:
    ben: Identity = someone(2)
    tall = np.ascontiguousarray(WIDE.T)
    expected = generate(studio, [(anna, left_mask(8)), (ben, left_mask(8).T)])
    assert np.array_equal(generate(studio, [(anna, WIDE), (ben, tall)]), expected)
    halves = [(anna, torch.tensor([[1.0, 0.0]])), (ben, torch.tensor([[0.0, 1.0]]))]
    left = left_mask(SIDE // 2)
    assert np.array_equal(
        generate(studio, halves), generate(studio, [(anna, left), (ben, 255 - left)])
    )


def test_inpaint_mask_is_cropped(
    studio: Studio, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = []
    for mask in ("quarter.png", "wide.png"):
        init = InitImage(folder / "room.png", strength=0.75, mask=folder / mask)
        request = GenerationRequest("portrait", seed=5, init_image=init)
        images.append(pixels(studio.generate(request).images[0]))
    assert np.array_equal(*images)
    room = pixels(Image.open(folder / "room.png"))
    assert np.array_equal(images[1][:, 8:], room[:, 8:])
    assert np.abs(images[1][:, :8] - room[:, :8]).max() > 2
    (message,) = [x.getMessage() for x in caplog.records if x.name.startswith("openpulid")]
    assert message.startswith("the inpaint mask has 64 x 32 pixels") and message.endswith(NOTE)


def open_wide_room(folder: Path, rows: int) -> InitImageInput:
    """Open an initial image of 64 x 32 with a square mask whose first rows are white."""
    Image.new("RGB", (2 * SIDE, SIDE)).save(folder / "wide-room.png")
    Image.fromarray(np.ascontiguousarray(left_mask(rows).T)).save(folder / "rows.png")
    init = InitImage(folder / "wide-room.png", mask=folder / "rows.png")
    opened = open_inputs(GenerationRequest("portrait", init_image=init), sdxl().models).init_image
    assert opened is not None
    return opened


def test_inpaint_mask_is_resized_with_its_image(folder: Path) -> None:
    """The middle half of the mask has 4 of 16 rows in white, which is a quarter of the image."""
    files = open_wide_room(folder, 12)
    same = files.resize(2 * SIDE, SIDE, "crop").mask
    crop = files.resize(SIDE, SIDE, "crop").mask
    stretch = files.resize(SIDE, SIDE, "stretch").mask
    pad = files.resize(2 * SIDE, 2 * SIDE, "pad").mask
    for mask, white in ((same, 8), (crop, 8), (stretch, 8), (pad, 24)):
        values = np.asarray(mask)
        assert values[: white - 1].min() > 200 and values[white + 1 : white + 12].max() < 55


def test_inpaint_mask_without_white_in_the_middle_is_refused(folder: Path) -> None:
    with pytest.raises(RequestError, match=r"init_image\.mask is black everywhere"):
        open_wide_room(folder, 8)
