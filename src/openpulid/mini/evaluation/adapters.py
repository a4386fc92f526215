"""The adapters that an evaluation of the miniature compares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from openpulid.methods.pulid import PuLID
from openpulid.pipelines.presets import MINIATURE
from openpulid.pipelines.studio import Studio

MODELS = ("stage1", "naive", "stage2", "stage3")
"""Adapters in the order of the table, if they exist."""


def find_adapters(weights: Path = MINIATURE, runs: Path = Path("runs/mini")) -> dict[str, Path]:
    """Return model -> file for all `MODELS` that are shipped in `weights` or trained in `runs`."""
    adapters = {}
    for model in MODELS:
        shipped = weights / f"pulid-{model}.safetensors"
        trained = runs / model / "adapter.safetensors"
        for file in (shipped, trained):
            if file.exists():
                adapters[model] = file
                break
    return adapters


def iterate_models(studio: Studio, adapters: Mapping[str, Path]) -> Iterator[tuple[str, Studio]]:
    """Yield the name of each model and a studio with its adapter."""
    for model, file in adapters.items():
        adapter = PuLID.load(file).to(studio.pipe.device)
        yield model, Studio(studio.pipe, adapter, studio.extractor, studio.preset)
