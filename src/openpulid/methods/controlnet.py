"""ControlNet (arXiv 2302.05543) in any SDXL pipeline: a copy of the U-Net's encoder that is shown a picture of what to keep,
and whose residuals are added to the U-Net's own. Pose, depth, edges, alone or together with whoever shows an identity.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel
from PIL import Image
from torch import Tensor, nn

from openpulid.errors import OptionError, WeightsError
from openpulid.methods.hooks import PipelineState, Serving, unet_of
from openpulid.methods.ip_adapter.base import Call, move_to, per_image

Picture = Image.Image | Tensor
"""RGB, or (3, H, W) in [0, 1]."""


class ControlNet(Serving):
    """A diffusers ControlNet for SDXL. diffusers' own ControlNet pipelines draw the same; this one needs no other pipeline, so
    it joins image to image, inpainting, and any other method.

    Args:
        net: the ControlNet.
    """

    def __init__(self, net: ControlNetModel) -> None:
        super().__init__()
        self.net = net.eval().requires_grad_(False)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ControlNet:
        """From a folder as diffusers saves it.

        Raises:
            WeightsError: there is none.
        """
        try:
            return cls(ControlNetModel.from_pretrained(path, local_files_only=True))
        except (OSError, ValueError) as error:
            raise WeightsError(
                f"{path} holds no ControlNet of diffusers; name a folder with its config.json."
            ) from error

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> ControlNet:
        """The same there."""
        self.net.to(device, dtype)
        return self

    def attach(self, target: Any) -> None:
        """Serves a StableDiffusionXL pipeline from now on; nothing in it changes before `use`.

        Raises:
            OptionError: it has no U-Net, or one of other widths.
        """
        theirs, ours = unet_of(target).config, self.net.config
        if (theirs.block_out_channels, theirs.cross_attention_dim) != (
            ours.block_out_channels,
            ours.cross_attention_dim,
        ):
            raise OptionError(
                "this ControlNet was made for another kind of base; take one for SDXL."
            )
        self.serve(target)

    @contextmanager
    def use(
        self,
        picture: Picture | Sequence[Picture],
        scale: float = 1.0,
        start: float = 0.0,
        end: float = 1.0,
        pipe: Any = None,
    ) -> Iterator[ControlNet]:
        """The attached pipelines follow a picture while this is open.

        Args:
            picture: of the kind that the net has learned (`edges` draws one), or one for each prompt.
            scale: weight of the residuals.
            start, end: fractions of the schedule between which they act, [start, end).
            pipe: only this one of the attached pipelines.

        Raises:
            OptionError: nothing is attached, or an argument is outside its range.
        """
        shown = [picture] if isinstance(picture, (Image.Image, Tensor)) else list(picture)
        serving = self.serving(pipe)
        if not shown or not 0 <= start <= 1 or not 0 <= end <= 1:
            raise OptionError(
                "give a picture, or one for each prompt; start and end are fractions of the schedule (0 to 1)."
            )
        with ExitStack() as hooks:
            for attachment in serving if scale and start < end else []:
                hooks.callback(self._follow(attachment, shown, scale, (start, end)).remove)
            yield self

    def _follow(
        self,
        attachment: PipelineState,
        pictures: Sequence[Picture],
        scale: float,
        span: tuple[float, float],
    ) -> Any:
        def hook(
            module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            first = (
                dict(zip(("sample", "timestep", "encoder_hidden_states"), args, strict=False))
                | named
            )
            call = Call(first["sample"], first["timestep"], named)
            if not attachment.within(call.time, span):
                return args, named
            size = tuple(side * attachment.pixels for side in call.sample.shape[-2:])
            drawings = torch.stack([fit_image(picture, (size[0], size[1])) for picture in pictures])
            shown = per_image(drawings, len(call.sample), attachment.guided(), negative=drawings)
            move_to([self.net], call.sample.device, attachment.unet.dtype)
            found = residuals(
                self.net,
                call,
                first["encoder_hidden_states"],
                shown,
                scale,
                named["added_cond_kwargs"],
            )
            return args, named | add_residuals(named, *found)

        return attachment.unet.register_forward_pre_hook(hook, with_kwargs=True)


def residuals(
    net: ControlNetModel,
    call: Call,
    tokens: Tensor,
    drawings: Tensor,
    scale: float,
    conditions: Mapping[str, Any],
) -> tuple[Sequence[Tensor], Tensor]:
    """What a ControlNet adds to the U-Net's skips and middle in a call.

    Args:
        tokens: (B, T, D), what it reads: the prompt, or somebody.
        drawings: (B, 3, H, W) in [0, 1], what it is shown.
        conditions: the U-Net's own `added_cond_kwargs`.
    """
    sample = call.sample[
        :, : net.config.in_channels
    ]  # a U-Net for inpainting is also given the mask and what is kept
    found: tuple[Sequence[Tensor], Tensor] = net(
        sample,
        call.time,
        encoder_hidden_states=tokens,
        controlnet_cond=drawings.to(sample),
        conditioning_scale=scale,
        added_cond_kwargs={name: x for name, x in conditions.items() if name != "image_embeds"},
        return_dict=False,
    )
    return found


def add_residuals(
    named: Mapping[str, Any], down: Sequence[Tensor], middle: Tensor
) -> dict[str, Any]:
    """The U-Net's arguments with these residuals beside those of a ControlNet that is there already."""
    known, known_middle = (
        named.get("down_block_additional_residuals"),
        named.get("mid_block_additional_residual"),
    )
    if known is not None and known_middle is not None:
        down, middle = [a + b for a, b in zip(known, down, strict=True)], middle + known_middle
    return {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": middle}


def fit_image(picture: Picture, size: tuple[int, int]) -> Tensor:
    """(3, H, W) in [0, 1] of this height and width."""
    height, width = size
    if isinstance(picture, Image.Image):
        pixels = np.array(picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS))
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    return nn.functional.interpolate(
        picture[None].float(), (height, width), mode="bilinear", antialias=True
    )[0]


def canny_edges(picture: Image.Image, low: int = 100, high: int = 200) -> Image.Image:
    """The edges of a picture, white on black, as ControlNets for them were trained (Canny 1986, OpenCV's).

    Args:
        low, high: thresholds of the gradient, 0 to 255 and more.
    """
    import cv2

    found = cv2.Canny(np.array(picture.convert("RGB")), low, high)
    return Image.fromarray(found).convert("RGB")
