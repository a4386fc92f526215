"""Edits with ControlNet, with Chroma and with soft masks, next to diffusers' own pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    ChromaImg2ImgPipeline,
    ChromaInpaintPipeline,
    FluxInpaintPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLInpaintPipeline,
)
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from openpulid.pipelines.request import GenerationRequest
from openpulid.pipelines.request_inputs import Control, InitImage
from openpulid.pipelines.studio import Studio
from tests.support.studios import (
    SIDE,
    SIZE,
    chroma_studio,
    flux_studio,
    pixels,
    sdxl_studio,
)
from tests.support.tiny_flux import tiny_pipe
from tests.support.token_files import controlnet

STRENGTH = 0.75
OPTIONS: dict[str, dict[str, Any]] = {
    "sdxl": {"negative_prompt": "", "guidance_scale": 3.0},
    "flux": {"max_sequence_length": 10, "guidance_scale": 4.0},
    "chroma": {
        "max_sequence_length": 10,
        "guidance_scale": 5.0,
        "negative_prompt": "of a person",
    },
}
"""Arguments of diffusers' pipelines: the defaults of the studios, and Chroma's negative prompt."""


@pytest.fixture(scope="module")
def studios(tiny_pipeline: Any) -> dict[str, Studio]:
    return {
        "sdxl": sdxl_studio(tiny_pipeline()),
        "flux": flux_studio(tiny_pipe()),
        "chroma": chroma_studio(),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, studios: dict[str, Studio]) -> Path:
    path = tmp_path_factory.mktemp("edits")
    for seed, name in enumerate(("room", "map")):
        noise = np.random.default_rng(seed).integers(0, 255, (SIDE, SIDE, 3), np.uint8)
        Image.fromarray(noise).save(path / f"{name}.png")
    sofa = np.zeros((SIDE, SIDE), np.uint8)
    sofa[8:24, 16:] = 255
    Image.fromarray(sofa).save(path / "sofa.png")
    # one gray for the 2 x 2 pixels of a latent: diffusers reads one of them, here it is their mean
    ramp = np.linspace(0, 255, SIDE // 2).astype(np.uint8).repeat(2)
    Image.fromarray(np.tile(ramp, (SIDE, 1))).save(path / "soft.png")
    controlnet(studios["sdxl"].pipe.unet).save_pretrained(path / "controlnet")
    return path


def generate(studio: Studio, folder: Path, mask: str | None = None, **fields: Any) -> np.ndarray:
    """Edit the room with a studio."""
    init = InitImage(folder / "room.png", STRENGTH, None if mask is None else folder / mask)
    request = GenerationRequest("portrait", seed=5, init_image=init, **fields)
    return pixels(studio.generate(request).images[0])


def run_diffusers(
    cls: Any,
    studio: Studio,
    folder: Path,
    mask: str | None = None,
    is_soft: bool = False,
    **options: Any,
) -> Image.Image:
    """Edit the room with a pipeline of diffusers of the same components.

    Its own mask processor rounds gray to black and white; `is_soft` keeps it.
    """
    family = studio.preset.models.family
    is_sdxl = family == "sdxl"
    networks = {"controlnet": options.pop("controlnet")} if "controlnet" in options else {}
    pipe = cls(
        **studio.pipe.components, **networks, **({"add_watermarker": False} if is_sdxl else {})
    )
    pipe.set_progress_bar_config(disable=True)
    if mask is not None:
        processor = VaeImageProcessor.from_config(
            pipe.mask_processor.config, do_binarize=not is_soft
        )
        pipe.mask_processor = processor
        options["mask_image"] = Image.open(folder / mask)
    if mask is not None or not is_sdxl:
        options |= SIZE
    return pipe(
        "portrait",
        image=Image.open(folder / "room.png"),
        strength=STRENGTH,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(5),
        **OPTIONS[family],
        **options,
    ).images[0]


def compose(edited: Image.Image, folder: Path, mask: str) -> np.ndarray:
    """Put the room back outside of a mask, as far as the mask is black."""
    room = Image.open(folder / "room.png")
    return pixels(Image.composite(edited, room, Image.open(folder / mask)))


@pytest.mark.parametrize("mask", [None, "sofa.png"])
def test_controlnet_is_that_of_diffusers(
    mask: str | None, studios: dict[str, Studio], folder: Path
) -> None:
    studio = studios["sdxl"]
    control = Control(folder / "controlnet", folder / "map.png", scale=0.7)
    image = generate(studio, folder, mask, controls=[control])
    cls = (
        StableDiffusionXLControlNetImg2ImgPipeline
        if mask is None
        else StableDiffusionXLControlNetInpaintPipeline
    )
    edited = run_diffusers(
        cls,
        studio,
        folder,
        mask,
        controlnet=controlnet(studio.pipe.unet),
        control_image=Image.open(folder / "map.png"),
        controlnet_conditioning_scale=0.7,
    )
    expected = pixels(edited) if mask is None else compose(edited, folder, mask)
    assert np.abs(image - expected).max() <= 1
    assert np.abs(image - generate(studio, folder, mask)).max() > 2


@pytest.mark.parametrize("mask", [None, "sofa.png"])
def test_chroma_is_that_of_diffusers(
    mask: str | None, studios: dict[str, Studio], folder: Path
) -> None:
    studio = studios["chroma"]
    image = generate(studio, folder, mask, negative_prompt="of a person")
    cls = ChromaImg2ImgPipeline if mask is None else ChromaInpaintPipeline
    edited = run_diffusers(cls, studio, folder, mask)
    expected = pixels(edited) if mask is None else compose(edited, folder, mask)
    assert np.abs(image - expected).max() <= 1
    assert np.abs(image - pixels(Image.open(folder / "room.png"))).max() > 2


@pytest.mark.parametrize("family", ["sdxl", "flux", "chroma"])
def test_soft_mask_is_that_of_diffusers_with_gray(
    family: str, studios: dict[str, Studio], folder: Path
) -> None:
    studio = studios[family]
    fields = {"negative_prompt": "of a person"} if family == "chroma" else {}
    image = generate(studio, folder, "soft.png", **fields)
    cls = {
        "sdxl": StableDiffusionXLInpaintPipeline,
        "flux": FluxInpaintPipeline,
        "chroma": ChromaInpaintPipeline,
    }[family]
    soft, rounded = (
        compose(run_diffusers(cls, studio, folder, "soft.png", is_soft), folder, "soft.png")
        for is_soft in (True, False)
    )
    assert np.abs(image - soft).max() <= 1
    assert np.abs(image - rounded).max() > 2
