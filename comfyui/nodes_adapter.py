"""Nodes that load an adapter and apply it to a model."""

from __future__ import annotations

from typing import Any

import folder_paths
from comfy_api.latest import io

from .adapters import ApplyOptions, apply_adapter, check_options, load_adapter
from .folders import ADAPTERS, MINIATURE, list_adapters
from .nodes_identity import FaceModels, PulidIdentity, read_faces
from .packages import explain_missing_packages

CATEGORY = "openpulid"
PROJECTIONS = ("ortho_v2", "ortho", "none")

METHODS = {"fidelity": ("ortho_v2", 8), "style": ("ortho", 16), "neutral": ("none", 0)}
"""The names of earlier PuLID nodes for a projection and a number of zero tokens."""

MAX_SCALE = 5.0
MAX_NUM_ZERO = 1000

PulidAdapter = io.Custom("OPENPULID_ADAPTER")


class LoadPulid(io.ComfyNode):
    """Loads an adapter."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return io.Schema(
            node_id="OpenPulidLoad",
            display_name="Load PuLID",
            category=CATEGORY,
            description="Load a PuLID adapter for SDXL (v1, v1.1) or FLUX (0.9.x), or one that "
            "`pulid train` wrote, from models/pulid.",
            inputs=[io.Combo.Input("file", options=list_adapters())],
            outputs=[PulidAdapter.Output(display_name="pulid")],
        )

    @classmethod
    @explain_missing_packages
    def execute(cls, file: str) -> io.NodeOutput:
        """Load the file."""
        from openpulid.pipelines.presets import mini

        if file == MINIATURE:
            path = str(mini().models.adapter)
        else:
            path = folder_paths.get_full_path_or_raise(ADAPTERS, file)
        return io.NodeOutput(load_adapter(path, file))


def strength_inputs() -> list[Any]:
    """Return the inputs that say how strongly and when an identity acts."""
    return [scale_input(), *span_inputs()]


def scale_input() -> Any:
    """Return the input for the weight of an identity."""
    return io.Float.Input(
        "scale",
        default=0.8,
        min=0.0,
        max=MAX_SCALE,
        step=0.05,
        tooltip="Weight of the identity: 0.8 for SDXL, 1 for FLUX. 0 changes nothing.",
    )


def span_inputs() -> list[Any]:
    """Return the inputs for the part of the schedule in which an identity acts."""
    return [
        io.Float.Input(
            "start",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Fraction of the schedule at which the identity begins to act.",
        ),
        io.Float.Input(
            "end",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Fraction of the schedule at which the identity stops acting.",
        ),
    ]


def projection_inputs() -> list[Any]:
    """Return the inputs of SDXL's identity attention."""
    return [
        io.Combo.Input(
            "projection",
            options=list(PROJECTIONS),
            default="ortho_v2",
            tooltip="SDXL only. How the identity is added: without the part along the text's "
            "attention (ortho, ortho_v2), or unchanged (none).",
        ),
        io.Int.Input(
            "num_zero",
            default=20,
            min=0,
            max=MAX_NUM_ZERO,
            tooltip="SDXL only. Number of zero tokens next to the identity's; more of them weaken "
            "the identity.",
        ),
    ]


def mask_input() -> Any:
    """Return the input for the place of a person."""
    return io.Mask.Input(
        "mask",
        optional=True,
        tooltip="White where the identity may act. A batch of masks has one per image. For several "
        "people, apply PuLID once per person with a mask each.",
    )


@explain_missing_packages
def find_problem(
    scale: float | None = None,
    start: float | None = None,
    end: float | None = None,
    num_zero: int | None = None,
) -> bool | str:
    """Return a sentence on the first value that is out of range, or True. None is not checked.

    ComfyUI leaves minima and maxima of the inputs that `validate_inputs` names to the node.
    """
    from openpulid.errors import PulidError
    from openpulid.methods.pulid.sdxl_attention import AttentionOptions

    values = {"scale": scale, "start": start, "end": end}
    given = {name: value for name, value in values.items() if value is not None}
    for name, value, maximum in (
        ("scale", scale, MAX_SCALE),
        ("num_zero", num_zero, MAX_NUM_ZERO),
    ):
        if value is not None and value > maximum:
            return f"{name} must be at most {maximum:g}; got {value:g}."
    try:
        check_options(ApplyOptions(**{"scale": 1.0, **given}))
        AttentionOptions(num_zero=num_zero or 0)
    except PulidError as error:
        return str(error)
    return True


class ApplyNode(io.ComfyNode):
    """A node with inputs that say how an identity acts."""

    @classmethod
    def validate_inputs(
        cls,
        scale: float | None = None,
        start: float | None = None,
        end: float | None = None,
        num_zero: int | None = None,
    ) -> bool | str:
        """Check the values before the workflow runs; those of other nodes are None."""
        return find_problem(scale, start, end, num_zero)


class ApplyPulid(ApplyNode):
    """Shows an identity with a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return io.Schema(
            node_id="OpenPulidApply",
            display_name="Apply PuLID",
            category=CATEGORY,
            description="Show an identity in the images of an SDXL, FLUX, Chroma, Qwen-Image or "
            "Z-Image model. Apply it several times for several people, each with a mask.",
            inputs=[
                io.Model.Input("model"),
                PulidAdapter.Input("pulid"),
                PulidIdentity.Input("identity"),
                *strength_inputs(),
                *projection_inputs(),
                mask_input(),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    @explain_missing_packages
    def execute(
        cls,
        model: Any,
        pulid: Any,
        identity: Any,
        scale: float,
        start: float,
        end: float,
        projection: str,
        num_zero: int,
        mask: Any = None,
    ) -> io.NodeOutput:
        """Patch a clone of the model."""
        options = ApplyOptions(scale, start, end, projection, num_zero, mask)
        return io.NodeOutput(apply_adapter(model, pulid, identity, options))


class ApplyPulidToImages(ApplyNode):
    """Shows the person of reference images; takes the place of other packs' nodes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return io.Schema(
            node_id="OpenPulidApplyImages",
            display_name="Apply PuLID (reference images)",
            category=CATEGORY,
            description="Identity from images and Apply PuLID in one node. The node of workflows "
            "that were made with other PuLID nodes.",
            inputs=[
                io.Model.Input("model"),
                PulidAdapter.Input("pulid"),
                FaceModels.Input("face_models"),
                io.Image.Input("image"),
                io.Combo.Input(
                    "method",
                    options=[*METHODS, "custom"],
                    default="fidelity",
                    tooltip="SDXL only: a projection and a number of zero tokens. With custom, "
                    "those of the inputs below.",
                ),
                *strength_inputs(),
                *projection_inputs(),
                mask_input(),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    @explain_missing_packages
    def execute(
        cls,
        model: Any,
        pulid: Any,
        face_models: Any,
        image: Any,
        method: str,
        scale: float,
        start: float,
        end: float,
        projection: str,
        num_zero: int,
        mask: Any = None,
    ) -> io.NodeOutput:
        """Extract the identity, and patch a clone of the model."""
        projection, num_zero = METHODS.get(method, (projection, num_zero))
        identity = read_faces(face_models, [image]).identity(fusion="mean")
        options = ApplyOptions(scale, start, end, projection, num_zero, mask)
        return io.NodeOutput(apply_adapter(model, pulid, identity, options))
