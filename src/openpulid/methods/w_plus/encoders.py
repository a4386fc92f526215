"""The networks of W+ Adapter, under the names of the published files.

Shapes: w (B, 18, W), a latent per layer of StyleGAN2 (W is 512); C width of the text tokens, D
width of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from openpulid.errors import IdentityError
from openpulid.identity.face_latents import LATENT_GROUPS, NUM_LATENTS
from openpulid.identity.identity import Identity
from openpulid.methods.pulid import cross_attentions
from openpulid.methods.second_attention import attend, read_layer_shapes


class LatentProjection(nn.Module):
    """Latents -> four tokens: one matrix per group of latents, and one layer norm."""

    def __init__(self, width: int, token_width: int) -> None:
        super().__init__()
        self.width = width
        for index, count in enumerate(LATENT_GROUPS):
            layer = nn.Linear(count * width, token_width, bias=False)
            self.add_module(f"proj_{index}", layer)
        self.norm = nn.LayerNorm(token_width)

    def forward(self, latents: Tensor) -> Tensor:
        """Map (B, 18, W) to (B, 4, C)."""
        groups = latents.split(LATENT_GROUPS, dim=1)
        tokens = [
            self.get_submodule(f"proj_{index}")(group.flatten(1))
            for index, group in enumerate(groups)
        ]
        return self.norm(torch.stack(tokens, 1))


class WPlusLayer(nn.Module):
    """The second attention of one cross-attention layer.

    Its queries are computed from the output of the text's attention, not from the image.

    Args:
        width: D.
        token_width: C.
    """

    def __init__(self, width: int, token_width: int) -> None:
        super().__init__()
        self.to_q_wplus = nn.Linear(width, width, bias=False)
        self.to_k_wplus = nn.Linear(token_width, width, bias=False)
        self.to_v_wplus = nn.Linear(token_width, width, bias=False)

    @classmethod
    def copy_of(cls, attention: Any) -> WPlusLayer:
        """Create a layer that starts as a copy of the text's attention."""
        layer = cls(attention.inner_dim, attention.cross_attention_dim)
        with torch.no_grad():
            for name in "qkv":
                source = attention.get_submodule(f"to_{name}")
                layer.get_parameter(f"to_{name}_wplus.weight").copy_(source.weight)
        return layer

    def forward(self, text: Tensor, keys: Tensor, values: Tensor, num_heads: int) -> Tensor:
        """Attend from the output of the text's attention.

        Args:
            text: (B, L, D).
            keys: (B, 4, D), of `to_k_wplus`.
            values: (B, 4, D), of `to_v_wplus`.
            num_heads: of the layer.

        Returns:
            (B, L, D), to be multiplied by the scale and added to `text`.
        """
        # the weights may be on another device, if the pipeline is offloaded
        query = linear(text, self.to_q_wplus.weight.to(text))
        return attend(query, keys.to(query), values.to(query), num_heads)


class WPlusNetworks(nn.Module):
    """All networks of a file.

    Args:
        width: W.
        token_width: C.
        layers: layer key -> (D, C).
    """

    def __init__(self, width: int, token_width: int, layers: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.w_proj = LatentProjection(width, token_width)
        self.wplus_adapter = nn.ModuleDict({key: WPlusLayer(*layers[key]) for key in layers})

    @classmethod
    def build(cls, tensors: Mapping[str, Tensor]) -> WPlusNetworks:
        """Create the networks with the sizes of a file's tensors."""
        token_width, width = tensors["w_proj.proj_0.weight"].shape
        layers = read_layer_shapes(tensors, "wplus_adapter", "to_k_wplus.weight")
        return cls(width // LATENT_GROUPS[0], token_width, layers)

    @classmethod
    def for_unet(cls, unet: Any, width: int = 512) -> WPlusNetworks:
        """Create untrained networks for a U-Net; each layer starts as a copy of the text's."""
        attentions = cross_attentions(unet)
        shapes = {key: (x.inner_dim, x.cross_attention_dim) for key, x in attentions.items()}
        networks = cls(width, unet.config.cross_attention_dim, shapes)
        for key, attention in attentions.items():
            networks.wplus_adapter[key] = WPlusLayer.copy_of(attention)
        return networks


def read_latents(identity: Identity, width: int) -> Tensor:
    """Return the latents (1, 18, W) of an identity; those of several images are averaged.

    Args:
        identity: holds the latents.
        width: W.

    Raises:
        IdentityError: it has other features.
    """
    if identity.id_cond.shape[-1] != NUM_LATENTS * width or identity.hidden:
        raise IdentityError(
            "W+ Adapter reads latents of StyleGAN2, and this identity holds features for "
            "another method; create it again from the reference images with "
            "`pulid identify --method w-plus --adapter FILE`."
        )
    return identity.id_cond.float().mean(1).unflatten(-1, (NUM_LATENTS, width))
