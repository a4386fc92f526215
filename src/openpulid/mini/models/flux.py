"""The miniature's FLUX pipeline: FLUX.1's architecture at 96 pixels, with a small T5.

diffusers' own `FluxPipeline` reads prompts and generates images with these networks.
"""

from __future__ import annotations

from collections.abc import Collection
from copy import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch import Tensor, nn
from transformers import CLIPTextModel, PreTrainedTokenizerBase, T5Config, T5EncoderModel

from openpulid.mini.data.captions import token_ids
from openpulid.mini.models.pipeline import save_folder
from openpulid.training.pulid import FluxText

PACKING = 4
"""Latents of one token: two by two."""
LATENT_PATCHES = {36: 1, 144: 2}
"""Tokens of a 96-pixel image -> `latent_patch` of the autoencoder, see `PatchAutoencoderKL`."""
TEXT_TOKENS = 32
"""Tokens of a prompt that T5 reads. 5% of the captions are longer; CLIP reads them whole."""


def build_transformer(
    channels: int,
    text_width: int,
    pooled: int,
    double: int = 2,
    single: int = 6,
    heads: int = 8,
    head_width: int = 32,
) -> FluxTransformer2DModel:
    """Build FLUX.1's transformer with random weights; it predicts zero.

    Modulation and output start at zero, so that every block begins as the identity (adaLN-zero,
    arXiv 2212.09748). diffusers starts them at random.

    Args:
        channels: latent channels.
        text_width: width of T5's tokens.
        pooled: width of CLIP's pooled embedding.
        double: number of double blocks.
        single: number of single blocks.
        heads: heads of the attention.
        head_width: width of a head, a multiple of 16.
    """
    index_width = head_width // 4
    side_width = (head_width - index_width) // 2
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=PACKING * channels,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=head_width,
        num_attention_heads=heads,
        joint_attention_dim=text_width,
        pooled_projection_dim=pooled,
        guidance_embeds=False,
        axes_dims_rope=(index_width, side_width, side_width),
    )
    zero_layers: list[Any] = [transformer.norm_out.linear, transformer.proj_out]
    for block in transformer.transformer_blocks:
        zero_layers += [block.norm1.linear, block.norm1_context.linear]
    zero_layers += [block.norm.linear for block in transformer.single_transformer_blocks]
    for layer in zero_layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return transformer


def build_t5(
    tokenizer: PreTrainedTokenizerBase, width: int = 192, layers: int = 2, heads: int = 6
) -> T5EncoderModel:
    """Build T5's encoder with random weights for the miniature's vocabulary.

    Args:
        tokenizer: the miniature's.
        width: width of the tokens.
        layers: number of layers.
        heads: heads of the attention.
    """
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=width // heads,
        d_ff=2 * width,
        num_layers=layers,
        num_heads=heads,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return T5EncoderModel(config)


def shorten(tokens: Tensor, t5: T5EncoderModel) -> Tensor:
    """Cut prompts (B, L) to what T5 reads, with an end token, as its tokenizer does."""
    short = tokens[:, :TEXT_TOKENS].clone()
    last = short[:, -1]
    last[last != t5.config.pad_token_id] = t5.config.eos_token_id
    return short


def build_flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Build FLUX's scheduler without a shift of the noise levels: an image has few tokens."""
    return FlowMatchEulerDiscreteScheduler(shift=1.0)


class FluxTextEncoders(nn.Module):
    """CLIP and T5, frozen; they compute the same conditioning as the diffusers pipeline.

    Args:
        clip: returns the pooled embedding.
        t5: returns the token embeddings.
        tokenizer: of both.
    """

    empty_tokens: Tensor

    def __init__(
        self, clip: CLIPTextModel, t5: T5EncoderModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        super().__init__()
        self.clip = clip.eval()
        self.t5 = t5.eval()
        self.requires_grad_(False)
        self.register_buffer("empty_tokens", token_ids(tokenizer, [""]), persistent=False)

    @torch.no_grad()
    def forward(self, tokens: Tensor, keep: Tensor | None = None) -> FluxText:
        """Encode prompts.

        Args:
            tokens: (B, L).
            keep: (B,) bool; the prompt is empty (unconditional) where it is false.
        """
        if keep is not None:
            tokens = torch.where(keep[:, None], tokens, self.empty_tokens.to(tokens.device))
        embeds = self.t5(shorten(tokens, self.t5))[0]
        return FluxText(embeds.float(), self.clip(tokens).pooler_output.float())


def build_flux_pipeline(
    transformer: FluxTransformer2DModel,
    vae: AutoencoderKL,
    text_encoders: FluxTextEncoders,
    tokenizer: PreTrainedTokenizerBase,
) -> FluxPipeline:
    """Build the diffusers pipeline from networks, without progress bars."""
    tokenizer_2 = copy(tokenizer)
    tokenizer_2.model_max_length = TEXT_TOKENS
    pipe = FluxPipeline(
        scheduler=build_flow_scheduler(),
        vae=vae,
        text_encoder=text_encoders.clip,
        tokenizer=tokenizer,
        text_encoder_2=text_encoders.t5,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_flux_pipeline(pipe: FluxPipeline, folder: Path, without: Collection[str] = ()) -> None:
    """Save a pipeline for diffusers' `from_pretrained`, its transformer in 8 bits.

    The other networks are in bfloat16. An autoencoder with the layout of SDXL's miniature is not
    saved: it is that of its pipeline.

    Args:
        pipe: the pipeline.
        folder: where to save it.
        without: networks that the folder has already.
    """
    for name, component in pipe.components.items():
        if name in without or (name == "vae" and component.config.latent_patch == 1):
            continue
        if isinstance(component, nn.Module):
            save_folder(component, folder / name, in_8_bits=name == "transformer")
        elif component is not None:
            component.save_pretrained(folder / name)
    pipe.save_config(folder)
