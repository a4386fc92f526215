"""ELITE's mappers (arXiv 2302.13848, section 3): from levels of a vision encoder to words.

Parameter names are those of the published files; sizes are read from the tensors.

Shapes: n images, N patches, S width of the vision encoder, D width of the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.nn.functional import interpolate

from openpulid.identity.identity import Identity
from openpulid.io.checkpoints import explain_bad_weights, load_state
from openpulid.methods.level_mapper import LevelMapper, read_levels


class Mapper(LevelMapper):
    """A global or local mapper: a word or local tokens, and keys and values of the U-Net.

    Args:
        states_dim: S.
        inner_dim: width between the layers of its networks.
        width: D.
        layers: name of a cross-attention with "_" for "." -> width of its keys and values.
    """

    def __init__(
        self, states_dim: int, inner_dim: int, width: int, layers: Mapping[str, int]
    ) -> None:
        super().__init__(states_dim, inner_dim, width)
        self.layers = dict(layers)
        for layer, out in self.layers.items():
            for kind in "kv":
                self.add_module(f"{layer}_to_{kind}", nn.Linear(width, out, bias=False))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Mapper:
        """Build a mapper from its published tensors.

        Raises:
            WeightsError: Names are missing or unexpected, or a shape differs.
        """
        message = "these are not weights of ELITE's mapper"
        suffix = "_to_k.weight"
        with explain_bad_weights(message), init_empty_weights(include_buffers=False):
            inner_dim, states_dim = tensors["mapping_0.0.weight"].shape
            width = len(tensors["mapping_0.6.weight"])
            layers = {
                name.removesuffix(suffix): len(x)
                for name, x in tensors.items()
                if name.endswith(suffix)
            }
            model = cls(states_dim, inner_dim, width, layers)
        load_state(model, tensors, message, assign=True)
        return model.eval().requires_grad_(False)

    def patches(self, levels: Sequence[Tensor], masks: Tensor | None = None) -> Tensor:
        """Map five levels (n, 1 + N, S) to local tokens (n, N, D), the mean over the levels.

        Args:
            levels: of the images.
            masks: (n, H, W), 1 where the object is; None for everywhere.
        """
        pairs = [self.map_level(level, states) for level, states in enumerate(levels)]
        mean = torch.stack([token + tokens for token, tokens in pairs]).mean(0)
        return mean if masks is None else mask_patches(mean, masks)

    def matrix(self, layer: str, kind: str) -> nn.Linear:
        """Return the projection of a cross-attention, kind "k" or "v"."""
        return cast(nn.Linear, self.get_submodule(f"{layer}_to_{kind}"))


class Mappers(nn.Module):
    """What an ELITE file has.

    Args:
        global_mapper: words, and keys and values of the text.
        local_mapper: local tokens, and their keys and values; None for the words alone.

    Attributes:
        num_words: words of the prompt that stand for an image, 1 or 5. The first is that of the
            encoder's last level; the authors use it alone with local tokens.
    """

    def __init__(self, global_mapper: Mapper, local_mapper: Mapper | None = None) -> None:
        super().__init__()
        self.global_mapper = global_mapper
        self.local_mapper = local_mapper
        self.num_words = 1

    def encode_words(self, people: Sequence[Identity]) -> Tensor:
        """Compute the words of identities, (P, num_words, D); images are averaged.

        Args:
            people: P people with n reference images each.

        Raises:
            IdentityError: An identity has other features.
        """
        words = self.global_mapper.words(self._levels(people))
        return words.unflatten(0, (len(people), -1)).mean(1)[:, : self.num_words]

    def encode_patches(
        self, people: Sequence[Identity], masks: Sequence[Tensor | None] | None = None
    ) -> Tensor | None:
        """Compute the local tokens of identities, (P, n * N, D); None without a local mapper.

        Args:
            people: P people with n reference images each.
            masks: (H, W) or (n, H, W) per person, 1 where the person is in the reference images;
                None for everywhere.

        Raises:
            IdentityError: An identity has other features.
        """
        if self.local_mapper is None:
            return None
        tokens = self.local_mapper.patches(self._levels(people)).unflatten(0, (len(people), -1))
        if masks is not None:
            tokens = torch.stack(
                [
                    images if mask is None else mask_patches(images, mask)
                    for images, mask in zip(tokens, masks, strict=True)
                ]
            )
        return tokens.flatten(1, 2)

    def _levels(self, people: Sequence[Identity]) -> list[Tensor]:
        like = next(self.parameters())
        return read_levels(people, self.global_mapper.states_dim, "ELITE", like)


def mask_patches(patches: Tensor, masks: Tensor) -> Tensor:
    """Set the tokens of patches outside masks to zero.

    Args:
        patches: (n, N, D) of n images.
        masks: (n, H, W), or (H, W) for all images.

    Returns:
        (n, N, D).
    """
    masks = masks.expand(len(patches), *masks.shape[-2:])
    side = round(patches.shape[1] ** 0.5)
    resized = interpolate(masks[:, None].to(patches), (side, side), mode="nearest")
    return patches * resized.flatten(2).transpose(1, 2)
