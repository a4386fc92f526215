"""Nodes for other methods than PuLID: InstantID, FaceID and PhotoMaker."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .adapters import ApplyOptions
from .folders import list_face_packs, list_method_files
from .methods import (
    METHODS,
    apply_identity_net,
    apply_method,
    encode_prompt,
    load_face_models,
    load_method,
)
from .nodes_adapter import CATEGORY, ApplyNode, mask_input, strength_inputs
from .nodes_identity import FaceModels, PulidIdentity
from .packages import explain_missing_packages

METHOD_PACK = "of the method"

Method = io.Custom("OPENPULID_METHOD")


class LoadMethod(io.ComfyNode):
    """Loads the adapter of another method."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return io.Schema(
            node_id="OpenPulidLoadMethod",
            display_name="Load method",
            category=CATEGORY,
            description="Load InstantID, FaceID or PhotoMaker for SDXL from models/instantid, "
            "models/ipadapter or models/photomaker.",
            inputs=[
                io.Combo.Input("method", options=list(METHODS)),
                io.Combo.Input("file", options=list_method_files()),
            ],
            outputs=[Method.Output(display_name="method")],
        )

    @classmethod
    @explain_missing_packages
    def execute(cls, method: str, file: str) -> io.NodeOutput:
        """Load the file."""
        return io.NodeOutput(load_method(method, file))


class LoadMethodFaceModels(io.ComfyNode):
    """Loads the models that read faces for another method."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return io.Schema(
            node_id="OpenPulidLoadMethodFaceModels",
            display_name="Load face models of a method",
            category=CATEGORY,
            description="Load the models that read faces for InstantID, FaceID or PhotoMaker. "
            "`pulid weights get detector arcface parsing eva` installs those of InstantID, "
            "`pulid weights get detector buffalo-l` those of FaceID and PhotoMaker v2; FaceID Plus "
            "also needs clip-h. Connect the result to Identity from images.",
            inputs=[
                Method.Input("method"),
                io.Combo.Input("pack", options=[METHOD_PACK, *list_face_packs(is_photo=True)]),
            ],
            outputs=[FaceModels.Output(display_name="face_models")],
        )

    @classmethod
    @explain_missing_packages
    def execute(cls, method: Any, pack: str) -> io.NodeOutput:
        """Load the models."""
        return io.NodeOutput(load_face_models(method, None if pack == METHOD_PACK else pack))


class ApplyMethod(ApplyNode):
    """Shows an identity with another method."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return io.Schema(
            node_id="OpenPulidApplyMethod",
            display_name="Apply method",
            category=CATEGORY,
            description="Show an identity in the images of an SDXL model with InstantID, FaceID or "
            "PhotoMaker. InstantID also needs Apply IdentityNet, PhotoMaker also its prompt.",
            inputs=[
                io.Model.Input("model"),
                Method.Input("method"),
                PulidIdentity.Input("identity"),
                *strength_inputs(),
                mask_input(),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    @explain_missing_packages
    def execute(
        cls,
        model: Any,
        method: Any,
        identity: Any,
        scale: float,
        start: float,
        end: float,
        mask: Any = None,
    ) -> io.NodeOutput:
        """Patch a clone of the model."""
        options = ApplyOptions(scale, start, end, mask=mask)
        return io.NodeOutput(apply_method(model, method, identity, options))


class ApplyIdentityNet(ApplyNode):
    """Adds InstantID's ControlNet to the conditioning."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return io.Schema(
            node_id="OpenPulidApplyIdentityNet",
            display_name="Apply IdentityNet (InstantID)",
            category=CATEGORY,
            description="Add InstantID's ControlNet, which reads the identity and places the face "
            "at the landmarks of the reference image, or of another identity's.",
            inputs=[
                Method.Input("method"),
                PulidIdentity.Input("identity"),
                io.ControlNet.Input("control_net"),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                io.Latent.Input("latent", tooltip="The size of the image is read from it."),
                *strength_inputs(),
                PulidIdentity.Input(
                    "pose",
                    optional=True,
                    tooltip="Identity of an image whose landmarks place the face.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
            ],
        )

    @classmethod
    @explain_missing_packages
    def execute(
        cls,
        method: Any,
        identity: Any,
        control_net: Any,
        positive: Any,
        negative: Any,
        latent: Any,
        scale: float,
        start: float,
        end: float,
        pose: Any = None,
    ) -> io.NodeOutput:
        """Extend both conditionings."""
        options = ApplyOptions(scale, start, end)
        changed = apply_identity_net(
            method, identity, pose or identity, control_net, (positive, negative), latent, options
        )
        return io.NodeOutput(*changed)


class PhotoMakerPrompt(io.ComfyNode):
    """Encodes a prompt with PhotoMaker's identity."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return io.Schema(
            node_id="OpenPulidPhotoMakerPrompt",
            display_name="PhotoMaker prompt",
            category=CATEGORY,
            description="Encode a prompt whose class word, such as woman, carries the identity. "
            "ComfyUI's own PhotoMaker Encode reads version 1 and one image; this node also reads "
            "version 2 and several images. Weights of words are ignored.",
            inputs=[
                io.Clip.Input("clip"),
                Method.Input("method"),
                PulidIdentity.Input("identity"),
                io.String.Input("text", multiline=True, default="a photo of a woman img"),
                io.Float.Input(
                    "start",
                    default=0.2,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Fraction of the schedule that has the prompt without the identity.",
                ),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    @explain_missing_packages
    def execute(
        cls, clip: Any, method: Any, identity: Any, text: str, start: float
    ) -> io.NodeOutput:
        """Encode the prompt without and with the identity."""
        return io.NodeOutput(encode_prompt(clip, method, identity, text, start))
