"""The ControlNets of a request: their files, their control images, and their use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from openpulid.errors import OptionError, WeightsError
from openpulid.io.images import open_image
from openpulid.io.networks import read_config
from openpulid.methods.control_maps.depth import estimate_depth
from openpulid.methods.control_maps.edges import canny_edges
from openpulid.methods.control_maps.pose import detect_poses, draw_poses
from openpulid.methods.control_maps.recognition import ControlKind, is_control_map
from openpulid.methods.controlnet import ControlNet, require_controlnet
from openpulid.methods.controlnet_flux import FluxControlNet
from openpulid.pipelines.factory import no_progress_bars
from openpulid.pipelines.flux_memory import place_controlnet
from openpulid.pipelines.published_controls import PUBLISHED_CONTROLS
from openpulid.pipelines.request_fields import RequestError, literal
from openpulid.pipelines.request_inputs import Control
from openpulid.pipelines.weights import resolve_path

MODES: dict[ControlKind, int] = {"edges": 0, "depth": 2, "pose": 4}
"""Numbers of the kinds in ControlNets for FLUX with a mode embedding (InstantX, Shakker Labs)."""


@dataclass(frozen=True, eq=False)
class ControlInput:
    """The files of a `Control`.

    Attributes:
        path: of the ControlNet.
        net: the ControlNet; several controls can share it.
        image: the control image, of the kind that the ControlNet reads.
        options: of `use`.
    """

    path: Path
    net: ControlNet | FluxControlNet
    image: Image.Image
    options: Mapping[str, Any]

    def check(self, base: str) -> None:
        """Check that the ControlNet is for the architecture of the base model.

        Args:
            base: name of that architecture, see `ModelSet.base_name`.

        Raises:
            WeightsError: it is for another architecture.
        """
        architecture = "FLUX.1" if isinstance(self.net, FluxControlNet) else "SDXL"
        if (architecture == "FLUX.1") != (base == "FLUX.1"):
            raise WeightsError(
                f"{self.path} is a ControlNet for {architecture}, and the base model is {base}; "
                "use a ControlNet for that."
            )


def open_controls(
    controls: Sequence[Control], time_limit: float | None = None
) -> tuple[ControlInput, ...]:
    """Open the files of ControlNets, and detect what their control images show.

    Each ControlNet is loaded once, also if several controls name it.

    Args:
        controls: of a request.
        time_limit: seconds for each image, as for `open_image`.

    Raises:
        ImageError: a file is not an image.
        OptionError: no person is in the image for a pose, or a ControlNet needs the kind.
        WeightsError: a ControlNet, or what detects its control image, is missing or damaged.
    """
    # all files are found before the first one is loaded
    paths = [resolve_path(control.model) for control in controls]
    images = [
        prepare_image(control, open_image(control.image, min_side=1, time_limit=time_limit))
        for control in controls
    ]
    nets = {path: load_controlnet(path) for path in paths}
    inputs = []
    for number, (control, path, image) in enumerate(zip(controls, paths, images, strict=True)):
        net = nets[path]
        options: dict[str, Any] = {
            "scale": control.scale,
            "start": control.start,
            "end": control.end,
        }
        if isinstance(net, FluxControlNet) and net.has_modes:
            kind = find_kind(control)
            if kind is None:
                raise RequestError(
                    f"{literal(control.model)} serves several kinds of control images; set {{0}} "
                    "to edges, depth or pose.",
                    f"controls.{number}.kind",
                )
            options["mode"] = MODES[kind]
        inputs.append(ControlInput(path, net, image, options))
    return tuple(inputs)


def load_controlnet(path: Path) -> ControlNet | FluxControlNet:
    """Load a ControlNet for SDXL or FLUX from a folder in diffusers' format.

    Raises:
        WeightsError: the folder contains no ControlNet, or its weights are not complete.
    """
    require_controlnet(path)
    if read_config(path).get("_class_name") == "FluxControlNetModel":
        return FluxControlNet.load(path)
    return ControlNet.load(path)


def find_kind(control: Control) -> ControlKind | None:
    """Return what the control image of a ControlNet shows; None if nobody says it."""
    published = PUBLISHED_CONTROLS.get(control.model)
    return control.kind or (None if published is None else published.kind)


def prepare_image(control: Control, image: Image.Image) -> Image.Image:
    """Return the control image of an image: the image itself, if it is one already.

    Args:
        control: of a request.
        image: its image, RGB.

    Raises:
        OptionError: no person is in the image for a pose.
        WeightsError: what detects the control image is not installed, or damaged.
    """
    kind = find_kind(control)
    if kind is None or control.is_map:
        return image
    if control.is_map is None and is_control_map(kind, image):
        return image
    if kind == "edges":
        return canny_edges(image)
    if kind == "depth":
        path = resolve_path("depth-estimator")
        with no_progress_bars():
            return estimate_depth(image, path)
    detector, estimator = resolve_path("person-detector"), resolve_path("pose-estimator")
    with no_progress_bars():
        people = detect_poses(image, detector, estimator)
    if not len(people):
        raise OptionError(
            f"{control.image} shows no person whose pose could be detected; use another image, or "
            "the drawing of a pose."
        )
    return draw_poses(people, image.size)


@contextmanager
def use_controls(controls: Sequence[ControlInput], pipe: Any, memory: str) -> Iterator[None]:
    """Let a pipeline follow ControlNets while this is open.

    Args:
        controls: the ControlNets.
        pipe: the pipeline.
        memory: FLUX: memory level of the pipeline.

    Raises:
        OptionError: a ControlNet is for another base model.
    """
    with ExitStack() as stack:
        for control in controls:
            net = control.net
            net.attach(pipe)
            stack.callback(net.detach, pipe)
            if isinstance(net, FluxControlNet):
                _place(net, pipe, memory)
            stack.enter_context(net.use(control.image, **control.options))
        yield


def _place(net: FluxControlNet, pipe: Any, memory: str) -> None:
    """Keep a ControlNet as the memory level says, unless another control has done so."""
    if not net.is_placed and memory != "full":
        place_controlnet(net.model, memory, pipe._execution_device)
        net.is_placed = True
