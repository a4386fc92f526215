"""IP-Adapter-FaceID (h94/IP-Adapter-FaceID): four tokens from a normalised face embedding, and a LoRA in the same file."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn.functional import normalize

from openpulid.identity.identity import Identity
from openpulid.methods.tokens import TokenMethod


class FaceID(TokenMethod):
    """IP-Adapter's decoupled cross-attention (arXiv 2308.06721, equation 5) with a face recogniser instead of CLIP.

    The published file was trained on *normalised* embeddings of buffalo_l; PuLID's identities hold raw ones.
    """

    scale: ClassVar[float] = 0.8

    @property
    def width(self) -> int:
        """D, of the face embedding that it was trained on."""
        return int(self.parts["image_proj"]["proj.0.weight"].shape[1])

    def embeddings(self, identity: Identity) -> Tensor:
        """(1, n, D): each photo's face embedding, of length 1."""
        return normalize(identity.id_cond[..., : self.width].float(), dim=-1)
