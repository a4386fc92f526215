"""Tune on the base model of a preset, and write the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from openpulid.device import select_device, training_dtype
from openpulid.errors import OptionError
from openpulid.identity.reference import ReferenceImage
from openpulid.methods.tuned import Trigger
from openpulid.pipelines.factory import load_detection, load_pipeline
from openpulid.pipelines.presets import Preset
from openpulid.pipelines.weights import require_weights
from openpulid.training.run_dir import delete_run
from openpulid.training.tuning.recipes import find_tuning_recipe
from openpulid.training.tuning.tune import delete_checkpoints, tune

WORD = "sks"
"""The word for the person; SDXL's tokenizers have it as one token."""
MINIATURE_WORD = "<|unknown|>"
"""The same for the miniature, whose vocabulary is closed."""


def tune_person(
    method: str,
    preset: Preset,
    references: Sequence[ReferenceImage],
    out: Path,
    *,
    class_word: str = "person",
    word: str | None = None,
    changes: Mapping[str, Any] | None = None,
    is_fresh: bool = False,
    class_images_path: Path | None = None,
    pipe: Any = None,
    device: str | None = None,
) -> None:
    """Tune a method on images of one person and write its file.

    A run that is interrupted continues when it is started again; its checkpoints are next to the
    file until that is written.

    Args:
        method: one of `recipes.TUNING_METHODS`.
        preset: whose base model is tuned.
        references: images of the person.
        out: the file to write.
        class_word: what the person is.
        word: for the person in prompts.
        changes: settings of the recipe that differ from the method's.
        is_fresh: delete an interrupted run first.
        class_images_path: see `tune`.
        pipe: of `load_tuning_pipeline`, to tune on several people; loaded by default.
        device: where to compute.

    Raises:
        OptionError: the preset is not one of SDXL, or a setting is out of its limits.
        WeightsError: weights are missing.
        FaceError: faces are weighed, and an image has none.
    """
    recipe = replace(find_tuning_recipe(method, preset.models.is_miniature), **(changes or {}))
    if preset.models.family != "sdxl":
        raise OptionError(
            f"{method} tunes SDXL, and {preset.label} is not one; choose another preset."
        )
    needs_faces = recipe.face_loss_weight != 1
    needed = [preset.models.pipeline, preset.models.unet]
    if needs_faces:
        needed.append(preset.models.detector)
    require_weights(preset, [source for source in needed if source is not None])
    run_dir = out.with_name(f"{out.stem}-run")
    if is_fresh:
        delete_run(run_dir)
    defaults = preset.defaults
    word = word or (MINIATURE_WORD if preset.models.is_miniature else WORD)
    tuned, facts = tune(
        recipe,
        load_tuning_pipeline(preset, device) if pipe is None else pipe,
        references,
        Trigger(word, class_word, replaces_noun=recipe.trained == "word"),
        run_dir,
        class_options={
            "num_inference_steps": defaults.num_inference_steps,
            "guidance_scale": defaults.guidance_scale,
        },
        class_images_path=class_images_path,
        detection=load_detection(preset.models) if needs_faces else None,
        is_miniature=preset.models.is_miniature,
    )
    tuned.save(out, facts)
    delete_checkpoints(run_dir)


def load_tuning_pipeline(preset: Preset, device: str | None = None) -> Any:
    """Load the base model of a preset in the precision of trainings.

    Args:
        preset: the preset.
        device: where to compute.

    Raises:
        WeightsError: weights are missing.
    """
    target = select_device(device)
    dtype = training_dtype(target) if preset.models.use_half_precision else None
    return load_pipeline(preset, target, dtype)
