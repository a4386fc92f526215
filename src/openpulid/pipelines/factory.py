"""From a preset's names to what computes: pipeline, scheduler, readers of faces. Files of this machine alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from openpulid.device import compute_dtype
from openpulid.diffusion.schedulers import KarrasScheduler
from openpulid.errors import OptionError, PulidError, WeightsError
from openpulid.faces.arcface import ArcFaceRecognition
from openpulid.faces.mini_detector import MiniFaceDetector
from openpulid.faces.scrfd import SCRFDDetector
from openpulid.identity.clip_extractor import ClipExtractor, load_clip_encoder
from openpulid.identity.extractor import DetectedFaces, IdentityExtractor, MiniExtractor
from openpulid.identity.photo_extractor import PhotoExtractor
from openpulid.io.checkpoints import fingerprint, load_module, load_state, read_tensors
from openpulid.io.hub import WEIGHTS, locate
from openpulid.methods.pulid.flux import PuLIDFlux
from openpulid.methods.pulid.sdxl import PuLID
from openpulid.methods.registry import METHODS, find_method
from openpulid.pipelines import flux_memory as memory
from openpulid.pipelines.presets import (
    COMPANION_WEIGHTS,
    MINI_BASELINES,
    PRESETS,
    Place,
    Preset,
    with_method,
)


def missing_weights(preset: Preset) -> list[str]:
    """What a preset needs and this machine has not: names of published weights, and files. Nothing is opened."""
    lacking = []
    for name in preset.published:
        try:
            locate(name)
        except WeightsError:
            lacking.append(name)
    networks = (preset.pipeline, preset.unet, preset.transformer, preset.adapter)
    places = (*networks, preset.finder, preset.recogniser, preset.vision, preset.parser)
    return lacking + [
        str(place) for place in places if isinstance(place, Path) and not place.exists()
    ]


def installed_methods(preset: Preset) -> list[str]:
    """The methods that can show a person on a preset's base, with all their files on this machine; PuLID first."""
    found = []
    for name in sorted(METHODS, key=lambda name: name != "pulid"):
        try:
            lacking = missing_weights(with_method(preset, name))
        except OptionError:  # it does not serve this base
            continue
        if not lacking:
            found.append(name)
    return found


def load_pipeline(preset: Preset, device: torch.device) -> Any:
    """The preset's diffusers pipeline, from local files only, silent; in float32 or, where the preset says so, in half.

    Raises:
        WeightsError: something is missing or damaged.
    """
    import openpulid.diffusion.patch_vae  # noqa: F401 (diffusers loads classes of modules that are already imported)

    place = resolve_path(preset.pipeline)
    if place.is_dir() and not (place / "model_index.json").is_file():
        raise WeightsError(f"{place} holds no pipeline; `pulid mini build` makes the miniature's.")
    dtype, flux = precision(preset, device), preset.family == "flux"
    with no_progress_bars(), _said_of(place):
        pipe = (
            _flux(place, preset, dtype)
            if flux
            else _pipeline(place, preset.unet and resolve_path(preset.unet), dtype)
        )
    if flux:
        memory.place(pipe, preset.memory, device)
        return pipe
    for part in pipe.components.values():
        if (
            isinstance(part, torch.nn.Module) and part.dtype != dtype
        ):  # diffusers warns of every cast
            part.to(dtype)  # text encoders come in the dtype that they are stored in
    pipe.scheduler = _scheduler(pipe.scheduler, preset)
    pipe.set_progress_bar_config(
        disable=not preset.half
    )  # the miniature is done before a bar is read
    return pipe.to(device)


def load_adapter(preset: Preset, device: torch.device) -> Any:
    """The preset's method with its weights.

    Raises:
        WeightsError: something is missing or damaged.
    """
    kind: Any = PuLIDFlux if preset.family == "flux" else find_method(preset.method)
    for place in (
        COMPANION_WEIGHTS.get(preset.method, ()) if isinstance(preset.adapter, str) else ()
    ):
        resolve_path(place)  # what is missing is said at once
    own = preset.parser is None and preset.method in MINI_BASELINES
    if own and isinstance(preset.adapter, Path) and not preset.adapter.exists():
        raise WeightsError(
            f"{preset.adapter} is not there; `pulid mini build --method {preset.method}` trains it."
        )
    return kind.load(resolve_path(preset.adapter)).to(device, precision(preset, device))


def load_extractor(preset: Preset, device: torch.device, method: Any = None) -> IdentityExtractor:
    """What reads faces for the preset: the miniature's networks, or with a parser those of photographs; or, for methods that
    read CLIP, a CLIP tower.

    Args:
        method: from `load_method`; needed where it brings its own tower, or remembers what it learned with.

    Raises:
        OptionError: the method learned with others.
        WeightsError: something is missing or damaged.
    """
    if preset.view:
        return _clip_features(preset, device, method)
    assert preset.recogniser is not None and preset.vision is not None
    if preset.parser is None:
        return MiniExtractor.load(
            resolve_path(preset.finder),
            resolve_path(preset.recogniser),
            resolve_path(preset.vision),
            device,
        )
    files = [
        resolve_path(place)
        for place in (preset.finder, preset.recogniser, preset.parser, preset.vision)
    ]
    detector, recogniser, parser, tower = files  # all are looked for before the first is opened
    device = torch.device("cpu") if memory.find_level(preset.memory).faces_on_cpu else device
    # not FLUX's precision: a face costs little, also on a processor that has no bfloat16
    dtype = compute_dtype(device) if preset.half else torch.float32
    features = PhotoExtractor.load(detector, recogniser, parser, tower, device, dtype)
    if isinstance(method, PuLID):
        method.require(features.models)
    return features


def _clip_features(preset: Preset, device: torch.device, method: Any) -> IdentityExtractor:
    """For methods that read a CLIP tower, or a recogniser alone; the miniature's finder finds its faces, too."""
    named = {
        place: resolve_path(place)
        for place in (preset.finder, preset.recogniser, preset.vision)
        if place is not None
    }
    small = preset.parser is None
    finder = named[preset.finder]
    faces: Any = (
        DetectedFaces(load_module(MiniFaceDetector, finder, device))
        if small
        else SCRFDDetector.load(finder, device)
    )
    recogniser = (
        ArcFaceRecognition.load(named[preset.recogniser], device)
        if preset.recogniser and not small
        else None
    )
    models = {
        named[place].stem: fingerprint(named[place])
        for place in (preset.recogniser, preset.vision)
        if place in named
    }
    if preset.vision is None and preset.view != "none":
        reader: ClipExtractor = method.features(faces, recogniser)
        reader.models = models | {preset.method: fingerprint(resolve_path(preset.adapter))}
        return reader
    tower = (
        load_clip_encoder(read_tensors(named[preset.vision])).to(device, precision(preset, device))
        if preset.vision
        else None
    )
    return ClipExtractor(
        faces,
        tower,
        "face" if preset.view == "face" else "picture",
        recogniser=recogniser,
        models=models,
    )


def _pipeline(place: Path, unet: Path | str | None, dtype: torch.dtype) -> Any:
    """A pipeline from a folder or a single file, with another U-Net where one is named: a folder, or weights alone."""
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    options: dict[str, Any] = {
        "torch_dtype": dtype,
        "local_files_only": True,
        "add_watermarker": False,
    }
    if isinstance(unet, Path) and unet.is_dir():
        options["unet"] = UNet2DConditionModel.from_pretrained(
            unet, torch_dtype=dtype, local_files_only=True
        )
    if place.is_file():
        pipe = StableDiffusionXLPipeline.from_single_file(
            place, config=str(_layout(place)), **options
        )
    else:
        stored = "fp16" if next(place.glob("unet/*.fp16.safetensors"), None) else None
        pipe = StableDiffusionXLPipeline.from_pretrained(place, variant=stored, **options)
    if isinstance(unet, Path) and unet.is_file():
        load_state(
            pipe.unet, read_tensors(unet), f"{unet} holds no U-Net of this base, name one of SDXL"
        )
    return pipe


def _layout(file: Path) -> Path:
    """A pipeline of SDXL that is here: a single file has the weights, but neither its parts' sizes nor their vocabulary, for
    which diffusers would ask the hub."""
    bases = [
        preset.pipeline
        for preset in (make() for make in PRESETS.values())
        if preset.family == "sdxl"
    ]
    for name in ["sdxl-base", *(base for base in bases if isinstance(base, str))]:
        with suppress(WeightsError):
            return locate(name, require_weights=False)
    raise WeightsError(
        f"{file} is a single file, which needs the sizes and the vocabulary of a pipeline of SDXL, and none is on this "
        f"machine; `pulid weights get sdxl-base` downloads one{WEIGHTS['sdxl-base'].size}."
    )


def _flux(place: Path, preset: Preset, dtype: torch.dtype) -> Any:
    """A FLUX pipeline from a folder, with another transformer where one is named."""
    from diffusers import FluxPipeline

    readers = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    if missing := [name for name in readers if not (place / name).is_dir()]:
        raise WeightsError(
            f"{place} has no {' and no '.join(missing)}; FLUX reads with CLIP and T5: get the whole pipeline."
        )
    options: dict[str, Any] = {"torch_dtype": dtype, "local_files_only": True}
    if preset.transformer is not None:
        options["transformer"] = _transformer(resolve_path(preset.transformer), place, options)
    return FluxPipeline.from_pretrained(place, **options)


def _transformer(place: Path, pipeline: Path, options: Mapping[str, Any]) -> Any:
    """FLUX's transformer alone: a folder, or a single file, safetensors or GGUF, of the sizes that the pipeline's has."""
    from diffusers import FluxTransformer2DModel

    with _said_of(place, "name a FLUX transformer of the preset's sizes"):
        if place.is_dir():
            return FluxTransformer2DModel.from_pretrained(place, **options)
        known = {**options, "config": str(pipeline), "subfolder": "transformer"}
        if place.suffix == ".gguf":
            known["quantization_config"] = _gguf(options["torch_dtype"])
        elif place.suffix != ".safetensors":
            raise WeightsError(
                f"{place} is no transformer; name a .safetensors or .gguf file, or a folder."
            )
        return FluxTransformer2DModel.from_single_file(str(place), **known)


def _gguf(dtype: torch.dtype) -> Any:
    from diffusers import GGUFQuantizationConfig
    from diffusers.utils import is_gguf_available

    if not is_gguf_available():
        raise WeightsError(
            "a GGUF file needs the package gguf; install it with `pip install gguf`."
        )
    return GGUFQuantizationConfig(compute_dtype=dtype)


@contextmanager
def _said_of(place: Path, way_out: str = "copy or build it again") -> Iterator[None]:
    """What a library says of damaged weights, as one sentence that names them."""
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    try:
        yield
    except PulidError:  # says it already
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
        raise WeightsError(f"{place} cannot be loaded ({reason}); {way_out}.") from error


def _scheduler(own: Any, preset: Preset) -> Any:
    if preset.sampler == "":
        return type(own).from_config(own.config, **preset.scheduler) if preset.scheduler else own
    if preset.sampler == "dpm":
        from diffusers import DPMSolverMultistepScheduler

        return DPMSolverMultistepScheduler.from_config(own.config, **preset.scheduler)
    return KarrasScheduler(
        prediction_type=own.config.prediction_type, algorithm=preset.sampler, **preset.scheduler
    )


def resolve_path(place: Place) -> Path:
    """A path as it is; a name of a published weight, or of a pipeline in the hub's cache, as the path that it lies at. A folder
    that happens to have a published name is `./NAME`."""
    if isinstance(place, Path) or (place not in WEIGHTS and Path(place).exists()):
        return Path(place)
    return locate(place)


def precision(preset: Preset, device: torch.device) -> torch.dtype:
    """What the preset's networks compute in there. FLUX in float32 would be 48 GB, so it stays in half everywhere."""
    if preset.half:
        return torch.bfloat16 if preset.family == "flux" else compute_dtype(device)
    return torch.float32


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Both libraries show how far loading is; here it takes a moment, and what was set before is set again."""
    import diffusers.utils.logging
    import transformers.utils.logging

    shown = [
        library
        for library in (diffusers.utils.logging, transformers.utils.logging)
        if library.is_progress_bar_enabled()
    ]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()
