"""A tiny random FluxPipeline, an adapter with a visible effect, and a short run."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxPipeline,
    FluxTransformer2DModel,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from openpulid.methods.pulid.encoders import IDFormer
from openpulid.methods.pulid.flux import PuLIDFlux

SMALL = {
    "dim": 16,
    "depth": 5,
    "dim_head": 8,
    "heads": 2,
    "num_queries": 6,
    "ff_mult": 1,
    "width": 12,
    "vit_dim": 8,
}
WORDS = ["<unk>", "</s>", "portrait", "of", "a", "person"]


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=12,
    )


def tiny_transformer(**sizes: int) -> FluxTransformer2DModel:
    defaults = {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 3,
        "num_single_layers": 5,
        "joint_attention_dim": 24,
    }
    heads = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 6, 6)}
    return FluxTransformer2DModel(
        **{**defaults, **heads, "pooled_projection_dim": 20, "guidance_embeds": True, **sizes}
    )


def tiny_pipe(**sizes: int) -> FluxPipeline:
    """Create a pipeline; `sizes` override those of its transformer."""
    torch.manual_seed(0)
    transformer = tiny_transformer(**sizes)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), in_channels=3, out_channels=3, latent_channels=4,
        norm_num_groups=4, sample_size=32, shift_factor=0.1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=1.0, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    clip = CLIPTextConfig(
        vocab_size=20, hidden_size=20, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=12, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    t5 = T5Config(vocab_size=20, d_model=24, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    pipe = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae,
        CLIPTextModel(clip).eval(), tokenizer(), T5EncoderModel(t5).eval(), tokenizer(),
        transformer.eval(),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_controlnet(seed: int = 1, double: int = 2, single: int = 2, **config: Any) -> Any:
    """Create a ControlNet with a visible effect, for the tiny transformer."""
    torch.manual_seed(seed)
    sizes = {"in_channels": 16, "joint_attention_dim": 24, "pooled_projection_dim": 20}
    heads = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 6, 6)}
    options = {"guidance_embeds": True, **sizes, **heads, **config}
    net = FluxControlNetModel(num_layers=double, num_single_layers=single, **options)
    for layer in (*net.controlnet_blocks, *net.controlnet_single_blocks, net.controlnet_x_embedder):
        nn.init.normal_(layer.weight, std=0.3)
    return net.eval()


def run(
    pipe: Any, negative: bool = False, count: int = 1, steps: int = 4, **options: Any
) -> np.ndarray:
    generator = torch.Generator().manual_seed(1)
    text = {}
    for name in ("", "negative_"):
        text[f"{name}prompt_embeds"] = torch.randn(count, 7, 24, generator=generator)
        text[f"{name}pooled_prompt_embeds"] = torch.randn(count, 20, generator=generator)
    dtype = (
        pipe.transformer.dtype if pipe.transformer.dtype.itemsize > 1 else torch.float32
    )  # eight bits are only stored
    text = {
        name: value.to(dtype)
        for name, value in text.items()
        if negative or not name.startswith("negative")
    }
    if negative:
        options["true_cfg_scale"] = 3.0
    generators = [torch.Generator().manual_seed(k) for k in range(count)]
    defaults = {
        "height": 32,
        "width": 32,
        "generator": generators,
        "num_inference_steps": steps,
        "output_type": "latent",
    }
    return pipe(**{**text, **defaults, **options}).images.float().numpy()


def fresh(pipe: Any, seed: int = 0) -> PuLIDFlux:
    torch.manual_seed(seed)
    former = IDFormer(**SMALL, output_dim=16, hidden_dim=16)
    adapter = PuLIDFlux.for_transformer(pipe.transformer, former, dim_head=8, heads=2).eval()
    for layer in adapter.pulid_ca:
        nn.init.normal_(layer.to_out.weight, std=0.3)
    adapter.attach(pipe)
    return adapter
