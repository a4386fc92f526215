"""Load diffusers pipelines from local files: directories, single files, GGUF."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from openpulid.errors import WeightsError
from openpulid.io.checkpoints import load_in_parts
from openpulid.io.networks import (
    PIPELINE_INDEX,
    Part,
    describe_load_errors,
    find_missing_parts,
    list_files,
    load_network,
    read_config,
    read_parts,
)
from openpulid.pipelines.lora_loading import fuse_lora
from openpulid.pipelines.model_set import FAMILIES, Family, ModelSet
from openpulid.pipelines.samplers import build_scheduler, check_scheduler
from openpulid.pipelines.single_files import (
    check_channels,
    check_guidance,
    check_sdxl_file,
    check_transformer_file,
    find_transformer_class,
    load_sdxl_file,
    load_transformer_file,
)
from openpulid.pipelines.weights import resolve_optional, resolve_path

logger = logging.getLogger(__name__)

SDXL_PARTS = ("unet", "vae", *FAMILIES["sdxl"].text_parts)


def check_base(models: ModelSet) -> None:
    """Check that the base model is one of the preset's family, before any model is loaded.

    Only indices and headers are read. What remains is checked when the files are loaded.

    Raises:
        WeightsError: a file is missing, or is of another kind.
    """
    path = _pipeline_path(models)
    if path.is_file() and not models.has_transformer:
        check_sdxl_file(path)
        return
    _check_index(path, models.family)
    _check_distilled(path, models.is_distilled)
    transformer = resolve_optional(models.transformer)
    if transformer is not None and transformer.is_file():
        check_transformer_file(transformer, path, models.family)


def load_base(models: ModelSet, dtype: torch.dtype) -> Any:
    """Load the pipeline of a model set.

    Raises:
        WeightsError: something is missing or damaged, or the base is of another kind.
    """
    load = load_with_transformer if models.has_transformer else load_sdxl
    return load(models, dtype)


def load_sdxl(models: ModelSet, dtype: torch.dtype) -> Any:
    """Load a StableDiffusionXLPipeline, with the U-Net and the sampler of the model set.

    Raises:
        WeightsError: something is missing or damaged, or the base is not SDXL, or of a kind that
            the presets do not sample.
    """
    import openpulid.diffusion.patch_vae  # noqa: F401 (diffusers finds classes of loaded modules)

    path = _pipeline_path(models)
    unet = resolve_optional(models.unet)
    networks: dict[str, Any] = {}
    if unet is not None and unet.is_dir():
        from diffusers import UNet2DConditionModel

        networks["unet"] = load_network(UNet2DConditionModel, unet, dtype)
    if path.is_file():
        pipe = load_sdxl_file(path, dtype, add_watermarker=False, **networks)
    else:
        pipe = _load_sdxl_directory(path, dtype, networks)
    if unet is not None and unet.is_file():
        message = f"{unet} contains no U-Net of this base, use one of SDXL"
        load_in_parts(pipe.unet, unet, message, dtype)
    for component in pipe.components.values():
        # text encoders are loaded in the dtype they are stored in; diffusers warns of every cast
        if isinstance(component, torch.nn.Module) and component.dtype != dtype:
            with describe_load_errors(path):
                component.to(dtype)
    pipe.scheduler = build_scheduler(pipe.scheduler, models)
    # the miniature is done before a progress bar is read
    pipe.set_progress_bar_config(disable=models.is_miniature)
    return pipe


def load_with_transformer(models: ModelSet, dtype: torch.dtype) -> Any:
    """Load a pipeline of FLUX or a relative, with the transformer of the model set.

    Raises:
        WeightsError: something is missing or damaged, or the base is of another family, or of a
            kind that the preset is not for.
    """
    import diffusers

    import openpulid.diffusion.patch_vae  # noqa: F401 (as for SDXL)

    path = _pipeline_path(models)
    parts = _check_index(path, models.family)
    _check_distilled(path, models.is_distilled)
    facts = FAMILIES[models.family]
    missing = [name for name in facts.text_parts if not (path / name).is_dir()]
    if missing:
        raise WeightsError(
            f"{path} lacks {' and '.join(missing)}; {models.base_name} needs "
            f"{facts.text_encoders}: download the complete pipeline."
        )
    scheduler, _ = _read_scheduler(path, parts)
    if not scheduler.startswith("FlowMatch"):
        raise WeightsError(
            f"{path} cannot be sampled: its scheduler is {scheduler}, and {models.base_name} needs "
            f"one of flow matching; use {models.base_name} or a finetune of it."
        )
    networks: dict[str, Any] = {}
    vae = path / "vae"
    if models.vae is not None and "vae" in parts and not vae.is_dir():
        vae = resolve_path(models.vae)
        networks["vae"] = load_network(parts["vae"].find_class(), vae, dtype)
    if models.transformer is not None:
        source = resolve_path(models.transformer)
        if source.is_dir():
            _check_transformer(source, vae, models)
            networks["transformer"] = load_network(
                find_transformer_class(models.family), source, dtype
            )
        else:
            networks["transformer"] = load_transformer_file(source, path, dtype, models.family)
    if "transformer" in parts:
        _check_transformer(path / "transformer", vae, models)
    pipeline_class = getattr(diffusers, facts.pipeline_class)
    pipe = _load_parts(pipeline_class, path, parts, dtype, networks)
    if models.few_step_lora is not None:
        fuse_lora(pipe, resolve_path(models.few_step_lora))
    pipe.set_progress_bar_config(disable=models.is_miniature)
    return pipe


def _pipeline_path(models: ModelSet) -> Path:
    path = resolve_path(models.pipeline)
    if path.is_dir() and not (path / PIPELINE_INDEX).is_file():
        fix = f"run `{models.build_command or 'pulid mini build'}` to train the miniature's"
        if not models.is_miniature:
            files = sorted(name for name in list_files(path) if name.endswith(".safetensors"))
            fix = f"pass the file itself, {path / files[0]}" if files else "download one"
        raise WeightsError(f"{path} contains no pipeline (no {PIPELINE_INDEX}); {fix}.")
    return path


def _read_index(path: Path) -> tuple[str, dict[str, Part]]:
    """Read the class of a pipeline and its parts."""
    text = (path / PIPELINE_INDEX).read_bytes()
    parts = read_parts(text)
    return str(json.loads(text).get("_class_name", "pipeline without a class")), parts


def _check_index(path: Path, family: Family) -> dict[str, Part]:
    """Return the parts of a pipeline; raise WeightsError if it is of another family."""
    class_name, parts = _read_index(path)
    facts = FAMILIES[family]
    if not re.match(facts.class_pattern, class_name):
        advice = [
            f"; {other.advice}"
            for other in FAMILIES.values()
            if re.match(other.class_pattern, class_name)
        ]
        article = "an" if family == "sdxl" else "a"
        raise WeightsError(
            f"{path} cannot be loaded for {article} {facts.name.removesuffix('.1')} "
            f"preset: it is a {class_name}{''.join(advice)}."
        )
    return parts


def _check_distilled(path: Path, expected: bool | None) -> None:
    """Raise WeightsError if a pipeline needs guidance, and the preset has none."""
    if expected is None:
        return
    index = json.loads((path / PIPELINE_INDEX).read_bytes())
    if not index.get("is_distilled", False):
        raise WeightsError(
            f"{path} is not distilled: it needs about 50 steps and guidance, and this preset has "
            "no guidance; use flux2-klein-distilled, or a model that was trained from it."
        )


def _read_scheduler(path: Path, parts: Mapping[str, Part]) -> tuple[str, dict[str, Any]]:
    """Read the class and the settings of a pipeline's scheduler."""
    file = path / "scheduler" / "scheduler_config.json"
    if "scheduler" not in parts or not file.is_file():
        raise WeightsError(f"{path} lacks its scheduler; download or copy it again.")
    with describe_load_errors(file):
        config = dict(json.loads(file.read_text("utf-8")))
    return parts["scheduler"].class_name, config


def _load_sdxl_directory(path: Path, dtype: torch.dtype, networks: Mapping[str, Any]) -> Any:
    from diffusers import StableDiffusionXLPipeline

    parts = _check_index(path, "sdxl")
    check_scheduler(path, *_read_scheduler(path, parts))
    absent = [name for name in SDXL_PARTS if name not in parts]
    if "text_encoder" in absent and "text_encoder_2" in parts:
        raise WeightsError(f"{path} is SDXL's refiner; use an SDXL base model.")
    if absent:
        raise WeightsError(f"{path} lacks {' and '.join(absent)}; use a complete SDXL pipeline.")
    config = read_config(path / "unet") if "unet" not in networks else networks["unet"].config
    latents = read_config(path / "vae").get("latent_channels", 4)
    check_channels(path, config.get("in_channels", 4), latents)
    return _load_parts(
        StableDiffusionXLPipeline, path, parts, dtype, networks, add_watermarker=False
    )


def _check_transformer(transformer: Path, vae: Path, models: ModelSet) -> None:
    """Check that the configuration of a transformer describes a model that the preset is for."""
    config = read_config(transformer)
    vae_config = read_config(vae)
    latents = vae_config.get("latent_channels", vae_config.get("z_dim", 16))
    # a token is a square of two by two latents, of which Z-Image's configuration has the channels
    num_latents = 1 if models.family == "z-image" else 4
    check_channels(transformer, config.get("in_channels", 64), num_latents * latents)
    guidance_embeds = models.guidance_embeds
    embeds = bool(config.get("guidance_embeds", False))
    if guidance_embeds and not embeds:
        logger.warning(
            "%s has no guidance embedding, like FLUX.1-schnell, so the guidance scale has no "
            "effect; --preset flux-schnell is for such models.",
            transformer,
        )
    elif guidance_embeds is not None:
        check_guidance(transformer, embeds, guidance_embeds, "this preset")


def _load_parts(
    cls: Any,
    path: Path,
    parts: Mapping[str, Part],
    dtype: torch.dtype,
    networks: Mapping[str, Any],
    **options: Any,
) -> Any:
    """Load the parts of a pipeline, each in the variant in which it is stored.

    Args:
        cls: of the pipeline.
        path: directory of the pipeline.
        parts: from its index.
        dtype: of the networks.
        networks: networks that replace those of the pipeline.
        options: further arguments of the pipeline.
    """
    # a directory may have parts of another pipeline, such as a ControlNet
    expected = signature(cls.__init__).parameters.keys() - networks.keys()
    own = {name: part for name, part in parts.items() if name in expected}
    missing = find_missing_parts(list_files(path), own)
    if missing:
        described = " and ".join(f"{name} ({reason})" for name, reason in missing.items())
        raise WeightsError(f"{path} lacks parts: {described}; download or copy it again.")
    loaded = dict(networks)
    # the largest last: its file is read next to fewer networks
    for name in sorted(own, key=lambda name: _folder_size(path / name)):
        if own[name].is_network:
            loaded[name] = load_network(own[name].find_class(), path / name, dtype)
    with describe_load_errors(path):
        return cls.from_pretrained(path, local_files_only=True, **loaded, **options)


def _folder_size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*"))
