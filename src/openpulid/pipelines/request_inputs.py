"""The parts of a request that name files: people, the initial image, ControlNets, add-ons."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from openpulid.methods.control_maps.recognition import ControlKind
from openpulid.pipelines.request_fields import (
    DEFAULT_FACE_ORDER,
    MAX_FILES,
    Box,
    Count,
    FaceOrder,
    FilePath,
    Fraction,
    LoraScale,
    RequestError,
    ResizeMode,
    Scale,
    Token,
)
from openpulid.pipelines.request_part import RequestPart


class Person(RequestPart):
    """A person to show: reference images or an identity file.

    Attributes:
        images: reference images of the person. Several are combined into one identity.
        identity: an identity file of `pulid identify`, instead of images.
        face_index: which face of an image with several, counted from 0 in `face_order`. By
            default the first, with a warning if there are several.
        face_order: how faces are counted.
        mask: an image that is white where the identity may act. By default everywhere.
        box: left, top, right and bottom of the region where the identity may act, as fractions of
            the image's sides, instead of a mask.
        scale: identity scale of this person; by default that of `IdentityOptions`.
    """

    files = ("images", "identity", "mask")

    images: tuple[FilePath, ...] = Field(default=(), max_length=MAX_FILES)
    identity: FilePath | None = None
    face_index: Count | None = None
    face_order: FaceOrder = DEFAULT_FACE_ORDER
    mask: FilePath | None = None
    box: Box | None = None
    scale: Scale | None = None

    @property
    def has_region(self) -> bool:
        """Whether the identity is restricted to a part of the image."""
        return self.mask is not None or self.box is not None

    @model_validator(mode="after")
    def _check_source(self) -> Person:
        if self.images and self.identity:
            raise RequestError("provide either images or an identity file, not both.")
        if self.mask and self.box:
            raise RequestError("provide either {0} or {1}, not both.", "mask", "box")
        names = ("face_index", "mask", "box")
        dependent = [name for name in names if getattr(self, name) is not None]
        if self.face_order != DEFAULT_FACE_ORDER:
            dependent.append("face_order")
        for name in dependent:
            if self.identity and name not in ("mask", "box"):
                raise RequestError(
                    "{0} cannot be used with an identity file; pass an image with {1}.",
                    name,
                    "images",
                )
        if not self.images and not self.identity:
            if dependent:
                raise RequestError(
                    "{0} requires a person; pass an image with {1}.", dependent[0], "images"
                )
            raise RequestError(
                "{0} is missing: a person needs images or an identity file.", "images"
            )
        return self


class Control(RequestPart):
    """A ControlNet and its image.

    Attributes:
        model: name of published weights, such as `control-pose`, or a directory of diffusers.
        image: the control image, or a plain image whose edges, depth or poses are detected.
        scale: conditioning scale of the ControlNet.
        start, end: fractions of the schedule between which the ControlNet acts. As in diffusers,
            its last step is the one that ends by `end`.
        kind: what the control image shows. Published ControlNets for one kind have it in their
            name. Without a kind, a directory's ControlNet gets the image as it is.
        is_map: whether the image is a control image already; None recognizes it by its content.
    """

    files = ("model", "image")

    model: FilePath
    image: FilePath
    scale: Scale = 1.0
    start: Fraction = 0.0
    end: Fraction = 1.0
    kind: ControlKind | None = None
    is_map: bool | None = None

    @model_validator(mode="after")
    def _check_span(self) -> Control:
        if self.start >= self.end:
            raise RequestError(
                f"{{0}} {self.start:g} is not before {{1}} {self.end:g}, so that the ControlNet "
                "would not act; widen the span.",
                "start",
                "end",
            )
        return self


class Lora(RequestPart):
    """A LoRA of the base model.

    Attributes:
        model: a file, a folder with one, or OWNER/NAME in the hub's cache.
        scale: of its change. A LoRA that was trained as a slider also takes negative scales.
    """

    files = ("model",)

    model: FilePath
    scale: LoraScale = 1.0


class Embedding(RequestPart):
    """A textual inversion: a file of embeddings, and the word for it in a prompt.

    Attributes:
        file: safetensors or a PyTorch file.
        token: the word; by default the name of the file without its suffix.
    """

    files = ("file",)

    file: FilePath
    token: Token | None = None

    @model_validator(mode="before")
    @classmethod
    def _name(cls, data: Any) -> Any:
        """Name the word after the file now: an image that is regenerated may name another file."""
        if not isinstance(data, dict) or data.get("token") is not None:
            return data
        file = data.get("file")
        if not isinstance(file, (str, os.PathLike)):
            return data
        # an image stores no folders, those of Windows included
        name = re.split(r"[/\\]", os.fsdecode(file))[-1]
        return {**data, "token": Path(name).stem or None}

    @property
    def word(self) -> str:
        """The word for it in a prompt."""
        return self.token or self.file


PUBLISHED_STYLES = {"ip-adapter": "sdxl", "ip-adapter-plus": "sdxl", "ip-adapter-flux": "flux"}
"""Published IP-Adapters for a style image, and the architecture of their base model."""


class StyleImage(RequestPart):
    """An image whose style the result takes, through an IP-Adapter.

    Attributes:
        image: the image; its center square is read.
        scale: weight of its tokens, from 0 to 1 in practice.
        model: `ip-adapter`, `ip-adapter-plus`, or a file of such an IP-Adapter for SDXL; on FLUX
            `ip-adapter-flux`; on the miniature a file of an IP-Adapter for it. None stands for
            `ip-adapter`, for `ip-adapter-flux`, or for the miniature's own.
    """

    files = ("image", "model")

    image: FilePath
    scale: Scale = 0.5
    model: FilePath | None = None


class InitImage(RequestPart):
    """The image to start from: image-to-image, and inpainting with a mask.

    Attributes:
        image: the image. Without a size in the request, its ratio is kept.
        strength: how much is changed, from 0 to 1: the fraction of the steps that is run.
        mask: white where the image is repainted. The rest stays as it is.
        resize: how an image of another ratio is brought to the size of the request.
    """

    files = ("image", "mask")

    image: FilePath
    strength: Fraction = 0.6
    mask: FilePath | None = None
    resize: ResizeMode = "crop"
