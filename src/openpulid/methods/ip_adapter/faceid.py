"""IP-Adapter-FaceID (h94/IP-Adapter-FaceID): tokens of a face embedding, and a LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from openpulid.identity.identity import Identity
from openpulid.io.checkpoint_kinds import FACEID, FACEID_PLUS, CheckpointKind
from openpulid.methods.hooks import PipelineState, Span, UNetCall, expand_per_image
from openpulid.methods.ip_adapter.base import IPAdapterBase
from openpulid.methods.ip_adapter.ip_adapter import clip_states


class FaceID(IPAdapterBase):
    """IP-Adapter's decoupled cross-attention (arXiv 2308.06721, equation 5) to a face embedding.

    The published file was trained on *normalized* embeddings of buffalo_l; identities hold raw
    ones. `scale` weighs the tokens. The LoRA has full weight within the span, as the authors fuse
    it.
    """

    kinds: ClassVar[tuple[CheckpointKind, ...]] = (FACEID,)

    @property
    def width(self) -> int:
        """D of the face embedding that the file was trained on."""
        return int(self.parts["image_proj"]["proj.0.weight"].shape[1])

    def embeddings(self, identity: Identity) -> Tensor:
        """Return the face embedding of each reference image, of length 1, (1, n, D)."""
        return normalize(identity.id_cond[..., : self.width].float(), dim=-1)


class FaceIDPlus(FaceID):
    """FaceID-PlusV2: a perceiver over CLIP's hidden states of the face adds to the face's tokens.

    Identities come from `identity.clip_extractor.ClipExtractor` with a face recognition model.
    """

    kinds: ClassVar[tuple[CheckpointKind, ...]] = (FACEID_PLUS,)

    def image_tokens(self, projection: nn.Module, identity: Identity) -> Tensor:
        """Compute the image tokens of an identity, and those of the negative prompt."""
        (layer,) = projection.image_projection_layers  # type: ignore[misc]
        states = torch.cat([clip_states(identity, index) for index in (0, 1)])
        layer.clip_embeds = states.to(next(layer.parameters()))
        layer.shortcut = True
        try:
            return super().image_tokens(projection, identity)
        finally:
            layer.clip_embeds = None

    def unet_kwargs(
        self, state: PipelineState, people: Sequence[Identity], call: UNetCall, scale: float
    ) -> dict[str, Any]:
        """Return the arguments of the U-Net, and set CLIP's states in the projection layer.

        diffusers has no argument for the states. They are set in the order of the batch.
        """
        states = torch.cat([clip_states(identity, 0) for identity in people])
        negative = torch.cat([clip_states(identity, 1) for identity in people])
        batch = expand_per_image(states, len(call.sample), state.is_guided(), negative)
        layer = self.layers_for(state.target).image_projection
        layer.clip_embeds = batch.to(call.sample)
        layer.shortcut = True  # version 2: the perceiver's output is added to the face embedding
        return super().unet_kwargs(state, people, call, scale)

    @contextmanager
    def _open(
        self, state: PipelineState, people: Sequence[Identity], scale: float, span: Span
    ) -> Iterator[None]:
        try:
            with super()._open(state, people, scale, span):
                yield
        finally:
            # the layer is reused: it must not keep the features of an identity
            layers = self._layers.get(state.network)
            if layers is not None:
                layers.image_projection.clip_embeds = None
