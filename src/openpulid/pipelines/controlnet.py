"""ControlNets on the pipeline of a studio."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from openpulid.errors import OptionError

if TYPE_CHECKING:
    from openpulid.pipelines.studio import Studio


def use_controlnet(
    studio: Studio, name: str | None, picture: str | None, scale: float | None
) -> AbstractContextManager[Any]:
    """A ControlNet in use on a studio's pipeline, where one is named.

    Args:
        name: of published weights, or a folder. picture: what it is shown; edges are drawn of any.
        scale: 1 by default.
    """
    if name is None and picture is None and scale is None:
        return nullcontext()
    if name is None or picture is None:
        raise OptionError(
            "a ControlNet and what it is shown go together; give both, --control NAME --control-picture PICTURE."
        )
    if studio.preset.family != "sdxl":
        raise OptionError(
            f"{name} is for SDXL, and {studio.preset.name} is FLUX; leave --control out."
        )
    from openpulid.io.images import open_image
    from openpulid.methods.controlnet import ControlNet, canny_edges
    from openpulid.pipelines.factory import resolve_path

    shown = open_image(picture)
    control = ControlNet.load(resolve_path(name))
    control.attach(studio.pipe)
    return control.use(
        canny_edges(shown) if name == "control-edges" else shown,
        scale=1.0 if scale is None else scale,
    )
