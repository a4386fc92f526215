"""InfiniteYou for FLUX.1: load the adapter, attach it to a pipeline, use it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from openpulid.identity.identity import Identity
from openpulid.io.checkpoint_kinds import INFINITEYOU, CheckpointKind
from openpulid.methods.adapter import Adapter
from openpulid.methods.hooks import PipelineState, Span, check_scale
from openpulid.methods.infiniteyou.encoders import FaceProjection, find_files
from openpulid.methods.infiniteyou.infusenet import InfuseNet
from openpulid.methods.infiniteyou.residuals import InfusedPeople, inject_people
from openpulid.methods.pulid import (
    People,
    delay_guidance,
    encode_people,
    normalize_people,
    stack_masks,
)


class InfiniteYou(Adapter):
    """Tokens of a face embedding, and InfuseNet's residuals in each call of the transformer.

    The authors' pipeline is a copy of diffusers' ControlNet pipeline. Here InfuseNet runs inside a
    hook on the transformer, so every FLUX.1 pipeline works, next to PuLID and ControlNets.

    Args:
        projection: face embedding -> tokens.
        infusenet: the published ControlNet.

    Raises:
        WeightsError: The two are not of the same base model.
    """

    slot: ClassVar[str] = "infusenet"
    kinds: ClassVar[tuple[CheckpointKind, ...]] = (INFINITEYOU,)

    def __init__(self, projection: FaceProjection, infusenet: InfuseNet) -> None:
        super().__init__()
        projection.require_output_width(infusenet.model.config.joint_attention_dim)
        self.projection = projection
        self.infusenet = infusenet

    @classmethod
    def check_file(cls, path: str | os.PathLike[str]) -> None:
        """Refuse files of another kind, see `load`."""
        super().check_file(find_files(path)[0])

    @classmethod
    def load(cls, path: str | os.PathLike[str], dtype: torch.dtype = torch.bfloat16) -> InfiniteYou:
        """Load the published files.

        Args:
            path: a folder with `image_proj_model.bin` (or .safetensors) and `InfuseNetModel/`, or
                the file next to the latter.
            dtype: of the weights; FLUX runs in bfloat16.

        Raises:
            WeightsError: One of them is missing, damaged or something else.
        """
        cls.check_file(path)
        file, folder = find_files(path)
        return cls(FaceProjection.load(file, dtype), InfuseNet.load(folder, dtype))

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> InfiniteYou:
        """Move both networks to a device and dtype."""
        self.projection.to(device, dtype)
        self.infusenet.to(device, dtype)
        return self

    def check(self, target: Any) -> None:
        """Raise OptionError if a target is not of FLUX.1, or of another width."""
        self.infusenet.check(target)

    @contextmanager
    def use(
        self,
        people: People,
        scale: float = 1.0,
        start: float = 0.0,
        end: float = 1.0,
        timestep_to_start_cfg: int = 0,
        landmarks: Identity | None = None,
        pipe: Any = None,
    ) -> Iterator[InfiniteYou]:
        """Show an identity with the attached pipelines while the context is open.

        Args:
            people: see `PuLID.use`; masks refer to the generated image. InfuseNet runs once per
                person.
            scale: weight of InfuseNet's residuals; 0 disables it at no cost.
            start: fraction of the schedule at which they begin to act.
            end: fraction of the schedule at which they stop acting. A step that ends after it is
                left out, as in diffusers' ControlNet pipelines.
            timestep_to_start_cfg: first step in which a negative prompt counts, for any scale.
            landmarks: an identity whose landmarks say where the face is, such as one of another
                image; by default the base model decides. The square around its reference image is
                centered in the generated image.
            pipe: one of the attached pipelines; all of them by default.

        Raises:
            OptionError: An argument is out of range, nothing is attached, another identity is in
                use, or the landmarks are missing.
            IdentityError: The identity is of another method, or not finite.
        """
        prompts = normalize_people(people)

        def encode_control(state: PipelineState, size: tuple[int, int], hidden: Tensor) -> Tensor:
            return self.infusenet.encode_landmarks(landmarks, size, state, hidden)

        check_scale(scale)
        span = Span(start, end, whole_steps=True)
        shown = None
        if scale and not span.is_empty:
            tokens = encode_people(prompts, self.projection.encode)
            masks = stack_masks(prompts)
            shown = InfusedPeople(self.infusenet, tokens, encode_control, scale, masks)
        with self._open(shown, span, timestep_to_start_cfg, pipe):
            yield self

    @contextmanager
    def use_tokens(
        self,
        tokens: Tensor,
        control: Tensor,
        scale: float = 1.0,
        start: float = 0.0,
        end: float = 1.0,
        pipe: Any = None,
    ) -> Iterator[InfiniteYou]:
        """Use tokens and latents of control images, also with a transformer alone.

        Args:
            tokens: (P, N, width of FLUX's text tokens), of one identity or one per prompt.
            control: (1 or P, L, C), latents of control images as image tokens.
            scale: see `use`, as the following.
            start: see `use`.
            end: see `use`.
            pipe: see `use`.

        Raises:
            OptionError: See `use`.
        """
        check_scale(scale)
        span = Span(start, end, whole_steps=True)
        shown = InfusedPeople(self.infusenet, tokens[:, None], lambda *_: control, scale)
        with self._open(shown if scale else None, span, 0, pipe):
            yield self

    @contextmanager
    def _open(
        self, people: InfusedPeople | None, span: Span, cfg_start_step: int, pipe: Any
    ) -> Iterator[None]:
        """Delay guidance, and add the residuals of people, in each attached pipeline."""
        states = self.select_pipelines(pipe)

        @contextmanager
        def open_pipeline(state: PipelineState) -> Iterator[None]:
            with ExitStack() as stack:
                stack.enter_context(delay_guidance(state.target, cfg_start_step))
                if people is not None:
                    stack.enter_context(inject_people(state, self.slot, people, watched))
                yield

        with span.watch("the identity") as watched, self.activate(states, open_pipeline):
            yield
