"""Load a studio from local files."""

from __future__ import annotations

import os

import torch

from openpulid.device import select_device
from openpulid.identity.extractor import IdentityExtractor
from openpulid.pipelines.factory import (
    check_models,
    defer_extractor,
    load_adapter,
    load_pipeline,
)
from openpulid.pipelines.selection import PresetSource, resolve_preset
from openpulid.pipelines.studio import Studio


def load(
    preset: PresetSource = "mini",
    device: str | torch.device | None = None,
    base: str | os.PathLike[str] | None = None,
    memory: str | None = None,
    method: str | None = None,
    face_pack: str | os.PathLike[str] | None = None,
    adapter: str | os.PathLike[str] | None = None,
    extractor: IdentityExtractor | None = None,
) -> Studio:
    """Load a studio from local files.

    The identity extractor is loaded for the first image of a person, and not at all for a saved
    identity.

    Args:
        preset: a preset, its name, a directory of weights, or the models of a request.
        device: where to compute; the accelerator if there is one, else the CPU.
        base: another base model, see `selection.resolve_preset`.
        memory: memory level of the base model.
        method: another method.
        face_pack: "open", or the directory of another insightface pack.
        adapter: another adapter file of the method.
        extractor: the identity extractor of `load_extractor`, if it is loaded already.

    Raises:
        OptionError: there is no such preset, or a change does not apply to it.
        OptionError: there is no such device.
        WeightsError: weights are missing or damaged.
    """
    resolved = resolve_preset(preset, base, method, adapter, face_pack, memory)
    target = select_device(device)
    check_models(resolved)
    loaded_adapter = load_adapter(resolved, target)
    # hashes its files, so that a missing one is reported before the base is loaded
    deferred = defer_extractor(resolved, target, loaded_adapter)
    pipe = load_pipeline(resolved, target)
    return Studio(pipe, loaded_adapter, extractor or deferred, resolved)
