"""Write a metric and measure images with it.

    python examples/custom_metric.py

`docs/extend/metric.md` explains how to add a metric to the benchmark.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import openpulid as pulid
from openpulid.bench.metrics import FaceSim, MetricInputs, OutsideFace
from openpulid.io.image_grid import to_tensor
from openpulid.mini.evaluation.scorers import FaceScorer

ANNA = Path(__file__).with_name("anna.png")
PROMPTS = ("portrait, photo, smiling", "portrait, film noir, looking right")


class Sharpness:
    """Mean absolute Laplacian of the gray image: blurred images score low.

    Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy" (2000).
    """

    name: ClassVar[str] = "sharpness"
    higher_is_better: ClassVar[bool] = True

    def __call__(self, inputs: MetricInputs) -> Tensor:
        gray = inputs.images.mean(dim=1, keepdim=True)  # (B, 1, H, W)
        kernel = gray.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
        return F.conv2d(gray, kernel, padding=1).abs().mean(dim=(1, 2, 3))  # (B,)


def main() -> dict[str, float]:
    studio = pulid.load("mini-lightning")
    anna = studio.identify(ANNA)
    images, base_images = [], []
    for seed, prompt in enumerate(PROMPTS):
        images += studio.generate(prompt, identity=anna, seed=seed).images
        base_images += studio.generate(prompt, seed=seed).images

    # The scorer is a face recognition model that no method uses.
    scorer = FaceScorer.load()
    reference = to_tensor([Image.open(ANNA).convert("RGB")])
    inputs = MetricInputs(
        images=to_tensor(images),
        base_images=to_tensor(base_images),
        faces=scorer(to_tensor(images)),
        base_faces=scorer(to_tensor(base_images)),
        subjects=torch.zeros(len(PROMPTS), dtype=torch.long),
        reference_images=reference,
        reference_faces=scorer(reference),
        prompts=PROMPTS,
    )
    metrics = (FaceSim(), OutsideFace(), Sharpness())
    values = {metric.name: metric(inputs).mean().item() for metric in metrics}
    for name, value in values.items():
        print(f"{name:12s} {value:.3f}")
    return values


if __name__ == "__main__":
    main()
