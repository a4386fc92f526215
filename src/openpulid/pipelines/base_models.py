"""Load diffusers pipelines from local files: directories, single files, GGUF."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError

from openpulid.diffusion.schedulers import KarrasScheduler
from openpulid.errors import PulidError, WeightsError
from openpulid.io.checkpoints import load_in_parts
from openpulid.io.hub import WEIGHTS, locate
from openpulid.pipelines.model_set import ModelSet
from openpulid.pipelines.presets import PRESETS
from openpulid.pipelines.weights import resolve_optional, resolve_path


def load_sdxl(models: ModelSet, dtype: torch.dtype) -> Any:
    """Load a StableDiffusionXLPipeline, with the U-Net and the sampler of the model set.

    Raises:
        WeightsError: something is missing or damaged.
    """
    import openpulid.diffusion.patch_vae  # noqa: F401 (diffusers finds classes of loaded modules)

    path = _pipeline_path(models)
    with describe_load_errors(path):
        pipe = _open_sdxl(path, resolve_optional(models.unet), dtype)
    for component in pipe.components.values():
        # text encoders are loaded in the dtype they are stored in; diffusers warns of every cast
        if isinstance(component, torch.nn.Module) and component.dtype != dtype:
            component.to(dtype)
    pipe.scheduler = _build_scheduler(pipe.scheduler, models)
    # the miniature is done before a progress bar is read
    pipe.set_progress_bar_config(disable=models.is_miniature)
    return pipe


def load_flux(models: ModelSet, dtype: torch.dtype) -> Any:
    """Load a FluxPipeline, with the transformer of the model set.

    Raises:
        WeightsError: something is missing or damaged.
    """
    path = _pipeline_path(models)
    with describe_load_errors(path):
        return _open_flux(path, models, dtype)


def _pipeline_path(models: ModelSet) -> Path:
    path = resolve_path(models.pipeline)
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise WeightsError(
            f"{path} contains no pipeline; run `pulid mini build` to train the miniature's."
        )
    return path


def _open_sdxl(path: Path, unet: Path | None, dtype: torch.dtype) -> Any:
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    options: dict[str, Any] = {
        "torch_dtype": dtype,
        "local_files_only": True,
        "add_watermarker": False,
    }
    if unet is not None and unet.is_dir():
        options["unet"] = UNet2DConditionModel.from_pretrained(
            unet, torch_dtype=dtype, local_files_only=True
        )
    if path.is_file():
        config = str(_find_sdxl_config(path))
        pipe = StableDiffusionXLPipeline.from_single_file(path, config=config, **options)
    else:
        variant = "fp16" if next(path.glob("unet/*.fp16.safetensors"), None) else None
        weights = None if "unet" in options else _find_unet_weights(path / "unet", variant)
        if weights is not None:
            # its weights are loaded last, when no other file is in memory
            with init_empty_weights(include_buffers=False):
                config = UNet2DConditionModel.load_config(path / "unet", local_files_only=True)
                options["unet"] = UNet2DConditionModel.from_config(config).eval()
        pipe = StableDiffusionXLPipeline.from_pretrained(path, variant=variant, **options)
        if weights is not None and (unet is None or not unet.is_file()):
            load_in_parts(pipe.unet, weights, f"{weights} does not fit its config.json", dtype)
    if unet is not None and unet.is_file():
        message = f"{unet} contains no U-Net of this base, use one of SDXL"
        load_in_parts(pipe.unet, unet, message, dtype)
    return pipe


def _find_unet_weights(folder: Path, variant: str | None) -> Path | None:
    """Find the single file of a U-Net in full or half precision.

    diffusers maps such a file as a whole, so that a U-Net of 5 GB takes 10 GB while it is loaded.

    Returns:
        The file; None for other layouts, which are left to diffusers.
    """
    suffix = "safetensors" if variant is None else f"{variant}.safetensors"
    path = folder / f"diffusion_pytorch_model.{suffix}"
    config = folder / "config.json"
    if not path.is_file() or not config.is_file():
        return None
    facts = json.loads(config.read_text("utf-8"))
    is_plain = facts.get("_class_name") == "UNet2DConditionModel"
    return path if is_plain and "quantization_config" not in facts else None


def _find_sdxl_config(file: Path) -> Path:
    """Find an installed SDXL pipeline that describes the networks of a single file.

    A single file has weights, but neither the sizes of the networks nor their vocabulary.
    diffusers would download both from the hub.
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


def _build_scheduler(scheduler: Any, models: ModelSet) -> Any:
    if models.sampler is None:
        if not models.scheduler:
            return scheduler
        return type(scheduler).from_config(scheduler.config, **models.scheduler)
    if models.sampler == "dpm":
        from diffusers import DPMSolverMultistepScheduler

        return DPMSolverMultistepScheduler.from_config(scheduler.config, **models.scheduler)
    return KarrasScheduler(
        prediction_type=scheduler.config.prediction_type,
        algorithm=models.sampler,
        **models.scheduler,
    )


def _open_flux(path: Path, models: ModelSet, dtype: torch.dtype) -> Any:
    from diffusers import FluxPipeline

    encoders = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    missing = [name for name in encoders if not (path / name).is_dir()]
    if missing:
        raise WeightsError(
            f"{path} lacks {' and '.join(missing)}; FLUX needs CLIP and T5: "
            "download the complete pipeline."
        )
    options: dict[str, Any] = {"torch_dtype": dtype, "local_files_only": True}
    if models.transformer is not None:
        options["transformer"] = _open_transformer(resolve_path(models.transformer), path, options)
    return FluxPipeline.from_pretrained(path, **options)


def _open_transformer(path: Path, pipeline: Path, options: Mapping[str, Any]) -> Any:
    """Load a FLUX transformer alone: a directory, or a safetensors or GGUF file.

    Args:
        path: the transformer.
        pipeline: a pipeline whose transformer has the same sizes.
        options: keyword arguments of `from_pretrained`.
    """
    from diffusers import FluxTransformer2DModel

    with describe_load_errors(path, "use a FLUX transformer of the preset's sizes"):
        if path.is_dir():
            return FluxTransformer2DModel.from_pretrained(path, **options)
        options = {**options, "config": str(pipeline), "subfolder": "transformer"}
        if path.suffix == ".gguf":
            options["quantization_config"] = _gguf_config(options["torch_dtype"])
        elif path.suffix != ".safetensors":
            raise WeightsError(
                f"{path} is not a transformer; use a .safetensors or .gguf file, or a directory."
            )
        return FluxTransformer2DModel.from_single_file(str(path), **options)


def _gguf_config(dtype: torch.dtype) -> Any:
    from diffusers import GGUFQuantizationConfig
    from diffusers.utils import is_gguf_available

    if not is_gguf_available():
        raise WeightsError("GGUF files need the package gguf: pip install gguf.")
    return GGUFQuantizationConfig(compute_dtype=dtype)


@contextmanager
def describe_load_errors(path: Path, fix: str = "copy or build it again") -> Iterator[None]:
    """Turn a library's error about damaged weights into one sentence that names the file."""
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    try:
        yield
    except PulidError:
        raise
    except (
        OSError,
        ValueError,
        LookupError,
        RuntimeError,
        SafetensorError,
        SingleFileComponentError,
    ) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WeightsError(f"{path} cannot be loaded ({reason}); {fix}.") from error
