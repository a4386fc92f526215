"""The node pack inside a checkout of ComfyUI, and models of its own classes."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import os
import sys
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

PACK = Path(__file__).parents[2] / "comfyui"
PACK_NAME = "openpulid_nodes"
NO_COMFYUI = "COMFYUI_PATH is not set; set it to a checkout of ComfyUI to test the nodes inside it."

requires_comfyui = pytest.mark.skipif(not os.environ.get("COMFYUI_PATH"), reason=NO_COMFYUI)


@cache
def import_comfyui() -> None:
    """Make ComfyUI's modules importable, for the CPU.

    Its folder comes last in the path, because it has a folder `tests` of its own.
    """
    sys.path.append(os.environ["COMFYUI_PATH"])
    importlib.import_module("comfy.cli_args").args.cpu = True


def import_pack(name: str) -> ModuleType:
    """Import a module of the node pack, as ComfyUI does: from its path, whatever its folder."""
    if PACK_NAME not in sys.modules:
        package = ModuleType(PACK_NAME)
        package.__path__ = [str(PACK)]
        sys.modules[PACK_NAME] = package
    return importlib.import_module(f"{PACK_NAME}.{name}")


def wrap(model: Any) -> Any:
    """Return ComfyUI's patcher of a model."""
    from comfy import model_management, model_patcher

    return model_patcher.ModelPatcher(
        model,
        load_device=model_management.get_torch_device(),
        offload_device=model_management.unet_offload_device(),
    )


def initialize(model: torch.nn.Module, seed: int = 0) -> None:
    """Fill all parameters: ComfyUI's layers are created empty."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim < 2:
            values = 0.1 * values + (0.0 if name.endswith("bias") else 1.0)
        else:
            values *= parameter[0].numel() ** -0.5
        parameter.data = values.to(parameter.dtype)


class Multiple(float):
    """A multiple of the base width that is not an integer, with integer products."""

    def __rmul__(self, other: Any) -> Any:
        return round(float(self) * other)

    __mul__ = __rmul__


def miniature_sizes() -> dict[str, Any]:
    """Return the sizes of the miniature's U-Net, as ComfyUI names them."""
    return {
        "image_size": 12,
        "in_channels": 20,
        "out_channels": 20,
        "model_channels": 64,
        "num_res_blocks": [1] * 3,
        "channel_mult": [1, 2, Multiple(2.5)],
        "transformer_depth": [1] * 3,
        "transformer_depth_middle": 1,
        "transformer_depth_output": [1] * 6,
        "context_dim": 192,
        "adm_in_channels": 320,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": True,
        "num_classes": "sequential",
        "legacy": False,
        "use_temporal_attention": False,
        "use_temporal_resblock": False,
        "dtype": torch.float32,
    }


def load_miniature(pipe: Any) -> Any:
    """Return the patcher of the miniature's U-Net in ComfyUI's own classes.

    Args:
        pipe: the miniature's diffusers pipeline.
    """
    import comfy.latent_formats
    import comfy.model_base
    import comfy.supported_models
    import comfy.utils
    from comfy.ldm.modules.diffusionmodules.openaimodel import Timestep

    config = comfy.supported_models.SDXL(miniature_sizes())
    config.unet_config["num_head_channels"] = 32
    config.sampling_settings = {"zsnr": True}

    class MiniatureLatents(comfy.latent_formats.LatentFormat):
        latent_channels = 20
        scale_factor = pipe.vae.config.scaling_factor

    config.latent_format = MiniatureLatents()
    model = comfy.model_base.SDXL(config, model_type=comfy.model_base.ModelType.V_PREDICTION)
    use_eight_groups(model)
    model.embedder = Timestep(32)
    names = comfy.utils.unet_to_diffusers(config.unet_config)
    state = pipe.unet.state_dict()
    missing = model.diffusion_model.load_state_dict(
        {names[name]: value for name, value in state.items()}, strict=True
    )
    assert not missing.missing_keys and not missing.unexpected_keys
    return wrap(model)


def controlnet(network: Any) -> Any:
    """Return a diffusers ControlNet of the miniature in ComfyUI's own classes."""
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.model_management
    import comfy.utils

    sizes = {**miniature_sizes(), "transformer_depth_middle": -1, "num_head_channels": 32}
    names = comfy.utils.unet_to_diffusers(sizes)
    del sizes["out_channels"]
    model = comfy.cldm.cldm.ControlNet(hint_channels=3, **sizes)
    use_eight_groups(model)

    # the layers that read the hint are narrower than ComfyUI's
    embedding = network.controlnet_cond_embedding
    layers = [embedding.conv_in, *embedding.blocks, embedding.conv_out]
    model.input_hint_block = type(model.input_hint_block)(
        *(part for layer in layers for part in (copy.deepcopy(layer), torch.nn.SiLU()))
    )[:-1]
    own = model.state_dict()
    state = {name: value for name, value in own.items() if name.startswith("input_hint_block")}
    for name, value in network.state_dict().items():
        kind, _, rest = name.partition(".")
        if kind == "controlnet_mid_block":
            state[f"middle_block_out.0.{rest}"] = value
        elif kind == "controlnet_down_blocks":
            index, _, parameter = rest.partition(".")
            state[f"zero_convs.{index}.0.{parameter}"] = value
        elif kind != "controlnet_cond_embedding":
            state[names[name]] = value
    model.load_state_dict(state, strict=True)
    return comfy.controlnet.ControlNet(model, load_device=comfy.model_management.get_torch_device())


def use_eight_groups(model: torch.nn.Module) -> None:
    """Set the groups of the miniature's normalization layers; ComfyUI has 32 everywhere."""
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.num_groups = 8


def read_image(path: str) -> torch.Tensor:
    """Read an image as ComfyUI does, (1, H, W, 3) in [0, 1]."""
    pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB")))
    return pixels[None].float() / 255


def sdxl_conditioning(text: torch.Tensor, pooled: torch.Tensor, side: int) -> Any:
    """Return ComfyUI's conditioning for a square image of this side in pixels."""
    return [[text, {"pooled_output": pooled, "width": side, "height": side}]]


def sample(
    patcher: Any,
    positive: Any,
    negative: Any,
    latent: torch.Tensor,
    seed: int = 7,
    steps: int = 2,
    cfg: float = 3.0,
    sampler: str = "euler",
    scheduler: str = "normal",
) -> torch.Tensor:
    """Sample latents with ComfyUI."""
    import comfy.sample

    noise = comfy.sample.prepare_noise(latent, seed)
    return comfy.sample.sample(
        patcher, noise, steps, cfg, sampler, scheduler, positive, negative, latent,
        denoise=1.0, seed=seed, disable_pbar=True,
    )  # fmt: skip


def flux_patcher(transformer: Any) -> Any:
    """Return the patcher of a tiny diffusers transformer of FLUX in ComfyUI's own classes."""
    import comfy.model_base
    import comfy.model_detection
    import comfy.supported_models

    model = comfy.model_base.Flux(
        comfy.supported_models.Flux({"image_model": "flux", **transformer_sizes(transformer)})
    )
    # the conversion writes into the tensors
    state = {name: value.clone() for name, value in transformer.state_dict().items()}
    converted = comfy.model_detection.convert_diffusers_mmdit(state, "")
    model.diffusion_model.load_state_dict(converted, strict=True)
    return wrap(model)


def chroma_patcher(transformer: Any) -> Any:
    """Return the patcher of a random Chroma transformer with the sizes of a FLUX one."""
    import comfy.model_base
    import comfy.supported_models
    from comfy.ldm.chroma.model import ChromaParams

    names = {"dtype", *(field.name for field in fields(ChromaParams))}
    sizes = transformer_sizes(transformer)
    sizes = {name: value for name, value in sizes.items() if name in names}
    channels = transformer.config.in_channels  # here of a token
    sizes.update(in_channels=channels, out_channels=channels)
    approximator = {"in_dim": 64, "out_dim": sizes["hidden_size"], "hidden_dim": 16, "n_layers": 1}
    config = comfy.supported_models.Chroma({"image_model": "chroma", **sizes, **approximator})
    model = comfy.model_base.Chroma(config)
    initialize(model)
    return wrap(model)


def transformer_sizes(transformer: Any) -> dict[str, Any]:
    """Return ComfyUI's sizes of a tiny diffusers transformer."""
    from comfy.ldm.flux.model import FluxParams

    config = transformer.config
    sizes = {
        "in_channels": config.in_channels // 4,
        "out_channels": config.in_channels // 4,
        "patch_size": 2,
        "vec_in_dim": config.pooled_projection_dim,
        "context_in_dim": config.joint_attention_dim,
        "hidden_size": transformer.inner_dim,
        "num_heads": config.num_attention_heads,
        "axes_dim": list(config.axes_dims_rope),
        "mlp_ratio": 4.0,
        "depth": config.num_layers,
        "depth_single_blocks": config.num_single_layers,
        "theta": 10000,
        "qkv_bias": True,
        "guidance_embed": config.guidance_embeds,
        "dtype": torch.float32,
    }
    if "txt_ids_dims" in {field.name for field in fields(FluxParams)}:
        sizes["txt_ids_dims"] = []  # since 12/2025
    return sizes


def call_network(patcher: Any, layout: list[int], sigma: float, *args: Any, **kwargs: Any) -> Any:
    """Call a patched network once, as ComfyUI's sampler does.

    Args:
        patcher: of the model.
        layout: `cond_or_uncond` of the rows.
        sigma: noise level.
        args: of the network.
        kwargs: of the network.
    """
    options = {
        **patcher.model_options["transformer_options"],
        "wrappers": patcher.wrappers,
        "cond_or_uncond": layout,
        "sigmas": torch.tensor([sigma]),
    }
    with torch.no_grad():
        return patcher.model.diffusion_model(*args, transformer_options=options, **kwargs)
