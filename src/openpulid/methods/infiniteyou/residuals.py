"""InfuseNet's residuals of all people, in each call of a FLUX transformer.

Shapes: B batch, P prompts, J people, N identity tokens, L image tokens (generated, and references).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from openpulid.methods.adapter import exclusive_use
from openpulid.methods.controlnet_flux import Residuals, add_residuals
from openpulid.methods.hooks import (
    HookResult,
    PipelineState,
    Span,
    StepTracker,
    crop_to_ratio,
)
from openpulid.methods.infiniteyou.infusenet import InfuseNet
from openpulid.methods.pulid.masks import resize_masks
from openpulid.methods.transformer_kinds import FLUX, TransformerCall

EncodeControl = Callable[[PipelineState, tuple[int, int], Tensor], Tensor]
"""Pipeline, (height, width) in pixels, image tokens -> latents of control images (1 or P, L, C)."""


@dataclass(frozen=True, eq=False)
class InfusedPeople:
    """People prepared for InfuseNet.

    Attributes:
        net: InfuseNet.
        tokens: (P, J, N, D), of each person of each prompt.
        encode_control: encodes the control images at the size of the generated image.
        scale: weight of the residuals.
        masks: (P, J, H, W) in [0, 1]; None for everywhere.
    """

    net: InfuseNet
    tokens: Tensor
    encode_control: EncodeControl
    scale: float = 1.0
    masks: Tensor | None = None
    _cropped: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def compute(
        self, call: Mapping[str, Any], generated: tuple[int, int], condition: Tensor
    ) -> list[Residuals]:
        """Run InfuseNet once per person.

        Args:
            call: arguments of the transformer by name.
            generated: first and end of the generated ones among the image tokens.
            condition: latents of the control images.

        Returns:
            Per person the residuals of the generated tokens.
        """
        tokens = slice(*generated)
        own_call = {
            **call,
            "hidden_states": call["hidden_states"][:, tokens],
            "img_ids": call["img_ids"][..., tokens, :],
        }
        return [
            self.net.compute_person(own_call, self.tokens[:, person], condition, self.scale)
            for person in range(self.tokens.shape[1])
        ]

    def combine(
        self, people: Sequence[Residuals], facts: TransformerCall, hidden: Tensor
    ) -> Residuals:
        """Add up the residuals of people, each in its region.

        Args:
            people: per person the residuals of the generated tokens.
            facts: about the call.
            hidden: (B, L, C), all image tokens.

        Returns:
            Residuals of all image tokens; those of reference images are zero.
        """
        first, end = facts.generated
        padding = (0, 0, first, hidden.shape[1] - end)
        regions = None
        if self.masks is not None:
            if facts.grid not in self._cropped:
                self._cropped[facts.grid] = crop_to_ratio(self.masks, facts.grid)
            regions = resize_masks(self._cropped[facts.grid], facts.grid, len(hidden)).to(hidden)

        def add_up(samples: Sequence[Tensor]) -> Tensor:
            total = samples[0] if regions is None else samples[0] * regions[0]
            for person in range(1, len(samples)):
                assert regions is not None, "several people have masks"
                total = total + samples[person] * regions[person]
            return pad(total, padding) if any(padding) else total

        double, single = (
            [add_up(samples) for samples in zip(*lists, strict=True)]
            for lists in zip(*people, strict=True)
        )
        return double, single


@contextmanager
def inject_people(
    state: PipelineState, slot: str, people: InfusedPeople, span: Span
) -> Iterator[None]:
    """Add the residuals in each call of a pipeline's transformer, but not for negative prompts.

    Args:
        state: of a pipeline with a FLUX.1 transformer.
        slot: see `Adapter.slot`.
        people: who is shown.
        span: of the schedule in which they are.

    Raises:
        OptionError: The slot is occupied, or the transformer is compiled as a whole.
    """
    tracker = StepTracker(state)
    conditions: dict[tuple[int, int], Tensor] = {}

    def before_call(transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> HookResult:
        call = FLUX.name_arguments(args, kwargs)
        facts = FLUX.read(state.target, call)
        tracker.count(facts.time)
        if tracker.is_negative or not span.contains(tracker.position):
            return args, kwargs
        hidden = call["hidden_states"]
        if facts.grid not in conditions:
            side = 2 * state.pixels_per_latent  # of a token
            size = (facts.grid[0] * side, facts.grid[1] * side)
            conditions[facts.grid] = people.encode_control(state, size, hidden)
        each = people.compute(call, facts.generated, conditions[facts.grid])
        residuals = people.combine(each, facts, hidden)
        return args, kwargs | add_residuals(transformer, call, residuals, is_repeated=False)

    transformer = state.network
    with exclusive_use(transformer, slot, [transformer]):
        # the hook reads Python values that change from call to call
        hook = torch.compiler.disable(before_call)
        handle = transformer.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
