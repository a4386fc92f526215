"""From the models that a user selects to a preset."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from openpulid.errors import OptionError, suggest
from openpulid.faces.insightface_pack import find_pack
from openpulid.io.hub import AURAFACE, WEIGHTS, find_weight
from openpulid.pipelines.baselines import BASELINES, Baseline, find_adapter, find_baseline
from openpulid.pipelines.memory_levels import find_level
from openpulid.pipelines.presets import PULID_MODES, Preset, find_preset
from openpulid.pipelines.request import OPEN_FACES, IdentityOptions, ModelSelection
from openpulid.pipelines.request_fields import RequestError

PresetSource = str | os.PathLike[str] | Preset | ModelSelection
"""A preset, its name, a directory of weights, or the models of a request."""


def resolve_preset(
    preset: PresetSource,
    base: str | os.PathLike[str] | None = None,
    method: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
    face_pack: str | os.PathLike[str] | None = None,
    memory: str | None = None,
) -> Preset:
    """Return a preset with changes in its models. No large file is opened.

    Args:
        preset: where to start. A `ModelSelection` brings its own changes.
        base: another base model, see `with_base`.
        method: another method than PuLID, see `methods.registry.METHODS`.
        adapter: another adapter file of the method, such as one of `pulid train`.
        face_pack: "open" for YuNet, AuraFace and selfie_multiclass, whose licenses allow commercial
            use, or the directory of another insightface pack, whose detector and recognition model
            are used. The adapter must have been trained with that recognition model. InfiniteYou
            keeps its own.
        memory: memory level of the base model, see `memory_levels.LEVELS`.

    Raises:
        OptionError: there is no such preset, or a change does not apply to it.
        WeightsError: the base does not exist.
    """
    if isinstance(preset, ModelSelection):
        return resolve_preset(**dict(preset))
    if not isinstance(preset, Preset):
        if not isinstance(preset, (str, os.PathLike)):
            raise OptionError(
                f"expected the name of a preset, such as 'mini', got {type(preset).__name__}."
            )
        preset = find_preset(os.fspath(preset))
    if base is not None:
        if not Path(base).exists():
            find_weight(os.fspath(base))
        preset = with_base(preset, os.fspath(base))
    if adapter is not None and not Path(adapter).exists():
        raise OptionError(f"{os.fspath(adapter)} does not exist; pass an adapter file.")
    if method is not None or adapter is not None:
        file = None if adapter is None else Path(adapter)
        preset = with_method(preset, method or preset.models.method, file)
    if memory is not None:
        preset = _with_memory(preset, memory)
    if face_pack is not None:
        preset = _with_face_pack(preset, os.fspath(face_pack))
    return preset


def with_method(preset: Preset, method: str, adapter: Path | None = None) -> Preset:
    """Return the preset with another method on the same base.

    Args:
        preset: a preset with PuLID.
        method: name of the method, see `methods.registry.METHODS`.
        adapter: another adapter file of the method.

    Raises:
        OptionError: there is no such method, or it does not support the base.
    """
    chosen = {"method": None if method == "pulid" else method}
    if adapter is not None:
        chosen["adapter"] = os.fspath(adapter)
    selection = preset.selection.model_copy(update=chosen)
    if method in ("pulid", preset.models.method):
        models = replace(preset.models, adapter=adapter or preset.models.adapter)
        return replace(preset, selection=selection, models=models)
    baseline = _find_baseline(preset, method)
    weights = Path(preset.models.detector).parent if preset.models.is_miniature else None
    source = adapter or find_adapter(method, weights)
    models = replace(preset.models, method=method, adapter=source, **dict(baseline.models))
    identity = IdentityOptions(scale=baseline.scale, start=baseline.start, end=1.0)
    defaults = preset.defaults.model_copy(update={"identity": identity})
    options = preset.options - baseline.unsupported
    return Preset(selection, preset.description, models, options, defaults)


def _find_baseline(preset: Preset, method: str) -> Baseline:
    if method in PULID_MODES:
        options = PULID_MODES[method].model_dump(exclude_none=True)
        described = ", ".join(f"{name}={value!r}" for name, value in options.items())
        raise OptionError(f"{method!r} is a set of PuLID's options, not a method; use {described}.")
    if method not in BASELINES:
        raise OptionError(
            f"there is no method {method!r}{suggest(method, ('pulid', *BASELINES, *PULID_MODES))}; "
            f"available: pulid, {', '.join(BASELINES)}."
        )
    return find_baseline(method, preset.models, preset.name)


def with_base(preset: Preset, base: Path | str) -> Preset:
    """Return the preset on another base model.

    Args:
        preset: the preset; a U-Net or transformer that it brings is not used.
        base: path or published name of a pipeline; for FLUX and Chroma also a transformer alone, as
            a single file or a directory, to which the preset's pipeline adds the other parts.
    """
    selection = preset.selection.model_copy(update={"base": os.fspath(base)})
    path = Path(base)
    is_network = path.is_file() or (path / "config.json").is_file()
    models = replace(preset.models, unet=None, transformer=None, few_step_lora=None)
    is_transformer = models.has_transformer and base not in WEIGHTS and is_network
    models = replace(models, transformer=base) if is_transformer else replace(models, pipeline=base)
    return replace(preset, selection=selection, models=models)


def _with_memory(preset: Preset, memory: str) -> Preset:
    if "memory" not in preset.options:
        raise RequestError(f"{preset.label} has no memory levels; leave {{0}} out.", "model.memory")
    find_level(preset.models.family, memory)
    selection = preset.selection.model_copy(update={"memory": memory})
    return replace(preset.with_models(memory=memory), selection=selection)


def _with_face_pack(preset: Preset, directory: str) -> Preset:
    if preset.models.is_miniature:
        raise RequestError(
            f"{preset.label} uses its own face models; {{0}} is only available for presets that "
            "read photos.",
            "model.face_pack",
        )
    models = preset.models
    # InfiniteYou reads facexlib's ArcFace, which is in no pack
    has_pack_model = models.recognition is not None and not models.method.startswith("infiniteyou")
    if directory == OPEN_FACES:
        changed = preset.with_models(
            detector="yunet",
            recognition=AURAFACE if has_pack_model else models.recognition,
            face_parsing="selfie-multiclass" if models.face_parsing else None,
        )
    else:
        detector, recognition = find_pack(directory)
        changed = preset.with_models(
            detector=detector, recognition=recognition if has_pack_model else models.recognition
        )
    selection = preset.selection.model_copy(update={"face_pack": directory})
    return replace(changed, selection=selection)
