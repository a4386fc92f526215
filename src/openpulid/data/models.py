"""The models with which a dataset is prepared, by their names."""

from __future__ import annotations

import torch

from openpulid.data.captioner import find_captioner
from openpulid.data.face_models import FaceModels, MiniFaceModels, PhotoFaceModels
from openpulid.data.options import PrepareOptions
from openpulid.identity.identity import hash_models
from openpulid.pipelines.presets import Preset
from openpulid.pipelines.selection import resolve_preset
from openpulid.pipelines.weights import require_weights, resolve_path


def check_models(options: PrepareOptions, needs_captioner: bool) -> dict[str, str]:
    """Check that all models are installed, before work that takes long.

    Args:
        options: see there.
        needs_captioner: whether images have no caption.

    Returns:
        Name -> hash of the face models.

    Raises:
        WeightsError: a model is missing; the message says how to get it.
    """
    models = _select_preset(options).models
    if options.captioner and needs_captioner:
        find_captioner(options.captioner)
    sources = [models.detector, models.recognition, models.face_parsing]
    return hash_models([resolve_path(source) for source in sources if source is not None])


def load_face_models(options: PrepareOptions, device: str | torch.device) -> FaceModels:
    """Load the face models.

    Raises:
        WeightsError: a file is missing or damaged.
    """
    models = _select_preset(options).models
    assert models.recognition is not None
    detector, recognition = resolve_path(models.detector), resolve_path(models.recognition)
    if options.is_miniature:
        return MiniFaceModels.load(detector, recognition, device)
    assert models.face_parsing is not None
    return PhotoFaceModels.load(detector, recognition, resolve_path(models.face_parsing), device)


def _select_preset(options: PrepareOptions) -> Preset:
    """Return the preset that has the face models."""
    if options.is_miniature:
        return resolve_preset("mini")
    preset = resolve_preset("sdxl", face_pack=options.faces or None)
    models = preset.models
    sources = (models.detector, models.recognition, models.face_parsing)
    require_weights(preset, [source for source in sources if source is not None])
    return preset
