"""PuLID training at full size: photos, and any number of SDXL checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from openpulid.device import training_dtype
from openpulid.faces.arcface import build_face_embedder, load_arcface_ir_se50
from openpulid.faces.embed import FaceEmbedder
from openpulid.identity.photo_extractor import PhotoExtractor
from openpulid.methods.pulid import PuLID
from openpulid.pipelines.factory import (
    load_extractor,
    load_pipeline,
    require_weights,
    resolve_path,
)
from openpulid.pipelines.presets import sdxl, sdxl_v1
from openpulid.pipelines.selection import resolve_preset
from openpulid.training.distributed import DistributedContext
from openpulid.training.pulid.models import SDXLModel
from openpulid.training.pulid.photo_dataset import INDEX, PhotoDataset, no_images_error
from openpulid.training.pulid.photo_folder import find_captioned_images
from openpulid.training.pulid.recipes import Recipe
from openpulid.training.pulid.train import build_adapter, prepare_run_dir, train_adapter
from openpulid.training.trainer import TrainingResult

ID_LOSS_WEIGHTS = "arcface-loss"


@dataclass(frozen=True)
class TrainingModels:
    """All frozen models of a training at full size.

    Attributes:
        base: model of the diffusion branch.
        extractor: extracts the identities.
        few_step_models: models of the lightning branch, used in round-robin order.
        face_embedder: embeds faces for the ID loss.
    """

    base: SDXLModel
    extractor: PhotoExtractor
    few_step_models: Sequence[SDXLModel] = ()
    face_embedder: FaceEmbedder | None = None


def load_models(
    recipe: Recipe,
    device: torch.device,
    *,
    base: str = "sdxl-base",
    few_step_models: Sequence[str] = (),
    faces: Path | None = None,
) -> TrainingModels:
    """Load the models that a recipe needs, from local files.

    All files are located before the first is opened.

    Args:
        recipe: a recipe without lightning branch or ID loss needs fewer models.
        device: of all models.
        base: checkpoint of the diffusion branch.
        few_step_models: checkpoints of the lightning branch; SDXL-Lightning by default.
        faces: folder of another insightface pack.

    Raises:
        WeightsError: a file is missing or damaged.
    """
    presets = [resolve_preset(sdxl(base), face_pack=faces).with_models(sampler=None)]
    if recipe.few_step_batch:
        lightning = sdxl_v1()
        presets += [
            lightning.with_models(pipeline=name, unet=None, sampler=None)
            for name in few_step_models
        ] or [lightning]
    adapters = {preset.models.adapter for preset in presets}
    sources = [source for preset in presets for source in preset.models.sources]
    needed = [source for source in sources if source not in adapters]
    if recipe.id_loss != "none":
        needed.append(ID_LOSS_WEIGHTS)
    require_weights(presets[0], needed)
    id_loss_file = resolve_path(ID_LOSS_WEIGHTS) if recipe.id_loss != "none" else None

    extractor = cast(PhotoExtractor, load_extractor(presets[0], device))
    dtype = training_dtype(device)
    models = [SDXLModel(load_pipeline(preset, device, dtype)) for preset in presets]
    embedder = None
    if id_loss_file is not None:
        embedder = build_face_embedder(
            extractor.detection.detector, load_arcface_ir_se50(id_loss_file, device)
        )
    return TrainingModels(models[0], extractor, models[1:], embedder)


def check_photos(folder: Path) -> None:
    """Check that a folder has images with captions, before anything is loaded.

    Raises:
        TrainingError: there is no such folder, or no image in it has a caption.
    """
    if not find_captioned_images(folder).captions:
        raise no_images_error(folder, 0)


def train_on_photos(
    recipe: Recipe,
    models: TrainingModels,
    data: Path,
    run_dir: Path,
    *,
    held_out: Path | None = None,
    init_adapter: Path | None = None,
    minutes: float | None = None,
    encoder_config: Mapping[str, Any] | None = None,
) -> tuple[PuLID, TrainingResult]:
    """Train an adapter on a folder of photos, or continue its run.

    Writes `adapter.safetensors` into the run directory.

    Args:
        recipe: what to train.
        models: the frozen models.
        data: images with captions, `NAME.jpg` and `NAME.txt`.
        run_dir: the run directory.
        held_out: images of people who are not in the training data.
        init_adapter: the adapter that the recipe continues.
        minutes: time budget.
        encoder_config: sizes of the identity encoder that differ from the published ones.

    Raises:
        OptionError: see `build_adapter` and `train_adapter`.
        WeightsError: `init_adapter` does not fit; raised before faces are detected.
        TrainingError: no image has a caption and a face, or the run cannot continue.
            Another process in the run directory is an OptionError.
    """
    prepare_run_dir(run_dir, init_adapter)
    extractor = models.extractor
    adapter = build_adapter(
        recipe,
        models.base,
        {**_feature_widths(extractor), **(encoder_config or {})},
        init_adapter=init_adapter,
        extractor_models=extractor.models,
    )
    pixels = recipe.pixels or models.base.pixels
    with_images = recipe.id_loss != "none"

    def open_dataset(folder: Path, index: str) -> PhotoDataset:
        return PhotoDataset.open(
            folder, run_dir / index, models.base, extractor, recipe.batch, pixels, with_images
        )

    # faces are detected for hours, which a second process must not repeat
    with DistributedContext(models.base.device).lock(run_dir):
        dataset = open_dataset(data, INDEX)
        held_out_dataset = open_dataset(held_out, f"held-out-{INDEX}") if held_out else None
    result = train_adapter(
        recipe,
        models.base,
        adapter,
        dataset,
        run_dir,
        few_step_models=models.few_step_models,
        face_embedder=models.face_embedder,
        held_out=held_out_dataset,
        minutes=minutes,
        metadata={"models": json.dumps(extractor.models)},
    )
    return adapter, result


def _feature_widths(extractor: PhotoExtractor) -> dict[str, int]:
    """Return the encoder's input widths, from the sizes of the extractor's networks."""
    vision = extractor.vision_encoder.config
    return {
        "width": extractor.recognition.dim + vision["num_classes"],
        "vit_dim": vision["embed_dim"],
    }
