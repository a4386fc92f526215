"""FastComposer's losses (arXiv 2305.10431, section 4.2), for several people in one image.

Shapes: B images, J people in each, H x W mask, L image positions, T text tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from openpulid.errors import OptionError
from openpulid.training.pulid.branches import DiffusionStep
from openpulid.training.pulid.models import AttentionQK

EPSILON = 1e-5
"""Added to areas, as in the authors' code."""


class LocalizationLoss(nn.Module):
    """Cross-attention of a person's word outside the person's mask, less that inside.

    The authors use the cross-attentions of the five middle blocks of Stable Diffusion 1.5 and the
    weight 1e-3. In SDXL no other blocks have any, so that `SDXLModel.capture_attention` collects
    the right ones.
    """

    def forward(
        self,
        attention: Sequence[AttentionQK],
        masks: Tensor,
        positions: Tensor,
        is_shown: Tensor,
    ) -> Tensor:
        """Compute the mean over layers, a scalar from -1 to 1.

        Args:
            attention: of each layer.
            masks: (B, J, H, W), 1 in the region of each person.
            positions: (B, J), of each person's word among the text tokens.
            is_shown: (B, J) bool; the other entries are padding.

        Raises:
            OptionError: There are no layers.
        """
        if not attention:
            raise OptionError("capture the attention of at least one layer.")
        losses = []
        with torch.autocast(attention[0].query.device.type, enabled=False):
            for layer in attention:
                weights = attention_weights(layer)
                losses.append(self.per_layer(weights, masks, positions, is_shown))
            return torch.stack(losses).mean()

    def per_layer(
        self, weights: Tensor, masks: Tensor, positions: Tensor, is_shown: Tensor
    ) -> Tensor:
        """Compute the loss of one layer from its attention weights (B, heads, L, T)."""
        rows = torch.arange(len(weights), device=weights.device)[:, None]
        maps = weights[rows, :, :, positions]  # (B, J, heads, L)
        inside = resize_masks(masks, maps.shape[-1]).to(maps)[:, :, None]  # (B, J, 1, L)
        outside = 1 - inside
        difference = _mean(maps, outside) - _mean(maps, inside)  # (B, J, heads)
        shown = is_shown.to(maps)
        per_image = (difference.mean(-1) * shown).sum(-1) / shown.sum(-1).clamp(min=1)
        return per_image.mean()


class MaskedDiffusionLoss(nn.Module):
    """L_diff of the regions of all people.

    The authors use it in half of the steps. It is the mean over all positions, so that small people
    weigh less; it is not divided by the area of the masks.
    """

    def forward(self, step: DiffusionStep, masks: Tensor) -> Tensor:
        """Compute the mean over the batch, a scalar.

        Args:
            step: prediction and target, (B, c, h, w).
            masks: (B, J, H, W), 1 in the region of each person; padding is 0.
        """
        union = masks.float().amax(1, keepdim=True)
        region = interpolate(union, step.output.shape[-2:], mode="bilinear", align_corners=False)
        error = (step.output.float() - step.target.float()) * region.to(step.output.device)
        return error.square().mean()


def attention_weights(layer: AttentionQK) -> Tensor:
    """Compute softmax(Q K^T / sqrt d) over the text tokens, (B, heads, L, T) in float32."""
    query = layer.query.float()
    return (query @ layer.key.float().transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(-1)


def resize_masks(masks: Tensor, num_positions: int) -> Tensor:
    """Resize masks (B, J, H, W) to the positions of a layer, (B, J, L), with antialiasing.

    The authors' code reads square images only; here the ratio of the sides is that of the masks.
    """
    height, width = masks.shape[-2:]
    rows = round((num_positions * height / width) ** 0.5)
    columns = num_positions // rows
    assert rows * columns == num_positions, "masks have the ratio of the latents"
    resized = interpolate(masks.float(), (rows, columns), mode="bilinear", antialias=True)
    return resized.flatten(2)


def _mean(maps: Tensor, weight: Tensor) -> Tensor:
    return (maps * weight).sum(-1) / (weight.sum(-1) + EPSILON)
