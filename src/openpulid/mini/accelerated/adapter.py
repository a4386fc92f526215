"""Training of PuLID's three stages on the device.

Trains on the rendered world, with two face recognition models in the ID loss.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from openpulid.identity.extractor import MiniExtractor
from openpulid.methods.pulid import PuLID
from openpulid.mini.accelerated.adapter_evaluation import AdapterEvaluation
from openpulid.mini.accelerated.adapter_steps import fit, save
from openpulid.mini.accelerated.device_models import DeviceModel
from openpulid.mini.accelerated.face_detection import load_face_embedder
from openpulid.mini.accelerated.portraits import DevicePortraits
from openpulid.mini.accelerated.state import RunState
from openpulid.mini.models import build_pipeline
from openpulid.mini.train import pulid
from openpulid.training.pulid import PuLIDTask, Recipe, build_adapter, find_recipe

TIME_FRACTIONS = {"stage1": 0.3, "stage2": 0.3, "stage3": 0.4}
"""Fraction of the remaining time for each stage, if all of them run."""
PORTRAITS = 2
"""Portraits per person of the world, see `stages.PORTRAITS`."""


def stage_recipe(name: str, batch: int, few_step_batch: int) -> Recipe:
    """Return the miniature's recipe of a stage for larger batches.

    Stages with a lightning branch use half of the batch in their diffusion branch.
    """
    recipe = find_recipe(f"mini_{name}")
    if not recipe.few_step_batch:
        return replace(recipe, batch=batch)
    return replace(recipe, batch=max(2, batch // 2), few_step_batch=few_step_batch)


def train_stages(run: RunState) -> None:
    """Train the run's adapter stages, each from the adapter of the previous one, and save them."""
    if run.student is None:
        student = run.load_model(UNet2DConditionModel, "lightning")
        run.student = student.to(memory_format=torch.channels_last)
    sizes = run.sizes
    recipes = {
        name: stage_recipe(name, sizes.adapter_batch, sizes.few_step_batch)
        for name in TIME_FRACTIONS
        if name in run.stages
    }
    extractor = _load_extractor(run)
    base, student_model = (
        DeviceModel(build_pipeline(unet, run.vae, run.text_encoders, run.tokenizer), run.data)
        for unet in (run.base, run.student)
    )
    adapter = _create_adapter(run, next(iter(recipes.values())), base, extractor)
    evaluation = AdapterEvaluation(run, extractor)
    fraction_left = sum(TIME_FRACTIONS[name] for name in recipes)
    for name, recipe in recipes.items():
        source = DevicePortraits(run.world, run.data, extractor, PORTRAITS, recipe.batch)
        loss_models: dict[str, Any] = {}
        if recipe.few_step_batch:
            loss_models["few_step_models"] = [student_model]
            loss_models["face_embedder"] = load_face_embedder(
                run.evaluation.detector, run.weights, run.device
            )
        task = PuLIDTask(recipe, base, adapter, source, **loss_models)
        seconds_left = run.seconds_left - 0.03 * run.seconds
        seconds = max(1.0, seconds_left * TIME_FRACTIONS[name] / fraction_left)
        fraction_left -= TIME_FRACTIONS[name]
        steps = fit(task, adapter, seconds, run, name)
        save(run, adapter, name, recipe, steps)
        metrics = evaluation.measure(adapter, base.pipe, name)
        run.out.add_metrics(name, {"steps": steps, "batch": recipe.batch, **metrics})


def _load_extractor(run: RunState) -> MiniExtractor:
    return MiniExtractor.load(
        run.weights / "detector.safetensors",
        run.weights / "recognition-encoder.safetensors",
        run.weights / "vision-encoder.safetensors",
        run.device,
    )


def _create_adapter(
    run: RunState, recipe: Recipe, base: DeviceModel, extractor: MiniExtractor
) -> PuLID:
    """Create the adapter of the first stage, from that of the weights if it continues one."""
    init_adapter = None
    if recipe.init_from is not None:
        init_adapter = pulid.find_init_adapter(recipe.init_from, run.work_dir, run.weights)
    adapter = build_adapter(
        recipe,
        base,
        pulid.encoder_config(recipe, extractor),
        init_adapter=init_adapter,
        extractor_models=extractor.models,
    )
    assert isinstance(adapter, PuLID)
    return adapter
