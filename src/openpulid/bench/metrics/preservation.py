"""Metrics of preservation: whether the prompt is followed and only the identity has changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from openpulid.bench.metrics.inputs import (
    ClassifyAttributes,
    Distance,
    EmbedImages,
    EmbedTexts,
    MetricInputs,
    cosine,
)


class ClipT:
    """How well an image follows its prompt: 100 x cosine of CLIP image and text features.

    CLIPScore (Hessel et al. 2021) without its factor 2.5 and clipping, as PuLID's "CLIP-T".
    """

    name: ClassVar[str] = "clip_t"
    higher_is_better: ClassVar[bool] = True

    def __init__(self, embed_images: EmbedImages, embed_texts: EmbedTexts) -> None:
        self.embed_images = embed_images
        self.embed_texts = embed_texts

    def __call__(self, inputs: MetricInputs) -> Tensor:
        """Compute the metric for each image, (B,)."""
        images = inputs.apply(self.embed_images)
        return 100 * cosine(images, self.embed_texts(inputs.prompts)).cpu()


class ClipI:
    """Cosine of the CLIP features of the images with and without the identity.

    PuLID's "CLIP-I" (arXiv 2404.16022, section 4.1): both images are generated from the same
    prompt and noise. 1 if nothing changed.
    """

    name: ClassVar[str] = "clip_i"
    higher_is_better: ClassVar[bool] = True

    def __init__(self, embed_images: EmbedImages) -> None:
        self.embed_images = embed_images

    def __call__(self, inputs: MetricInputs) -> Tensor:
        """Compute the metric for each image, (B,)."""
        images = inputs.apply(self.embed_images)
        return cosine(images, inputs.apply_to_base(self.embed_images)).cpu()


class Dino(ClipI):
    """Cosine of the DINO features (arXiv 2104.14294) with and without the identity.

    DINO is sensitive to composition and texture, CLIP to what a caption would say.
    """

    name: ClassVar[str] = "dino"


class OutsideFace:
    """Mean absolute difference with and without the identity, outside the faces of both images.

    This project's own, direct version of what CLIP-I measures indirectly: the identity belongs in
    the face, so any change elsewhere is a disturbance. The pixels of both faces are excluded, so
    a face may change its outline. In [0, 1].
    """

    name: ClassVar[str] = "outside_face"
    higher_is_better: ClassVar[bool] = False

    def __call__(self, inputs: MetricInputs) -> Tensor:
        """Compute the metric for each image, (B,)."""
        outside = _outside_mask(inputs)
        difference = (inputs.images.float() - inputs.base_images.float()).abs()
        difference = difference.mean(dim=1, keepdim=True) * outside
        return difference.sum(dim=(1, 2, 3)) / outside.sum(dim=(1, 2, 3)).clamp(min=1)


class LpipsOutside:
    """LPIPS (arXiv 1801.03924) with and without the identity, the faces covered with gray.

    The perceptual version of `OutsideFace`.
    """

    name: ClassVar[str] = "lpips_outside"
    higher_is_better: ClassVar[bool] = False

    def __init__(self, lpips: Distance) -> None:
        self.lpips = lpips

    def __call__(self, inputs: MetricInputs) -> Tensor:
        """Compute the metric for each image, (B,)."""
        outside = _outside_mask(inputs)
        gray = 0.5 * (1 - outside)
        images = inputs.images.float() * outside + gray
        base_images = inputs.base_images.float() * outside + gray
        return self.lpips(images, base_images).cpu()


def _outside_mask(inputs: MetricInputs) -> Tensor:
    """Return (B, 1, H, W), one where neither image shows its face."""
    return 1 - torch.maximum(inputs.faces.masks, inputs.base_faces.masks).float()


class Attributes:
    """Share of the requested attributes that a classifier finds in the image.

    Attribute accuracy as in compositional text-to-image benchmarks (GenEval, Ghosh et al. 2023),
    with a classifier per attribute instead of an object detector. Attributes that the prompt does
    not mention are ignored; NaN if it mentions none.

    Args:
        classify: images (B, 3, H, W) -> attribute name -> class scores (B, C).
    """

    name: ClassVar[str] = "attributes"
    higher_is_better: ClassVar[bool] = True

    def __init__(self, classify: ClassifyAttributes) -> None:
        self.classify = classify

    def __call__(self, inputs: MetricInputs) -> Tensor:
        """Compute the metric for each image, (B,)."""
        return _accuracies(self.check(inputs))

    def check(self, inputs: MetricInputs) -> list[dict[str, bool]]:
        """Return, for each image and requested attribute, whether the image shows it."""
        requested = inputs.requested or [{}] * len(inputs.images)
        return _check_attributes(inputs.apply(self.classify), requested)


def attribute_accuracy(
    scores: Mapping[str, Tensor], requested: Sequence[Mapping[str, int]]
) -> Tensor:
    """Compute the share of requested attributes that are predicted.

    Args:
        scores: attribute name -> class scores (B, C).
        requested: for each image, attribute name -> class index.

    Returns:
        (B,), NaN where nothing is requested.
    """
    return _accuracies(_check_attributes(scores, requested))


def _check_attributes(
    scores: Mapping[str, Tensor], requested: Sequence[Mapping[str, int]]
) -> list[dict[str, bool]]:
    predicted = {name: values.argmax(dim=-1).tolist() for name, values in scores.items()}
    return [
        {name: predicted[name][row] == value for name, value in attributes.items()}
        for row, attributes in enumerate(requested)
    ]


def _accuracies(checks: Sequence[Mapping[str, bool]]) -> Tensor:
    return torch.tensor(
        [sum(check.values()) / len(check) if check else float("nan") for check in checks]
    )


class FID:
    """Frechet distance (arXiv 1706.08500) between the images with and without the identity.

    One number for all images passed to `update`. PuLID does not disclose its reference set; the
    reports state that this definition is another one. Few images give a larger number, so only
    equal counts compare. The base model generates the same image of a prompt and seed for every
    subject: the number of distinct base images is prompts x seeds.

    Args:
        features: images (B, 3, H, W) in [0, 1] -> (B, D); the published FID uses the
            2048-dimensional pooling layer of Inception.
    """

    name: ClassVar[str] = "fid"
    higher_is_better: ClassVar[bool] = False

    def __init__(self, features: EmbedImages) -> None:
        self.features = features
        self._distance: Any = None

    def update(self, inputs: MetricInputs) -> None:
        """Add a batch of images."""
        from torchmetrics.image.fid import FrechetInceptionDistance

        base_features = inputs.apply_to_base(self.features)
        if self._distance is None:
            self._distance = FrechetInceptionDistance(
                feature=_ComputedFeatures(base_features.shape[-1])
            )
            self._distance.set_dtype(torch.float64)
        self._distance.update(base_features, real=True)
        self._distance.update(inputs.apply(self.features), real=False)

    def compute(self) -> float:
        """Compute the distance over all batches; NaN with fewer than two images."""
        if self._distance is None or self._distance.real_features_num_samples < 2:
            return float("nan")
        return float(self._distance.compute())


class _ComputedFeatures(nn.Module):
    """Returns features that are computed already, where torchmetrics expects their network."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features
