"""Nodes that read, save and compare identities."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import torch
from comfy_api.latest import io, ui

from .folders import (
    DEFAULT_PACK,
    IDENTITIES,
    MINIATURE,
    OPEN_PACK,
    find_face_pack,
    identity_output_folder,
    list_face_packs,
    list_identities,
)
from .packages import explain_missing_packages

CATEGORY = "openpulid"
ORDERS = ("large-small", "small-large", "left-right", "right-left", "top-bottom", "bottom-top")
FUSIONS = ("concat", "mean", "norm_id", "max_norm")
MAX_IMAGES = 4

FaceModels = io.Custom("OPENPULID_FACE_MODELS")
PulidIdentity = io.Custom("OPENPULID_IDENTITY")


def read_faces(extractor: Any, batches: Sequence[torch.Tensor | None]) -> Any:
    """Detect the faces in batches (B, H, W, 3) of reference images.

    Raises:
        FaceError: An image has no face; the message names what was tried.
    """
    from openpulid.identity.reference import ReferenceFaces, ReferenceImage
    from openpulid.io.image_grid import to_pil

    images = []
    for batch in batches:
        if batch is not None:
            images += to_pil(batch[..., :3].movedim(-1, 1))
    references = [
        ReferenceImage(f"image {number}", image) for number, image in enumerate(images, start=1)
    ]
    return ReferenceFaces.detect(extractor, references)


def image_inputs() -> list[Any]:
    """Return the inputs for reference images; images of one size may be a batch."""
    further = [
        io.Image.Input(f"image_{number}", optional=True) for number in range(2, MAX_IMAGES + 1)
    ]
    return [io.Image.Input("image"), *further]


def face_inputs() -> list[Any]:
    """Return the inputs that select a face."""
    return [
        io.Int.Input(
            "face_index",
            default=0,
            min=0,
            max=100,
            tooltip="Which face of an image with several, counted from 0 in face_order.",
        ),
        io.Combo.Input("face_order", options=list(ORDERS), default="large-small"),
    ]


class LoadFaceModels(io.ComfyNode):
    """Loads face detector, face recognition model and vision encoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return io.Schema(
            node_id="OpenPulidLoadFaceModels",
            display_name="Load face models",
            category=CATEGORY,
            description="Load the models that read faces: an insightface pack of "
            "models/insightface/models, or the one that `pulid weights get detector arcface "
            "parsing eva` installs, with EVA02-CLIP. For an adapter of `pulid train --faces "
            "open`, choose open.",
            inputs=[
                io.Combo.Input("pack", options=list_face_packs(), default=DEFAULT_PACK),
                io.Combo.Input("device", options=["default", "cpu"], default="default"),
            ],
            outputs=[FaceModels.Output(display_name="face_models")],
        )

    @classmethod
    @explain_missing_packages
    def execute(cls, pack: str, device: str) -> io.NodeOutput:
        """Load the models."""
        from openpulid.pipelines.factory import load_extractor
        from openpulid.pipelines.selection import resolve_preset

        if pack == MINIATURE:
            preset = resolve_preset("mini")
        elif pack == OPEN_PACK:
            preset = resolve_preset("sdxl", face_pack="open")
        else:
            preset = resolve_preset("sdxl", face_pack=find_face_pack(pack))
        where = "cpu" if device == "cpu" else comfy.model_management.get_torch_device()
        return io.NodeOutput(load_extractor(preset, where))


class IdentityFromImages(io.ComfyNode):
    """Extracts an identity from reference images."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return io.Schema(
            node_id="OpenPulidIdentity",
            display_name="Identity from images",
            category=CATEGORY,
            description="Extract one person's identity from one or several reference images. An "
            "image without a face is an error that names what was tried.",
            inputs=[
                FaceModels.Input("face_models"),
                *image_inputs(),
                *face_inputs(),
                io.Combo.Input(
                    "fusion",
                    options=list(FUSIONS),
                    default="concat",
                    tooltip="How several images are combined: all of them (concat), their mean, "
                    "the mean weighted by clarity (norm_id), or the clearest one (max_norm).",
                ),
            ],
            outputs=[PulidIdentity.Output(display_name="identity")],
        )

    @classmethod
    @explain_missing_packages
    def execute(
        cls,
        face_models: Any,
        image: torch.Tensor,
        face_index: int,
        face_order: str,
        fusion: str,
        image_2: torch.Tensor | None = None,
        image_3: torch.Tensor | None = None,
        image_4: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        """Extract the identity."""
        faces = read_faces(face_models, [image, image_2, image_3, image_4])
        return io.NodeOutput(faces.identity(face_index, face_order, fusion))


class LoadIdentity(io.ComfyNode):
    """Loads an identity file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return io.Schema(
            node_id="OpenPulidLoadIdentity",
            display_name="Load identity",
            category=CATEGORY,
            description="Load an identity of Save identity or `pulid identify`, from "
            "models/pulid_identities or output/identities.",
            inputs=[io.Combo.Input("file", options=list_identities())],
            outputs=[PulidIdentity.Output(display_name="identity")],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str) -> float:
        """Return when the file was changed, so that a new one is read."""
        path = folder_paths.get_full_path(IDENTITIES, file)
        return 0.0 if path is None else Path(path).stat().st_mtime

    @classmethod
    @explain_missing_packages
    def execute(cls, file: str) -> io.NodeOutput:
        """Load the file."""
        from openpulid.identity.identity import Identity

        return io.NodeOutput(Identity.load(folder_paths.get_full_path_or_raise(IDENTITIES, file)))


class SaveIdentity(io.ComfyNode):
    """Saves an identity."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return io.Schema(
            node_id="OpenPulidSaveIdentity",
            display_name="Save identity",
            category=CATEGORY,
            description="Save an identity to output/identities. It is biometric data: only you can "
            "read the file. An existing file is never overwritten, and a name of "
            "models/pulid_identities gets a number.",
            inputs=[
                PulidIdentity.Input("identity"),
                io.String.Input("name", default="identity"),
            ],
            outputs=[PulidIdentity.Output(display_name="identity")],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, name: str | None = None) -> bool | str:
        """Check the name before the workflow runs."""
        problem = None if name is None else describe_bad_name(name)
        return problem or True

    @classmethod
    @explain_missing_packages
    def execute(cls, identity: Any, name: str) -> io.NodeOutput:
        """Write the file."""
        from openpulid.errors import OptionError

        if problem := describe_bad_name(name):  # an input from another node is not validated
            raise OptionError(problem)
        folder = identity_output_folder()
        folder.mkdir(parents=True, exist_ok=True)
        path = find_free_path(folder, name)
        identity.save(path)
        return io.NodeOutput(identity, ui=ui.PreviewText(f"saved as {path.name}"))


def describe_bad_name(name: str) -> str | None:
    """Return why an identity cannot have a name; None if it can."""
    if name.strip() and Path(name).name == name and "\\" not in name:
        return None
    return f"the name of an identity must be a file name without a folder; got {name!r}."


def find_free_path(folder: Path, name: str) -> Path:
    """Return NAME.safetensors, or the first NAME_2.safetensors, ... that does not exist.

    Nor does one in another folder of *Load identity*, which lists names without folders.
    """
    stem = name.removesuffix(".safetensors")
    path = folder / f"{stem}.safetensors"
    number = 2
    while path.exists() or folder_paths.get_full_path(IDENTITIES, path.name):
        path = folder / f"{stem}_{number}.safetensors"
        number += 1
    return path


class IdentitySimilarity(io.ComfyNode):
    """Compares two identities."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return io.Schema(
            node_id="OpenPulidSimilarity",
            display_name="Identity similarity",
            category=CATEGORY,
            description="Cosine similarity of two identities' faces: -1 to 1. The face models must "
            "be those that produced both.",
            inputs=[
                FaceModels.Input("face_models"),
                PulidIdentity.Input("identity"),
                PulidIdentity.Input("other"),
            ],
            outputs=[io.Float.Output(display_name="similarity")],
            is_output_node=True,
        )

    @classmethod
    @explain_missing_packages
    def execute(cls, face_models: Any, identity: Any, other: Any) -> io.NodeOutput:
        """Compute the similarity."""
        from openpulid.identity.similarity import compare_identities

        for one in (identity, other):
            one.require(face_models.models)
        similarity = compare_identities(face_models, identity, other)
        return io.NodeOutput(similarity, ui=ui.PreviewText(f"{similarity:.3f}"))


class FacePreview(io.ComfyNode):
    """Shows the faces in reference images."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return io.Schema(
            node_id="OpenPulidFacePreview",
            display_name="Face preview",
            category=CATEGORY,
            description="Show the detected faces with their numbers, and the crops that the face "
            "models receive.",
            inputs=[FaceModels.Input("face_models"), *image_inputs(), *face_inputs()],
            outputs=[io.Image.Output(display_name="preview"), io.String.Output("description")],
        )

    @classmethod
    @explain_missing_packages
    def execute(
        cls,
        face_models: Any,
        image: torch.Tensor,
        face_index: int,
        face_order: str,
        image_2: torch.Tensor | None = None,
        image_3: torch.Tensor | None = None,
        image_4: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        """Draw the faces."""
        from openpulid.io.image_grid import to_tensor

        faces = read_faces(face_models, [image, image_2, image_3, image_4])
        sheet = to_tensor([faces.draw(face_index, face_order)]).movedim(1, -1)
        return io.NodeOutput(sheet, "\n".join(faces.describe(face_order)))
