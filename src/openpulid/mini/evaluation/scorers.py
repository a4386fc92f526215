"""The miniature's judges: a recogniser and readers that no adapter was trained with; the finder, which all share; and CLIP,
whose picture tower PhotoMaker reads with, and whose text tower is the base's second."""

from __future__ import annotations

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

from openpulid.bench import metrics
from openpulid.bench.metrics import (
    EmbedImages,
    EmbedTexts,
    Faces,
    FindFaces,
    Metric,
    ReadAttributes,
)
from openpulid.errors import WeightsError
from openpulid.faces.embed import FaceEmbedder
from openpulid.faces.mini_detector import MiniFaceDetector
from openpulid.faces.mini_recognition import VGGRecognition
from openpulid.io.checkpoints import load_module
from openpulid.mini.data.captions import token_ids
from openpulid.mini.evaluation.parameter_probe import ParameterProbe, get_facial_values
from openpulid.mini.models.attribute_classifier import AttributeClassifier
from openpulid.mini.train import clip
from openpulid.pipelines.factory import no_progress_bars
from openpulid.pipelines.presets import MINIATURE
from openpulid.world import ATTRIBUTES


class FaceScorer:
    """Finds the face in each image and says whose it is: `bench.metrics.FindFaces` of the miniature."""

    def __init__(self, finder: MiniFaceDetector, recogniser: VGGRecognition) -> None:
        self.embed = FaceEmbedder(finder.detect, recogniser)
        self.width: int = cast(Any, recogniser).config["dim"]

    @classmethod
    def load(cls, folder: Path = MINIATURE) -> FaceScorer:
        """The judge of the miniature in `folder`."""
        finder = load_module(MiniFaceDetector, folder / "detector.safetensors")
        return cls(finder, load_module(VGGRecognition, folder / "recognition-scorer.safetensors"))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Faces:
        """(B, 3, H, W) in [0, 1] -> Faces; embeddings of images without a face are zero."""
        seen = self.embed(images)
        if not seen.found.any():  # the recogniser was not asked, and its width is not known there
            return Faces(seen.found, seen.embeddings.new_zeros(len(images), self.width), seen.masks)
        return Faces(seen.found, seen.embeddings, seen.masks)


@dataclass(frozen=True)
class MiniScorers:
    """All networks that the measures ask, as plain callables."""

    faces: FindFaces
    embed_images: EmbedImages
    embed_texts: EmbedTexts
    read: ReadAttributes
    values: ParameterProbe | None = None

    def measures(self) -> list[Metric]:
        """All that can be told of an image here."""
        exact = [metrics.FacialValues(self.values)] if self.values else []
        return [
            *exact,
            metrics.FaceSim(),
            metrics.Rank1(),
            metrics.ClipT(self.embed_images, self.embed_texts),
            metrics.ClipI(self.embed_images),
            metrics.OutsideFace(),
            metrics.Attributes(self.read),
            metrics.FaceFound(),
            metrics.CopyPaste(),
        ]

    def sets(self) -> list[metrics.FID]:
        """FID of CLIP's image features: there is no Inception that knows these pictures."""
        return [metrics.FID(self.embed_images)]

    def truth(self, people: Sequence[str]) -> Tensor | None:
        """(P, V) facial values of the people that `mini.sitters` draws."""
        return get_facial_values(people) if all(name.isdigit() for name in people) else None

    def wanted(self, named: Mapping[str, str]) -> dict[str, int]:
        """What a scene asks for, as the reader's classes."""
        return {name: ATTRIBUTES[name].index(value) for name, value in named.items()}

    @classmethod
    def load(cls, folder: Path = MINIATURE) -> MiniScorers:
        """The judges of the miniature in `folder`, on the CPU.

        Raises:
            WeightsError: one of them is missing or damaged.
        """
        reader = load_module(AttributeClassifier, folder / "attribute-classifier.safetensors")
        try:
            # the text model's own tokenizer: a prompt is read here as it was there
            words = PreTrainedTokenizerFast.from_pretrained(
                folder / "pipeline" / "tokenizer", local_files_only=True
            )
            with no_progress_bars():
                known: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True}
                seeing = CLIPVisionModelWithProjection.from_pretrained(
                    folder / "clip", **known
                ).eval()
                reading = CLIPTextModelWithProjection.from_pretrained(
                    folder / "pipeline" / "text_encoder_2", **known
                ).eval()
        except (OSError, ValueError) as error:
            raise WeightsError(f"{folder} holds no CLIP; `pulid mini build` makes it.") from error
        return cls(
            FaceScorer.load(folder),
            partial(clip.embed_images, seeing),
            lambda prompts: clip.embed_texts(reading, token_ids(words, list(prompts))),
            reader,
            load_module(ParameterProbe, file)
            if (file := folder / "parameter-probe.safetensors").exists()
            else None,
        )
