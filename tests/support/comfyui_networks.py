"""Tiny models of ComfyUI's own classes, and what PuLID adds to their blocks by forward hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from openpulid.methods.pulid.encoders import IDFormer
from openpulid.methods.pulid.flux import PuLIDFlux, precompute_projections
from openpulid.methods.pulid.flux_attention import (
    FluxCall,
    FluxIdentity,
    PerceiverCrossAttention,
)
from openpulid.methods.pulid.masks import Person, stack_masks
from openpulid.methods.transformer_kinds import BlockKey, select_block_keys
from tests.support import tiny_flux
from tests.support.comfyui import initialize, wrap

TEXT_WIDTH = 24
NUM_BLOCKS = 4
POOLED_WIDTH = 16


def deep_unet() -> Any:
    """Return a random diffusers U-Net with two and three transformer blocks per attention."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=32,
        attention_head_dim=(1, 2, 2),
        transformer_layers_per_block=(1, 2, 3),
        cross_attention_dim=64,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=6 * 256 + POOLED_WIDTH,
    )
    return unet.eval()


def deep_unet_patcher(unet: Any) -> Any:
    """Return the patcher of a `deep_unet` in ComfyUI's own classes."""
    import comfy.model_base
    import comfy.supported_models
    import comfy.utils

    sizes = {
        "image_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "num_res_blocks": [1, 1, 1],
        "channel_mult": [1, 2, 2],
        "transformer_depth": [0, 2, 3],
        "transformer_depth_middle": 3,
        "transformer_depth_output": [0, 0, 2, 2, 3, 3],
        "context_dim": 64,
        "adm_in_channels": 6 * 256 + POOLED_WIDTH,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": True,
        "num_classes": "sequential",
        "legacy": False,
        "use_temporal_attention": False,
        "use_temporal_resblock": False,
        "dtype": torch.float32,
    }
    config = comfy.supported_models.SDXL(sizes)
    config.unet_config["num_head_channels"] = 32  # the constructor sets another value
    model = comfy.model_base.SDXL(config)
    names = comfy.utils.unet_to_diffusers(config.unet_config)
    state = {names[name]: value for name, value in unet.state_dict().items()}
    model.diffusion_model.load_state_dict(state, strict=True)
    return wrap(model)


def qwen_patcher() -> Any:
    """Return the patcher of a random Qwen-Image transformer."""
    import comfy.model_base
    import comfy.supported_models

    sizes = {
        "image_model": "qwen_image",
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": NUM_BLOCKS,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT_WIDTH,
        "axes_dims_rope": (4, 6, 6),
        "dtype": torch.float32,
    }
    model = comfy.model_base.QwenImage(comfy.supported_models.QwenImage(sizes))
    initialize(model)
    return wrap(model)


def lumina_patcher(is_z_image: bool = True) -> Any:
    """Return the patcher of a random Z-Image transformer, or of a Lumina 2 one.

    Z-Image's image and text tokens are padded to a multiple of 8.
    """
    import comfy.model_base
    import comfy.supported_models

    sizes: dict[str, Any] = {
        "image_model": "lumina2",
        "patch_size": 2,
        "in_channels": 16,
        "dim": 256,  # the smallest one: Z-Image's modulation has this width
        "n_layers": NUM_BLOCKS,
        "n_refiner_layers": 1,
        "n_heads": 16,
        "n_kv_heads": 16,
        "multiple_of": 32,
        "ffn_dim_multiplier": 0.25,
        "qk_norm": True,
        "cap_feat_dim": TEXT_WIDTH,
        "axes_dims": [4, 6, 6],
        "axes_lens": [64, 64, 64],
        "dtype": torch.float32,
    }
    if is_z_image:
        sizes.update(z_image_modulation=True, pad_tokens_multiple=8, time_scale=1000.0)
    model = comfy.model_base.Lumina2(comfy.supported_models.Lumina2(sizes))
    initialize(model)
    return wrap(model)


def create_adapter(num_blocks: int, width: int, interval: int) -> PuLIDFlux:
    """Create a random adapter for a transformer without single blocks."""
    torch.manual_seed(1)
    encoder = IDFormer(**tiny_flux.SMALL, output_dim=16, hidden_dim=16)
    layers = nn.ModuleList()
    for _ in select_block_keys(num_blocks, 0, interval):
        layer = PerceiverCrossAttention(width, dim_head=8, heads=2, kv_dim=16)
        nn.init.normal_(layer.to_out.weight, std=0.5)
        layers.append(layer)
    return PuLIDFlux(encoder, layers, double_interval=interval).eval()


@torch.no_grad()
def create_identity(
    adapter: PuLIDFlux, blocks: Sequence[BlockKey], people: Sequence[Person], scale: float
) -> FluxIdentity:
    """Prepare people for the package's own hooks."""
    layers = dict(zip(blocks, adapter.layers, strict=True))
    first, mask = people[0]
    negative = adapter.unconditional(first.id_cond, first.hidden)[:, None]
    return FluxIdentity(
        layers,
        precompute_projections(layers, adapter.encode_people([list(people)])),
        lambda: precompute_projections(layers, negative),
        scale,
        None if len(people) == 1 and mask is None else stack_masks([list(people)]),
    )


def describe_call(identity: FluxIdentity, is_negative: bool, rows: int, columns: int) -> FluxCall:
    """Return the call of a transformer whose rows are all of one prompt."""
    regions = identity.resize_masks((rows, columns), 1)
    return FluxCall(True, identity.keys_values(is_negative), regions=regions)


@contextmanager
def changed_outputs(
    modules: Mapping[BlockKey, nn.Module], change: Callable[[BlockKey, Any], Any]
) -> Iterator[None]:
    """Change the outputs of modules by forward hooks while the context is open."""

    def hook(key: BlockKey) -> Any:
        return lambda module, args, output: change(key, output)

    with ExitStack() as hooks:
        for key, module in modules.items():
            hooks.callback(module.register_forward_hook(hook(key)).remove)
        yield


def add_after(
    image: Tensor, first: int, num_tokens: int, add: Callable[[Tensor], Tensor]
) -> Tensor:
    """Change some tokens of (rows, tokens, width), and keep the others."""
    end = first + num_tokens
    return torch.cat([image[:, :first], add(image[:, first:end]), image[:, end:]], dim=1)
