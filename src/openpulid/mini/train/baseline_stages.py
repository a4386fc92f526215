"""Build stages of the other methods of the miniature's benchmark."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from openpulid.errors import WeightsError
from openpulid.io.checkpoints import read_metadata
from openpulid.mini.train.baseline_data import (
    load_input,
    load_rows,
    make_sheet_function,
    open_baseline_data,
)
from openpulid.mini.train.baseline_task import PRETRAINED, BaselineTask
from openpulid.mini.train.baselines import BASELINES, FEATURES, FLUX_NAMES, Features
from openpulid.mini.train.build_context import (
    PORTRAITS,
    BuildContext,
    Stage,
    stamp,
)
from openpulid.mini.train.clip_stages import CLIP_FACES, train_clip_faces
from openpulid.mini.train.face_latents_stage import FACE_LATENTS_STAGE
from openpulid.mini.train.loss_models import create_model
from openpulid.mini.train.portraits import Mixture, Portraits
from openpulid.mini.train.pulid import adapter_file
from openpulid.pipelines.factory import load_extractor, load_pipeline
from openpulid.pipelines.presets import Preset, mini, mini_flux
from openpulid.pipelines.selection import with_method
from openpulid.training.pulid import Recipe, find_recipe

PRETRAINED_LR_SCALE = 0.1
"""Factor of the learning rate of weights that are trained already. PhotoMaker's authors train its
LoRA with 1e-4 and its vision encoder with 1e-5. With the same rate for both, the encoder lost most
of the facial values that it knew within 800 steps (benchmarks/mini-baselines.md)."""


def baseline_stage(name: str) -> Callable[[BuildContext], dict[str, float]]:
    """Return the stage that trains a baseline and writes it next to the other weights.

    It uses the recipe of PuLID's first stage and its number of steps, or fewer if the time budget
    is short.
    """

    def train(context: BuildContext) -> dict[str, float]:
        recipe = find_baseline_recipe(context, name)
        preset = find_baseline_preset(context, name)
        pipe = load_pipeline(preset, context.device)
        features = FEATURES[name]
        # the other methods without the miniature's extractor bring their own vision encoder
        faces = with_method(preset, name) if features == "latents" else preset
        extractor: Any = load_extractor(faces, context.device)
        torch.manual_seed(recipe.seed)
        baseline = BASELINES[name](pipe, load_input(context, extractor, name))

        def open_source(dataset: str) -> Portraits:
            return open_baseline_data(
                context,
                dataset,
                partial(load_rows, context, extractor, features),
                pipe.tokenizer,
                recipe.batch,
            )

        data = Mixture([open_source("world"), open_source(PORTRAITS)])
        held_out = open_source("world-held-out")
        idle_pipe = type(pipe)(**pipe.components)  # a pipeline that never runs is never guided
        sheet = make_sheet_function(baseline, pipe, extractor, with_method(preset, name))
        model = create_model(recipe, idle_pipe)
        task = BaselineTask(recipe, model, baseline, data, held_out, sheet)
        return train_task(context, name, task)

    return train


def find_baseline_recipe(context: BuildContext, name: str) -> Recipe:
    """Return the recipe of PuLID's first stage, with the number of steps that it trained.

    Raises:
        WeightsError: its adapter, which knows the number, is not among the weights.
    """
    stage = "flux-stage1" if name in FLUX_NAMES else "stage1"
    adapter = adapter_file(context.weights, stage)
    if not adapter.exists():
        raise WeightsError(
            f"{name} trains as many steps as PuLID's first stage, and {adapter} does not exist; "
            f"train it with `pulid mini build {stage}`."
        )
    recipe = find_recipe(f"mini_{stage.replace('-', '_')}")
    steps = int(read_metadata(adapter)["steps"])
    return replace(recipe, name=f"mini_{name}", steps=steps)


def find_baseline_preset(context: BuildContext, name: str) -> Preset:
    """Return the preset of a baseline's base, with PuLID."""
    return (mini_flux if name in FLUX_NAMES else mini)(context.weights)


def train_task(context: BuildContext, name: str, task: BaselineTask) -> dict[str, float]:
    """Train a baseline, write it next to the other weights, and measure it."""
    config = replace(task.recipe.trainer_config(), lr_scales={PRETRAINED: PRETRAINED_LR_SCALE})
    context.train(name, task, config)
    folder = context.weights / "flux" if name in FLUX_NAMES else context.weights
    path = task.baseline.save(folder / name, task.base.pipe)
    stamp(path, context.describe_training(name, config))
    return dict(task.validate())


NEEDS: Mapping[Features, tuple[str, ...]] = {
    "images": (CLIP_FACES,),
    "latents": (FACE_LATENTS_STAGE.name,),
}
"""What a baseline reads -> stages that are selected with it."""

BASELINE_STAGES: list[Stage] = [
    Stage(CLIP_FACES, 15, train_clip_faces),
    FACE_LATENTS_STAGE,
    *(Stage(name, 90, baseline_stage(name), NEEDS.get(FEATURES[name], ())) for name in BASELINES),
]
"""Other methods, selected with `--method`, the vision encoder that two of them begin with, and the
latent space of W+ Adapter.

The methods train as many steps as PuLID's first stage and have twice its time budget.
"""
