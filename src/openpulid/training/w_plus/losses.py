"""The losses of W+ Adapter's second stage (arXiv 2311.17461), computed in float32."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import interpolate, mse_loss


class WPlusLoss(nn.Module):
    """L = L_rec + disentanglement * L_disen + preservation * L_preserve.

    - rec: the diffusion loss.
    - disen: with other latents, nothing changes outside of the face. The weight 1 - mask multiplies
      both predictions before the square, so a soft mask counts squared, as in the authors' code.
    - preserve: the identity changes the base model's prediction little, in the whole image.

    The other two predictions carry no gradient.

    Args:
        disentanglement: weight of `disen`. The code has 0.6 by default, its script for training 2.
        preservation: weight of `preserve`. The code has 0.4 by default, its script 1.
    """

    def __init__(self, disentanglement: float = 0.6, preservation: float = 0.4) -> None:
        super().__init__()
        self.disentanglement = disentanglement
        self.preservation = preservation

    def forward(
        self, prediction: Tensor, target: Tensor, other: Tensor, base: Tensor, mask: Tensor
    ) -> Tensor:
        """Compute the weighted sum of `parts`, a scalar."""
        parts = self.parts(prediction, target, other, base, mask)
        total = parts["rec"] + self.disentanglement * parts["disen"]
        return total + self.preservation * parts["preserve"]

    def parts(
        self, prediction: Tensor, target: Tensor, other: Tensor, base: Tensor, mask: Tensor
    ) -> dict[str, Tensor]:
        """Compute the losses without their weights.

        Args:
            prediction: (B, c, h, w), with the identity.
            target: (B, c, h, w), the noise.
            other: (B, c, h, w), with disturbed latents of other people.
            base: (B, c, h, w), of the base model: scale 0.
            mask: (B, 1, H, W) in [0, 1], 1 inside the face; it is resized to h x w.
        """
        prediction = prediction.float()
        outside = 1 - interpolate(mask.float(), prediction.shape[-2:], mode="bilinear")
        return {
            "rec": mse_loss(prediction, target.float()),
            "disen": mse_loss(outside * prediction, outside * other.detach().float()),
            "preserve": mse_loss(prediction, base.detach().float()),
        }
