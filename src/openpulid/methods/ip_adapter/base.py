"""Image tokens next to the text tokens: what IP-Adapter, FaceID and InstantID share.

diffusers does the work: `load_ip_adapter` builds the projection and the attention processors. This
module activates them around a generation, for any SDXL pipeline and without new arguments of the
pipeline: the embeddings are passed by a hook on the U-Net.

Shapes: B batch of the U-Net, P prompts, n reference images, D width of an embedding.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from openpulid.errors import OptionError, WeightsError
from openpulid.identity.identity import Identity
from openpulid.io.checkpoint_kinds import IP_ADAPTER, RESAMPLER, CheckpointKind
from openpulid.io.checkpoints import (
    TensorGroups,
    explain_bad_weights,
    group_tensors,
    read_tensors,
)
from openpulid.methods.adapter import Adapter, check_projections_are_called, exclusive_use
from openpulid.methods.hooks import (
    HookResult,
    PipelineState,
    Span,
    UNetCall,
    expand_per_image,
    find_unet,
    move_to,
)
from openpulid.methods.ip_adapter.processors import (
    IPAdapterLayers,
    build_layers,
    install_layers,
    restore_layers,
)
from openpulid.methods.lora import check_low_rank, find_lora_layers, low_rank_hook
from openpulid.methods.person_adapter import list_identities


class IPAdapterBase(Adapter):
    """A method whose file diffusers opens with `load_ip_adapter`. Subclasses define the embeddings.

    Args:
        parts: the published file.

    Attributes:
        scale: default weight of the image tokens, as the authors use it.
    """

    slot: ClassVar[str] = "attention_processors"
    scale: ClassVar[float] = 1.0
    kinds: ClassVar[tuple[CheckpointKind, ...]] = (IP_ADAPTER, RESAMPLER)

    def __init__(self, parts: TensorGroups) -> None:
        super().__init__()
        if set(parts) != {"image_proj", "ip_adapter"} or not all(parts.values()):
            raise WeightsError(
                "an IP-Adapter file has the parts image_proj and ip_adapter; "
                f"this file has {', '.join(parts) or 'none'}."
            )
        self.parts = {part: dict(tensors) for part, tensors in parts.items()}
        layers = self.parts["ip_adapter"]
        self.lora = {name: layers.pop(name) for name in list(layers) if "_lora." in name}
        self._layers: WeakKeyDictionary[nn.Module, IPAdapterLayers] = WeakKeyDictionary()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> IPAdapterBase:
        """Load a published file, safetensors or `.bin`.

        Raises:
            WeightsError: The file does not exist, or is another kind of adapter.
        """
        cls.check_file(path)
        return cls(group_tensors(read_tensors(path)))

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> IPAdapterBase:
        """Move the low-rank matrices. What diffusers builds from the file follows the U-Net."""
        self.lora = {name: x.to(device, dtype) for name, x in self.lora.items()}
        return self

    @property
    def width(self) -> int:
        """D of the embedding that the file reads."""
        raise NotImplementedError

    def embeddings(self, identity: Identity) -> Tensor:
        """Return the embeddings of an identity for diffusers' projection layer, (1, n, ...)."""
        raise NotImplementedError

    def unconditional_embeddings(self, identity: Identity) -> Tensor | None:
        """Return the embeddings of the negative half of a guided batch; None for zeros."""
        return None

    def image_tokens(self, projection: nn.Module, identity: Identity) -> Tensor:
        """Compute the image tokens of an identity, and those of the negative prompt.

        Args:
            projection: of `IPAdapterLayers`.
            identity: the person.

        Returns:
            (2, T, width of the text tokens), in the dtype of the projection.
        """
        embeddings = self.embeddings(identity)
        negative = self.unconditional_embeddings(identity)
        if negative is None:
            negative = torch.zeros_like(embeddings)
        weight = next(projection.parameters())
        (tokens,) = projection([torch.cat([embeddings, negative]).to(weight)])
        return tokens.flatten(1, 2)

    def check(self, target: Any) -> None:
        """Raise OptionError if the target is no SDXL pipeline, or is already offloaded."""
        find_unet(target)
        if not hasattr(target, "load_ip_adapter"):
            raise OptionError(
                f"{type(target).__name__} is not a pipeline; "
                "attach this method to a StableDiffusionXL pipeline."
            )
        self.layers_for(target)  # build now instead of in the first image

    def layers_for(self, pipe: Any) -> IPAdapterLayers:
        """Return the method's layers for a pipeline's U-Net, built by diffusers once.

        Raises:
            OptionError: The pipeline is already offloaded.
            WeightsError: The file is damaged, or was trained for another base model.
        """
        if pipe.unet not in self._layers:
            with explain_bad_weights(
                "this adapter was trained for another base model, or its file is damaged"
            ):
                layers = build_layers(pipe, self.parts)
                self._check_sizes(pipe.unet)
            self._layers[pipe.unet] = layers
        return self._layers[pipe.unet]

    def _check_sizes(self, unet: Any) -> None:
        """Raise an error if the file lacks its first layer, or its LoRA does not fit a U-Net."""
        if self.width < 1:
            raise ValueError("it reads embeddings of width 0")
        for module, down, up in find_lora_layers(unet, self.lora):
            check_low_rank(module, down, up)

    def _release(self, network: Any) -> None:
        self._layers.pop(network, None)
        super()._release(network)

    @contextmanager
    def use(
        self,
        people: Identity | Sequence[Identity],
        scale: float | None = None,
        start: float = 0.0,
        end: float = 1.0,
        pipe: Any = None,
    ) -> Iterator[IPAdapterBase]:
        """Show an identity with the attached pipelines while the context is open.

        Args:
            people: an identity, or one per prompt.
            scale: weight of the image tokens; the authors' by default.
            start: fraction of the schedule at which they begin to act.
            end: fraction of the schedule at which they stop acting; 1 includes the last step.
            pipe: one of the attached pipelines; all of them by default.

        Raises:
            OptionError: Nothing is attached, an argument is out of range, identities have
                different numbers of reference images, or another identity is in use.
            IdentityError: The features of an identity are not finite.
        """
        identities = list_identities(people)
        if len({self.embeddings(identity).shape for identity in identities}) > 1:
            raise OptionError(
                "all identities of a batch need the same number of reference images; run prompts "
                "with other numbers in a call of their own."
            )
        weight = self.scale if scale is None else scale
        with self.activate_span(
            lambda state, span: self._open(state, identities, weight, span),
            weight,
            Span(start, end),
            pipe,
        ):
            yield self

    def unet_kwargs(
        self, state: PipelineState, people: Sequence[Identity], call: UNetCall, scale: float
    ) -> dict[str, Any]:
        """Return the arguments of the U-Net that change in a call.

        Args:
            state: of the pipeline that runs.
            people: one identity per prompt, or one for all.
            call: of the U-Net.
            scale: 0 where the method is not active.
        """
        embeddings = torch.cat([self.embeddings(identity) for identity in people])
        negative = cat_or_none([self.unconditional_embeddings(identity) for identity in people])
        batch = expand_per_image(embeddings, len(call.sample), state.is_guided(), negative)
        conditions = call.kwargs.get("added_cond_kwargs") or {}
        image_embeds = [batch.to(call.sample)]
        return {"added_cond_kwargs": {**conditions, "image_embeds": image_embeds}}

    @contextmanager
    def _open(
        self, state: PipelineState, people: Sequence[Identity], scale: float, span: Span
    ) -> Iterator[None]:
        """Put the layers into one pipeline and pass the embeddings in every call."""
        unet = state.network
        if self.lora:
            check_projections_are_called(unet)
        current_scale = 0.0
        with (
            exclusive_use(unet, self.slot, unet.modules() if self.lora else [unet]),
            restore_layers(state.target) as processors,
            ExitStack() as hooks,
        ):
            layers = self.layers_for(state.target)
            own = layers.cross_attention
            install_layers(unet, {**processors, **own}, layers.projection, "ip_image_proj")

            def pass_embeddings(
                module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
            ) -> HookResult:
                nonlocal current_scale
                call = UNetCall.parse(args, kwargs)
                is_active = span.contains(state.position(call.timestep))
                current_scale = scale if is_active else 0.0
                move_to([layers.projection, *own.values()], call.sample.device, unet.dtype)
                for processor in own.values():
                    processor.scale = [current_scale]
                return args, kwargs | self.unet_kwargs(state, people, call, current_scale)

            handle = unet.register_forward_pre_hook(pass_embeddings, with_kwargs=True)
            hooks.callback(handle.remove)
            for module, down, up in find_lora_layers(unet, self.lora):
                low_rank = low_rank_hook(down, up, lambda: current_scale != 0)
                hooks.callback(module.register_forward_hook(low_rank).remove)
            yield


def cat_or_none(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """Join tensors to (P, ...), or return None if one is missing."""
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(present) if len(present) == len(tensors) else None
