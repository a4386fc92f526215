"""The configuration of a method: options and hashes of all weights that affect its images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from openpulid.bench.run_dir import BASE
from openpulid.bench.tuned import TunedPreset
from openpulid.io.checkpoints import hash_weights
from openpulid.pipelines.model_set import NETWORK_FOLDERS
from openpulid.pipelines.presets import Preset
from openpulid.pipelines.weights import resolve_path

OPTIONS = ("num_inference_steps", "guidance_scale", "negative_prompt", "width", "height")
BASE_PARTS = ("pipeline", "unet", "transformer", "few_step_lora")
METHOD_PARTS = ("detector", "recognition", "face_parsing", "vision_encoder")


def describe_configuration(
    method: str, preset: Preset, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Describe everything that determines the images of a method, as JSON data.

    Two equal descriptions give the same images. Weights are described by the hashes of their
    files, so a copy of a file is the same and another file of the same name is not.

    Args:
        method: name of the method; `BASE` uses neither face models nor an adapter.
        preset: the preset of the method.
        options: generation options that replace the preset's.

    Raises:
        OSError, WeightsError: a file of weights is missing.
    """
    defaults = preset.with_defaults(**options).defaults
    configuration: dict[str, Any] = {name: getattr(defaults, name) for name in OPTIONS}
    configuration["sampler"] = preset.models.sampler
    configuration["preset"] = preset.name
    weights = {name: _hash_part(preset, name) for name in BASE_PARTS}
    if preset.models.vae:  # otherwise it is a part of the pipeline
        weights["vae"] = _hash_part(preset, "vae")
    if isinstance(preset, TunedPreset):
        configuration["recipe"] = asdict(preset.recipe)
    elif method != BASE:
        weights |= {name: _hash_part(preset, name) for name in METHOD_PARTS}
        weights["adapter"] = _hash_adapter(preset)
    if method != BASE:
        configuration |= defaults.identity.model_dump(exclude_none=True)
    configuration["weights"] = weights
    data: dict[str, Any] = json.loads(json.dumps(configuration))
    return data


def _hash_part(preset: Preset, name: str) -> list[str]:
    location = getattr(preset.models, name)
    return hash_weights(resolve_path(location)) if location else []


def _hash_adapter(preset: Preset) -> list[str]:
    path = resolve_path(preset.models.require_adapter())
    hashes = hash_weights(path)
    network = NETWORK_FOLDERS.get(preset.models.method)
    # a folder contains the network, which is next to a file
    if network is not None and path.is_file() and (path.parent / network).is_dir():
        hashes += hash_weights(path.parent / network)
    return hashes
