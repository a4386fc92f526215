"""InstantID (arXiv 2401.07519): face tokens and IdentityNet.

Sixteen tokens of the raw face embedding go to cross-attention. IdentityNet is a ControlNet whose
control image shows five landmarks, and which reads the identity instead of the prompt.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import ControlNetModel
from PIL import Image, ImageDraw
from torch import Tensor

from openpulid.errors import OptionError
from openpulid.identity.identity import Identity
from openpulid.io.checkpoint_kinds import RESAMPLER, CheckpointKind
from openpulid.io.checkpoints import TensorGroups, group_tensors, read_tensors
from openpulid.io.networks import load_network
from openpulid.methods.controlnet import (
    add_residuals,
    compute_residuals,
    find_adapter_files,
)
from openpulid.methods.hooks import PipelineState, UNetCall, expand_per_image, move_to
from openpulid.methods.ip_adapter.base import IPAdapterBase

COLORS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255))
"""Left eye, right eye, nose and the corners of the mouth, as InstantID was trained."""
LINE_BRIGHTNESS = 0.6
"""Of the lines from each landmark to the nose, relative to the landmark's color."""
NOSE = 2


class InstantID(IPAdapterBase):
    """IP-Adapter tokens and IdentityNet's residuals in the same call of the U-Net.

    The published pipeline is a copy of diffusers' ControlNet pipeline. Here IdentityNet runs inside
    the hook that passes the embeddings, so every SDXL pipeline works, ControlNet pipelines
    included.

    Args:
        parts: the adapter's file.
        identity_net: the published ControlNet; None if another program runs it.

    Attributes:
        control_scale: weight of IdentityNet's residuals; None for that of the tokens. The authors
            use 0.8 for both.
    """

    scale: ClassVar[float] = 0.8
    kinds: ClassVar[tuple[CheckpointKind, ...]] = (RESAMPLER,)

    def __init__(self, parts: TensorGroups, identity_net: ControlNetModel | None) -> None:
        super().__init__(parts)
        self.identity_net = identity_net and identity_net.eval().requires_grad_(False)
        self.control_scale: float | None = None

    @classmethod
    def check_file(cls, path: str | os.PathLike[str]) -> None:
        """Refuse files of another kind, see `load`."""
        super().check_file(cls._find_files(path)[0])

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> InstantID:
        """Load the published files.

        Args:
            path: a folder with `ip-adapter.bin` (or .safetensors) and `ControlNetModel/`, or an
                adapter file next to the latter.

        Raises:
            WeightsError: One of them is missing or is something else.
        """
        cls.check_file(path)
        file, identity_net = cls._find_files(path)
        return cls(group_tensors(read_tensors(file)), load_network(ControlNetModel, identity_net))

    @classmethod
    def load_tokens(cls, path: str | os.PathLike[str]) -> InstantID:
        """Load the adapter's file alone, for a program that runs IdentityNet itself.

        Raises:
            WeightsError: It does not exist, or is another kind of file.
        """
        super().check_file(path)
        return cls(group_tensors(read_tensors(path)), None)

    @staticmethod
    def _find_files(path: str | os.PathLike[str]) -> tuple[Path, Path]:
        """Return the adapter's file, and the folder of IdentityNet.

        Raises:
            WeightsError: one of them is missing.
        """
        names = ("ip-adapter.safetensors", "ip-adapter.bin")
        return find_adapter_files(path, "InstantID", names, "ControlNetModel")

    @property
    def width(self) -> int:
        """D of the face embedding that the file was trained on."""
        return int(self.parts["image_proj"]["proj_in.weight"].shape[1])

    def embeddings(self, identity: Identity) -> Tensor:
        """Return the *raw* face embedding, averaged over the reference images, (1, 1, 1, D)."""
        return identity.id_cond[..., : self.width].mean(1)[:, None, None]

    def unet_kwargs(
        self, state: PipelineState, people: Sequence[Identity], call: UNetCall, scale: float
    ) -> dict[str, Any]:
        """Return the embeddings, and IdentityNet's residuals of the U-Net's skips and middle."""
        kwargs = super().unet_kwargs(state, people, call, scale)
        if not scale or self.control_scale == 0 or self.identity_net is None:
            return kwargs
        unet = state.network
        move_to([self.identity_net], call.sample.device, unet.dtype)
        conditions = kwargs["added_cond_kwargs"]
        tokens = unet.encoder_hid_proj(conditions["image_embeds"])[0].flatten(1, 2)
        height, width = (side * state.pixels_per_latent for side in call.sample.shape[-2:])
        control = torch.cat([draw_landmarks(identity, (width, height)) for identity in people])
        batch = expand_per_image(control, len(call.sample), state.is_guided(), negative=control)
        weight = scale if self.control_scale is None else self.control_scale
        residuals = compute_residuals(self.identity_net, call, tokens, batch, weight, conditions)
        return kwargs | add_residuals(call.kwargs, *residuals)


def draw_landmarks(identity: Identity, size: tuple[int, int]) -> Tensor:
    """Draw the landmarks of the first reference image on black.

    The square around the reference image is centered in the generated image.

    Args:
        identity: with landmarks.
        size: width and height in pixels.

    Returns:
        (1, 3, height, width) in [0, 1].

    Raises:
        OptionError: The identity has no landmarks.
    """
    if identity.landmarks is None:
        raise OptionError(
            "this identity has no landmarks to draw; create it again from the reference image."
        )
    width, height = size
    side = min(width, height)
    margin = torch.tensor([(width - side) / 2, (height - side) / 2])
    points = [tuple(point.tolist()) for point in identity.landmarks[0, 0].cpu() * side + margin]
    canvas = Image.new("RGB", size)
    draw = ImageDraw.Draw(canvas)

    # lines to the nose
    line_width = max(1, round(8 * side / 1024))
    for index, point in enumerate(points):
        if index != NOSE:
            line_color = tuple(round(LINE_BRIGHTNESS * value) for value in COLORS[index])
            draw.line([point, points[NOSE]], fill=line_color, width=line_width)

    # discs on top
    radius = max(1.0, 10 * side / 1024)
    for (x, y), color in zip(points, COLORS, strict=True):
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=color)
    pixels = torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8)
    return pixels.view(1, height, width, 3).permute(0, 3, 1, 2) / 255
