"""IP-Adapter (arXiv 2308.06721): tokens of a picture as CLIP sees it. Plain, Plus, and Plus-Face: Plus shown a face."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from openpulid.errors import OptionError
from openpulid.identity.identity import Identity
from openpulid.methods.ip_adapter.base import IPAdapterBase


class IPAdapter(IPAdapterBase):
    """Decoupled cross-attention (equation 5) to four tokens of CLIP's picture embedding, or, in a Plus file, to sixteen that a
    Resampler makes of its penultimate hidden states.

    Identities are `identity.clip.ClipExtractor`'s: the picture tower is the one that the file was trained with.
    """

    scale: ClassVar[float] = 0.6

    @property
    def plus(self) -> bool:
        """Whether the file reads hidden states."""
        return "latents" in self.parts["image_proj"]

    @property
    def width(self) -> int:
        """Of what the file reads: an embedding, or a hidden state."""
        return int(
            self.parts["image_proj"]["proj_in.weight" if self.plus else "proj.weight"].shape[1]
        )

    def embeddings(self, identity: Identity) -> Tensor:
        """(1, n, D), or of a Plus file (1, n, 1 + N, D)."""
        return self._fitting(hidden(identity, 0) if self.plus else identity.id_cond)

    def nobody(self, identity: Identity) -> Tensor | None:
        """A Plus file learned what CLIP sees in an empty picture; a plain one learned zeros."""
        return self._fitting(hidden(identity, 1)) if self.plus else None

    def _fitting(self, seen: Tensor) -> Tensor:
        if seen.shape[-1] != self.width:
            raise OptionError(
                f"this IP-Adapter reads {self.width} numbers of a picture tower and the identity has {seen.shape[-1]}; "
                "make the identity with the tower that the file was trained with."
            )
        return seen


def hidden(identity: Identity, level: int) -> Tensor:
    """(1, n, 1 + N, D): a level of an identity by photo.

    Raises:
        OptionError: the identity has none such, as PuLID's has not.
    """
    if len(identity.hidden) != 2:
        raise OptionError(
            "this identity holds no CLIP states of a picture and of none; make it with this method's own reader of pictures."
        )
    states = identity.hidden[level]
    return states.unflatten(1, (identity.photos, -1))
