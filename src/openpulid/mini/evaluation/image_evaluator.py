"""Evaluation of a base model or its student on prompts of held-out scenes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from openpulid.bench.metrics import attribute_accuracy
from openpulid.faces.miniature import MiniFaceDetector
from openpulid.io.checkpoints import load_module
from openpulid.io.image_grid import image_grid, to_pil
from openpulid.mini.evaluation.prompts import EvalPrompt, sample_prompts
from openpulid.mini.models import (
    AttributeClassifier,
    TextEncoders,
    build_pipeline,
    sample,
)

STEPS = 20
"""Sampling steps of the evaluation and of the preset."""
GUIDANCE = 3.0
"""Guidance scale of the evaluation and of the preset."""


NUM_PROMPTS = 256
"""Prompts on which the base model and its student are evaluated."""


@dataclass
class ImageEvaluator:
    """Generates images for prompts of held-out scenes and measures how well they match.

    Attributes:
        vae: the autoencoder.
        text_encoders: the text encoders.
        tokenizer: the tokenizer of both text encoders.
        classifier: recognizes attributes.
        detector: detects faces; None if it is not trained yet.
        prompts: the prompts.
        steps: sampling steps.
        guidance: guidance scale.
        order: order of the solver; 2, or 1 for a few-step student.
    """

    vae: Any
    text_encoders: TextEncoders
    tokenizer: Any
    classifier: AttributeClassifier
    detector: MiniFaceDetector | None = None
    prompts: tuple[EvalPrompt, ...] = ()
    steps: int = STEPS
    guidance: float = GUIDANCE
    order: int = 2

    @classmethod
    def load(cls, weights: Path, device: torch.device, **options: Any) -> ImageEvaluator:
        """Load the metric networks, and sample a prompt for each of `NUM_PROMPTS` held-out people.

        The prompts do not describe the person. There is no face detector if it is not trained yet.

        Args:
            weights: folder of the trained weights.
            device: of the metric networks.
            **options: the other attributes.
        """
        classifier = load_module(
            AttributeClassifier, weights / "attribute-classifier.safetensors", device
        )
        detector = None
        if (weights / "detector.safetensors").exists():
            detector = load_module(MiniFaceDetector, weights / "detector.safetensors", device)
        prompts = tuple(sample_prompts(NUM_PROMPTS, 1))
        return cls(classifier=classifier, detector=detector, prompts=prompts, **options)

    def generate(self, unet: Any, count: int | None = None) -> Tensor:
        """Generate images (B, 3, H, W) for the first `count` prompts."""
        pipe = build_pipeline(unet, self.vae, self.text_encoders, self.tokenizer)
        pipe.scheduler = type(pipe.scheduler).from_config(
            pipe.scheduler.config, solver_order=self.order
        )
        selected = self.prompts[:count]
        texts = [prompt.prompt for prompt in selected]
        seeds = [prompt.seed for prompt in selected]
        return sample(pipe, texts, seeds, steps=self.steps, guidance=self.guidance)

    @torch.no_grad()
    def evaluate(self, unet: Any, count: int | None = None) -> dict[str, float]:
        """Evaluate a U-Net on the first `count` prompts.

        Returns:
            `attributes`, the share of the attributes in each prompt that the classifier recognizes
            in its image, and `face_found`, the share of images with a detected face.
        """
        device = next(self.classifier.parameters()).device
        images = self.generate(unet, count).to(device)
        expected = [prompt.wanted for prompt in self.prompts[:count]]
        accuracy = attribute_accuracy(self.classifier(images), expected)
        results = {"attributes": accuracy.mean().item()}
        if self.detector is not None:
            faces = self.detector.detect(images)
            results["face_found"] = sum(face is not None for face in faces) / len(faces)
        return results

    def draw_sheet(self, unet: Any, count: int = 40) -> Image.Image:
        """Draw the images of the first `count` prompts, eight per row."""
        images = to_pil(self.generate(unet, count))
        return image_grid([images[start : start + 8] for start in range(0, len(images), 8)], 144)
