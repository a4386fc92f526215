"""The other methods: how they differ from PuLID on the same base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from openpulid.errors import OptionError
from openpulid.methods.registry import TUNED_METHODS, UNPUBLISHED_METHODS
from openpulid.pipelines.model_set import (
    FAMILIES,
    MINI_ADAPTERS,
    MINI_FLUX_ADAPTERS,
    MINI_LATENT_ENCODER,
    Family,
    ModelSet,
)


@dataclass(frozen=True)
class Baseline:
    """How another method differs from PuLID on the same base.

    Attributes:
        scale: identity scale that its authors recommend.
        start: fraction of the schedule from which it acts.
        models: fields of `ModelSet` that differ.
        family: architecture of the base models that it supports.
        unused: options of the base without effect.
    """

    scale: float
    start: float = 0.0
    models: Mapping[str, Any] = field(default_factory=dict)
    family: Family = "sdxl"
    unused: frozenset[str] = frozenset()

    @property
    def unsupported(self) -> frozenset[str]:
        """Options of PuLID on the same base without effect.

        Some methods read weights of the U-Net, which the memory levels of SDXL keep in 8 bits or on
        the host; none has been tested with them.
        """
        memory = frozenset(("memory",)) if self.family == "sdxl" else frozenset()
        return PULID_OPTIONS | self.unused | memory


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
_TUNED = {name: Baseline(1.0) for name in TUNED_METHODS} | {
    "dreambooth": Baseline(1.0, unused=frozenset(("start", "end"))),
    "textual-inversion": Baseline(1.0, unused=frozenset(("scale", "start", "end"))),
}
_PHOTOMAKER = _clip(clip_input="image", adapter_has_vision_encoder=True)
_UNPUBLISHED = {
    "elite": Baseline(1.0),
    "face0": Baseline(1.0),
    "fastcomposer": Baseline(1.0, start=0.2, models=_PHOTOMAKER),
    "photoverse": Baseline(1.0),
}
_W_PLUS = {"extractor": "e4e", "recognition": None, "vision_encoder": "e4e"}
_MINI_W_PLUS = {"extractor": "mini-latents", "recognition": None}
_MINI_INFINITEYOU = {"extractor": "mini-embedding", "vision_encoder": None}

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
    "w-plus": Baseline(1.0, start=0.2, models=_W_PLUS),
    **_TUNED,
    **_UNPUBLISHED,
}
"""Other methods on full-size bases. A published adapter has the method's name."""

MINI_BASELINES: dict[str, Baseline] = {
    "faceid": Baseline(1.0),
    "infiniteyou": Baseline(1.0, models=_MINI_INFINITEYOU, family="flux"),
    "instantid": Baseline(1.0),
    "photomaker": Baseline(1.0, start=0.2, models=_PHOTOMAKER),
    "w-plus": Baseline(1.0, start=0.2, models=_MINI_W_PLUS),
    **_TUNED,
    **_UNPUBLISHED,
}
"""Other methods on the miniature. PhotoMaker and FastComposer have a vision encoder of their own,
W+ Adapter an encoder of face latents, and InfiniteYou reads the face embedding alone; the others
use the miniature's extractor."""

PULID_OPTIONS = frozenset(
    ("projection", "num_zero", "compiled", "start_step", "pose_from_prompt", "style_image")
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
            f"{method} is only available for {FAMILIES[baseline.family].name.removesuffix('.1')} "
            f"presets, and {preset} is not one; choose another preset or PuLID."
        )
    if not models.is_miniature:
        return baseline
    if method not in MINI_BASELINES:
        names = [name for name, own in MINI_BASELINES.items() if own.family == models.family]
        raise OptionError(
            f"{method} is not available for the miniature; available: pulid, {', '.join(names)}."
        )
    baseline = MINI_BASELINES[method]
    if baseline.models.get("extractor") != "mini-latents":
        return baseline
    encoder = Path(models.detector).parent / MINI_LATENT_ENCODER
    return replace(baseline, models={**baseline.models, "vision_encoder": encoder})


def find_adapter(method: str, weights: Path | None) -> Path | str:
    """Return the adapter of another method, which need not exist.

    Args:
        method: name of the method.
        weights: directory of the miniature's weights; None for the published adapter.

    Raises:
        OptionError: the method is tuned on each person, or nobody has published its weights.
    """
    adapters = MINI_ADAPTERS | MINI_FLUX_ADAPTERS
    if weights is not None and method in adapters:
        return weights / adapters[method]
    if method in UNPUBLISHED_METHODS:
        raise OptionError(
            f"no weights of {method} for SDXL have been published; pass a file of your own with "
            "--adapter, or choose another method."
        )
    if method in TUNED_METHODS:
        raise OptionError(
            f"{method} needs a file of the person: `pulid tune {method}` writes it, and --adapter "
            "names it."
        )
    return method
