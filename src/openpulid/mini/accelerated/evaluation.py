"""Evaluate a base, or its student, on the device: attributes, faces, and the Frechet distance of face embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openpulid.faces.align import align_faces
from openpulid.faces.mini_detector import FACE, MiniFaceDetector
from openpulid.faces.mini_recognition import CROP, VGGRecognition
from openpulid.io.checkpoints import load_module
from openpulid.mini.accelerated.autoencoder import decode, steepness
from openpulid.mini.accelerated.unet import rollout, time_ids
from openpulid.mini.accelerated.world import World
from openpulid.mini.data.captions import token_ids
from openpulid.mini.evaluation.evaluate import EvalPrompt, sample_prompts
from openpulid.mini.models.attribute_classifier import AttributeClassifier
from openpulid.mini.models.pipeline import TextEncoders
from openpulid.mini.train.unet import GUIDANCE, STEPS
from openpulid.training.pulid.models import TextConditioning
from openpulid.world import ATTRIBUTES


@dataclass(frozen=True)
class Detected:
    """Faces of B images: found (B,) bool, masks (B, 1, H, W) float, landmarks (B, 5, 2) pixels."""

    found: Tensor
    masks: Tensor
    landmarks: Tensor


@torch.no_grad()
def detect(detector: MiniFaceDetector, images: Tensor) -> Detected:
    """Detect the face of each 96 x 96 image (B, 3, 96, 96), as `MiniFaceDetector.find` does, without leaving the device."""
    finding = detector(images)
    masks = (finding.parts.softmax(1)[:, FACE : FACE + 1] > 0.5).float()
    found = (
        (finding.score_logit > 0)
        & (finding.box[:, 2] > finding.box[:, 0])
        & (masks.amax((1, 2, 3)) > 0)
    )
    return Detected(found, masks, finding.landmarks)


@torch.no_grad()
def embed(
    detector: MiniFaceDetector, recognition: nn.Module, images: Tensor, batch: int = 512
) -> tuple[Tensor, Tensor]:
    """Return face embeddings (F, D) of those of B images where a face is detected, and (B,) bool which these are."""
    embeddings, found = [], []
    for part in images.split(batch):
        faces = detect(detector, part)
        crops = align_faces(part, faces.masks, faces.landmarks, CROP)[faces.found]
        if len(crops):
            embeddings.append(recognition(crops).float())
        found.append(faces.found)
    return torch.cat(embeddings) if embeddings else images.new_zeros(0, 1), torch.cat(found)


def frechet(one: Tensor, two: Tensor) -> float:
    """Return the Frechet distance of two sets of features (N, D), (M, D) (Heusel et al. 2017, arXiv 1706.08500)."""
    if min(len(one), len(two)) < 2:
        return float("nan")
    one, two = one.double().cpu(), two.double().cpu()
    first, second = torch.cov(one.T), torch.cov(two.T)
    values, vectors = torch.linalg.eigh(first)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    between = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    apart = (one.mean(0) - two.mean(0)).square().sum()
    return (apart + first.trace() + second.trace() - 2 * between).item()


class Evaluation:
    """Held-out prompts, and the networks that score images: the same for every checkpoint.

    Args:
        weights: the folder with attribute classifier, detector and the evaluator's face recognition model.
        held_out: images of people and color combinations that no training has seen.
        count: prompts.
    """

    def __init__(
        self, weights: Path, words: TextEncoders, tokenizer: Any, held_out: World, count: int = 512
    ) -> None:
        device = held_out.images.device
        self.device, self.size = device, held_out.images.shape[-1]
        self.reader = load_module(
            AttributeClassifier, weights / "attribute-classifier.safetensors", device
        )
        self.detector = load_module(MiniFaceDetector, weights / "detector.safetensors", device)
        self.recognition = load_module(
            VGGRecognition, weights / "recognition-scorer.safetensors", device
        )
        self.requests: list[EvalPrompt] = sample_prompts(count, 1)
        tokens = token_ids(tokenizer, [request.prompt for request in self.requests]).to(device)
        self.text = words(tokens)
        rows = [[request.wanted.get(name, -1) for name in ATTRIBUTES] for request in self.requests]
        self.wanted = torch.tensor(rows, device=device)
        own = held_out.images[:count].float() / 255
        self.own, _ = embed(self.detector, self.recognition, own)
        self.grid = steepness(own).mean().item()

    @torch.no_grad()
    def images(
        self,
        unet: Any,
        vae: Any,
        count: int,
        steps: int = STEPS,
        guidance: float = GUIDANCE,
        order: int = 2,
    ) -> Tensor:
        """Generate images (B, 3, H, W) in [0, 1] for the first `count` prompts, each from its own seed."""
        config = unet.config
        shape = (config.in_channels, config.sample_size, config.sample_size)
        seeds = [request.seed for request in self.requests[:count]]
        noise = torch.stack(
            [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        )
        images = []
        for rows in torch.arange(len(seeds)).split(512):
            text = TextConditioning(
                self.text.embeds[rows],
                self.text.pooled[rows],
                time_ids(self.size, len(rows), self.device),
            )
            latents = rollout(
                unet, noise[rows].to(self.device), text, steps, guidance, order, every=steps
            )[:, -1]
            images.append(decode(vae, latents))
        return torch.cat(images)

    @torch.no_grad()
    def figures(self, images: Tensor) -> dict[str, Any]:
        """Return the figures of the images for the first prompts.

        `attributes`: share of what the prompts ask for that the classifier sees, mean over images; `each`: by
        attribute; `face_found`; `frechet`: of face embeddings against the world's own; `grid`: how much steeper
        images are across 8-pixel borders than elsewhere, relative to the world's own.
        """
        wanted = self.wanted[: len(images)]
        scores = [self.reader(part) for part in images.split(512)]
        seen = torch.stack(
            [torch.cat([part[name] for part in scores]).argmax(-1) for name in ATTRIBUTES], 1
        )
        right = torch.where(wanted >= 0, (seen == wanted).float(), torch.nan)
        embeddings, found = embed(self.detector, self.recognition, images)
        each = dict(zip(ATTRIBUTES, right.nanmean(0).tolist(), strict=True))
        return {
            "attributes": right.nanmean(1).nanmean().item(),
            "face_found": found.float().mean().item(),
            "frechet": frechet(embeddings, self.own[: len(images)]),
            "grid": steepness(images).mean().item() / self.grid,
            "each": {name: round(value, 4) for name, value in each.items()},
        }
