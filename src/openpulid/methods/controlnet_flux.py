"""ControlNet in any FLUX.1 pipeline.

A copy of some of the transformer's blocks reads a control image, and what it computes is added
after the transformer's own blocks. diffusers has a pipeline for each task with ControlNet; here
one hook on the transformer serves all pipelines, with an identity or without.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import FluxControlNetModel
from einops import rearrange
from PIL import Image
from torch import Tensor

from openpulid.errors import OptionError
from openpulid.io.networks import load_network
from openpulid.methods.adapter import check_hooks_are_called
from openpulid.methods.controlnet import (
    ControlImage,
    ControlNetBase,
    fit_images,
    require_controlnet,
)
from openpulid.methods.hooks import (
    HookResult,
    PipelineState,
    Span,
    StepTracker,
    expand_per_image,
    move_to,
)
from openpulid.methods.transformer_kinds import FLUX, find_transformer

Residuals = tuple[list[Tensor], list[Tensor]]
"""What is added after each double block and after each single block; empty for nothing."""

Net = TypeVar("Net", bound="FluxControlNet")


class FluxControlNet(ControlNetBase):
    """A diffusers ControlNet for FLUX.1.

    The images equal those of diffusers' ControlNet pipelines, but for one choice: where a
    ControlNet reads latents of the control image, they are the mean that the autoencoder predicts
    and not a sample. So an image depends on no other random number than its seed.

    Args:
        model: a FluxControlNetModel. A union of several kinds with a mode embedding needs the mode.
    """

    @classmethod
    def load(
        cls: type[Net], path: str | os.PathLike[str], dtype: torch.dtype = torch.bfloat16
    ) -> Net:
        """Load a folder in diffusers' format.

        Args:
            path: the folder.
            dtype: of the weights; they are published in bfloat16.

        Raises:
            WeightsError: The folder contains no ControlNet, or its weights are not complete.
        """
        require_controlnet(path)
        return cls(load_network(FluxControlNetModel, Path(path), dtype))

    @property
    def has_modes(self) -> bool:
        """Whether the ControlNet is a union of several kinds that needs the mode."""
        return bool(self.model.union)

    def check(self, target: Any) -> None:
        """Raise OptionError if a pipeline has no FLUX transformer, or one of another width."""
        transformer, kind = find_transformer(target)
        if kind is not FLUX:
            raise OptionError(
                f"ControlNets of FLUX.1 do not act in {kind.name}; attach to FLUX.1 or a finetune "
                "of it."
            )
        if not self.fits(transformer):
            raise OptionError(
                "this ControlNet was trained for another base model; use one for FLUX.1."
            )
        if self.model.config.guidance_embeds and not transformer.config.guidance_embeds:
            raise OptionError(
                "this ControlNet reads the guidance scale, which FLUX.1-schnell does not have; "
                "use it with FLUX.1-dev (preset flux)."
            )

    def fits(self, transformer: Any) -> bool:
        """Return whether the ControlNet has the widths of a FLUX transformer."""
        widths = (transformer.inner_dim, transformer.config.joint_attention_dim)
        return widths == (self.model.inner_dim, self.model.config.joint_attention_dim)

    @contextmanager
    def use(
        self,
        image: ControlImage | Sequence[ControlImage],
        scale: float = 1.0,
        start: float = 0.0,
        end: float = 1.0,
        mode: int | None = None,
        pipe: Any = None,
    ) -> Iterator[FluxControlNet]:
        """Make the attached pipelines follow a control image while the context is open.

        Args:
            image: of the kind that the ControlNet was trained on, or one per prompt.
            scale: weight of the residuals.
            start: fraction of the schedule at which they begin to act.
            end: fraction of the schedule by which their last step ends, as in diffusers' pipelines.
            mode: number of the kind of image, for a union with a mode embedding.
            pipe: one of the attached pipelines; all of them by default.

        Raises:
            OptionError: Nothing is attached, an argument is out of range, or the mode is missing.
        """
        if self.has_modes and mode not in range(self.model.config.num_mode):
            raise OptionError(
                f"this ControlNet serves {self.model.config.num_mode} kinds of control images; "
                f"pass the mode of yours, got {mode}."
            )
        hook = partial(self._hook, mode)
        span = Span(start, end, whole_steps=True)
        with self.open_hooks(image, scale, span, pipe, hook):
            yield self

    @contextmanager
    def _hook(
        self,
        mode: int | None,
        state: PipelineState,
        images: Sequence[Image.Image | Tensor],
        scale: float,
        span: Span,
    ) -> Iterator[None]:
        """Add the residuals in every call of a pipeline's transformer."""
        tracker = StepTracker(state)
        conditions: dict[tuple[int, int], Tensor] = {}
        residuals: Residuals = ([], [])

        def add_control(
            transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> HookResult:
            nonlocal residuals
            call = FLUX.name_arguments(args, kwargs)
            tracker.count(float(call["timestep"].flatten()[0]))
            if not span.contains(tracker.position):
                return args, kwargs
            # guidance repeats the residuals of the prompt for the negative prompt
            if not tracker.is_negative:
                size = _image_size(call["img_ids"], state)
                if size not in conditions:
                    hidden = call["hidden_states"]
                    conditions[size] = self.encode_images(images, size, state, hidden)
                residuals = self.compute(call, conditions[size], scale, mode)
            is_repeated = self.model.input_hint_block is not None
            return args, kwargs | add_residuals(transformer, call, residuals, is_repeated)

        transformer = state.network
        check_hooks_are_called([transformer])
        # the hook reads Python values that change from call to call
        hook = torch.compiler.disable(add_control)
        handle = transformer.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def encode_images(
        self,
        images: Sequence[Image.Image | Tensor],
        size: tuple[int, int],
        state: PipelineState,
        hidden: Tensor,
    ) -> Tensor:
        """Convert images to what the ControlNet reads: pixels, or tokens of their latents.

        Args:
            images: (P) control images.
            size: height and width in pixels.
            state: of the pipeline.
            hidden: (B, L, C) image tokens.

        Returns:
            (P, 3, H, W) in [-1, 1], or (P, L, C).

        Raises:
            OptionError: The ControlNet reads latents, and the target has no autoencoder.
        """
        pixels = 2 * fit_images(images, size) - 1
        if self.model.input_hint_block is not None:
            return pixels.to(hidden)
        vae = getattr(state.target, "vae", None)
        if vae is None:
            raise OptionError(
                "the control image is read as latents, and a transformer alone has no "
                "autoencoder; attach to a FLUX pipeline."
            )
        with torch.no_grad():
            latents = vae.encode(pixels.to(hidden.device, vae.dtype)).latent_dist.mode()
        latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        tokens = rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
        return tokens.to(hidden)

    def compute(
        self, call: Mapping[str, Any], condition: Tensor, scale: float, mode: int | None = None
    ) -> Residuals:
        """Run the ControlNet in a call of the transformer.

        Args:
            call: arguments of the transformer by name.
            condition: from `encode_images`, for each prompt or for all.
            scale: weight of the residuals.
            mode: see `use`.
        """
        hidden = call["hidden_states"]
        if not self.is_placed:
            move_to([self.model], hidden.device, hidden.dtype)
        modes = None
        if mode is not None:
            modes = torch.full((len(hidden), 1), mode, device=hidden.device)
        double, single = self.model(
            # a transformer for inpainting also gets the mask and the masked image as channels
            hidden_states=hidden[..., : self.model.config.in_channels],
            controlnet_cond=expand_per_image(condition, len(hidden), is_guided=False),
            controlnet_mode=modes if self.has_modes else None,
            conditioning_scale=scale,
            encoder_hidden_states=call["encoder_hidden_states"],
            pooled_projections=call["pooled_projections"],
            timestep=call["timestep"],
            img_ids=call["img_ids"],
            txt_ids=call["txt_ids"],
            guidance=call.get("guidance") if self.model.config.guidance_embeds else None,
            return_dict=False,
        )
        return list(double or ()), list(single or ())


def _image_size(image_ids: Tensor, state: PipelineState) -> tuple[int, int]:
    """Return height and width of the generated image in pixels; a token is 2 x 2 latents."""
    ids = image_ids[0] if image_ids.ndim == 3 else image_ids
    if ids[:, 0].any():
        raise OptionError(
            "ControlNets do not support reference images among the tokens (FLUX.1-Kontext); "
            "use FLUX.1-dev."
        )
    side = 2 * state.pixels_per_latent
    return (int(ids[:, 1].max()) + 1) * side, (int(ids[:, 2].max()) + 1) * side


def add_residuals(
    transformer: Any, call: Mapping[str, Any], residuals: Residuals, is_repeated: bool
) -> dict[str, Any]:
    """Add residuals to those that another ControlNet has put into the transformer's arguments.

    A ControlNet has fewer blocks than the transformer, which assigns each residual to several
    blocks. ControlNets of different depth can only be added block by block.

    Args:
        transformer: of FLUX.1.
        call: its arguments by name.
        residuals: of a ControlNet.
        is_repeated: the residuals of double blocks follow one another again and again, instead of
            each serving several blocks in sequence.

    Returns:
        The arguments that change.
    """
    names = ("controlnet_block_samples", "controlnet_single_block_samples")
    blocks = (transformer.transformer_blocks, transformer.single_transformer_blocks)
    was_repeated = call.get("controlnet_blocks_repeat", False)
    changed: dict[str, Any] = {"controlnet_blocks_repeat": False}
    for name, own_blocks, own, repeats in zip(
        names, blocks, residuals, ((was_repeated, is_repeated), (False, False)), strict=True
    ):
        previous = _assign(call.get(name) or (), len(own_blocks), repeats[0])
        added = _assign(own, len(own_blocks), repeats[1])
        changed[name] = _add(previous, added) if previous and added else previous or added or None
    return changed


def _assign(samples: Sequence[Tensor], num_blocks: int, is_repeated: bool) -> list[Tensor]:
    """Return the residual of each block, as the transformer assigns a shorter list to its blocks.

    Args:
        samples: residuals; none for nothing.
        num_blocks: blocks of the transformer.
        is_repeated: see `add_residuals`.
    """
    if not samples:
        return []
    interval = math.ceil(num_blocks / len(samples))
    if is_repeated:
        return [samples[block % len(samples)] for block in range(num_blocks)]
    return [samples[block // interval] for block in range(num_blocks)]


def _add(first: Sequence[Tensor], second: Sequence[Tensor]) -> list[Tensor]:
    """Add two lists of residuals; equal pairs give one tensor, as memory is scarce."""
    sums: dict[tuple[int, int], Tensor] = {}
    total = []
    for one, other in zip(first, second, strict=True):
        pair = (id(one), id(other))
        if pair not in sums:
            sums[pair] = one + other
        total.append(sums[pair])
    return total
