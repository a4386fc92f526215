"""InstantID (arXiv 2401.07519): sixteen tokens from the raw face embedding, and IdentityNet, a ControlNet that is shown five
landmarks and reads the identity instead of the prompt."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import ControlNetModel
from PIL import Image, ImageDraw
from torch import Tensor

from openpulid.errors import OptionError, WeightsError
from openpulid.identity.identity import Identity
from openpulid.methods.controlnet import add_residuals, residuals
from openpulid.methods.hooks import PipelineState
from openpulid.methods.ip_adapter.base import Call, IPAdapterBase, Parts, move_to, per_image

COLORS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255))
"""Of left eye, right eye, nose and the corners of the mouth, as InstantID was trained."""
DIMMED = 0.6  # its lines to the nose are this bright
NOSE = 2


class InstantID(IPAdapterBase):
    """The adapter's tokens as `IPAdapterBase` shows them, and IdentityNet's residuals in the same call of the U-Net.

    The published pipeline is a copy of diffusers' ControlNet pipeline. Here IdentityNet runs inside the hook that tells the
    U-Net the embeddings, so any SDXL pipeline shows it, ControlNet pipelines too.

    Args:
        parts: the adapter's file.
        identity_net: the published ControlNet.

    Attributes:
        control_scale: weight of IdentityNet's residuals; as of the tokens where it is None (the authors have .8 for both).
    """

    scale: ClassVar[float] = 0.8

    def __init__(self, parts: Parts, identity_net: ControlNetModel) -> None:
        super().__init__(parts)
        self.identity_net = identity_net.eval().requires_grad_(False)
        self.control_scale: float | None = None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> InstantID:
        """From a folder with `ip-adapter.bin` (or .safetensors) and `ControlNetModel/`, as it is published, or from a file
        beside the latter.

        Raises:
            WeightsError: one of them is missing or something else.
        """
        folder = Path(path).parent if Path(path).is_file() else Path(path)
        places = (Path(path), folder / "ip-adapter.safetensors", folder / "ip-adapter.bin")
        files = [file for file in places if file.is_file()]
        if not files or not (folder / "ControlNetModel").is_dir():
            raise WeightsError(
                f"{folder} holds no InstantID; it needs ip-adapter.bin and ControlNetModel/."
            )
        net = ControlNetModel.from_pretrained(folder / "ControlNetModel", local_files_only=True)
        return cls(cls.read(files[0]), net)

    @property
    def width(self) -> int:
        """D, of the face embedding that it was trained on."""
        return int(self.parts["image_proj"]["proj_in.weight"].shape[1])

    def embeddings(self, identity: Identity) -> Tensor:
        """(1, 1, 1, D): the *raw* embedding, the mean of several photos'."""
        return identity.id_cond[..., : self.width].mean(1)[:, None, None]

    def tell(
        self, attachment: PipelineState, people: Sequence[Identity], call: Call, strength: float
    ) -> dict[str, Any]:
        """The embeddings, and what IdentityNet adds to the U-Net's skips and middle."""
        told = super().tell(attachment, people, call, strength)
        if not strength or self.control_scale == 0:
            return told
        unet, guided = attachment.unet, attachment.guided()
        move_to([self.identity_net], call.sample.device, unet.dtype)
        tokens = unet.encoder_hid_proj(told["added_cond_kwargs"]["image_embeds"])[0].flatten(1, 2)
        height, width = (side * attachment.pixels for side in call.sample.shape[-2:])
        drawings = torch.cat([landmarks_drawn(identity, (width, height)) for identity in people])
        shown = per_image(drawings, len(call.sample), guided, negative=drawings)
        weight = strength if self.control_scale is None else self.control_scale
        found = residuals(self.identity_net, call, tokens, shown, weight, told["added_cond_kwargs"])
        return told | add_residuals(call.named, *found)


def landmarks_drawn(identity: Identity, size: tuple[int, int]) -> Tensor:
    """(1, 3, H, W) in [0, 1]: the first photo's landmarks on black, the photo in the middle of the image.

    Args:
        size: width and height in pixels.

    Raises:
        OptionError: the identity has none.
    """
    if identity.landmarks is None:
        raise OptionError(
            "this identity has no landmarks, which InstantID needs; make it again from the photo."
        )
    width, height = size
    side = min(width, height)
    margin = torch.tensor([(width - side) / 2, (height - side) / 2])
    points = [tuple(point.tolist()) for point in identity.landmarks[0, 0].cpu() * side + margin]
    page = Image.new("RGB", size)
    draw = ImageDraw.Draw(page)
    thick = max(1, round(8 * side / 1024))
    for place, point in enumerate(points):
        if place != NOSE:
            color = tuple(round(DIMMED * value) for value in COLORS[place])
            draw.line([point, points[NOSE]], fill=color, width=thick)
    radius = max(1.0, 10 * side / 1024)
    for (x, y), color in zip(points, COLORS, strict=True):
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=color)
    return (
        torch.frombuffer(bytearray(page.tobytes()), dtype=torch.uint8)
        .view(1, height, width, 3)
        .permute(0, 3, 1, 2)
        / 255
    )
