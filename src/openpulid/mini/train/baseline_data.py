"""Training data and sample sheets of the baselines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from openpulid.identity.eva_clip import normalize_for_clip
from openpulid.identity.extractor import FaceEmbeddingExtractor
from openpulid.mini.data import FaceFeatures, Latents, cache_folder, load_faces
from openpulid.mini.train.baselines import FEATURES, Baseline, Features
from openpulid.mini.train.build_context import PORTRAITS, BuildContext
from openpulid.mini.train.clip_stages import CLIP_FACES
from openpulid.mini.train.face_latent_data import FaceLatentRows, load_directions
from openpulid.mini.train.portraits import Portraits, load_features
from openpulid.mini.train.sheet import draw_sheet
from openpulid.pipelines.presets import Preset
from openpulid.pipelines.studio import Studio
from openpulid.training import autocast
from openpulid.world import WorldDataset


class FaceEmbeddingRows:
    """The face embeddings alone of cached features: all that FaceID and InstantID read."""

    def __init__(self, features: Any, width: int) -> None:
        self.features = features
        self.width = width

    def rows(self, rows: Any, device: torch.device | str = "cpu") -> tuple[Tensor, list[Tensor]]:
        """Return (B, D) embeddings, and no hidden states."""
        return torch.from_numpy(self.features.id_cond[rows, : self.width]).to(device), []


class ReferenceImages:
    """The reference images themselves, for methods that train a part of their vision encoder."""

    def __init__(self, data: WorldDataset) -> None:
        self.data = data

    def rows(
        self, rows: np.ndarray, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, list[Tensor]]:
        """Return ones (B, 1) in place of face embeddings, and the normalized pixels (B, 3, S*S)."""
        images, _, _ = load_faces(self.data, rows, torch.device(device))
        return images.new_ones(len(images), 1), [normalize_for_clip(images).flatten(2)]


def load_rows(
    context: BuildContext, extractor: Any, features: Features, data: WorldDataset
) -> ReferenceImages | FaceEmbeddingRows | FaceFeatures | FaceLatentRows:
    """Load what a baseline reads of a dataset: the images, or cached features."""
    if features == "images":
        return ReferenceImages(data)
    if features == "latents":
        folder = cache_folder(context.runs, "face-latents-of", data.folder.name)
        return FaceLatentRows.build(extractor, data, folder)
    cached = load_features(extractor, data, context.runs)
    if features == "levels":
        return cached
    return FaceEmbeddingRows(cached, extractor.recognition.config["dim"])


def load_input(context: BuildContext, extractor: Any, name: str) -> Any:
    """Load what a baseline is created for, see `BASELINES`.

    Args:
        context: of the build.
        extractor: of the features.
        name: of the baseline.

    Returns:
        The vision encoder of CLIP, editing directions of the face latents, or the width of the
        features.
    """
    features = FEATURES[name]
    if features == "images":
        return context.load_model(CLIPVisionModelWithProjection, CLIP_FACES)
    if features == "levels":
        return extractor.vision_encoder.config["embed_dim"]
    if features == "latents":
        return load_directions(extractor, context.open(PORTRAITS))
    return extractor.recognition.config["dim"]


def open_baseline_data(
    context: BuildContext,
    name: str,
    load_rows: Callable[[WorldDataset], Any],
    tokenizer: Any,
    batch_size: int,
) -> Portraits:
    """Open one dataset of the synthetic world with a baseline's features, of paired images.

    Args:
        context: where the dataset is.
        name: of the dataset.
        load_rows: returns the features of the dataset, with a method `rows`.
        tokenizer: of the captions.
        batch_size: images per step, over all processes.
    """
    data = context.open(name)
    with autocast(context.device):
        latents: Latents = context.load_latents(name)
        features = load_rows(data)
    return Portraits(
        data,
        latents,
        context.load_captions(name),
        features,
        tokenizer,
        batch_size,
        context.device,
        with_images=False,
        paired=True,
    )


def make_sheet_function(
    baseline: Baseline, pipe: Any, extractor: Any, preset: Preset
) -> Callable[[], Image.Image]:
    """Return a function that draws the sample sheet of a baseline.

    Args:
        baseline: the baseline.
        pipe: the pipeline to which it is attached.
        extractor: of its training features.
        preset: of the baseline.
    """
    if preset.models.adapter_has_vision_encoder:
        extractor = baseline.method.create_extractor(extractor.detection)
    elif preset.models.extractor == "mini-embedding":
        extractor = FaceEmbeddingExtractor(extractor.detection, extractor.recognition)
    studio = Studio(pipe, baseline.method, extractor, preset)
    return lambda: draw_sheet(studio)
