"""Methods of a run that are tuned on each subject before its images are generated."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from openpulid.bench.run_dir import Subject
from openpulid.identity.reference import ReferenceImage
from openpulid.io.checkpoints import read_metadata
from openpulid.io.files import make_folder
from openpulid.pipelines.presets import Preset
from openpulid.pipelines.selection import with_method
from openpulid.training.tuning import CLASS_IMAGES, TuningRecipe, find_tuning_recipe
from openpulid.training.tuning.session import load_tuning_pipeline, tune_person


@dataclass(frozen=True)
class TunedPreset(Preset):
    """A preset whose adapter is tuned on each subject.

    Attributes:
        recipe: the settings of the tuning.
    """

    recipe: TuningRecipe = field(kw_only=True)


def tuned_preset(base: Preset, name: str) -> TunedPreset:
    """Return the preset of a tuning method.

    Args:
        base: the preset that the other methods use.
        name: one of `training.tuning.TUNING_METHODS`.

    Raises:
        OptionError: the base is not one of SDXL.
    """
    recipe = find_tuning_recipe(name, base.models.is_miniature)
    # a file that does not exist: each subject has its own
    preset = with_method(base, recipe.method, Path(f"{name}.safetensors"))
    values = {entry.name: getattr(preset, entry.name) for entry in fields(Preset)}
    return TunedPreset(**values, recipe=recipe)


class SubjectTuner:
    """Tunes methods on subjects; all tunings use one pipeline, which is loaded for the first.

    Args:
        device: where to compute.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pipe: Any = None

    def tune(
        self, preset: TunedPreset, subject: Subject, folder: Path, configuration: Mapping[str, Any]
    ) -> tuple[Preset, float, int]:
        """Tune a method on the reference image of a subject, or find the file of an earlier run.

        Args:
            preset: of the method; all have the same base model.
            subject: the subject.
            folder: where the files of the method are kept.
            configuration: of the method, see `describe_configuration`. A file of another recipe or
                base model is not used; the same one is at another scale.

        Returns:
            The preset with the subject's file, the seconds of the tuning and the bytes of the file.
        """
        tuning = {name: configuration[name] for name in ("recipe", "weights")}
        digest = hashlib.sha256(json.dumps(tuning, sort_keys=True).encode()).hexdigest()
        file = folder / digest[:12] / f"{subject.name}.safetensors"
        make_folder(file.parent)
        with FileLock(file.with_suffix(".lock")):  # other workers wait for the file
            if not file.exists():
                self._tune(preset, subject, file, folder.parent / CLASS_IMAGES)
        seconds = float(read_metadata(file)["seconds"])
        models = replace(preset.models, adapter=file)
        return replace(preset, models=models), seconds, file.stat().st_size

    def _tune(
        self, preset: TunedPreset, subject: Subject, file: Path, class_images_path: Path
    ) -> None:
        """Tune a method on a subject and write its file.

        Between tunings the pipeline is in host memory: images are generated with another one.
        """
        if self._pipe is None:
            self._pipe = load_tuning_pipeline(preset, str(self.device))
        self._pipe.to(self.device)
        try:
            tune_person(
                preset.recipe.method,
                preset,
                [ReferenceImage(subject.name, subject.portrait.convert("RGB"))],
                file,
                changes=asdict(preset.recipe),
                class_images_path=class_images_path,
                pipe=self._pipe,
                device=str(self.device),
            )
        finally:
            self._pipe.to("cpu")
