"""PuLID training at full size: photos, and any number of SDXL or FLUX checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from openpulid.data.captioned_images import TrainingImages, find_captioned_images
from openpulid.data.prepared_images import PreparedImages, has_held_out, is_prepared, is_url
from openpulid.data.shards import HELD_OUT, TRAIN
from openpulid.errors import OptionError, TrainingError
from openpulid.methods.pulid import PuLID, PuLIDFlux
from openpulid.training.distributed import DistributedContext
from openpulid.training.pulid.face_index import check_face_models
from openpulid.training.pulid.photo_dataset import (
    INDEX,
    PhotoDataset,
    no_images_error,
    no_pairs_error,
    number_people,
)
from openpulid.training.pulid.photo_models import TrainingModels
from openpulid.training.pulid.recipe import Recipe
from openpulid.training.pulid.task import Validation
from openpulid.training.pulid.train import (
    FACE_MODELS_FILE,
    build_adapter,
    hash_init_adapter,
    prepare_run_dir,
    train_adapter,
)
from openpulid.training.trainer import TrainingResult


def check_photos(folder: str | Path, *, is_paired: bool = False) -> None:
    """Check that a folder or dataset has images with captions, before anything is loaded.

    Args:
        folder: see `train_on_photos`.
        is_paired: whether a person must have two images.

    Raises:
        OptionError: the URL of a dataset is not supported.
        TrainingError: there is no such folder, no image in it has a caption, or no person has two.
    """
    if is_prepared(folder):
        if not PreparedImages.open(folder).names:
            raise TrainingError(
                f"{folder} has no image to train on: prepare it with other filters."
            )
    elif not find_captioned_images(Path(folder)).captions:
        raise no_images_error(folder, 0)
    if is_paired and not has_pairs(folder):
        raise no_pairs_error(folder)


def has_pairs(folder: str | Path, split: str = TRAIN) -> bool:
    """Return whether a person has two images in a folder, or in a split of a dataset."""
    images: TrainingImages
    if is_prepared(folder):
        images = PreparedImages.open(folder, split)
        names: Sequence[str] = images.names
    else:
        images = find_captioned_images(Path(folder))
        names = list(images.captions)
    return len(set(number_people(images, names))) < len(names)


def train_on_photos(
    recipe: Recipe,
    models: TrainingModels,
    data: str | Path,
    run_dir: Path,
    *,
    held_out: str | Path | None = None,
    init_adapter: Path | None = None,
    minutes: float | None = None,
    encoder_config: Mapping[str, Any] | None = None,
    is_sharded: bool = False,
) -> tuple[PuLID | PuLIDFlux, TrainingResult]:
    """Train an adapter on a folder of photos, or continue its run.

    Writes `adapter.safetensors` into the run directory.

    Args:
        recipe: what to train.
        models: the frozen models.
        data: images with captions, `NAME.jpg` and `NAME.txt`; or a dataset of `pulid data
            prepare`, in a folder or at a URL.
        run_dir: the run directory.
        held_out: images of people who are not in the training data; those of the prepared dataset
            by default.
        init_adapter: the adapter that the recipe continues.
        minutes: time budget.
        encoder_config: sizes of the identity encoder that differ from the published ones.
        is_sharded: see `train_adapter`.

    Raises:
        OptionError: see `check_separate`, `build_adapter` and `train_adapter`.
        WeightsError: `init_adapter` does not fit; raised before faces are detected.
        TrainingError: no image has a caption and a face, or the run cannot continue.
            Another process in the run directory is an OptionError.
    """
    check_separate(data, held_out)
    prepare_run_dir(run_dir, init_adapter)
    extractor = models.extractor
    adapter = build_adapter(
        recipe,
        models.base,
        {**models.feature_widths, **(encoder_config or {})},
        init_adapter=init_adapter,
        extractor_models=extractor.models,
    )
    pixels = recipe.pixels or models.base.pixels
    with_images = recipe.id_loss != "none"

    def open_dataset(
        folder: str | Path, index: str, is_paired: bool, split: str = TRAIN
    ) -> PhotoDataset:
        return PhotoDataset.open(
            folder,
            run_dir / index,
            models.base,
            extractor,
            recipe.batch,
            pixels,
            with_images,
            is_paired,
            recipe.aspect_buckets,
            split,
        )

    # faces are detected for hours, which a second process must not repeat
    ranks = DistributedContext(models.base.device)
    with ranks.lock(run_dir):
        check_face_models(run_dir / FACE_MODELS_FILE, extractor.models, ranks)
        dataset = open_dataset(data, INDEX, recipe.paired)
        validation = held_out or data
        split = HELD_OUT if is_prepared(validation) and has_held_out(validation) else TRAIN
        held_out_dataset = None
        if held_out is not None or split == HELD_OUT:
            is_paired = recipe.paired and has_pairs(validation, split)
            held_out_dataset = open_dataset(validation, f"held-out-{INDEX}", is_paired, split)
    result = train_adapter(
        recipe,
        models.base,
        adapter,
        dataset,
        run_dir,
        few_step_models=models.few_step_models,
        face_embedder=models.face_embedder,
        validation=Validation(held_out_dataset),
        minutes=minutes,
        metadata={"models": json.dumps(extractor.models)},
        inputs={**models.hashes, **hash_init_adapter(init_adapter)},
        is_sharded=is_sharded,
    )
    return adapter, result


def check_data(data: str | Path, held_out: str | Path | None, *, is_paired: bool = False) -> None:
    """Check everything about the images that needs no model.

    Raises:
        OptionError: see `check_photos` and `check_separate`.
        TrainingError: see `check_photos`.
    """
    check_photos(data, is_paired=is_paired)
    if held_out is not None:
        check_photos(held_out)
    check_separate(data, held_out)


def check_separate(data: str | Path, held_out: str | Path | None) -> None:
    """Check that no held-out image is in the training data as well.

    Raises:
        OptionError: one folder is in the other, and folders are searched at any depth; or both are
            a prepared dataset without held-out people.
    """
    if held_out is None:
        return
    if str(data) == str(held_out):
        shares_images = not (is_prepared(data) and has_held_out(data))
    elif is_url(data) or is_url(held_out):
        return
    else:
        training, validation = Path(data).resolve(), Path(held_out).resolve()
        shares_images = any(
            inner.is_relative_to(outer) and (inner == outer or not is_prepared(outer))
            for outer, inner in ((training, validation), (validation, training))
        )
    if shares_images:
        raise OptionError(
            f"{data} and {held_out} share images, so people would be in the training data and held "
            "out: choose separate folders."
        )
