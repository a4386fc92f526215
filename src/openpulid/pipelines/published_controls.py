"""The published ControlNets: their base model, and the kind of their control image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from openpulid.methods.control_maps.recognition import ControlKind


@dataclass(frozen=True)
class PublishedControl:
    """A ControlNet of `io.hub.WEIGHTS`.

    Attributes:
        family: architecture of the base model.
        kind: what its control image shows; None for a union of several kinds.
    """

    family: Literal["sdxl", "flux"]
    kind: ControlKind | None


PUBLISHED_CONTROLS = {
    "control-edges": PublishedControl("sdxl", "edges"),
    "control-depth": PublishedControl("sdxl", "depth"),
    "control-pose": PublishedControl("sdxl", "pose"),
    "control-flux-edges": PublishedControl("flux", "edges"),
    "control-flux-depth": PublishedControl("flux", "depth"),
    "control-flux-union": PublishedControl("flux", None),
}
"""By their names in `io.hub.WEIGHTS`."""
