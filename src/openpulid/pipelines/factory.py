"""Build what a preset names: pipeline, adapter and identity extractor.

Only local files are used.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from openpulid.device import compute_dtype, select_device, training_dtype
from openpulid.errors import WeightsError
from openpulid.identity.clip_extractor import ClipExtractor
from openpulid.identity.detection import FaceDetection, MiniFaceDetection, PhotoFaceDetection
from openpulid.identity.extractor import (
    DeferredExtractor,
    FaceEmbeddingExtractor,
    FaceLatentExtractor,
    IdentityExtractor,
    MiniExtractor,
)
from openpulid.identity.identity import Identity, hash_models
from openpulid.identity.photo_extractor import LatentExtractor, PhotoExtractor
from openpulid.methods.pulid import PuLID, PuLIDFlux
from openpulid.methods.registry import find_method
from openpulid.pipelines.base_models import check_base, load_base
from openpulid.pipelines.face_models import (
    check_published_adapter,
    hash_adapter_models,
    require_face_models,
)
from openpulid.pipelines.memory_levels import find_level, place_infiniteyou, place_pipeline
from openpulid.pipelines.model_set import COMPANION_WEIGHTS, ModelSet
from openpulid.pipelines.presets import Preset
from openpulid.pipelines.weights import (
    require_trained,
    require_weights,
    resolve_optional,
    resolve_path,
)


def load_pipeline(preset: Preset, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """Load the preset's diffusers pipeline onto a device.

    Args:
        preset: the preset.
        device: where to compute.
        dtype: of its networks; `network_dtype` by default.

    Raises:
        WeightsError: something is missing or damaged.
    """
    dtype = dtype or network_dtype(preset.models, device)
    with no_progress_bars(), no_future_warnings():
        pipe = load_base(preset.models, dtype)
    place_pipeline(pipe, find_level(preset.models.family, preset.models.memory), device)
    return pipe


def check_models(preset: Preset, identities: Iterable[Identity] = ()) -> None:
    """Check the files of a preset, and identities for it, before any model is loaded.

    Args:
        preset: the preset.
        identities: they must be of the preset's face models.

    Raises:
        RequestError: nobody has published an adapter and the user passes none, or the face pack is
            not that of the published one.
        WeightsError: files are missing, or of another kind; the message names all weights that are
            not installed, and the command that downloads them.
        IdentityError: other models produced an identity.
    """
    preset.models.require_adapter()
    check_published_adapter(preset.models)
    require_trained(preset)
    if isinstance(preset.models.adapter, Path):
        _check_adapter(preset.models)
    require_weights(preset)
    check_base(preset.models)
    identities = list(identities)
    models = hash_extractor_models(preset.models) if identities else {}
    for identity in identities:
        identity.require(models)


def _check_adapter(models: ModelSet) -> None:
    """Raise WeightsError if the adapter is missing, or is of another method."""
    adapter = models.require_adapter()
    if not isinstance(adapter, Path):
        for name in COMPANION_WEIGHTS.get(models.method, ()):
            resolve_path(name)
    elif models.is_trained_baseline and not adapter.exists():
        raise WeightsError(
            f"{adapter} does not exist; "
            f"run `pulid mini build --method {models.method}` to train it."
        )
    _find_adapter_class(models).check_file(resolve_path(adapter))


def _find_adapter_class(models: ModelSet) -> Any:
    if models.has_transformer and models.method == "pulid":
        return PuLIDFlux
    return find_method(models.method)


def load_adapter(preset: Preset, device: torch.device) -> Any:
    """Load the preset's method with its weights.

    Raises:
        WeightsError: something is missing or damaged.
    """
    models = preset.models
    _check_adapter(models)
    with no_progress_bars():
        adapter = _find_adapter_class(models).load(resolve_path(models.require_adapter()))
    dtype = network_dtype(models, device)
    if models.method.startswith("infiniteyou"):
        return place_infiniteyou(adapter, models.memory, device, dtype)
    if not isinstance(adapter, PuLID) or dtype == torch.float32:
        return adapter.to(device, dtype)
    # PuLID's own program computes tokens, keys and values in float32. They are computed once. The
    # layers are published in float16 and stay in it until they are used.
    on_cpu = find_level(models.family, models.memory).faces_on_cpu
    adapter.to(torch.device("cpu") if on_cpu else device)
    adapter.id_adapter_attn_layers.to(dtype=torch.float16)
    return adapter


def load_extractor(
    preset: Preset, device: str | torch.device | None = None, adapter: Any = None
) -> IdentityExtractor:
    """Load the identity extractor of a preset; no base model is needed.

    Args:
        preset: the preset.
        device: where to compute; the best device by default.
        adapter: the method's adapter, if it is loaded already. It is loaded where the extractor
            uses its vision encoder.

    Raises:
        OptionError: the adapter was trained with other models, or there is no such device.
        WeightsError: something is missing or damaged.
    """
    models = preset.models
    sources = [models.detector, models.recognition, models.vision_encoder, models.face_parsing]
    if models.adapter_has_vision_encoder and adapter is None:
        sources.append(models.require_adapter())
    require_weights(preset, [source for source in sources if source is not None])
    device = select_device(device)
    if find_level(models.family, models.memory).faces_on_cpu:
        device = torch.device("cpu")
    if models.extractor == "clip":
        return _load_clip_extractor(preset, device, adapter)
    detector = resolve_path(models.detector)
    if models.extractor == "mini-embedding":
        assert models.recognition is not None
        return FaceEmbeddingExtractor.load(detector, resolve_path(models.recognition), device)
    assert models.vision_encoder is not None
    if models.extractor == "mini-latents":
        hash_extractor_models(models)  # reports an encoder that is not trained yet
        return FaceLatentExtractor.load(detector, resolve_path(models.vision_encoder), device)
    if models.extractor == "e4e":
        assert models.face_parsing is not None
        parsing = resolve_path(models.face_parsing)
        return LatentExtractor.load(detector, parsing, resolve_path(models.vision_encoder), device)
    assert models.recognition is not None
    recognition = resolve_path(models.recognition)
    if models.extractor == "mini":
        vision_encoder = resolve_path(models.vision_encoder)
        return MiniExtractor.load(detector, recognition, vision_encoder, device)
    assert models.face_parsing is not None
    parsing = resolve_path(models.face_parsing)
    vision_encoder = resolve_path(models.vision_encoder)
    # FLUX's own program reads faces in bfloat16, SDXL's in float32
    is_reduced = models.use_half_precision and models.has_transformer
    dtype = training_dtype(device) if is_reduced else torch.float32
    extractor = PhotoExtractor.load(detector, recognition, parsing, vision_encoder, device, dtype)
    require_face_models(adapter, extractor.models)
    return extractor


def share_extractor(
    extractor: IdentityExtractor, base: Preset, preset: Preset, adapter: Any, device: torch.device
) -> IdentityExtractor:
    """Return an identity extractor that is loaded already, or load another one for a method.

    Args:
        extractor: the loaded extractor.
        base: its preset.
        preset: of the method.
        adapter: of the method.
        device: where to compute.

    Raises:
        OptionError: the adapter was trained with other face models.
        WeightsError: something is missing or damaged.
    """
    if preset.models.extractor != base.models.extractor:
        return load_extractor(preset, device, adapter)
    if not preset.models.is_miniature:
        require_face_models(adapter, extractor.models)
    return extractor


def load_detection(models: ModelSet) -> FaceDetection:
    """Load the face detector of a preset alone, on the CPU: it takes no memory of an accelerator.

    Raises:
        WeightsError: it is missing or damaged.
    """
    kind = MiniFaceDetection if models.is_miniature else PhotoFaceDetection
    return kind.load(resolve_path(models.detector), "cpu")


def defer_extractor(preset: Preset, device: torch.device, adapter: Any = None) -> DeferredExtractor:
    """Return the identity extractor of a preset as `load_extractor` loads it, but do not load it.

    Args:
        preset: the preset.
        device: where to compute.
        adapter: the method's adapter.

    Raises:
        OptionError: the adapter was trained with other models.
        WeightsError: a file is missing.
    """
    models = hash_extractor_models(preset.models)
    if not preset.models.is_miniature:
        require_face_models(adapter, models)
    return DeferredExtractor(models, lambda: load_extractor(preset, device, adapter))


def hash_extractor_models(models: ModelSet) -> dict[str, str]:
    """Return name -> hash of the models that determine the features of a preset's extractor.

    Raises:
        WeightsError: a file is missing.
    """
    if models.has_own_person:
        return {}
    if models.adapter_has_vision_encoder:
        return hash_adapter_models(models)
    sources = (models.recognition, models.vision_encoder)
    paths = [resolve_path(source) for source in sources if source is not None]
    for path in paths:
        if not path.is_file():
            command = "pulid mini build" if models.is_miniature else "pulid weights get"
            if path in models.baseline_files:
                command += f" --method {models.method}"
            raise WeightsError(f"{path} does not exist; `{command}` provides it.")
    return hash_models(paths)


def _load_clip_extractor(preset: Preset, device: torch.device, adapter: Any) -> IdentityExtractor:
    models = preset.models
    if not models.is_miniature:
        require_face_models(adapter, hash_extractor_models(models))
    recognition = resolve_optional(models.recognition)
    if models.adapter_has_vision_encoder:
        if adapter is None:
            adapter = load_adapter(preset, device)
        detector, embedder = ClipExtractor.load_face_models(
            resolve_path(models.detector), recognition, device, models.is_miniature
        )
        return adapter.create_extractor(detector, embedder, models=hash_adapter_models(models))
    return ClipExtractor.load(
        resolve_path(models.detector),
        recognition,
        resolve_optional(models.vision_encoder),
        device,
        network_dtype(models, device),
        clip_input=models.clip_input or "image",
        is_miniature=models.is_miniature,
    )


def network_dtype(models: ModelSet, device: torch.device) -> torch.dtype:
    """Return the dtype of the networks. FLUX in float32 would take 48 GB, so it never is."""
    if not models.use_half_precision:
        return torch.float32
    return torch.bfloat16 if models.has_transformer else compute_dtype(device)


@contextmanager
def no_future_warnings() -> Iterator[None]:
    """Hide warnings for developers.

    Newer versions of diffusers have another name for an argument whose old name all versions know.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Disable the progress bars of diffusers and transformers, and restore their setting."""
    import diffusers.utils.logging
    import transformers.utils.logging

    enabled = [
        library
        for library in (diffusers.utils.logging, transformers.utils.logging)
        if library.is_progress_bar_enabled()
    ]
    for library in enabled:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in enabled:
            library.enable_progress_bar()
