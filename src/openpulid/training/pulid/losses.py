"""The losses, one class each: equation in the docstring, float32 inside, no logging, no base model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from openpulid.diffusion.noise_schedule import NoiseSchedule
from openpulid.errors import OptionError
from openpulid.training.pulid.branches import DiffusionStep
from openpulid.training.pulid.models import AttentionQK


class DiffusionLoss(nn.Module):
    """L_diff = E || eps - eps_theta(x_t, t, C) ||^2 (PuLID, arXiv 2404.16022, equation 1), with the base's
    own target.

    Two options that the paper does not mention, both off by default:

    - min-SNR-gamma (arXiv 2303.09556): the loss at t is weighted so that it counts like min(SNR_t, gamma) on
    x_0, which is
      min(SNR, gamma) / SNR for epsilon and min(SNR, gamma) / (SNR + 1) for v. Few times dominate no longer.
    - `inside`: positions inside a mask weigh so many times those outside; each picture's weights are divided
    by their mean.

    Args:
        schedule: the base's.
        gamma: of min-SNR, usually 5; None weighs all times alike.
        inside: weight of a position inside the mask, those outside weigh 1.
    """

    def __init__(
        self, schedule: NoiseSchedule, gamma: float | None = None, inside: float = 1.0
    ) -> None:
        super().__init__()
        if inside <= 0 or (gamma is not None and gamma <= 0):
            raise OptionError(
                f"gamma {gamma} and inside {inside} are weights: choose positive numbers"
            )
        self.schedule, self.gamma, self.inside = schedule, gamma, inside

    def forward(self, step: DiffusionStep, mask: Tensor | None = None) -> Tensor:
        """The mean over the batch, a scalar. `mask` (B, 1, h, w) is 1 inside, at the size of the latents."""
        return (self.per_sample(step, mask) * self.weight(step.t)).mean()

    def per_sample(self, step: DiffusionStep, mask: Tensor | None = None) -> Tensor:
        """Each picture's mean squared error, (B,), weighted over its positions but not over times."""
        error = (step.output.float() - step.target.float()).square()
        if mask is not None:
            weight = 1.0 + (self.inside - 1.0) * mask.to(error)
            error = error * (weight / weight.mean(dim=(1, 2, 3), keepdim=True))
        return error.flatten(1).mean(1)

    def weight(self, t: Tensor) -> Tensor:
        """(B,) by the time alone."""
        if self.gamma is None:
            return torch.ones(len(t), device=t.device)
        snr = self.schedule.snr(t)
        counted = snr.clamp(max=self.gamma)
        if self.schedule.prediction == "epsilon":
            return counted / snr.clamp(min=torch.finfo(torch.float32).tiny)
        return counted / (snr + 1.0)


class IDLoss(nn.Module):
    """L_id = 1 - cos(phi(C_id), phi(x_0)) (PuLID, equation 3), phi a face recogniser other than the encoder's.

    x_0 is the decoded picture: of the lightning branch ("accurate"), or of one step from x_t ("naive", the ablation).
    Pictures without a face, on either side, are left out.
    """

    def forward(self, wanted: Tensor, shown: Tensor, found: Tensor) -> Tensor:
        """A scalar: the sum over the pictures with a face, divided by B.

        Not by the number of faces: so every face weighs the same however many were found beside it, and the mean over
        the processes of a run is what one process would have computed.

        Args:
            wanted, shown: (B, D) embeddings of who should be seen and who is.
            found: (B,) bool, a face on both sides.
        """
        distance = 1 - cosine_similarity(wanted.float(), shown.float(), dim=-1)
        return torch.where(found, distance, torch.zeros_like(distance)).mean()


class SemanticAlignment(nn.Module):
    """L_sem = || softmax(K Q_tid^T / sqrt d) Q_tid - softmax(K Q_t^T / sqrt d) Q_t ||_2 (PuLID, equation 4).

    For each word, the image queries that answer to it must be the same with the identity as without. Per head; the
    softmax is over the image positions.
    """

    def forward(self, own: Sequence[AttentionQK], target: Sequence[AttentionQK]) -> Tensor:
        """A scalar: the mean of `distance` over layers (and steps, when their lists are joined); the target carries
        no gradient."""
        return _over_layers(own, target, semantic_response)


class LayoutAlignment(nn.Module):
    """L_layout = || Q_tid - Q_t ||_2 (PuLID, equation 5): every position asks with the identity what it asked without."""

    def forward(self, own: Sequence[AttentionQK], target: Sequence[AttentionQK]) -> Tensor:
        """A scalar, as `SemanticAlignment`."""
        return _over_layers(own, target, lambda seen: seen.query.float())


def semantic_response(seen: AttentionQK) -> Tensor:
    """softmax(K Q^T / sqrt d) Q, (B, h, T, d) float32."""
    query, key = seen.query.float(), seen.key.float()
    return (key @ query.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(-1) @ query


def distance(own: Tensor, target: Tensor) -> Tensor:
    """|| own - target ||_2 of each sample, (B,), divided by the square root of the number of entries.

    The paper leaves open how the norm is reduced; so reduced it does not depend on a layer's size, and layers of any
    scale pull with the same force.
    """
    square = (own - target).square().flatten(1).mean(1)
    return (square + 1e-12).sqrt()  # a root has no gradient at exactly zero


def _over_layers(
    own: Sequence[AttentionQK], target: Sequence[AttentionQK], what: Callable[[AttentionQK], Tensor]
) -> Tensor:
    if not own or len(own) != len(target):
        raise OptionError(
            f"{len(own)} layers with identity are compared with {len(target)} without"
        )
    with torch.autocast(own[0].query.device.type, enabled=False):
        pairs = zip(own, target, strict=True)
        return torch.stack([distance(what(a), what(b).detach()).mean() for a, b in pairs]).mean()
