"""IP-Adapter-FaceID (h94/IP-Adapter-FaceID): four tokens from a normalised face embedding, and a LoRA in the same file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from openpulid.identity.identity import Identity
from openpulid.methods.hooks import PipelineState
from openpulid.methods.ip_adapter.base import Call, IPAdapterBase, per_image
from openpulid.methods.ip_adapter.ip_adapter import hidden


class FaceID(IPAdapterBase):
    """IP-Adapter's decoupled cross-attention (arXiv 2308.06721, equation 5) with a face recogniser instead of CLIP.

    The published file was trained on *normalised* embeddings of buffalo_l; PuLID's identities hold raw ones. `scale` weighs the
    tokens; the LoRA acts wholly within the span, as the authors fuse it.
    """

    @property
    def width(self) -> int:
        """D, of the face embedding that it was trained on."""
        return int(self.parts["image_proj"]["proj.0.weight"].shape[1])

    def embeddings(self, identity: Identity) -> Tensor:
        """(1, n, D): each photo's face embedding, of length 1."""
        return normalize(identity.id_cond[..., : self.width].float(), dim=-1)


class FaceIDPlus(FaceID):
    """FaceID-PlusV2: the face's tokens ask a perceiver over CLIP's hidden states of the face, and add what it answers.

    Identities are `identity.clip.ClipExtractor`'s, with a recogniser.
    """

    def tell(
        self, attachment: PipelineState, people: Sequence[Identity], call: Call, strength: float
    ) -> dict[str, Any]:
        """The states go to the projection layer itself, in the order of the batch: diffusers has no argument for them."""
        seen, nothing = (
            torch.cat([hidden(identity, level) for identity in people]) for level in (0, 1)
        )
        layer = _perceiver(attachment.unet.encoder_hid_proj)
        layer.clip_embeds = per_image(seen, len(call.sample), attachment.guided(), nothing).to(
            call.sample
        )
        layer.shortcut = True  # version 2: the face embedding stays, and the perceiver adds to it
        return super().tell(attachment, people, call, strength)

    @contextmanager
    def _opened(
        self,
        attachment: PipelineState,
        people: Sequence[Identity],
        scale: float,
        span: tuple[float, float],
    ) -> Iterator[None]:
        try:
            with super()._opened(attachment, people, scale, span):
                yield
        finally:
            if (
                attachment.unet in self._built
            ):  # nobody's features stay in a layer that is kept for the next time
                _perceiver(self._built[attachment.unet][1]).clip_embeds = None


def _perceiver(projection: Any) -> Any:
    """diffusers' layer that makes the tokens of the one file that is loaded."""
    return projection.image_projection_layers[0]
