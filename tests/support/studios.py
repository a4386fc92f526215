"""Studios of tiny random pipelines, and what they need."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from openpulid.pipelines.presets import chroma, flux, flux2_klein, sdxl
from openpulid.pipelines.studio import Studio
from tests.support.people import anna
from tests.support.people import fresh as fresh_sdxl
from tests.support.tiny_bases import flux2_with_text, fresh_adapter, tiny_base
from tests.support.tiny_flux import fresh as fresh_flux

SIDE = 32
SIZE = {"width": SIDE, "height": SIDE}


class UnusedExtractor:
    """Extractor of a studio that receives identities alone."""

    models = anna.models


def sdxl_studio(pipe: Any) -> Studio:
    """A studio of 4 steps with guidance."""
    models: dict[str, Any] = {"use_half_precision": False, "size_multiple": 8, "min_side": 8}
    preset = sdxl().with_models(**models, native_side=SIDE, sampler=None)
    preset = preset.with_defaults(
        num_inference_steps=4, guidance_scale=3.0, negative_prompt="", **SIZE
    )
    return Studio(pipe, fresh_sdxl(pipe), UnusedExtractor(), preset)


def flux_studio(pipe: Any) -> Studio:
    """A studio of 4 steps."""
    models: dict[str, Any] = {"use_half_precision": False, "size_multiple": 4, "min_side": 4}
    preset = flux().with_models(**models, native_side=SIDE)
    preset = preset.with_defaults(num_inference_steps=4, max_sequence_length=10, **SIZE)
    return Studio(pipe, fresh_flux(pipe), UnusedExtractor(), preset)


def chroma_studio() -> Studio:
    """A studio of 4 steps with guidance."""
    pipe = tiny_base("Chroma")
    models: dict[str, Any] = {"use_half_precision": False, "size_multiple": 4, "min_side": 4}
    preset = chroma().with_models(**models, native_side=SIDE)
    preset = preset.with_defaults(num_inference_steps=4, max_sequence_length=10, **SIZE)
    return Studio(pipe, fresh_adapter(pipe), UnusedExtractor(), preset)


def klein_studio() -> Studio:
    """A studio of 4 steps without guidance."""
    pipe = flux2_with_text()
    models: dict[str, Any] = {"use_half_precision": False, "size_multiple": 4, "min_side": 4}
    preset = flux2_klein().with_models(**models, native_side=SIDE)
    preset = preset.with_defaults(max_sequence_length=10, **SIZE)
    return Studio(pipe, fresh_adapter(pipe), UnusedExtractor(), preset)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def run_diffusers(studio: Studio, seed: int = 5, **options: Any) -> np.ndarray:
    """Run the pipeline of a studio as diffusers alone would, with the preset's options."""
    defaults = studio.preset.defaults
    if studio.preset.models.family == "sdxl":
        options = {"negative_prompt": "", **options}
    else:
        options = {"max_sequence_length": 10, **options}
    if "prompt_embeds" not in options:
        options = {"prompt": "portrait", **options}
    elif "negative_prompt_embeds" in options:
        options.pop("negative_prompt", None)
    images = studio.pipe(
        width=SIDE,
        height=SIDE,
        num_inference_steps=defaults.num_inference_steps,
        guidance_scale=defaults.guidance_scale,
        generator=torch.Generator().manual_seed(seed),
        **options,
    ).images
    return pixels(images[0])


def components_state(pipe: Any) -> dict[str, dict[str, Any]]:
    """Return the modules and hooks of all networks of a pipeline, and copies of their weights."""
    state: dict[str, dict[str, Any]] = {}
    for name, network in pipe.components.items():
        if isinstance(network, torch.nn.Module):
            modules = dict(network.named_modules())
            state[name] = {
                "modules": {key: id(module) for key, module in modules.items()},
                "hooks": sum(
                    len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules.values()
                ),
                "weights": {key: x.clone() for key, x in network.state_dict().items()},
            }
    return state


def assert_same_state(one: dict[str, dict[str, Any]], other: dict[str, dict[str, Any]]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name]["modules"] == other[name]["modules"], name
        assert one[name]["hooks"] == other[name]["hooks"], name
        weights = one[name]["weights"]
        assert weights.keys() == other[name]["weights"].keys(), name
        for key, value in weights.items():
            assert torch.equal(value, other[name]["weights"][key]), f"{name}.{key}"
