"""The adapters that an evaluation of the miniature compares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from openpulid.errors import OptionError
from openpulid.pipelines.presets import MINIATURE, PRESETS, Preset, find_preset
from openpulid.pipelines.studio import Studio

MODELS = ("stage1", "naive", "stage2", "stage3")
"""Adapters in the order of the table, if they exist."""


def find_miniature(name: str) -> Preset:
    """Find a preset of the miniature.

    Raises:
        OptionError: there is no such preset, or it is not the miniature's.
    """
    preset = find_preset(name)
    if not preset.models.is_miniature:
        names = [other for other, build in PRESETS.items() if build().models.is_miniature]
        raise OptionError(
            f"the synthetic people need the miniature, not {name}: choose {', '.join(names)}."
        )
    return preset


def find_adapters(
    family: str = "sdxl", weights: Path = MINIATURE, runs: Path = Path("runs/mini")
) -> dict[str, Path]:
    """Return model -> file for all `MODELS` that are shipped in `weights` or trained in `runs`.

    Args:
        family: of the base model, "sdxl" or "flux".
        weights: folder of the miniature's weights.
        runs: folder of the trainings.
    """
    folder, prefix = (weights, "") if family == "sdxl" else (weights / family, f"{family}-")
    adapters = {}
    for model in MODELS:
        shipped = folder / f"pulid-{model}.safetensors"
        trained = runs / f"{prefix}{model}" / "adapter.safetensors"
        for file in (shipped, trained):
            if file.exists():
                adapters[model] = file
                break
    return adapters


def iterate_models(studio: Studio, adapters: Mapping[str, Path]) -> Iterator[tuple[str, Studio]]:
    """Yield the name of each model and a studio with its adapter."""
    adapter_class: Any = type(studio.adapter)
    for model, file in adapters.items():
        adapter = adapter_class.load(file).to(studio.pipe.device)
        yield model, Studio(studio.pipe, adapter, studio.extractor, studio.preset)
