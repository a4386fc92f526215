"""The miniature's pipeline: SDXL's architecture at 96 pixels, in the folder layout of diffusers."""

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

from openpulid.errors import NonFiniteError
from openpulid.training.pulid import TextConditioning

TIME_WIDTH = 32
"""Width of the embedding of each of SDXL's six size conditions."""
SHARD_SIZE = "12MB"


def build_unet(
    channels: int,
    text_width: int,
    pooled: int,
    widths: Sequence[int] = (64, 128, 160),
    layers: int = 1,
    size: int = 12,
) -> UNet2DConditionModel:
    """Build SDXL's U-Net with random weights, with attention on every level and heads of width 32.

    Args:
        channels: latent channels.
        text_width: width of the text embeddings.
        pooled: width of the pooled text embedding.
        widths: channels per level, from full resolution down.
        layers: residual blocks per level.
        size: width and height of the latents.
    """
    levels = len(widths)
    return UNet2DConditionModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(widths),
        layers_per_block=layers,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        # diffusers uses this name for the number of heads.
        attention_head_dim=tuple(max(1, width // 32) for width in widths),
        transformer_layers_per_block=1,
        use_linear_projection=True,
        cross_attention_dim=text_width,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_WIDTH,
        projection_class_embeddings_input_dim=pooled + 6 * TIME_WIDTH,
    )


def build_scheduler(order: int = 2) -> DPMSolverMultistepScheduler:
    """Build DPM-Solver++(2M) with SDXL's betas, rescaled to zero terminal SNR (arXiv 2305.08891).

    In SDXL's own schedule the mean color of an image shows through the noise of the last timestep.
    A model that learns to rely on it cannot generate a black or white background at inference. Zero
    terminal SNR requires v-prediction.
    """
    return DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        solver_order=order,
    )


class TextEncoders(nn.Module):
    """Both frozen text encoders; they compute the same conditioning as the diffusers pipeline.

    Args:
        first: the text encoder without projection.
        second: the text encoder with projection, which returns the pooled embedding.
        size: width and height of the images, for SDXL's size conditions.
    """

    def __init__(
        self, first: CLIPTextModel, second: CLIPTextModelWithProjection, size: int = 96
    ) -> None:
        super().__init__()
        self.first = first.eval()
        self.second = second.eval()
        self.size = size
        self.requires_grad_(False)

    @property
    def width(self) -> int:
        """Width of the concatenated text embeddings."""
        return self.first.config.hidden_size + self.second.config.hidden_size

    @torch.no_grad()
    def forward(
        self, tokens: Tensor, keep: Tensor | None = None, size: tuple[int, int] | None = None
    ) -> TextConditioning:
        """Encode prompts.

        Args:
            tokens: (B, L).
            keep: (B,) bool; the conditioning is zero (unconditional) where it is false.
            size: height and width of the images in pixels; by default they are square.

        Returns:
            Embeddings (B, L, D), pooled embeddings (B, P) and time ids (B, 6).
        """
        first = self.first(tokens, output_hidden_states=True)
        second = self.second(tokens, output_hidden_states=True)
        embeds = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1).float()
        pooled = second.text_embeds.float()
        if keep is not None:
            embeds = embeds * keep[:, None, None].to(embeds)
            pooled = pooled * keep[:, None].to(pooled)
        height, width = size or (self.size, self.size)
        sizes = [height, width, 0, 0, height, width]
        ids = torch.tensor(sizes, device=tokens.device, dtype=torch.float32)
        return TextConditioning(embeds, pooled, ids.expand(len(tokens), -1))


def predict(unet: Callable[..., Any], x_t: Tensor, t: Tensor, text: TextConditioning) -> Tensor:
    """Call the U-Net for x_t (B, C, h, w) at timesteps t (B,); return (B, C, h, w) float32."""
    added_cond = {"text_embeds": text.pooled, "time_ids": text.time_ids}
    x_t = x_t.contiguous(memory_format=torch.channels_last)
    outputs = unet(
        x_t,
        t,
        encoder_hidden_states=text.embeds,
        added_cond_kwargs=added_cond,
        return_dict=False,
    )
    return outputs[0].float()


def build_pipeline(
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    text_encoders: TextEncoders,
    tokenizer: PreTrainedTokenizerBase,
    order: int = 2,
) -> StableDiffusionXLPipeline:
    """Build the diffusers pipeline from networks, without progress bars.

    Args:
        unet: the base model or its student.
        vae: the autoencoder.
        text_encoders: the text encoders.
        tokenizer: the tokenizer of both.
        order: order of the solver; 2, or 1 for a few-step student.
    """
    pipe = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoders.first,
        text_encoder_2=text_encoders.second,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=build_scheduler(order),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
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
    """Generate one image per prompt, each from its own seed on the CPU.

    Args:
        pipe: the pipeline.
        prompts: N prompts.
        seeds: N seeds.
        steps: number of sampling steps.
        guidance: classifier-free guidance scale; 1 disables it.
        batch: images per call of the pipeline.

    Returns:
        (N, 3, H, W) in [0, 1] on the CPU.

    Raises:
        NonFiniteError: an image has NaN.
    """
    images = []
    for start in range(0, len(prompts), batch):
        rows = slice(start, start + batch)
        result = pipe(
            prompt=list(prompts[rows]),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[rows]],
            num_inference_steps=steps,
            output_type="pt",
            **_guidance_options(pipe, guidance, len(prompts[rows])),
        )
        images.append(result.images.float().cpu())
    generated = torch.cat(images)
    if not bool(generated.isfinite().all()):
        raise NonFiniteError(
            "the miniature gave NaN or infinity instead of images; train the part again, or use "
            "other weights."
        )
    return generated


def _guidance_options(pipe: Any, guidance: float, count: int) -> dict[str, Any]:
    """Return a pipeline's arguments for guidance; for FLUX also sizes without a useful default.

    Args:
        pipe: the pipeline.
        guidance: classifier-free guidance scale.
        count: number of prompts.
    """
    if not hasattr(pipe, "transformer"):
        return {"guidance_scale": guidance}
    side = pipe.vae.config.sample_size
    options = {
        "true_cfg_scale": guidance,
        "height": side,
        "width": side,
        "max_sequence_length": pipe.tokenizer_2.model_max_length,
    }
    return options | ({"negative_prompt": [""] * count} if guidance > 1 else {})


def save_folder(model: Any, folder: Path, in_8_bits: bool = False) -> None:
    """Save a bfloat16 copy of a model with shards small enough for a git repository.

    git compresses bfloat16 by a third, and float16 hardly at all.

    Args:
        model: of diffusers or transformers.
        folder: where to save it.
        in_8_bits: store matrices in float8, which halves the size; `from_pretrained` loads them in
            the dtype that it is asked for.
    """
    copy = deepcopy(model).to(torch.bfloat16)
    if in_8_bits:
        for parameter in copy.parameters():
            if parameter.dim() > 1:
                parameter.data = parameter.data.to(torch.float8_e4m3fn)
    if isinstance(copy, ModelMixin):
        # Otherwise the config would store the local folder from which the model was loaded.
        copy.register_to_config(_name_or_path="")
    # The index of an earlier save with several shards would be read instead of a single file.
    for index in folder.glob("*.index.json"):
        index.unlink()
    copy.save_pretrained(folder, max_shard_size=SHARD_SIZE)
