"""What a training step costs: measured on a base of a few thousand random weights."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from openpulid.bench import training
from openpulid.errors import OptionError
from openpulid.training.recipe import Recipe


def tiny() -> training.RandomSDXL:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=8,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 1), cross_attention_dim=32, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), in_channels=3, out_channels=3, latent_channels=4, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, sample_size=16,
    )  # fmt: skip
    return training.RandomSDXL(unet, vae)


def test_every_candidate_is_measured_and_told() -> None:
    recipe = Recipe("tiny", "mini", encoder_width=16, batch=2, fast_batch=1, id_loss="accurate", semantic=0.6, layout=0.1)
    costs = training.measure(training.random_task(recipe, tiny()), lasts=(1, 2), rounds=1)
    assert [(cost.last, cost.checkpoint) for cost in costs] == [(1, False), (1, True), (2, False), (2, True)]
    assert costs[0].ratio == 1.0 and all(cost.seconds > 0 for cost in costs)


def test_the_miniature_at_random_has_the_miniatures_sizes() -> None:
    base = training.random_base("mini", torch.device("cpu"))
    assert base.shape() == (20, 12, 12) and base.unet.dtype == torch.float32
    assert base.decode(torch.zeros(1, 20, 12, 12)).shape == (1, 3, 96, 96)
    text = base.encode_text(["portrait"], guided=True)
    assert text.embeds.shape == (2, 77, base.unet.config.cross_attention_dim)


def test_other_bases_are_refused() -> None:
    with pytest.raises(OptionError, match="mini or sdxl"):
        training.random_base("flux", torch.device("cpu"))
