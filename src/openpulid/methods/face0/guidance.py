"""Hooks that overwrite three text tokens by a face, and combine predictions with and without it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from openpulid.errors import OptionError
from openpulid.methods.adapter import check_projections_are_called, exclusive_use
from openpulid.methods.face0.encoders import combine_predictions, overwrite_text
from openpulid.methods.hooks import HookResult, PipelineState, Span, UNetCall, expand_per_image
from openpulid.methods.lora import LoraMatrices, low_rank_hook


@dataclass(frozen=True)
class FaceGuidance:
    """How Face0 weighs the prompt and the face.

    Attributes:
        joint: c of the paper: weight of the prediction with both. 1 needs no further pass; 0.4 to
            0.7 gives stylized images, 1.4 images that are far from photos.
        face_share: a of the paper: share of the face's own prediction in the rest. 0 for stylized
            images, 1 with a `joint` of 1.4.
    """

    joint: float = 1.0
    face_share: float = 0.0


class FaceTokens:
    """State of one pipeline while identities are in use.

    Args:
        state: of the pipeline.
        tokens: (P, 3, C) of P identities.
        scale: 1 overwrites the text.
        guidance: weights of prompt and face.
        span: of the schedule in which the face acts.
    """

    def __init__(
        self,
        state: PipelineState,
        tokens: Tensor,
        scale: float,
        guidance: FaceGuidance,
        span: Span,
    ) -> None:
        self.state = state
        self.tokens = tokens
        self.scale = scale
        self.guidance = guidance
        self.span = span
        self.is_active = False
        self._call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._reentrant = False  # the second call of the U-Net, by its own hook

    @contextmanager
    def register(self, lora: LoraMatrices, slot: str) -> Iterator[None]:
        """Register all hooks while the context is open.

        Args:
            lora: name of a layer of the U-Net -> its low-rank matrices.
            slot: see `Adapter.slot`.

        Raises:
            OptionError: another method that changes the prompt is in use, or the U-Net is compiled.
        """
        unet = self.state.network
        if lora:
            check_projections_are_called(unet)
        with exclusive_use(unet, slot, hooked=unet.modules()), ExitStack() as hooks:
            for name, (down, up) in lora.items():
                low_rank = low_rank_hook(down, self.scale * up, lambda: self.is_active)
                handle = unet.get_submodule(name).register_forward_hook(low_rank)
                hooks.callback(handle.remove)
            # before other hooks: a ControlNet must read the changed text
            before = unet.register_forward_pre_hook(
                self._before_call, with_kwargs=True, prepend=True
            )
            hooks.callback(before.remove)
            if self.guidance.joint != 1:
                after = unet.register_forward_hook(self._after_call)
                hooks.callback(after.remove)
            yield

    def _before_call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> HookResult | None:
        """Overwrite text tokens (forward pre-hook of the U-Net)."""
        if self._reentrant:
            return None
        call = UNetCall.parse(args, kwargs)
        self.is_active = self.span.contains(self.state.position(call.timestep))
        if not self.is_active:
            return None
        if self.guidance.joint != 1:
            self._call = (args, kwargs)
        # the negative half has no face, as in the paper
        tokens = expand_per_image(self.tokens, len(call.text), self.state.is_guided())
        return _with_text(args, kwargs, overwrite_text(call.text, tokens, self.scale))

    def _after_call(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Combine the prediction with those of prompt and face alone (forward hook of the U-Net).

        One more call computes both: its positive half has the prompt without the face, its negative
        half the face with the negative prompt.
        """
        if self._reentrant or self._call is None or not self.is_active:
            return None
        args, kwargs = self._call
        self._call = None
        text = UNetCall.parse(args, kwargs).text
        is_guided = self.state.is_guided()
        if self.guidance.face_share and not is_guided:
            raise OptionError(
                "Face0 predicts the face alone with the negative prompt, which this generation "
                "does not have; use a guidance scale above 1, or a face_share of 0."
            )
        faces = expand_per_image(self.tokens, len(text), is_guided)
        if is_guided:
            faces = faces.roll(len(text) // 2, 0)
        else:
            faces = torch.zeros_like(faces)
        self._reentrant = True
        try:
            changed, named = _with_text(args, kwargs, overwrite_text(text, faces, self.scale))
            alone: Tensor = module(*changed, **named)[0]
        finally:
            self._reentrant = False
        both: Tensor = output[0]
        first = len(both) // 2 if is_guided else 0
        face = alone[:first] if is_guided else alone
        positive = combine_predictions(
            both[first:], alone[first:], face, self.guidance.joint, self.guidance.face_share
        )
        sample = torch.cat([both[:first], positive])
        return (sample, *output[1:]) if isinstance(output, tuple) else type(output)(sample=sample)


def _with_text(args: tuple[Any, ...], kwargs: Mapping[str, Any], text: Tensor) -> HookResult:
    """Return the arguments of the U-Net with another text.

    Sample and timestep stay positional; what was positional after them is passed by name.
    """
    return args[:2], {**kwargs, "encoder_hidden_states": text}
