"""Which weights go together, and the figures they work best with: plain functions that return a `Preset`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from openpulid.errors import OptionError
from openpulid.methods.pulid.projection import Projection

MINIATURE = Path(__file__).parent / "mini" / "weights"


@dataclass(frozen=True)
class Preset:
    """A base model, what finds and reads faces for it, the adapter, and the defaults of a generation."""

    name: str
    pipeline: Path  # folder of a StableDiffusionXLPipeline
    finder: Path
    recogniser: Path
    vision: Path
    adapter: Path
    unet: Path | None = None  # folder of a U-Net that replaces the pipeline's
    scheduler: Mapping[str, Any] = field(default_factory=dict)  # settings that differ from the pipeline's scheduler
    steps: int = 20
    guidance: float = 3.0
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    projection: Projection = "ortho_v2"
    num_zero: int = 0
    no_face: str = ""  # what to do when a picture shows no face that it knows


def mini(folder: Path = MINIATURE) -> Preset:
    """The miniature: 96 pixels, its own procedural people, trained by `pulid mini build`."""
    return Preset(
        name="mini",
        pipeline=folder / "pipeline",
        finder=folder / "finder.safetensors",
        recogniser=folder / "recogniser-encoder.safetensors",
        vision=folder / "vision.safetensors",
        adapter=folder / "pulid-stage1.safetensors",
        no_face="the preset mini knows only its own drawn people (`pulid world person` draws one), "
        "no photographs; those are for a preset of full size.",
    )


def mini_lightning(folder: Path = MINIATURE) -> Preset:
    """The miniature's student: four steps without guidance."""
    single = {"timestep_spacing": "trailing", "solver_order": 1}  # single first-order steps, as it was taught
    return replace(mini(folder), name="mini-lightning", unet=folder / "lightning", scheduler=single, steps=4, guidance=1.0)


PRESETS: dict[str, Callable[[], Preset]] = {"mini": mini, "mini-lightning": mini_lightning}


def find(name: str) -> Preset:
    """A preset by its name, or a folder that is laid out as the miniature's weights are.

    Raises:
        OptionError: neither.
    """
    if name in PRESETS:
        return PRESETS[name]()
    folder = Path(name)
    if (folder / "pipeline" / "model_index.json").is_file():
        return replace(mini(folder), name=str(folder))
    raise OptionError(
        f"{name!r} is neither a preset ({', '.join(PRESETS)}) nor a folder with a pipeline in it; name one of these."
    )
