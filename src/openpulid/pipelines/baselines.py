"""The other methods: how they differ from PuLID on the same base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from openpulid.errors import OptionError


@dataclass(frozen=True)
class Baseline:
    """How another method differs from PuLID on the same base.

    Attributes:
        scale: identity scale that its authors recommend.
        start: fraction of the schedule from which it acts.
        models: fields of `ModelSet` that differ.
        unused: options of SDXL without effect.
    """

    scale: float
    start: float = 0.0
    models: Mapping[str, Any] = field(default_factory=dict)
    unused: frozenset[str] = frozenset()


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


TUNED_METHODS: dict[str, Baseline] = {
    "custom-diffusion": Baseline(1.0),
    "dreambooth": Baseline(1.0, unused=frozenset(("start", "end"))),
    "lora": Baseline(1.0),
    "textual-inversion": Baseline(1.0, unused=frozenset(("scale", "start", "end"))),
}
"""Methods that `pulid tune` tunes on images of one person; the adapter file has the person."""

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
    **TUNED_METHODS,
}
"""Other methods on SDXL. The published adapter of each has the method's name."""

MINI_BASELINES: dict[str, Baseline] = {
    "faceid": Baseline(1.0),
    "instantid": Baseline(1.0),
    "photomaker": Baseline(1.0, start=0.2, models=_PHOTOMAKER),
    **TUNED_METHODS,
}
"""Other methods on the miniature. All but PhotoMaker use the miniature's own extractor."""

MINI_ADAPTERS = {
    "faceid": "faceid.safetensors",
    "instantid": "instantid",
    "photomaker": "photomaker.safetensors",
}
"""Adapters of the miniature's baselines, in the directory of its weights."""


def find_adapter(method: str, weights: Path | None) -> Path | str:
    """Return the adapter of another method, which need not exist.

    Args:
        method: name of the method.
        weights: directory of the miniature's weights; None for the published adapter.

    Raises:
        OptionError: the method is tuned on each person.
    """
    if method in TUNED_METHODS:
        raise OptionError(
            f"{method} needs a file of the person: `pulid tune {method}` writes it, and --adapter "
            "names it."
        )
    return method if weights is None else weights / MINI_ADAPTERS[method]
