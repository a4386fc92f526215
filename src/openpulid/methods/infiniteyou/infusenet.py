"""InfuseNet: a ControlNet of FLUX.1 that reads identity tokens in the place of the prompt.

Shapes: B batch, P prompts, N identity tokens, L image tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from openpulid.errors import OptionError
from openpulid.identity.identity import Identity
from openpulid.methods.controlnet_flux import FluxControlNet, Residuals
from openpulid.methods.hooks import PipelineState, expand_per_image
from openpulid.methods.ip_adapter.instantid import draw_landmarks
from openpulid.methods.transformer_kinds import FLUX, find_transformer

GUIDANCE = 1.0
"""Distilled guidance of InfuseNet, as in its training; the base model's is that of the request."""


class InfuseNet(FluxControlNet):
    """diffusers' `FluxControlNetModel`, called as InfiniteYou's authors call it."""

    def check(self, target: Any) -> None:
        """Raise OptionError if a target is not of FLUX.1, or of another width.

        InfuseNet has its own guidance, so transformers without one fit as well.
        """
        transformer, kind = find_transformer(target)
        if kind is not FLUX:
            raise OptionError(
                f"InfiniteYou does not act in {kind.name}; attach it to FLUX.1 or a finetune of it."
            )
        if not self.fits(transformer):
            raise OptionError(
                "this InfuseNet was trained for another base model; attach it to FLUX.1 or a "
                "finetune of it."
            )

    def encode_landmarks(
        self,
        identity: Identity | None,
        size: tuple[int, int],
        state: PipelineState,
        hidden: Tensor,
    ) -> Tensor:
        """Encode the control image: landmarks on black, or black alone.

        Args:
            identity: whose landmarks are drawn; None for none.
            size: height and width in pixels.
            state: of the pipeline.
            hidden: (B, L, C) image tokens.

        Returns:
            (1, L, C).

        Raises:
            OptionError: The identity has no landmarks, or the target no autoencoder.
        """
        height, width = size
        image = torch.zeros(3, height, width)
        if identity is not None:
            (image,) = draw_landmarks(identity, (width, height))
        return self.encode_images([image], size, state, hidden)

    def compute_person(
        self, call: Mapping[str, Any], tokens: Tensor, condition: Tensor, scale: float
    ) -> Residuals:
        """Run InfuseNet in a call of the transformer.

        It gets the identity's tokens instead of the prompt's, at position zero like these, and its
        own guidance. It does get the pooled prompt.

        Args:
            call: arguments of the transformer by name, without tokens of reference images.
            tokens: (P, N, D).
            condition: (1 or P, L, C), the latents of control images.
            scale: weight of the residuals.
        """
        hidden = call["hidden_states"]
        identity = expand_per_image(tokens, len(hidden), is_guided=False)
        own = {
            "encoder_hidden_states": identity.to(hidden),
            "txt_ids": hidden.new_zeros(tokens.shape[1], call["img_ids"].shape[-1]),
            "guidance": hidden.new_full((len(hidden),), GUIDANCE),
        }
        return self.compute({**call, **own}, condition, scale)
