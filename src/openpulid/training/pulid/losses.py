"""The losses, one class each, computed in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from openpulid.diffusion.flow_schedule import FlowSchedule
from openpulid.diffusion.noise_schedule import NoiseSchedule
from openpulid.errors import OptionError
from openpulid.training.pulid.branches import DiffusionStep
from openpulid.training.pulid.models import AttentionQK


class DiffusionLoss(nn.Module):
    """L_diff = E || eps - eps_theta(x_t, t, C) ||^2 (PuLID, arXiv 2404.16022, equation 1).

    The target is the base's own. Two options that the paper does not mention are off by default:

    - min-SNR-gamma (arXiv 2303.09556): the loss at t is weighted so that it counts like
      min(SNR_t, gamma) on x_0. The weight is min(SNR, gamma) / SNR for epsilon and
      min(SNR, gamma) / (SNR + 1) for v. Then a few timesteps do not dominate. A flow model weighs
      noise levels by how often it draws them instead.
    - `face_weight`: positions inside a mask weigh more than those outside. The weights of each
      image are divided by their mean.

    Args:
        schedule: of the base model.
        min_snr_gamma: usually 5; None weighs all timesteps alike.
        face_weight: of a position inside the mask; positions outside weigh 1.
    """

    def __init__(
        self,
        schedule: NoiseSchedule | FlowSchedule,
        min_snr_gamma: float | None = None,
        face_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if face_weight <= 0 or (min_snr_gamma is not None and min_snr_gamma <= 0):
            raise OptionError(
                f"min_snr_gamma ({min_snr_gamma}) and face_weight ({face_weight}) must be positive."
            )
        if min_snr_gamma is not None and isinstance(schedule, FlowSchedule):
            raise OptionError("flow models have no min_snr_gamma; set logit_mean and logit_std.")
        self.schedule = schedule
        self.min_snr_gamma = min_snr_gamma
        self.face_weight = face_weight

    def forward(self, step: DiffusionStep, mask: Tensor | None = None) -> Tensor:
        """Compute the mean over the batch, a scalar.

        Args:
            step: prediction and target.
            mask: (B, 1, h, w), 1 inside the face, at the size of the latents.
        """
        return self.per_image(step, mask).mean()

    def per_image(self, step: DiffusionStep, mask: Tensor | None = None) -> Tensor:
        """Compute the loss of each image, (B,), whose mean is that of the batch."""
        return self.per_sample(step, mask) * self.timestep_weight(step.t)

    def per_sample(self, step: DiffusionStep, mask: Tensor | None = None) -> Tensor:
        """Compute the mean squared error of each image, (B,), without timestep weights."""
        error = (step.output.float() - step.target.float()).square()
        if mask is not None:
            weight = 1.0 + (self.face_weight - 1.0) * mask.to(error)
            error = error * (weight / weight.mean(dim=(1, 2, 3), keepdim=True))
        return error.flatten(1).mean(1)

    def timestep_weight(self, t: Tensor) -> Tensor:
        """Compute the min-SNR weights (B,) of timesteps (B,)."""
        if self.min_snr_gamma is None or isinstance(self.schedule, FlowSchedule):
            return torch.ones(len(t), device=t.device)
        snr = self.schedule.snr(t)
        clipped_snr = snr.clamp(max=self.min_snr_gamma)
        if self.schedule.prediction == "epsilon":
            return clipped_snr / snr.clamp(min=torch.finfo(torch.float32).tiny)
        return clipped_snr / (snr + 1.0)


class IDLoss(nn.Module):
    """L_id = 1 - cos(phi(C_id), phi(x_0)) (PuLID, equation 3).

    phi is a face recognition model other than the encoder's. x_0 is the decoded image of the
    lightning branch ("accurate"), or of one step from x_t ("naive", the ablation). Images without a
    detected face are left out.
    """

    def forward(self, target: Tensor, embeddings: Tensor, has_face: Tensor) -> Tensor:
        """Compute the sum over the images with a face, divided by B.

        Dividing by B instead of the number of faces weighs every face alike, and the mean over the
        processes of a run is what a single process computes.

        Args:
            target: (B, D) embeddings of the reference images.
            embeddings: (B, D) embeddings of the generated images.
            has_face: (B,) bool, whether both images show a face.
        """
        distance = 1 - cosine_similarity(target.float(), embeddings.float(), dim=-1)
        return torch.where(has_face, distance, torch.zeros_like(distance)).mean()


class SemanticAlignment(nn.Module):
    """L_sem = || softmax(K Q_tid^T / sqrt d) Q_tid - softmax(K Q_t^T / sqrt d) Q_t ||_2.

    PuLID, equation 4. For each text token, the image queries that respond to it must be the same
    with the identity as without. Computed per head; the softmax is over the image positions.
    """

    def forward(self, attention: Sequence[AttentionQK], target: Sequence[AttentionQK]) -> Tensor:
        """Compute the mean of `rms_distance` over layers (and steps, if their lists are joined).

        The target carries no gradient.
        """
        return _mean_over_layers(attention, target, semantic_response)


class LayoutAlignment(nn.Module):
    """L_layout = || Q_tid - Q_t ||_2 (PuLID, equation 5): queries with and without identity."""

    def forward(self, attention: Sequence[AttentionQK], target: Sequence[AttentionQK]) -> Tensor:
        """Compute the mean of `rms_distance` over layers, as `SemanticAlignment`."""
        return _mean_over_layers(attention, target, lambda layer: layer.query.float())


class OutsideLoss(nn.Module):
    """Mean absolute difference with and without the identity, outside the faces of both images.

    Not in the paper, whose alignment compares attention alone: a texture that an identity adds to
    the whole image, such as a faint grid, hardly changes it. `bench.metrics.OutsideFace` measures
    the same, so it is no independent judge of an adapter that was trained with this loss.
    """

    def forward(self, images: Tensor, target: Tensor, faces: Tensor) -> Tensor:
        """Compute the mean over the batch, a scalar; the target carries no gradient.

        Args:
            images: (B, 3, H, W) with the identities.
            target: (B, 3, H, W) without, from the same prompts and noise.
            faces: (B, 1, H, W), one on the pixels of either face.
        """
        difference = (images.float() - target.detach().float()).abs().mean(1, keepdim=True)
        outside = 1 - faces.float()
        covered = outside.sum((1, 2, 3)).clamp(min=1)
        return ((difference * outside).sum((1, 2, 3)) / covered).mean()


def semantic_response(layer: AttentionQK) -> Tensor:
    """Compute softmax(K Q^T / sqrt d) Q, (B, heads, T, d) in float32."""
    query = layer.query.float()
    key = layer.key.float()
    return (key @ query.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(-1) @ query


def rms_distance(x: Tensor, target: Tensor) -> Tensor:
    """Compute || x - target ||_2 of each sample, (B,), over the root of its number of entries.

    The paper does not say how the norm is reduced. This reduction does not depend on a layer's
    size, so layers of all resolutions have the same influence.
    """
    square = (x - target).square().flatten(1).mean(1)
    return (square + 1e-12).sqrt()  # the root has no gradient at exactly zero


def _mean_over_layers(
    attention: Sequence[AttentionQK],
    target: Sequence[AttentionQK],
    feature: Callable[[AttentionQK], Tensor],
) -> Tensor:
    if not attention or len(attention) != len(target):
        raise OptionError(
            f"cannot align {len(attention)} layers with identity to {len(target)} layers without: "
            "capture the same layers in both."
        )
    distances = []
    with torch.autocast(attention[0].query.device.type, enabled=False):
        for layer, target_layer in zip(attention, target, strict=True):
            distance = rms_distance(feature(layer), feature(target_layer).detach())
            distances.append(distance.mean())
        return torch.stack(distances).mean()
