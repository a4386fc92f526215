"""Base class of the methods that change the prompt: PhotoMaker, FastComposer, ELITE."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from openpulid.errors import OptionError
from openpulid.identity.identity import Identity
from openpulid.methods.adapter import Adapter, check_text_encoders, exclusive_use
from openpulid.methods.hooks import PipelineState, Span, find_unet
from openpulid.methods.lora import check_lora, move_lora, parse_lora
from openpulid.methods.prompt_fusion import PromptFusion
from openpulid.methods.pulid import People, normalize_people


class PromptAdapter(Adapter):
    """A method that names identities in the prompt of an SDXL pipeline.

    Args:
        encoder: what `fusion` needs of the method.
        lora: low-rank change of the U-Net, by the names of diffusers or peft.

    Attributes:
        fusion: changes the prompts of one pipeline; created with its state, the encoder, the
            identities of each prompt (or one entry for all prompts), and the span.
        start: default start, up to which the plain prompt is used.
        shows_several: whether one prompt can name several people.
    """

    slot: ClassVar[str] = "prompt"
    fusion: ClassVar[Callable[..., PromptFusion]]
    start: ClassVar[float] = 0.0
    shows_several: ClassVar[bool] = False

    def __init__(self, encoder: Any, lora: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.encoder = encoder
        self.lora = parse_lora(lora)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> PromptAdapter:
        """Move the encoder and the low-rank matrices to a device and dtype."""
        self.encoder.to(device, dtype)
        move_lora(self.lora, device, dtype)
        return self

    def hook_unet(
        self, fusion: Any, scale: float, *args: Any, **options: Any
    ) -> AbstractContextManager[Any]:
        """Register the hooks of `fusion`, and those of the method on the U-Net."""
        return fusion.register(self.lora, scale, *args, **options)

    def check(self, target: Any) -> None:
        """Raise an error if the target is no SDXL pipeline with two text encoders.

        Raises:
            OptionError: it is another pipeline.
            WeightsError: the low-rank change was trained for another U-Net.
        """
        unet = find_unet(target)
        check_text_encoders(target)
        check_lora(unet, self.lora)

    @contextmanager
    def use(
        self,
        people: People,
        scale: float = 1.0,
        start: float | None = None,
        end: float = 1.0,
        pipe: Any = None,
        **options: Any,
    ) -> Iterator[Any]:
        """Show identities with the attached pipelines while the context is open.

        Args:
            people: an identity, or one per prompt. For a method with several people in one prompt
                also a list of (identity, None), in the order of their words; or one such list per
                prompt.
            scale: weight of the method; 0 disables it.
            start: fraction of the schedule after which the changed prompt is used. The step that
                begins at `start` still has the plain prompt, unless start is 0.
            end: fraction of the schedule at which it stops; 1 includes the last step.
            pipe: one of the attached pipelines; all of them by default.
            options: of the method, see its class.

        Raises:
            OptionError: Nothing is attached, or an argument is out of range.
            IdentityError: The features of an identity are not finite.
        """
        prompts = self._identities(people)

        @contextmanager
        def open_pipeline(state: PipelineState, span: Span) -> Iterator[None]:
            fusion = type(self).fusion(state, self.encoder, prompts, span)
            with (
                exclusive_use(state.network, self.slot, state.network.modules()),
                self.hook_unet(fusion, scale, **options),
            ):
                yield

        first = self.start if start is None else start
        span = Span(first, end, after_start=True)
        with self.activate_span(open_pipeline, scale, span, pipe):
            yield self

    def _identities(self, people: People) -> list[list[Identity]]:
        """Return the identities of each prompt."""
        name = type(self).__name__
        prompts = normalize_people(people)
        for prompt in prompts:
            if any(mask is not None for _, mask in prompt):
                raise OptionError(f"{name} has no masks; leave them out.")
            if len(prompt) > 1 and not self.shows_several:
                raise OptionError(f"{name} shows one identity per prompt; leave the others out.")
            for identity, _ in prompt:
                identity.check_values()
        return [[identity for identity, _ in prompt] for prompt in prompts]
