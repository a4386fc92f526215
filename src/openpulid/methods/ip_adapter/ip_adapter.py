"""IP-Adapter (arXiv 2308.06721): image tokens from CLIP features.

Three published variants: plain, Plus, and Plus-Face, which is a Plus file trained on face crops.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from openpulid.errors import OptionError
from openpulid.identity.identity import Identity
from openpulid.methods.ip_adapter.base import IPAdapterBase


class IPAdapter(IPAdapterBase):
    """Decoupled cross-attention (equation 5) to image tokens.

    A plain file has four tokens of CLIP's image embedding. A Plus file has sixteen that a Resampler
    computes from CLIP's penultimate hidden states.

    Identities come from `identity.clip_extractor.ClipExtractor` with the vision encoder that the
    file was trained with.
    """

    scale: ClassVar[float] = 0.6

    @property
    def plus(self) -> bool:
        """Whether the file reads hidden states."""
        return "latents" in self.parts["image_proj"]

    @property
    def width(self) -> int:
        """D of the embedding or hidden state that the file reads."""
        weight = "proj_in.weight" if self.plus else "proj.weight"
        return int(self.parts["image_proj"][weight].shape[1])

    def embeddings(self, identity: Identity) -> Tensor:
        """Return CLIP's embeddings (1, n, D), or hidden states (1, n, 1 + N, D) for a Plus file."""
        if self.plus:
            return self._check_width(clip_states(identity, 0))
        return self._check_width(identity.id_cond)

    def unconditional_embeddings(self, identity: Identity) -> Tensor | None:
        """Return CLIP's states of an empty image for a Plus file; None for a plain one."""
        return self._check_width(clip_states(identity, 1)) if self.plus else None

    def _check_width(self, features: Tensor) -> Tensor:
        if features.shape[-1] != self.width:
            raise OptionError(
                f"this IP-Adapter reads CLIP features of width {self.width}, the identity has "
                f"{features.shape[-1]}; create the identity with the vision encoder "
                "that the file was trained with."
            )
        return features


def clip_states(identity: Identity, index: int) -> Tensor:
    """Return CLIP's hidden states by reference image.

    Args:
        identity: of a `ClipExtractor`.
        index: 0 for the reference images, 1 for an empty image.

    Returns:
        (1, n, 1 + N, D).

    Raises:
        OptionError: The identity has no CLIP features, such as one created for PuLID.
    """
    if len(identity.hidden) != 2:
        raise OptionError(
            "this identity has no CLIP image features; "
            "create it again with `pulid identify --method ip-adapter`."
        )
    return identity.hidden[index].unflatten(1, (identity.photos, -1))
