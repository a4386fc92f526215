"""The miniature's pipeline: SDXL's architecture at 96 pixels, and the folders that diffusers loads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    ModelMixin,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerBase

from openpulid.training.pulid.models import TextConditioning

TIME_WIDTH = 32
"""Of the embedding of each of SDXL's six size conditions."""
SHARD = "12MB"


def build_unet(
    channels: int,
    text_width: int,
    pooled: int,
    widths: Sequence[int] = (64, 128, 160),
    layers: int = 1,
    size: int = 12,
) -> UNet2DConditionModel:
    """SDXL's U-Net with random weights: attention on every level, heads of 32, `widths` from full resolution down."""
    levels = len(widths)
    return UNet2DConditionModel(
        sample_size=size, in_channels=channels, out_channels=channels,
        block_out_channels=tuple(widths), layers_per_block=layers, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D",) * levels, up_block_types=("CrossAttnUpBlock2D",) * levels,
        # diffusers' name for the number of heads
        attention_head_dim=tuple(max(1, width // 32) for width in widths), transformer_layers_per_block=1,
        use_linear_projection=True, cross_attention_dim=text_width,
        addition_embed_type="text_time", addition_time_embed_dim=TIME_WIDTH,
        projection_class_embeddings_input_dim=pooled + 6 * TIME_WIDTH,
    )  # fmt: skip


def build_scheduler() -> DPMSolverMultistepScheduler:
    """SDXL's noise, rescaled so that the last time is nothing but noise (arXiv 2305.08891), and DPM-Solver++(2M).

    With SDXL's own schedule a model learns that the mean colour of a picture shines through the noise, and at inference,
    where it does not, cannot make a black or a white ground. This needs the v-prediction.
    """
    return DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        rescale_betas_zero_snr=True, timestep_spacing="trailing",
    )  # fmt: skip


class TextEncoders(nn.Module):
    """Both text encoders, frozen: tokens to what the U-Net is told, exactly as the stock pipeline does it."""

    def __init__(
        self, first: CLIPTextModel, second: CLIPTextModelWithProjection, size: int = 96
    ) -> None:
        super().__init__()
        self.first, self.second, self.size = first.eval(), second.eval(), size
        self.requires_grad_(False)

    @property
    def width(self) -> int:
        return self.first.config.hidden_size + self.second.config.hidden_size

    @torch.no_grad()
    def forward(self, tokens: Tensor, kept: Tensor | None = None) -> TextConditioning:
        """(B, L) tokens -> embeddings (B, L, D), pooled (B, P), time ids (B, 6); all zero where not `kept` (B,) bool."""
        one = self.first(tokens, output_hidden_states=True)
        two = self.second(tokens, output_hidden_states=True)
        embeds = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1).float()
        pooled = two.text_embeds.float()
        if kept is not None:
            embeds, pooled = (
                embeds * kept[:, None, None].to(embeds),
                pooled * kept[:, None].to(pooled),
            )
        ids = torch.tensor(
            [self.size, self.size, 0, 0, self.size, self.size],
            device=tokens.device,
            dtype=torch.float32,
        )
        return TextConditioning(embeds, pooled, ids.expand(len(tokens), -1))


def predict(unet: Callable[..., Any], x_t: Tensor, t: Tensor, text: TextConditioning) -> Tensor:
    """The U-Net's output (B, C, s, s) in float32 for x_t at times t (B,)."""
    added = {"text_embeds": text.pooled, "time_ids": text.time_ids}
    x_t = x_t.contiguous(memory_format=torch.channels_last)
    return unet(
        x_t, t, encoder_hidden_states=text.embeds, added_cond_kwargs=added, return_dict=False
    )[0].float()


def build_pipeline(
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    words: TextEncoders,
    tokenizer: PreTrainedTokenizerBase,
) -> StableDiffusionXLPipeline:
    """The stock pipeline around these networks, silent."""
    pipe = StableDiffusionXLPipeline(
        vae=vae, text_encoder=words.first, text_encoder_2=words.second, tokenizer=tokenizer, tokenizer_2=tokenizer,
        unet=unet, scheduler=build_scheduler(), force_zeros_for_empty_prompt=True, add_watermarker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def sample(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int = 20,
    guidance: float = 3.0,
    batch: int = 32,
) -> Tensor:
    """(B, 3, H, W) in [0, 1], each image from its own seed on the CPU."""
    made = []
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        made.append(
            pipe(
                prompt=list(prompts[part]), generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
                num_inference_steps=steps, guidance_scale=guidance, output_type="pt",
            ).images.float().cpu()
        )  # fmt: skip
    return torch.cat(made)


def save_folder(model: Any, folder: Path) -> None:
    """`save_pretrained` of a copy in bfloat16, with shards small enough for a repository: it packs a third of the bits away,
    of float16 next to nothing."""
    copy = deepcopy(model).to(torch.bfloat16)
    if isinstance(
        copy, ModelMixin
    ):  # a loaded model of diffusers would say from which folder of this machine it came
        copy.register_to_config(_name_or_path="")
    copy.save_pretrained(folder, max_shard_size=SHARD)
