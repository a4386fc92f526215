"""A file in the published layout in a pipeline of Stable Diffusion 1.5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from openpulid.errors import WeightsError
from openpulid.identity.identity import Identity
from openpulid.methods.w_plus import WPlusAdapter
from openpulid.methods.w_plus.encoders import WPlusNetworks


@pytest.fixture
def pipe(tiny_pipeline: Any) -> StableDiffusionPipeline:
    """Create a tiny pipeline with one text encoder."""
    parts = tiny_pipeline()
    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=8,
        cross_attention_dim=32,
        norm_num_groups=16,
    )
    pipe = StableDiffusionPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=unet,
        scheduler=parts.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: StableDiffusionPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 5, "output_type": "latent", "generator": generator}
    return pipe("portrait of a person", **options).images


def test_published_layout_in_its_own_base(
    pipe: StableDiffusionPipeline, tiny_pipeline: Any, tmp_path: Path
) -> None:
    networks = WPlusNetworks.for_unet(pipe.unet, width=4)
    parts = {name: getattr(networks, name).state_dict() for name in ("w_proj", "wplus_adapter")}
    torch.save(parts, tmp_path / "wplus_adapter.bin")
    adapter = WPlusAdapter.load(tmp_path / "wplus_adapter.bin")
    with pytest.raises(WeightsError, match=r"read tokens of width 32, .* of width 64; the publis"):
        adapter.attach(tiny_pipeline())
    latents = torch.randn(1, 1, 18 * 4, generator=torch.Generator().manual_seed(0))
    calls: list[torch.Tensor] = []
    pipe.unet.register_forward_hook(lambda module, args, output: calls.append(output[0].clone()))
    base = generate(pipe)
    adapter.attach(pipe)
    with adapter.use(Identity(latents, ())):  # from the default start on
        shown = generate(pipe)
    changed = [not torch.equal(one, two) for one, two in zip(calls[:5], calls[5:], strict=True)]
    # the step at 1 / 5 still has the text alone
    assert changed == [False, False, True, True, True]
    assert not torch.allclose(shown, base, atol=1e-3)
    assert torch.equal(generate(pipe), base)
