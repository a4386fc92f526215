"""Tune a method on images of one person."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
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
"""Latents of the class images in the run directory, which take minutes to generate."""


def tune(
    recipe: TuningRecipe,
    pipe: Any,
    references: Sequence[ReferenceImage],
    trigger: Trigger,
    run_dir: Path,
    *,
    class_options: Mapping[str, Any] | None = None,
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
        detection: finds the faces, which a recipe can weigh more than the background.
        is_miniature: whether the base model is the miniature, which knows few words.

    Returns:
        The method, and the facts about its training.

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
    class_images = None
    if recipe.num_class_images:
        options = dict(class_options or {})
        class_images = _cache_images(
            run_dir / CLASS_IMAGES,
            f"{name} {json.dumps(options, default=str)}",
            lambda: generate_class_images(
                model, class_prompts, recipe.num_class_images, options, recipe.seed
            ),
        )
    preparation_seconds = time.monotonic() - started_at
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


def _cache_images(path: Path, key: str, generate: Callable[[], TuningImages]) -> TuningImages:
    """Read images that an interrupted tuning with the same key has stored, or generate them."""
    if path.exists() and read_metadata(path).get("key") == key:
        return TuningImages(read_tensors(path)["latents"])
    images = generate()
    save_tensors({"latents": images.latents.cpu().contiguous()}, path, {"key": key})
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
    # a few layers tell U-Nets apart; a hash of all would take seconds at full size
    layers = [pipe.unet.conv_in, pipe.unet.time_embedding, pipe.unet.conv_out]
    networks = [str(pipe.name_or_path), *map(module_fingerprint, layers)]
    settings = [asdict(recipe), asdict(trigger), *networks]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for reference in references:
        digest.update(reference.image.tobytes())
    return f"{recipe.method}-{digest.hexdigest()[:12]}"
