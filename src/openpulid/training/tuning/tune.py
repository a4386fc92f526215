"""Tune a method on images of one person."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from openpulid.identity.detection import FaceDetection
from openpulid.identity.reference import ReferenceImage
from openpulid.io.checkpoints import (
    module_fingerprint,
    read_metadata,
    read_tensors,
    save_tensors,
)
from openpulid.io.lock import LOCK
from openpulid.methods.tuned import Trigger, TunedAdapter
from openpulid.training.code_revision import revision
from openpulid.training.pulid import SDXLModel
from openpulid.training.run_dir import delete_run
from openpulid.training.trainer import run
from openpulid.training.tuning.images import (
    TuningImages,
    encode_person,
    fill_templates,
    generate_class_images,
)
from openpulid.training.tuning.recipes import TuningRecipe
from openpulid.training.tuning.task import TuningTask
from openpulid.training.tuning.trained import check_words, open_part

CLASS_IMAGES = "class-images.safetensors"
"""File of the latents of the class images, which take minutes to generate."""


def tune(
    recipe: TuningRecipe,
    pipe: Any,
    references: Sequence[ReferenceImage],
    trigger: Trigger,
    run_dir: Path,
    *,
    class_options: Mapping[str, Any] | None = None,
    class_images_path: Path | None = None,
    detection: FaceDetection | None = None,
    is_miniature: bool = False,
) -> tuple[TunedAdapter, dict[str, Any]]:
    """Tune a method on images of one person, or continue an interrupted run.

    The pipeline is as it was afterwards.

    Args:
        recipe: the settings.
        pipe: a pipeline of SDXL.
        references: images of the person.
        trigger: the word for the person in prompts.
        run_dir: folder of the checkpoints, see `delete_checkpoints`.
        class_options: arguments of the pipeline with which the class images are generated.
        class_images_path: file that caches the class images for further tunings of the same base
            model; a file in the run directory by default.
        detection: finds the faces, which a recipe can weigh more than the background.
        is_miniature: whether the base model is the miniature, which knows few words.

    Returns:
        The method, and the facts about its training. Its seconds are without those of the class
        images, which depend on the base model alone.

    Raises:
        FaceError: faces are weighed, and an image has none.
        OptionError: the word is not one token of the base model.
        TrainingError: see `trainer.run`.
    """
    check_words(pipe, trigger)  # class images take minutes
    started_at = time.monotonic()
    model = SDXLModel(pipe)
    is_weighed = recipe.face_loss_weight != 1
    images = encode_person(
        model, references, recipe.num_crops, detection if is_weighed else None, recipe.seed
    )
    name = _name_run(recipe, pipe, references, trigger)
    class_prompts = fill_templates(trigger.class_word, is_miniature)
    preparation_seconds = time.monotonic() - started_at
    class_images = None
    if recipe.num_class_images:
        class_images = _load_class_images(
            class_images_path or run_dir / CLASS_IMAGES,
            model,
            class_prompts,
            recipe,
            dict(class_options or {}),
        )
    with open_part(recipe, pipe, trigger) as part:
        task = TuningTask(
            recipe,
            model,
            part,
            images,
            fill_templates(trigger.phrase, is_miniature),
            class_images,
            class_prompts,
        )
        result = run(task, recipe.trainer_config(name), run_dir, device=model.device)
        method = part.create_method()
    facts = {
        "recipe": json.dumps(asdict(recipe)),
        "revision": revision(),
        "images": len(references),
        "seconds": round(preparation_seconds + result.seconds, 1),
    }
    return method, facts


def _load_class_images(
    path: Path,
    model: SDXLModel,
    prompts: Sequence[str],
    recipe: TuningRecipe,
    options: dict[str, Any],
) -> TuningImages:
    """Read the class images of a base model from their file, or generate and store them.

    The file is of an interrupted run, or of another tuning. Its metadata has the seconds that the
    images took.
    """
    count = recipe.num_class_images
    networks = _describe_networks(model.pipe)
    settings = [networks, list(prompts), count, recipe.seed, options]
    key = hashlib.sha256(json.dumps(settings, default=str).encode()).hexdigest()
    if path.exists() and read_metadata(path).get("key") == key:
        return TuningImages(read_tensors(path)["latents"])
    started_at = time.monotonic()
    images = generate_class_images(model, prompts, count, options, recipe.seed)
    seconds = f"{time.monotonic() - started_at:.1f}"
    latents = images.latents.cpu().contiguous()
    save_tensors({"latents": latents}, path, {"key": key, "seconds": seconds})
    return images


def delete_checkpoints(run_dir: Path) -> None:
    """Delete the checkpoints of a finished tuning, and their folder if nothing else is in it."""
    delete_run(run_dir, (LOCK, CLASS_IMAGES))
    with suppress(OSError):  # the user may keep other files there
        run_dir.rmdir()


def _name_run(
    recipe: TuningRecipe, pipe: Any, references: Sequence[ReferenceImage], trigger: Trigger
) -> str:
    """Return a name that differs for other settings, base models, images or words."""
    settings = [asdict(recipe), asdict(trigger), *_describe_networks(pipe)]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for reference in references:
        digest.update(reference.image.tobytes())
    return f"{recipe.method}-{digest.hexdigest()[:12]}"


def _describe_networks(pipe: Any) -> list[str]:
    """Return the path of a base model and hashes that tell its U-Net from other ones."""
    # a few layers are enough; a hash of all would take seconds at full size
    layers = [pipe.unet.conv_in, pipe.unet.time_embedding, pipe.unet.conv_out]
    return [str(pipe.name_or_path), *map(module_fingerprint, layers)]
