"""Base models in one file: a whole SDXL checkpoint, or a FLUX transformer alone.

diffusers converts the names of the tensors. What it would drop without a word is checked before, or
read after loading.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import Tensor, nn

from openpulid.errors import WeightsError
from openpulid.io.checkpoint_kinds import (
    SDXL,
    UNET,
    Header,
    describe_kind,
    find_kind,
    find_quantization,
    read_header,
)
from openpulid.io.hub import WEIGHTS, locate
from openpulid.io.networks import (
    SCALE_SUFFIXES,
    check_loaded,
    describe_load_errors,
    read_config,
)
from openpulid.pipelines.model_set import FAMILIES, Family
from openpulid.pipelines.presets import PRESETS
from openpulid.pipelines.samplers import Prediction

CHANNELS = {
    5: "depth-to-image",
    8: "image editing (InstructPix2Pix)",
    9: "inpainting",
    128: "control images (FLUX.1 Depth or Canny)",
    384: "inpainting (FLUX.1 Fill)",
}
"""Input channels of base models that read more than noisy latents, and what these are for."""

FLOAT8_FORMATS = ("float8_e4m3fn", "float8_e5m2")

_SDXL_NAMES = re.compile(
    r"model\.diffusion_model\.|first_stage_model\.|conditioner\.|cond_stage_model\."
)
_IGNORED_NAMES = re.compile(
    r"v_pred$|ztsnr$|model_ema\.|denoiser\.|betas$|alphas_|sqrt_|log_|posterior_|lvlb_|logvar$"
    r"|scale_factor$"
)
"""Marks that `Prediction.read` obeys, and buffers of the program that trained the base."""


def check_channels(path: Path, channels: int, expected: int) -> None:
    """Check that a base model reads noisy latents alone.

    Raises:
        WeightsError: it reads further channels, such as a mask.
    """
    if channels != expected:
        purpose = CHANNELS.get(channels, "another purpose")
        raise WeightsError(
            f"{path} is a base model for {purpose}: it reads {channels} channels instead of "
            f"{expected}; use a text-to-image model."
        )


def load_sdxl_file(path: Path, dtype: torch.dtype, **options: Any) -> Any:
    """Load an SDXL pipeline from one file; an installed pipeline describes its networks.

    Args:
        path: safetensors, or a PyTorch file.
        dtype: of the networks.
        options: further arguments of `from_single_file`.

    Raises:
        WeightsError: the file is another kind of checkpoint, or no SDXL pipeline is installed.
    """
    from diffusers import StableDiffusionXLPipeline

    header = check_sdxl_file(path)
    names = header.shapes
    prediction = Prediction.read(path, header)
    config = find_sdxl_config(path)
    with describe_load_errors(path):
        pipe = StableDiffusionXLPipeline.from_single_file(
            path, config=str(config), torch_dtype=dtype, local_files_only=True, **options
        )
    for network in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        check_loaded(path, find_empty(network), ())
    unused = [name for name in names if not _SDXL_NAMES.match(name)]
    unused = [name for name in unused if not _IGNORED_NAMES.match(name)]
    num_unet = sum(name.startswith(UNET) for name in names)
    if "unet" not in options and num_unet > len(pipe.unet.state_dict()):
        unused.append(f"{num_unet - len(pipe.unet.state_dict())} of {UNET}")
    check_loaded(path, (), unused)
    pipe.scheduler = prediction.apply(pipe.scheduler)
    return pipe


def check_sdxl_file(path: Path) -> Header:
    """Check the header of a file that is to be loaded as an SDXL pipeline, and return it.

    Raises:
        WeightsError: the file is another kind of checkpoint, or no SDXL pipeline is installed.
    """
    if path.suffix == ".gguf":
        raise WeightsError(f"{path}: GGUF files are only supported for FLUX presets.")
    header = read_header(path)
    names = header.shapes
    if find_kind(names) is not SDXL:
        raise WeightsError(f"{path} is no SDXL checkpoint; {describe_kind(names)}.")
    _check_quantization(path, header)
    if any(name.endswith(SCALE_SUFFIXES) for name in names):
        raise WeightsError(
            f"{path} is stored in scaled float8, which is only supported for FLUX; "
            "use a file in float16, bfloat16 or plain float8."
        )
    first = names.get(f"{UNET}input_blocks.0.0.weight")
    if first is not None:
        config = read_config(find_sdxl_config(path) / "unet")
        check_channels(path, first[1], config.get("in_channels", 4))
    if not any(name.startswith("first_stage_model.") for name in names):
        raise WeightsError(f"{path} has no autoencoder; use a file with all networks of SDXL.")
    return header


def find_sdxl_config(file: Path) -> Path:
    """Find an installed SDXL pipeline that describes the networks of a single file.

    A single file has weights, but neither the sizes of the networks nor their vocabulary.
    diffusers would download both from the hub.

    Raises:
        WeightsError: none is installed.
    """
    presets = [preset() for preset in PRESETS.values()]
    pipelines = [preset.models.pipeline for preset in presets if preset.models.family == "sdxl"]
    for name in ["sdxl-base", *(name for name in pipelines if isinstance(name, str))]:
        with suppress(WeightsError):
            return locate(name, require_weights=False)
    raise WeightsError(
        f"{file} is a single file and needs the configuration of an SDXL pipeline, and none is "
        f"installed; `pulid weights get sdxl-base` downloads one{WEIGHTS['sdxl-base'].size}."
    )


def load_transformer_file(path: Path, pipeline: Path, dtype: torch.dtype, family: Family) -> Any:
    """Load a transformer of FLUX or a relative from one file.

    Args:
        path: safetensors with diffusers' or the original names, or GGUF.
        pipeline: a pipeline whose transformer has the same sizes.
        dtype: of the transformer; that in which a GGUF file computes.
        family: of the transformer.

    Raises:
        WeightsError: the file is another kind of checkpoint, or does not fit the pipeline.
    """
    check_transformer_file(path, pipeline, family)
    transformer_class = find_transformer_class(family)
    options: dict[str, Any] = {
        "config": str(pipeline),
        "subfolder": "transformer",
        "torch_dtype": dtype,
        "local_files_only": True,
    }
    advice = f"use a {FAMILIES[family].name} transformer of the preset's sizes"
    with describe_load_errors(path, advice):
        if path.suffix == ".gguf":
            from diffusers import GGUFQuantizationConfig

            quantization = GGUFQuantizationConfig(compute_dtype=dtype)
            transformer = transformer_class.from_single_file(
                str(path), quantization_config=quantization, **options
            )
            check_loaded(path, find_empty(transformer), ())
            return transformer
        tensors = dequantize(path, load_file(path), dtype)
        # diffusers removes the prefix for FLUX.1 alone
        tensors = {name.removeprefix(UNET): tensor for name, tensor in tensors.items()}
        expected = _expected_names(transformer_class, pipeline)
        unused = set()
        if "x_embedder.weight" in tensors:  # diffusers' names need no conversion
            unused = tensors.keys() - expected
            check_loaded(path, expected - tensors.keys(), ())
            tensors = {name: tensors[name] for name in expected}
        num_tensors = len(tensors)
        transformer = transformer_class.from_single_file(tensors, **options)
        # the conversion removes the tensors that it uses
        if len(tensors) < num_tensors:
            unused = set(tensors)
        check_loaded(path, find_empty(transformer), unused)
    return transformer


def check_transformer_file(path: Path, pipeline: Path, family: Family) -> None:
    """Check that a file is a transformer of the family and kind that a pipeline describes.

    Args:
        path: safetensors or GGUF; only its header is read.
        pipeline: a pipeline whose transformer has the same sizes.
        family: of the transformer.

    Raises:
        WeightsError: the file is another kind of checkpoint, or does not fit the pipeline.
    """
    if path.suffix not in (".safetensors", ".gguf"):
        raise WeightsError(
            f"{path} is not a transformer; use a .safetensors or .gguf file, or a directory."
        )
    header = read_header(path)
    config = read_config(pipeline / "transformer")
    names = header.shapes
    architecture = header.metadata.get("architecture", family)
    is_expected = architecture in ("flux", family)  # programs write flux for its relatives as well
    if find_kind(names) is not FAMILIES[family].file_kind or not is_expected:
        what = describe_kind(names) if is_expected else f"it is of {architecture}"
        raise WeightsError(f"{path} is no {FAMILIES[family].name} transformer; {what}.")
    _check_quantization(path, header)
    for name in ("img_in.weight", f"{UNET}img_in.weight", "x_embedder.weight"):
        if name in names and path.suffix != ".gguf":
            check_channels(path, names[name][1], config.get("in_channels", 64))
    if family != "flux":
        return
    has_guidance = any(re.search(r"guidance_(in|embedder)\.", name) for name in names)
    check_guidance(path, has_guidance, config.get("guidance_embeds", False), str(pipeline))


def check_guidance(path: Path, embeds: bool, expected: bool, reference: str) -> None:
    """Check whether a FLUX transformer embeds the guidance scale.

    FLUX.1-dev does, FLUX.1-schnell does not.

    Args:
        path: of the transformer.
        embeds: whether it does.
        expected: whether it should.
        reference: what expects it, in words.

    Raises:
        WeightsError: it differs from what is expected.
    """
    if embeds == expected:
        return
    names = ("FLUX.1-dev", "FLUX.1-schnell") if embeds else ("FLUX.1-schnell", "FLUX.1-dev")
    has = "has" if embeds else "lacks"
    preset = "flux" if embeds else "flux-schnell"
    raise WeightsError(
        f"{path} {has} a guidance embedding like {names[0]}, but {reference} is for {names[1]}; "
        f"use --preset {preset}."
    )


def dequantize(path: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Multiply matrices of a scaled float8 file by their scales.

    Args:
        path: of the file, for messages.
        tensors: by name. The scale of `X.weight` is `X.scale_weight` or `X.weight_scale`: one for
            the matrix, or one per row.
        dtype: of the products.

    Returns:
        The tensors without scales. A file without any is returned as it is.

    Raises:
        WeightsError: the scales are of another kind.
    """
    scales = {}
    for name, tensor in tensors.items():
        if name.endswith(SCALE_SUFFIXES):
            scales[f"{name.rpartition('.')[0]}.weight"] = tensor
        elif name.endswith(".comfy_quant"):
            _check_comfy_format(path, tensor)
    if not scales:
        return tensors
    # scales of activations are for programs that multiply in 8 bits
    suffixes = (*SCALE_SUFFIXES, ".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")
    result = {name: tensor for name, tensor in tensors.items() if not name.endswith(suffixes)}
    for name, scale in scales.items():
        weight = result.get(name)
        if weight is None:
            raise WeightsError(f"{path} has a scale of {name}, but not {name}; download it again.")
        if scale.numel() not in (1, len(weight)):
            raise WeightsError(
                f"{path} has float8 weights with {tuple(scale.shape)} scales of {name}, which is "
                "not supported; use a file with one scale per matrix, or in bfloat16."
            )
        scale = scale.float().reshape(-1, *[1] * (weight.ndim - 1))
        result[name] = (weight.float() * scale).to(dtype)
    return result


def _check_comfy_format(path: Path, tensor: Tensor) -> None:
    """Check the format that ComfyUI records for one layer, as JSON in bytes."""
    try:
        stored = json.loads(bytes(tensor.tolist()))["format"]
    except (ValueError, KeyError, TypeError):
        stored = "an unknown format"
    if stored not in FLOAT8_FORMATS:
        raise WeightsError(
            f"{path} is quantized in {stored}, which is not supported; "
            "use a file in bfloat16, float8 or GGUF."
        )


def _check_quantization(path: Path, header: Header) -> None:
    quantization = find_quantization(header.shapes)
    if quantization is not None:
        raise WeightsError(
            f"{path} is quantized {quantization}, which is not supported in a single file; use a "
            "file in bfloat16, float8 or GGUF, or a directory that diffusers has saved."
        )


def find_transformer_class(family: Family) -> Any:
    """Return diffusers' class of a family's transformer."""
    import diffusers

    return getattr(diffusers, FAMILIES[family].network_class)


def _expected_names(transformer_class: Any, pipeline: Path) -> set[str]:
    """Return the names of the tensors of a pipeline's transformer."""
    with init_empty_weights():
        config = transformer_class.load_config(pipeline, subfolder="transformer")
        return set(transformer_class.from_config(config).state_dict())


def find_empty(network: nn.Module) -> Collection[str]:
    """Return the names of the parameters that no file has filled."""
    return [name for name, parameter in network.named_parameters() if parameter.is_meta]
