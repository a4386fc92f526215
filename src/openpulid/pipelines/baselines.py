"""The other methods: how they differ from PuLID on the same base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from openpulid.errors import OptionError
from openpulid.pipelines.model_set import BASE_NAMES, Family, ModelSet


@dataclass(frozen=True)
class Baseline:
    """How another method differs from PuLID on the same base.

    Attributes:
        scale: identity scale that its authors recommend.
        start: fraction of the schedule from which it acts.
        models: fields of `ModelSet` that differ.
        family: architecture of the base models that it supports.
    """

    scale: float
    start: float = 0.0
    models: Mapping[str, Any] = field(default_factory=dict)
    family: Family = "sdxl"


def _clip(
    recognition: str | None = None,
    vision_encoder: str | None = None,
    clip_input: Literal["image", "face"] | None = None,
    adapter_has_vision_encoder: bool = False,
) -> dict[str, Any]:
    """Return the models of a method that uses the "clip" extractor."""
    return {
        "extractor": "clip",
        "recognition": recognition,
        "vision_encoder": vision_encoder,
        "face_parsing": None,
        "clip_input": clip_input,
        "adapter_has_vision_encoder": adapter_has_vision_encoder,
    }


_INFINITEYOU = _clip("arcface-loss")
_PHOTOMAKER = _clip(clip_input="image", adapter_has_vision_encoder=True)

BASELINES: dict[str, Baseline] = {
    "faceid": Baseline(1.0, models=_clip("buffalo-l")),
    "faceid-plus": Baseline(1.0, models=_clip("buffalo-l", "clip-h", "face")),
    "infiniteyou": Baseline(1.0, models=_INFINITEYOU, family="flux"),
    "infiniteyou-sim": Baseline(1.0, models=_INFINITEYOU, family="flux"),
    "instantid": Baseline(0.8),
    "ip-adapter": Baseline(0.6, models=_clip(None, "clip-h", "image")),
    "ip-adapter-plus": Baseline(0.6, models=_clip(None, "clip-h", "image")),
    "ip-adapter-plus-face": Baseline(0.6, models=_clip(None, "clip-h", "face")),
    "photomaker": Baseline(1.0, start=0.2, models=_PHOTOMAKER),
    "photomaker-v2": Baseline(1.0, start=0.2, models={**_PHOTOMAKER, "recognition": "buffalo-l"}),
}
"""Other methods on full-size bases. The published adapter of each has the method's name."""

MINI_BASELINES: dict[str, Baseline] = {
    "faceid": Baseline(1.0),
    "instantid": Baseline(1.0),
    "photomaker": Baseline(1.0, start=0.2, models=_PHOTOMAKER),
}
"""Other methods on the miniature. All but PhotoMaker use the miniature's own extractor."""

MINI_ADAPTERS = {
    "faceid": "faceid.safetensors",
    "instantid": "instantid",
    "photomaker": "photomaker.safetensors",
}
"""Adapters of the miniature's baselines, in the directory of its weights."""

PULID_OPTIONS = frozenset(
    ("projection", "num_zero", "start_step", "pose_from_prompt", "style_image")
)
"""Options that only PuLID has."""


def find_baseline(method: str, models: ModelSet, preset: str) -> Baseline:
    """Return how another method differs from PuLID.

    Args:
        method: one of `BASELINES`.
        models: of a preset with PuLID.
        preset: name of the preset.

    Raises:
        OptionError: The method does not support the base.
    """
    baseline = BASELINES[method]
    if baseline.family != models.family:
        raise OptionError(
            f"{method} is only available for {BASE_NAMES[baseline.family].removesuffix('.1')} "
            f"presets, and {preset} is not one; choose another preset or PuLID."
        )
    if not models.is_miniature:
        return baseline
    if method not in MINI_BASELINES:
        raise OptionError(
            f"{method} is not available for the miniature; "
            f"available: pulid, {', '.join(MINI_BASELINES)}."
        )
    return MINI_BASELINES[method]
