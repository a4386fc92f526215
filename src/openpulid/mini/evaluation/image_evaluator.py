"""Evaluation of a base model or its student on prompts of held-out scenes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from openpulid.bench.metrics import attribute_accuracy
from openpulid.faces.embed import FaceEmbedder
from openpulid.faces.miniature import RECOGNITION_MODELS, MiniFaceDetector
from openpulid.io.checkpoints import load_module
from openpulid.io.image_grid import image_grid, to_pil
from openpulid.mini.evaluation.prompts import EvalPrompt, sample_prompts
from openpulid.mini.models import AttributeClassifier, sample
from openpulid.world import HELD_OUT_PEOPLE, Person, render

STEPS = 20
"""Sampling steps of the evaluation and of the preset."""
GUIDANCE = 3.0
"""Guidance scale of the evaluation and of the preset."""
NUM_PROMPTS = 512
"""Prompts on which the base model and its student are evaluated."""
OTHER_PEOPLE = 100_000
"""Offset of the seeds of held-out people who are in no prompt."""
RENDER_BATCH = 32
"""Images per call of the renderer."""


@dataclass
class ImageEvaluator:
    """Generates images for prompts of held-out scenes and measures how well they match.

    Attributes:
        pipe: the pipeline; it may share a network in training.
        classifier: recognizes attributes.
        embedder: detects and embeds faces with the benchmark's face recognition model; None if
            one of both networks is not trained yet.
        prompts: the prompts.
        steps: sampling steps.
        guidance: guidance scale.
    """

    pipe: Any
    classifier: AttributeClassifier
    embedder: FaceEmbedder | None = None
    prompts: tuple[EvalPrompt, ...] = ()
    steps: int = STEPS
    guidance: float = GUIDANCE

    @classmethod
    def load(cls, weights: Path, device: torch.device, **options: Any) -> ImageEvaluator:
        """Load the metric networks, and sample a prompt for each of `NUM_PROMPTS` held-out people.

        The prompts do not describe the person.

        Args:
            weights: folder of the trained weights.
            device: of the metric networks.
            **options: the other attributes.
        """
        classifier = load_module(
            AttributeClassifier, weights / "attribute-classifier.safetensors", device
        )
        files = [weights / f"{name}.safetensors" for name in ("detector", "recognition-scorer")]
        embedder = None
        if all(file.exists() for file in files):
            detector = load_module(MiniFaceDetector, files[0], device)
            recognition = load_module(RECOGNITION_MODELS["scorer"], files[1], device)
            embedder = FaceEmbedder(detector.detect, recognition)
        prompts = tuple(sample_prompts(NUM_PROMPTS, 1))
        return cls(classifier=classifier, embedder=embedder, prompts=prompts, **options)

    def generate(self, count: int | None = None) -> Tensor:
        """Generate images (B, 3, H, W) for the first `count` prompts."""
        selected = self.prompts[:count]
        texts = [prompt.prompt for prompt in selected]
        seeds = [prompt.seed for prompt in selected]
        return sample(self.pipe, texts, seeds, steps=self.steps, guidance=self.guidance)

    @torch.no_grad()
    def evaluate(self, count: int | None = None) -> dict[str, float]:
        """Evaluate the pipeline on the first `count` prompts.

        Returns:
            `attributes`, the share of the attributes in each prompt that the classifier recognizes
            in its image; `pose` and `expression`, the same for these two; `face_found`, the share
            of images with a detected face; `frechet`, the Frechet distance of the embeddings of
            these faces to `real_embeddings`, if there are at least two. The same figures with the
            suffix `_real` are those of rendered images of other people in the scenes of all
            prompts: no model can be expected to do better. Distances for another `count` are not
            comparable: they are larger for fewer faces.
        """
        device = next(self.classifier.parameters()).device
        images = self.generate(count).to(device)
        results = self._measure(images)
        return results | {f"{name}_real": self.real_results[name] for name in results}

    def _measure(self, images: Tensor) -> dict[str, float]:
        """Measure images (B, 3, H, W) of the first B prompts, see `evaluate`."""
        expected = [prompt.wanted for prompt in self.prompts[: len(images)]]
        scores = self.classifier(images)
        results = {"attributes": attribute_accuracy(scores, expected).mean().item()}
        for name in ("pose", "expression"):
            requested = [{key: row[key] for key in row if key == name} for row in expected]
            results[name] = attribute_accuracy(scores, requested).nanmean().item()
        if self.embedder is not None:
            faces = self.embedder(images)
            results["face_found"] = faces.has_face.float().mean().item()
            if faces.has_face.sum() > 1:
                embeddings = faces.embeddings[faces.has_face]
                results["frechet"] = frechet_distance(embeddings, self.real_embeddings)
        return results

    @cached_property
    def real_embeddings(self) -> Tensor:
        """Embeddings (N, D) of the faces of rendered held-out people in the prompts' scenes."""
        assert self.embedder is not None
        faces = self.embedder(self._render(HELD_OUT_PEOPLE))
        return faces.embeddings[faces.has_face]

    @cached_property
    def real_results(self) -> dict[str, float]:
        """What `evaluate` measures, for rendered images of other held-out people."""
        with torch.no_grad():
            return self._measure(self._render(HELD_OUT_PEOPLE + OTHER_PEOPLE))

    def _render(self, first: int) -> Tensor:
        """Render people from seed `first` on in the prompts' scenes, (N, 3, H, W)."""
        device = next(self.classifier.parameters()).device
        images = []
        for start in range(0, len(self.prompts), RENDER_BATCH):
            prompts = self.prompts[start : start + RENDER_BATCH]
            people = [Person.from_seed(first + prompt.person) for prompt in prompts]
            images.append(render(people, [x.scene for x in prompts], device=device).image)
        return torch.cat(images)

    def draw_sheet(self, count: int = 40) -> Image.Image:
        """Draw the images of the first `count` prompts, eight per row."""
        images = to_pil(self.generate(count))
        return image_grid([images[start : start + 8] for start in range(0, len(images), 8)], 144)


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Compute the Frechet distance of two sets of features (Heusel et al. 2017, arXiv 1706.08500).

    Args:
        x: (N, D).
        y: (M, D).

    Returns:
        The distance; NaN if a set has fewer than two elements.
    """
    if min(len(x), len(y)) < 2:
        return float("nan")
    x = x.double().cpu()
    y = y.double().cpu()
    cov_x = torch.cov(x.T)
    cov_y = torch.cov(y.T)
    values, vectors = torch.linalg.eigh(cov_x)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    cross_trace = torch.linalg.eigvalsh(root @ cov_y @ root).clamp(min=0).sqrt().sum()
    mean_distance = (x.mean(0) - y.mean(0)).square().sum()
    return (mean_distance + cov_x.trace() + cov_y.trace() - 2 * cross_trace).item()
