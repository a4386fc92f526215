"""Whether the prompt is followed, and nothing but the person has changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from openpulid.bench.metrics.inputs import (
    Distance,
    EmbedImages,
    EmbedTexts,
    MetricInputs,
    ReadAttributes,
    cosine,
)


class ClipT:
    """How well an image follows its prompt: 100 x cosine of CLIP image and text features.

    CLIPScore (Hessel et al. 2021) without its factor 2.5 and clipping, as PuLID's "CLIP-T" reports it.
    """

    name: ClassVar[str] = "clip_t"
    higher: ClassVar[bool] = True

    def __init__(self, images: EmbedImages, texts: EmbedTexts) -> None:
        self.images, self.texts = images, texts

    def __call__(self, evidence: MetricInputs) -> Tensor:
        return 100 * cosine(self.images(evidence.images), self.texts(evidence.prompts)).cpu()


class ClipI:
    """How little the identity changed the picture: cosine of CLIP features, with against without identity.

    PuLID's "CLIP-I" (arXiv 2404.16022, section 4.1): both images from the same prompt and the same noise. 1 where nothing
    changed.
    """

    name: ClassVar[str] = "clip_i"
    higher: ClassVar[bool] = True

    def __init__(self, images: EmbedImages) -> None:
        self.images = images

    def __call__(self, evidence: MetricInputs) -> Tensor:
        return cosine(self.images(evidence.images), self.images(evidence.before)).cpu()


class Dino(ClipI):
    """The same by DINO (arXiv 2104.14294), which sees composition and texture rather than what words would say."""

    name: ClassVar[str] = "dino"


class OutsideFace:
    """Mean absolute difference, with against without identity, over the pixels outside both images' faces.

    This project's own measure of what CLIP-I only suggests: the identity belongs in the face, so all that moves elsewhere
    is a disturbance. Pixels of either face are left out, so a face may change its outline. In [0, 1].
    """

    name: ClassVar[str] = "outside_face"
    higher: ClassVar[bool] = False

    def __call__(self, evidence: MetricInputs) -> Tensor:
        outside = _outside(evidence)
        difference = (
            (evidence.images.float() - evidence.before.float()).abs().mean(dim=1, keepdim=True)
        )
        return (difference * outside).sum(dim=(1, 2, 3)) / outside.sum(dim=(1, 2, 3)).clamp(min=1)


class LpipsOutside:
    """LPIPS (arXiv 1801.03924) of with against without identity, both faces covered with gray: what an eye sees move
    elsewhere."""

    name: ClassVar[str] = "lpips_outside"
    higher: ClassVar[bool] = False

    def __init__(self, lpips: Distance) -> None:
        self.lpips = lpips

    def __call__(self, evidence: MetricInputs) -> Tensor:
        outside = _outside(evidence)
        images, before = (
            x.float() * outside + 0.5 * (1 - outside) for x in (evidence.images, evidence.before)
        )
        return self.lpips(images, before).cpu()


def _outside(evidence: MetricInputs) -> Tensor:
    """(B, 1, H, W): one where neither image has its face."""
    return 1 - torch.maximum(evidence.seen.masks, evidence.was.masks).float()


class Attributes:
    """Share of what the prompt asks for that an attribute reader sees in the image.

    Attribute accuracy as in compositional text-to-image benchmarks (GenEval, Ghosh et al. 2023), with a classifier for
    each attribute in place of an object detector. Attributes not asked for do not count; NaN where nothing is asked.
    """

    name: ClassVar[str] = "attributes"
    higher: ClassVar[bool] = True

    def __init__(self, read: ReadAttributes) -> None:
        self.read = read

    def __call__(self, evidence: MetricInputs) -> Tensor:
        return _shares(self.each(evidence))

    def each(self, evidence: MetricInputs) -> list[dict[str, bool]]:
        """Of each image and each attribute that is asked for, whether it is seen."""
        return _each(self.read(evidence.images), evidence.wanted or [{}] * len(evidence.images))


def attributes_seen(scores: Mapping[str, Tensor], wanted: Sequence[Mapping[str, int]]) -> Tensor:
    """(B,), of attribute: (B, classes) scores and what each image should show: `Attributes` without its reader."""
    return _shares(_each(scores, wanted))


def _each(
    scores: Mapping[str, Tensor], wanted: Sequence[Mapping[str, int]]
) -> list[dict[str, bool]]:
    seen = {name: values.argmax(dim=-1).tolist() for name, values in scores.items()}
    return [
        {name: seen[name][k] == value for name, value in asked.items()}
        for k, asked in enumerate(wanted)
    ]


def _shares(each: Sequence[Mapping[str, bool]]) -> Tensor:
    return torch.tensor([sum(one.values()) / len(one) if one else float("nan") for one in each])


class FID:
    """Frechet distance (arXiv 1706.08500) between the images with and the images without identity: one number for all that
    `update` was told.

    PuLID does not disclose its reference set; this is the definition used here, and reports say so. Few images give a
    larger number: only equal counts compare. The base makes the same image of a prompt and a seed for every person, so what is
    compared with are as many different images as there are prompts and seeds.

    Args:
        features: images (B, 3, H, W) in [0, 1] -> (B, D); Inception's pool of 2048 is the published one's.
    """

    name: ClassVar[str] = "fid"
    higher: ClassVar[bool] = False

    def __init__(self, features: EmbedImages) -> None:
        self.features = features
        self._distance: Any = None

    def update(self, evidence: MetricInputs) -> None:
        """Some images more."""
        from torchmetrics.image.fid import FrechetInceptionDistance

        if self._distance is None:
            self._distance = FrechetInceptionDistance(
                feature=_Features(self.features, evidence.before[:1]), normalize=True
            )
            self._distance.set_dtype(torch.float64)
        for images, real in ((evidence.before, True), (evidence.images, False)):
            self._distance.update(images, real=real)

    def compute(self) -> float:
        """Of all so far; NaN of fewer than two."""
        if self._distance is None or self._distance.real_features_num_samples < 2:
            return float("nan")
        return float(self._distance.compute())


class _Features(nn.Module):
    """As torchmetrics wants them."""

    def __init__(self, features: EmbedImages, example: Tensor) -> None:
        super().__init__()
        self.features, self.num_features = features, features(example).shape[-1]

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)
