"""ControlNet (arXiv 2302.05543) in any SDXL pipeline.

A copy of the U-Net's encoder reads a control image, such as a pose, a depth map or edges, and its
residuals are added to the U-Net's own. It works alone or together with any method that shows an
identity. Several ControlNets add up.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from openpulid.errors import OptionError, WeightsError
from openpulid.io.image_grid import to_tensor
from openpulid.io.images import Source, is_image_source, open_image
from openpulid.io.networks import CONFIG, load_network
from openpulid.methods.adapter import Adapter, check_hooks_are_called
from openpulid.methods.hooks import (
    HookResult,
    PipelineState,
    Span,
    UNetCall,
    check_scale,
    expand_per_image,
    find_unet,
    move_to,
    warn_if_other_ratio,
)

ControlImage = Source | Tensor
"""An image as `open_image` accepts it, or float (3, H, W) in [0, 1]."""


ControlHook = Callable[
    [PipelineState, Sequence[Image.Image | Tensor], float, Span], AbstractContextManager[None]
]
"""Adds residuals in every call of a pipeline's network: state, images, scale and span."""


class ControlNetBase(Adapter):
    """What ControlNets of all base models share.

    Args:
        model: the ControlNet of diffusers.

    Attributes:
        is_placed: the model stays where and as it is; by default it follows the pipeline's network.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.is_placed = False
        self.model = model.eval().requires_grad_(False)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> ControlNetBase:
        """Move the ControlNet to a device and dtype."""
        self.model.to(device, dtype)
        return self

    @contextmanager
    def open_hooks(
        self,
        image: ControlImage | Sequence[ControlImage],
        scale: float,
        span: Span,
        pipe: Any,
        hook: ControlHook,
    ) -> Iterator[None]:
        """Check the arguments of `use`, and keep the hooks of the attached pipelines open.

        Args:
            image: a control image, or one per prompt.
            scale: weight of the residuals.
            span: of the schedule in which they act.
            pipe: one of the attached pipelines; all of them by default.
            hook: opens the hook of one pipeline.

        Raises:
            OptionError: Nothing is attached, or an argument is out of range.
        """
        sources = [image] if is_image_source(image) else image
        if not isinstance(sources, Sequence) or not sources:
            raise OptionError("pass a control image, or one per prompt.")
        images = [_open_control_image(source) for source in sources]
        check_scale(scale)
        states = self.select_pipelines(pipe)
        with span.watch("the control image") as watched:
            if not scale or watched.is_empty:
                yield
                return
            with self.activate(states, lambda state: hook(state, images, scale, watched)):
                yield


class ControlNet(ControlNetBase):
    """A diffusers ControlNet for SDXL.

    The images equal those of diffusers' ControlNet pipelines. No other pipeline is needed, so it
    also works with image-to-image, inpainting and every other method.

    Args:
        model: a ControlNetModel.
    """

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ControlNet:
        """Load a folder in diffusers' format.

        Raises:
            WeightsError: The folder contains no ControlNet, or its weights are not complete.
        """
        require_controlnet(path)
        return cls(load_network(ControlNetModel, Path(path)))

    def check(self, target: Any) -> None:
        """Raise OptionError if a pipeline has no U-Net, or one of other widths."""
        # a configuration that was read from a file has lists in place of tuples
        unet_widths, widths = (
            (list(config.block_out_channels), config.cross_attention_dim)
            for config in (find_unet(target).config, self.model.config)
        )
        if unet_widths != widths:
            raise OptionError(
                "this ControlNet was trained for another base model; use one for SDXL."
            )

    @contextmanager
    def use(
        self,
        image: ControlImage | Sequence[ControlImage],
        scale: float = 1.0,
        start: float = 0.0,
        end: float = 1.0,
        pipe: Any = None,
    ) -> Iterator[ControlNet]:
        """Make the attached pipelines follow a control image while the context is open.

        Args:
            image: of the kind that the ControlNet was trained on (see `methods.control_maps`), or
                one per prompt.
            scale: weight of the residuals.
            start: fraction of the schedule at which they begin to act.
            end: fraction of the schedule by which their last step ends, as in diffusers' pipelines.
            pipe: one of the attached pipelines; all of them by default.

        Raises:
            OptionError: Nothing is attached, or an argument is out of range.
        """
        with self.open_hooks(image, scale, Span(start, end, whole_steps=True), pipe, self._hook):
            yield self

    @contextmanager
    def _hook(
        self, state: PipelineState, images: Sequence[Image.Image | Tensor], scale: float, span: Span
    ) -> Iterator[None]:
        """Add the residuals in every call of a pipeline's U-Net."""
        fitted: dict[tuple[int, int], Tensor] = {}

        def add_control(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> HookResult:
            call = UNetCall.parse(args, kwargs)
            if not span.contains(state.position(call.timestep)):
                return args, kwargs
            height, width = (side * state.pixels_per_latent for side in call.sample.shape[-2:])
            if (height, width) not in fitted:
                fitted[height, width] = fit_images(images, (height, width))
            control = fitted[height, width]
            batch = expand_per_image(control, len(call.sample), state.is_guided(), negative=control)
            if not self.is_placed:
                move_to([self.model], call.sample.device, state.network.dtype)
            residuals = compute_residuals(
                self.model, call, call.text, batch, scale, kwargs["added_cond_kwargs"]
            )
            return args, kwargs | add_residuals(kwargs, *residuals)

        check_hooks_are_called([state.network])
        handle = state.network.register_forward_pre_hook(add_control, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def require_controlnet(path: str | os.PathLike[str]) -> None:
    """Check that a path is a folder with a network of diffusers.

    Raises:
        WeightsError: It is not.
    """
    if not (Path(path) / CONFIG).is_file():
        raise WeightsError(
            f"{path} contains no diffusers ControlNet; pass a folder with its config.json."
        )


def find_adapter_files(
    path: str | os.PathLike[str], method: str, names: Sequence[str], network: str
) -> tuple[Path, Path]:
    """Find an adapter's file, and the ControlNet that is published next to it.

    Args:
        path: a folder with both, or the adapter's file.
        method: how messages call the method.
        names: of the file in the folder; the last one is the published one.
        network: folder of the ControlNet.

    Returns:
        The file, and the folder of the ControlNet.

    Raises:
        WeightsError: One of them is missing.
    """
    folder = Path(path).parent if Path(path).is_file() else Path(path)
    candidates = [Path(path), *(folder / name for name in names)]
    files = [file for file in candidates if file.is_file()]
    if not files or not (folder / network).is_dir():
        raise WeightsError(f"{folder} contains no {method}; it needs {names[-1]} and {network}/.")
    return files[0], folder / network


def compute_residuals(
    model: ControlNetModel,
    call: UNetCall,
    tokens: Tensor,
    control: Tensor,
    scale: float,
    conditions: Mapping[str, Any],
) -> tuple[Sequence[Tensor], Tensor]:
    """Run a ControlNet in a call of the U-Net.

    Args:
        model: the ControlNet.
        call: of the U-Net.
        tokens: (B, T, D), what its cross-attention reads: the prompt or an identity.
        control: (B, 3, H, W) in [0, 1], the control images.
        scale: weight of the residuals.
        conditions: the U-Net's `added_cond_kwargs`.

    Returns:
        Residuals of the skip connections and of the middle block.
    """
    # a U-Net for inpainting also gets the mask and the masked image as channels
    sample = call.sample[:, : model.config.in_channels]
    residuals: tuple[Sequence[Tensor], Tensor] = model(
        sample,
        call.timestep,
        encoder_hidden_states=tokens,
        controlnet_cond=control.to(sample),
        conditioning_scale=scale,
        added_cond_kwargs={name: x for name, x in conditions.items() if name != "image_embeds"},
        return_dict=False,
    )
    return residuals


def add_residuals(
    kwargs: Mapping[str, Any], down: Sequence[Tensor], middle: Tensor
) -> dict[str, Any]:
    """Add residuals to those that another ControlNet has put into the U-Net's arguments.

    Returns:
        The arguments that change.
    """
    previous_down = kwargs.get("down_block_additional_residuals")
    previous_middle = kwargs.get("mid_block_additional_residual")
    if previous_down is not None and previous_middle is not None:
        down = [a + b for a, b in zip(previous_down, down, strict=True)]
        middle = previous_middle + middle
    return {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": middle}


def _open_control_image(source: Any) -> Image.Image | Tensor:
    """Return an RGB image, or a float tensor (3, H, W) as it is.

    Raises:
        ImageError: the image cannot be used.
        OptionError: the source is no image.
    """
    is_float = isinstance(source, Tensor) and source.is_floating_point()
    if is_float and source.shape[:-2] == (3,) and ((source >= 0) & (source <= 1)).all():
        return source
    return open_image(source, min_side=1)


def _height_width(image: Image.Image | Tensor) -> tuple[int, int]:
    if isinstance(image, Tensor):
        return image.shape[-2], image.shape[-1]
    return image.height, image.width


def fit_images(images: Sequence[Image.Image | Tensor], size: tuple[int, int]) -> Tensor:
    """Resize control images, with a note on each of another ratio.

    Args:
        images: RGB or (3, H, W) in [0, 1].
        size: height and width in pixels.

    Returns:
        (N, 3, height, width) in [0, 1].
    """
    for image in images:
        warn_if_other_ratio("control image", _height_width(image), size)
    return torch.stack([_fit_image(image, size) for image in images])


def _fit_image(image: Image.Image | Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a control image.

    Args:
        image: RGB or (3, H, W) in [0, 1].
        size: height and width in pixels.

    Returns:
        (3, height, width) in [0, 1].
    """
    height, width = size
    if isinstance(image, Image.Image):
        rgb = image.convert("RGB")
        return to_tensor([rgb.resize((width, height), Image.Resampling.LANCZOS)])[0]
    resized = interpolate(image[None].float(), (height, width), mode="bilinear", antialias=True)
    return resized[0]
