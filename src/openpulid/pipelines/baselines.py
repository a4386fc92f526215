"""The other methods: how they differ from PuLID on the same base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Baseline:
    """How another method differs from PuLID on the same base.

    Attributes:
        scale: identity scale that its authors recommend.
        start: fraction of the schedule from which it acts.
        models: fields of `ModelSet` that differ.
    """

    scale: float
    start: float = 0.0
    models: Mapping[str, Any] = field(default_factory=dict)


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


_PHOTOMAKER = _clip(clip_input="image", adapter_has_vision_encoder=True)

BASELINES: dict[str, Baseline] = {
    "faceid": Baseline(1.0, models=_clip("buffalo-l")),
    "faceid-plus": Baseline(1.0, models=_clip("buffalo-l", "clip-h", "face")),
    "instantid": Baseline(0.8),
    "ip-adapter": Baseline(0.6, models=_clip(None, "clip-h", "image")),
    "ip-adapter-plus": Baseline(0.6, models=_clip(None, "clip-h", "image")),
    "ip-adapter-plus-face": Baseline(0.6, models=_clip(None, "clip-h", "face")),
    "photomaker": Baseline(1.0, start=0.2, models=_PHOTOMAKER),
    "photomaker-v2": Baseline(1.0, start=0.2, models={**_PHOTOMAKER, "recognition": "buffalo-l"}),
}
"""Other methods on SDXL. The published adapter of each has the method's name."""

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
