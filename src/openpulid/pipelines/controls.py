"""The ControlNets of a request: their files, their control images, and their use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from openpulid.errors import WeightsError
from openpulid.io.images import open_image
from openpulid.io.networks import check_complete, find_weights, read_config
from openpulid.methods.control_maps.recognition import ControlKind, is_control_map
from openpulid.methods.controlnet import ControlNet, require_controlnet
from openpulid.methods.controlnet_flux import FluxControlNet
from openpulid.pipelines.control_images import detect_map, find_detectors
from openpulid.pipelines.memory_levels import Level, find_network, place_controlnet
from openpulid.pipelines.published_controls import PUBLISHED_CONTROLS
from openpulid.pipelines.request_fields import RequestError, literal
from openpulid.pipelines.request_inputs import Control
from openpulid.pipelines.weights import resolve_path

MODES: dict[ControlKind, int] = {"edges": 0, "depth": 2, "pose": 4}
"""Numbers of the kinds in ControlNets for FLUX with a mode embedding (InstantX, Shakker Labs)."""


class ControlNetFiles:
    """A ControlNet for SDXL or FLUX in diffusers' format, which is loaded when it is first used.

    Args:
        path: the folder.

    Attributes:
        is_flux: whether it is for FLUX.
        has_modes: whether it is a union of several kinds that needs the mode.

    Raises:
        WeightsError: the folder contains no ControlNet, or its weights are not complete.
    """

    def __init__(self, path: Path) -> None:
        require_controlnet(path)
        config = read_config(path)
        for name in find_weights(path).names:
            check_complete(path / name)
        self.path = path
        self.is_flux = config.get("_class_name") == "FluxControlNetModel"
        self.has_modes = self.is_flux and config.get("num_mode") is not None

    @cached_property
    def network(self) -> ControlNet | FluxControlNet:
        """The ControlNet; it is loaded now if it has not been used yet."""
        return FluxControlNet.load(self.path) if self.is_flux else ControlNet.load(self.path)


@dataclass(frozen=True, eq=False)
class ControlInput:
    """The files of a `Control`.

    Attributes:
        files: of the ControlNet; several controls can share them.
        image: RGB, of the kind that the ControlNet reads, unless a map is missing.
        options: of `use`.
        name: how messages call the image.
        missing_map: what has yet to be detected in the image.
    """

    files: ControlNetFiles
    image: Image.Image
    options: Mapping[str, Any]
    name: str = "the control image"
    missing_map: ControlKind | None = None

    def check(self, base: str) -> None:
        """Check that the ControlNet is for the architecture of the base model.

        Args:
            base: name of that architecture, see `ModelSet.base_name`.

        Raises:
            WeightsError: it is for another architecture.
        """
        architecture = "FLUX.1" if self.files.is_flux else "SDXL"
        if (architecture == "FLUX.1") != (base == "FLUX.1"):
            raise WeightsError(
                f"{self.files.path} is a ControlNet for {architecture}, and the base model is "
                f"{base}; use a ControlNet for that."
            )

    def with_map(self) -> ControlInput:
        """Detect what is missing in the image. Raises as `detect_map`."""
        if self.missing_map is None:
            return self
        image = detect_map(self.missing_map, self.image, self.name)
        return replace(self, image=image, missing_map=None)


def open_controls(
    controls: Sequence[Control], time_limit: float | None = None
) -> tuple[ControlInput, ...]:
    """Open the files of ControlNets; no network is loaded, and nothing is detected in the images.

    Each ControlNet is loaded once later, also if several controls name it.

    Args:
        controls: of a request.
        time_limit: seconds for each image, as for `open_image`.

    Raises:
        ImageError: a file is not an image.
        RequestError: a ControlNet needs the kind.
        WeightsError: a ControlNet, or what detects its control image, is missing or cut short.
    """
    paths = [resolve_path(control.model) for control in controls]
    images = [open_image(control.image, min_side=1, time_limit=time_limit) for control in controls]
    files = {path: ControlNetFiles(path) for path in paths}
    inputs = []
    for number, (control, path, image) in enumerate(zip(controls, paths, images, strict=True)):
        options: dict[str, Any] = {
            "scale": control.scale,
            "start": control.start,
            "end": control.end,
        }
        if files[path].has_modes:
            kind = find_kind(control)
            if kind is None:
                raise RequestError(
                    f"{literal(control.model)} serves several kinds of control images; set {{0}} "
                    "to edges, depth or pose.",
                    f"controls.{number}.kind",
                )
            options["mode"] = MODES[kind]
        if control.is_map is False and find_kind(control) is None:
            raise RequestError(
                "what is to be detected in the image of {0}? Set {1} to edges, depth or pose.",
                f"controls.{number}.model",
                f"controls.{number}.kind",
            )
        missing_map = find_missing_map(control, image)
        inputs.append(ControlInput(files[path], image, options, control.image, missing_map))
    return tuple(inputs)


def find_kind(control: Control) -> ControlKind | None:
    """Return what the control image of a ControlNet shows; None if nobody says it."""
    published = PUBLISHED_CONTROLS.get(control.model)
    return control.kind or (None if published is None else published.kind)


def find_missing_map(control: Control, image: Image.Image) -> ControlKind | None:
    """Return what must be detected in an image; None if it is the control image already.

    Args:
        control: of a request.
        image: its image, RGB.

    Raises:
        WeightsError: what detects the control image is not installed.
    """
    kind = find_kind(control)
    if kind is None or control.is_map:
        return None
    if control.is_map is None and is_control_map(kind, image):
        return None
    find_detectors(kind)
    return kind


@contextmanager
def use_controls(controls: Sequence[ControlInput], pipe: Any, level: Level) -> Iterator[None]:
    """Let a pipeline follow ControlNets while this is open.

    Args:
        controls: the ControlNets, with their control images.
        pipe: the pipeline.
        level: memory level of the pipeline.

    Raises:
        OptionError: a ControlNet is for another base model.
        WeightsError: a ControlNet is damaged.
    """
    with ExitStack() as stack:
        for control in controls:
            net = control.files.network
            net.attach(pipe)
            stack.callback(net.detach, pipe)
            _place(net, pipe, level)
            stack.enter_context(net.use(control.image, **control.options))
        yield


def _place(net: ControlNet | FluxControlNet, pipe: Any, level: Level) -> None:
    """Keep a ControlNet as the memory level says, unless another control has done so."""
    if not net.is_placed and level.network != "resident":
        net.model.to(find_network(pipe).dtype)
        place_controlnet(net.model, level, pipe._execution_device)
        net.is_placed = True
