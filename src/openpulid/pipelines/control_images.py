"""Detect edges, depth and poses in an image, with the installed weights."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from openpulid.errors import OptionError
from openpulid.methods.control_maps.depth import estimate_depth
from openpulid.methods.control_maps.edges import canny_edges
from openpulid.methods.control_maps.pose import detect_poses, draw_poses
from openpulid.methods.control_maps.recognition import ControlKind
from openpulid.pipelines.factory import no_progress_bars
from openpulid.pipelines.weights import resolve_path

DETECTORS: dict[ControlKind, tuple[str, ...]] = {
    "edges": (),
    "depth": ("depth-estimator",),
    "pose": ("person-detector", "pose-estimator"),
}
"""Published weights that detect a kind of control image."""


def find_detectors(kind: ControlKind) -> list[Path]:
    """Find the weights that detect a kind of control image; nothing is loaded.

    Raises:
        WeightsError: they are not installed.
    """
    return [resolve_path(name) for name in DETECTORS[kind]]


def detect_map(kind: ControlKind, image: Image.Image, name: str) -> Image.Image:
    """Detect the control image of an image.

    Args:
        kind: what the control image shows.
        image: RGB.
        name: how messages call the image.

    Returns:
        RGB, of the same size.

    Raises:
        OptionError: no person is in the image for a pose.
        WeightsError: what detects the control image is not installed, or damaged.
    """
    if kind == "edges":
        return canny_edges(image)
    detectors = find_detectors(kind)
    if kind == "depth":
        with no_progress_bars():
            return estimate_depth(image, detectors[0])
    with no_progress_bars():
        people = detect_poses(image, detectors[0], detectors[1])
    if not len(people):
        raise OptionError(
            f"{name} shows no person whose pose could be detected; use another image, or the "
            "drawing of a pose."
        )
    return draw_poses(people, image.size)
