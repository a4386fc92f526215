"""W+ Adapter (arXiv 2311.17461) in any pipeline with a U-Net.

`attention` adds the second attention with hooks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from openpulid.identity.identity import Identity
from openpulid.io.checkpoint_kinds import W_PLUS, CheckpointKind
from openpulid.methods.hooks import Span, find_unet
from openpulid.methods.person_adapter import PersonAdapter, list_identities
from openpulid.methods.second_attention import check_layers, load_networks
from openpulid.methods.w_plus.attention import SLOT, open_attention
from openpulid.methods.w_plus.encoders import WPlusNetworks, read_latents

ORIGIN = (
    "the published files are for Stable Diffusion 1.5, and none is published for SDXL; use a file "
    "that was trained on this base model"
)


class WPlusAdapter(PersonAdapter[WPlusNetworks]):
    """Four tokens of a StyleGAN2 latent, and a second attention in each cross-attention layer.

    Identities come from `identity.photo_extractor.LatentExtractor`: `id_cond` holds the latents.

    Args:
        networks: of a file.

    Attributes:
        start: default start. The authors use the text alone for this fraction of the steps.
    """

    slot: ClassVar[str] = SLOT
    kinds: ClassVar[tuple[CheckpointKind, ...]] = (W_PLUS,)
    start: ClassVar[float] = 0.2

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> WPlusAdapter:
        """Load a file with the published names, such as `wplus_adapter.bin`.

        Raises:
            WeightsError: The file does not exist, is damaged, or is another kind of adapter.
        """
        cls.check_file(path)
        message = f"{path} is no complete W+ Adapter; download it again"
        return cls(load_networks(WPlusNetworks.build, path, message))

    def check(self, target: Any) -> None:
        """Raise an error if the adapter does not fit a pipeline or U-Net.

        Raises:
            OptionError: the target has no U-Net.
            WeightsError: the adapter was trained for another base model.
        """
        shapes = {
            key: tuple(layer.get_parameter("to_k_wplus.weight").shape)
            for key, layer in self.networks.wplus_adapter.items()
        }
        check_layers(shapes, find_unet(target), ORIGIN)

    def encode(self, people: Sequence[Identity]) -> Tensor:
        """Compute the tokens of identities, and those of the negative prompt.

        Returns:
            (2, P, 4, C): of latents that are all zero, as the authors use for the negative prompt,
            then of the identities.

        Raises:
            IdentityError: an identity holds no latents.
        """
        width = self.networks.w_proj.width
        weight = self.networks.w_proj.norm.weight
        latents = torch.cat([read_latents(identity, width) for identity in people]).to(weight)
        return self.encode_latents(latents)

    def encode_latents(self, latents: Tensor) -> Tensor:
        """Compute the tokens (2, P, 4, C) of latents (P, 18, W), see `encode`."""
        zero = torch.zeros_like(latents)
        tokens: Tensor = self.networks.w_proj(torch.cat([zero, latents]))
        return tokens.unflatten(0, (2, -1))

    @contextmanager
    def use(
        self,
        people: Identity | Sequence[Identity],
        scale: float = 1.0,
        start: float | None = None,
        end: float = 1.0,
        pipe: Any = None,
    ) -> Iterator[WPlusAdapter]:
        """Show an identity with the attached pipelines while the context is open.

        Args:
            people: an identity, or one per prompt.
            scale: weight of the second attention; 0 disables the method.
            start: fraction of the schedule after which it acts. The step that begins at `start`
                still has the text alone, as the authors count, unless start is 0.
            end: fraction of the schedule at which it stops; 1 includes the last step.
            pipe: one of the attached pipelines; all of them by default.

        Raises:
            OptionError: nothing is attached, or an argument is out of range.
            IdentityError: an identity holds no latents.
        """
        first = self.start if start is None else start
        with self.use_tokens(self.encode(list_identities(people)), scale, first, end, pipe):
            yield self

    @contextmanager
    def use_tokens(
        self,
        tokens: Tensor,
        scale: float = 1.0,
        start: float = 0.0,
        end: float = 1.0,
        pipe: Any = None,
    ) -> Iterator[WPlusAdapter]:
        """Use tokens of `encode`, which may have gradients, see `use`."""
        span = Span(start, end, after_start=True)
        register = partial(open_attention, self.networks, tokens, scale)
        with self.activate_span(register, scale, span, pipe):
            yield self
