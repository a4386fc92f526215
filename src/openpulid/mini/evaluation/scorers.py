"""The miniature's metric networks.

Face recognition model and attribute classifier are used by no method. The face detector is shared
by all. CLIP's vision encoder is also PhotoMaker's, and its text encoder is the base model's second.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerFast,
)

from openpulid.bench.metrics import (
    FID,
    Attributes,
    ClassifyAttributes,
    ClipI,
    ClipT,
    CopyPaste,
    DetectFaces,
    EmbedImages,
    EmbedTexts,
    FaceFound,
    Faces,
    FaceSim,
    FacialValues,
    Metric,
    OutsideFace,
    Rank1,
)
from openpulid.errors import WeightsError
from openpulid.faces.embed import FaceEmbedder
from openpulid.faces.miniature import MiniFaceDetector, VGGRecognition
from openpulid.io.checkpoints import load_module
from openpulid.mini.data import token_ids
from openpulid.mini.evaluation.value_reader import ValueReader, ValueScorer, get_facial_values
from openpulid.mini.models import AttributeClassifier
from openpulid.mini.train import clip
from openpulid.pipelines.factory import no_progress_bars
from openpulid.pipelines.presets import MINIATURE
from openpulid.world import ATTRIBUTES


class FaceScorer:
    """Detects and embeds the face of each image; `bench.metrics.DetectFaces` of the miniature.

    Args:
        detector: the face detector.
        recognition: the face recognition model of the benchmark.
    """

    def __init__(self, detector: MiniFaceDetector, recognition: VGGRecognition) -> None:
        self.embed = FaceEmbedder(detector.detect, recognition)
        self.width: int = cast(Any, recognition).config["dim"]

    @classmethod
    def load(cls, folder: Path = MINIATURE) -> FaceScorer:
        """Load both networks from the miniature's weights."""
        detector = load_module(MiniFaceDetector, folder / "detector.safetensors")
        recognition = load_module(VGGRecognition, folder / "recognition-scorer.safetensors")
        return cls(detector, recognition)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Faces:
        """Embed the faces of images (B, 3, H, W) in [0, 1]; embeddings without a face are zero."""
        faces = self.embed(images)
        embeddings = faces.embeddings
        if not faces.has_face.any():
            # The face recognition model was not called, so the width has to be set here.
            embeddings = embeddings.new_zeros(len(images), self.width)
        return Faces(faces.has_face, embeddings, faces.masks)


@dataclass(frozen=True)
class MiniScorers:
    """All metric networks of the miniature, as plain callables."""

    faces: DetectFaces
    embed_images: EmbedImages
    embed_texts: EmbedTexts
    read: ClassifyAttributes
    values: ValueScorer | None = None

    def metrics(self) -> list[Metric]:
        """Return the metrics of single images."""
        exact = [FacialValues(self.values)] if self.values else []
        return [
            *exact,
            FaceSim(),
            Rank1(),
            ClipT(self.embed_images, self.embed_texts),
            ClipI(self.embed_images),
            OutsideFace(),
            Attributes(self.read),
            FaceFound(),
            CopyPaste(),
        ]

    def method_metrics(self) -> list[FID]:
        """Return the metrics of image sets: FID of CLIP features instead of Inception's."""
        return [FID(self.embed_images)]

    def facial_values(self, people: Sequence[str]) -> Tensor | None:
        """Return the facial parameters (P, V) of synthetic subjects, or None for other subjects."""
        is_synthetic = all(re.fullmatch(r"[0-9]{7,}", name) for name in people)
        return get_facial_values(people) if is_synthetic else None

    def attribute_classes(self, attributes: Mapping[str, str]) -> dict[str, int]:
        """Convert the attributes of a scene to class indices of the attribute classifier."""
        return {name: ATTRIBUTES[name].index(value) for name, value in attributes.items()}

    @classmethod
    def load(cls, folder: Path = MINIATURE) -> MiniScorers:
        """Load all networks from the miniature's weights, on the CPU.

        Raises:
            WeightsError: one of them is missing or damaged.
        """
        classifier = load_module(AttributeClassifier, folder / "attribute-classifier.safetensors")
        vision, text, tokenizer = _load_clip(folder)
        detector = load_module(MiniFaceDetector, folder / "detector.safetensors")
        reader = load_module(ValueReader, folder / "value-reader.safetensors")
        return cls(
            FaceScorer.load(folder),
            partial(clip.embed_images, vision),
            lambda prompts: clip.embed_texts(text, token_ids(tokenizer, list(prompts))),
            classifier,
            ValueScorer(detector, reader),
        )


def _load_clip(folder: Path) -> tuple[Any, Any, PreTrainedTokenizerFast]:
    """Load CLIP's vision encoder, its text encoder, and the tokenizer of the base model."""
    options: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True}
    pipeline = folder / "pipeline"
    try:
        # The text encoder's own tokenizer, so that metrics see the same tokens as the base model.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            pipeline / "tokenizer", local_files_only=True
        )
        with no_progress_bars():
            vision = CLIPVisionModelWithProjection.from_pretrained(folder / "clip", **options)
            text = CLIPTextModelWithProjection.from_pretrained(
                pipeline / "text_encoder_2", **options
            )
    except (OSError, ValueError) as error:
        raise WeightsError(f"{folder} holds no CLIP; create it with `pulid mini build`.") from error
    return vision.eval(), text.eval(), tokenizer
