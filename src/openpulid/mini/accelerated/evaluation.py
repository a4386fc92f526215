"""Evaluation of a base or its student on the device.

Measures attributes, faces, and the Frechet distance of face embeddings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openpulid.faces.miniature import MiniFaceDetector, VGGRecognition
from openpulid.io.checkpoints import load_module
from openpulid.mini.accelerated.autoencoder import decode, steepness
from openpulid.mini.accelerated.face_detection import embed_faces
from openpulid.mini.accelerated.rollouts import rollout
from openpulid.mini.accelerated.train_set import time_ids
from openpulid.mini.accelerated.world import World
from openpulid.mini.data import token_ids
from openpulid.mini.evaluation.image_evaluator import GUIDANCE, STEPS, frechet_distance
from openpulid.mini.evaluation.prompts import EvalPrompt, sample_prompts
from openpulid.mini.models import AttributeClassifier, TextEncoders
from openpulid.training.pulid import TextConditioning
from openpulid.world import ATTRIBUTES


def seeded_noise(prompts: list[EvalPrompt], unet: Any) -> Tensor:
    """Draw the initial noise (B, C, s, s) of each prompt from its own seed, on the CPU."""
    config = unet.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    return torch.stack(
        [
            torch.randn(shape, generator=torch.Generator().manual_seed(prompt.seed))
            for prompt in prompts
        ]
    )


def requested_classes(prompts: list[EvalPrompt], device: torch.device) -> Tensor:
    """Return (B, A) the class of each attribute that a prompt requests; -1 for none."""
    rows = []
    for prompt in prompts:
        classes = prompt.wanted
        rows.append([classes.get(name, -1) for name in ATTRIBUTES])
    return torch.tensor(rows, device=device)


def match_attributes(
    classifier: AttributeClassifier, images: Tensor, requested: Tensor, batch: int = 512
) -> Tensor:
    """Compare the attributes of images with the requested ones.

    Args:
        classifier: attribute classifier.
        images: (B, 3, H, W) in [0, 1].
        requested: (B, A) see `requested_classes`.
        batch: images at a time.

    Returns:
        (B, A) 1 for a match, 0 for none, NaN for an attribute that is not requested.
    """
    logits = [classifier(part) for part in images.split(batch)]
    classes = torch.stack(
        [torch.cat([part[name] for part in logits]).argmax(-1) for name in ATTRIBUTES], 1
    )
    return torch.where(requested >= 0, (classes == requested).float(), torch.nan)


class Evaluation:
    """Held-out prompts and the metric models, the same for every checkpoint.

    Args:
        weights: folder of the attribute classifier, the face detector and the evaluator's face
            recognition model.
        text_encoders: encode the prompts.
        tokenizer: of the text encoders.
        held_out: images of people and color combinations that are not in the training data.
        count: number of prompts.
    """

    def __init__(
        self,
        weights: Path,
        text_encoders: TextEncoders,
        tokenizer: Any,
        held_out: World,
        count: int = 512,
    ) -> None:
        device = held_out.images.device
        self.device = device
        self.size = held_out.images.shape[-1]
        self.classifier = load_module(
            AttributeClassifier, weights / "attribute-classifier.safetensors", device
        )
        self.detector = load_module(MiniFaceDetector, weights / "detector.safetensors", device)
        self.recognition = load_module(
            VGGRecognition, weights / "recognition-scorer.safetensors", device
        )
        self.prompts = sample_prompts(count, 1)
        tokens = token_ids(tokenizer, [prompt.prompt for prompt in self.prompts])
        self.text = text_encoders(tokens.to(device))
        self.requested = requested_classes(self.prompts, device)
        real_images = held_out.images[:count].float() / 255
        self.real_embeddings, _ = embed_faces(self.detector, self.recognition, real_images)
        self.real_steepness = steepness(real_images).mean().item()

    @torch.no_grad()
    def generate(
        self,
        unet: Any,
        vae: Any,
        count: int,
        steps: int = STEPS,
        guidance: float = GUIDANCE,
        order: int = 2,
    ) -> Tensor:
        """Generate images for the first prompts, each from its own seed.

        Args:
            unet: the base or the student.
            vae: decodes the latents.
            count: number of prompts.
            steps: number of sampling steps.
            guidance: classifier-free guidance scale.
            order: of the solver.

        Returns:
            (count, 3, H, W) in [0, 1].
        """
        noise = seeded_noise(self.prompts[:count], unet)
        images = []
        for rows in torch.arange(len(noise)).split(512):
            ids = time_ids(self.size, len(rows), self.device)
            text = TextConditioning(self.text.embeds[rows], self.text.pooled[rows], ids)
            start = noise[rows].to(self.device)
            latents = rollout(unet, start, text, steps, guidance, order, every=steps)[:, -1]
            images.append(decode(vae, latents))
        return torch.cat(images)

    @torch.no_grad()
    def measure(self, images: Tensor) -> dict[str, Any]:
        """Measure the images that were generated for the first prompts.

        Returns:
            `attributes`: fraction of the requested attributes that the classifier recognizes, mean
            over images; `by_attribute`: the same for each attribute; `face_found`; `frechet`: of
            face embeddings against rendered images; `grid`: steepness across 8-pixel borders
            relative to rendered images.
        """
        matches = match_attributes(self.classifier, images, self.requested[: len(images)])
        embeddings, has_face = embed_faces(self.detector, self.recognition, images)
        by_attribute = dict(zip(ATTRIBUTES, matches.nanmean(0).tolist(), strict=True))
        return {
            "attributes": matches.nanmean(1).nanmean().item(),
            "face_found": has_face.float().mean().item(),
            "frechet": frechet_distance(embeddings, self.real_embeddings[: len(images)]),
            "grid": steepness(images).mean().item() / self.real_steepness,
            "by_attribute": {name: round(value, 4) for name, value in by_attribute.items()},
        }
