"""Tiny random pipelines of every base in which PuLID for FLUX acts, and a short run of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import nn
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from openpulid.methods.pulid.encoders import IDFormer
from openpulid.methods.pulid.flux import PuLIDFlux
from tests.support import tiny_flux

HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}
TEXT_LENGTHS = (7, 5)
"""Tokens of the prompts and of the negative prompts; Z-Image's have their own lengths."""


@dataclass(frozen=True)
class Base:
    """A base model in miniature.

    Attributes:
        create: a pipeline without text encoder.
        text: creates the prompt arguments of n images.
        guide: options that guide with the negative prompt.
        unguided: options without guidance.
        text_width: of the prompt embeddings.
        num_layers: of an adapter with the default intervals.
    """

    create: Callable[[], Any]
    text: Callable[[int, str, torch.Generator], dict[str, Any]]
    guide: dict[str, Any]
    unguided: dict[str, Any]
    num_layers: int


def vae(**options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8), in_channels=3, out_channels=3, latent_channels=4,
        norm_num_groups=4, sample_size=32, shift_factor=0.1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=1.0, use_quant_conv=False, use_post_quant_conv=False, **options,
    )  # fmt: skip


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


def chroma_transformer(**sizes: int) -> ChromaTransformer2DModel:
    defaults = {"in_channels": 16, "num_layers": 3, "num_single_layers": 5}
    return ChromaTransformer2DModel(
        **{**defaults, **sizes}, **HEADS, joint_attention_dim=24, axes_dims_rope=(4, 6, 6),
        approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1,
    )  # fmt: skip


def chroma() -> ChromaPipeline:
    t5 = T5Config(vocab_size=20, d_model=24, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return ChromaPipeline(
        scheduler(), vae(), T5EncoderModel(t5).eval(), tiny_flux.tokenizer(), chroma_transformer()
    )


def flux2_vae() -> AutoencoderKLFlux2:
    return AutoencoderKLFlux2(
        block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


def flux2_transformer(**sizes: int) -> Flux2Transformer2DModel:
    defaults = {"in_channels": 16, "num_layers": 3, "num_single_layers": 5}
    return Flux2Transformer2DModel(
        **{**defaults, **sizes}, **HEADS, joint_attention_dim=24, axes_dims_rope=(4, 4, 4, 4),
        timestep_guidance_channels=16, guidance_embeds=False,
    )  # fmt: skip


def flux2() -> Flux2KleinPipeline:
    return Flux2KleinPipeline(scheduler(), flux2_vae(), None, None, flux2_transformer())


def qwen_image() -> QwenImagePipeline:
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=5, **HEADS, joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    pipe = QwenImagePipeline(scheduler(), None, None, None, transformer)
    pipe.vae_scale_factor = 2  # its autoencoder is for video, and not used here
    return pipe


def z_image(**sizes: int) -> ZImagePipeline:
    defaults = {"dim": 32, "n_layers": 4, "n_heads": 2, "n_kv_heads": 2}
    transformer = ZImageTransformer2DModel(
        **{**defaults, **sizes}, in_channels=4, n_refiner_layers=1, cap_feat_dim=24,
        axes_dims=[4, 6, 6], axes_lens=[256, 32, 32],
    )  # fmt: skip
    for pad in (transformer.x_pad_token, transformer.cap_pad_token):
        nn.init.normal_(pad)
    return ZImagePipeline(scheduler(), vae(), None, None, transformer)


def _flux_text(count: int, prefix: str, generator: torch.Generator) -> dict[str, Any]:
    embeds = torch.randn(count, TEXT_LENGTHS[0], 24, generator=generator)
    pooled = torch.randn(count, 20, generator=generator)
    return {f"{prefix}prompt_embeds": embeds, f"{prefix}pooled_prompt_embeds": pooled}


def _chroma_text(count: int, prefix: str, generator: torch.Generator) -> dict[str, Any]:
    length = TEXT_LENGTHS[bool(prefix)]
    mask = torch.ones(count, length)
    mask[:, -2:] = 0  # padding
    return {
        f"{prefix}prompt_embeds": torch.randn(count, length, 24, generator=generator),
        f"{prefix}prompt_attention_mask": mask,
    }


def _flux2_text(count: int, prefix: str, generator: torch.Generator) -> dict[str, Any]:
    embeds = torch.randn(count, TEXT_LENGTHS[bool(prefix)], 24, generator=generator)
    return {f"{prefix}prompt_embeds": embeds}


def _qwen_text(count: int, prefix: str, generator: torch.Generator) -> dict[str, Any]:
    length = TEXT_LENGTHS[bool(prefix)]
    embeds = torch.randn(count, length, 24, generator=generator)
    return {f"{prefix}prompt_embeds": embeds, f"{prefix}prompt_embeds_mask": None}


def _z_image_text(count: int, prefix: str, generator: torch.Generator) -> dict[str, Any]:
    lengths = [TEXT_LENGTHS[bool(prefix)] + 30 * k for k in range(count)]  # padded to 32 and 64
    return {f"{prefix}prompt_embeds": [torch.randn(n, 24, generator=generator) for n in lengths]}


BASES = {
    "FLUX.1": Base(tiny_flux.tiny_pipe, _flux_text, {"true_cfg_scale": 3.0}, {}, num_layers=4),
    "Chroma": Base(
        chroma, _chroma_text, {"guidance_scale": 3.0}, {"guidance_scale": 1.0}, num_layers=4
    ),
    "FLUX.2": Base(
        flux2, _flux2_text, {"guidance_scale": 3.0}, {"guidance_scale": 1.0}, num_layers=4
    ),
    "Qwen-Image": Base(
        qwen_image, _qwen_text, {"true_cfg_scale": 3.0}, {"true_cfg_scale": 1.0}, num_layers=2
    ),
    "Z-Image": Base(
        z_image, _z_image_text, {"guidance_scale": 3.0}, {"guidance_scale": 0.0}, num_layers=2
    ),
}


def tiny_base(name: str) -> Any:
    """Create a pipeline; its blocks have a visible effect."""
    torch.manual_seed(0)
    pipe = BASES[name].create()
    pipe.transformer.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def z_image_with_text(**sizes: int) -> ZImagePipeline:
    """Create a pipeline of Z-Image that reads prompts."""
    torch.manual_seed(0)
    pipe = z_image(**sizes)
    config = Qwen3Config(
        vocab_size=20, hidden_size=24, intermediate_size=8, num_hidden_layers=2, head_dim=4,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    tokenizer = tiny_flux.tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    text_encoder = Qwen3Model(config).eval()
    pipe = ZImagePipeline(pipe.scheduler, pipe.vae, text_encoder, tokenizer, pipe.transformer)
    pipe.transformer.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def qwen_image_with_text() -> QwenImagePipeline:
    """Create a pipeline of Qwen-Image that reads prompts, without its template for them."""
    torch.manual_seed(0)
    transformer = qwen_image().transformer.eval()
    text: dict[str, Any] = {
        "vocab_size": 20, "hidden_size": 24, "intermediate_size": 8, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2]},
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2}
    config = Qwen2_5_VLConfig(text_config=text, vision_config={**vision, "out_hidden_size": 24})
    autoencoder = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.5, 1.0, 2.0],
    )  # fmt: skip
    text_encoder = Qwen2_5_VLForConditionalGeneration(config).eval()
    pipe = QwenImagePipeline(
        scheduler(), autoencoder, text_encoder, tiny_flux.tokenizer(), transformer
    )
    pipe.prompt_template_encode = "{}"
    pipe.prompt_template_encode_start_idx = 0
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_base(
    name: str, pipe: Any, negative: bool = False, count: int = 1, steps: int = 4, **options: Any
) -> np.ndarray:
    """Generate latents; image k is the same in every batch."""
    base = BASES[name]
    generator = torch.Generator().manual_seed(1)
    text = base.text(count, "", generator)
    negative_text = base.text(count, "negative_", generator)
    options = {**(base.guide if negative else base.unguided), **options}
    if negative:
        text |= negative_text
    generators = [torch.Generator().manual_seed(k) for k in range(count)]
    size = {"height": 16, "width": 24}
    result = pipe(
        **text, **size, generator=generators, num_inference_steps=steps, output_type="latent",
        **options,
    )  # fmt: skip
    return result.images.float().numpy()


def fresh_adapter(pipe: Any, seed: int = 0) -> PuLIDFlux:
    """Create a random adapter with a visible effect, attached to a pipeline."""
    torch.manual_seed(seed)
    encoder = IDFormer(**tiny_flux.SMALL, output_dim=16, hidden_dim=16)
    adapter = PuLIDFlux.for_transformer(pipe.transformer, encoder, dim_head=8, heads=2).eval()
    for layer in adapter.layers:
        nn.init.normal_(layer.to_out.weight, std=0.3)
    adapter.attach(pipe)
    return adapter


def flux2_with_text(is_distilled: bool = True, **sizes: int) -> Flux2KleinPipeline:
    """Create a pipeline of FLUX.2 klein that reads prompts, with a real batch norm."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=28, head_dim=4,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    tokenizer = tiny_flux.tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    autoencoder = flux2_vae()
    nn.init.normal_(autoencoder.bn.running_mean, std=0.5)
    nn.init.uniform_(autoencoder.bn.running_var, 0.5, 2.0)
    pipe = Flux2KleinPipeline(
        scheduler(),
        autoencoder,
        Qwen3ForCausalLM(config).eval(),
        tokenizer,
        flux2_transformer(**sizes).eval(),
        is_distilled,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
