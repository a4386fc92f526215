"""Which checkpoints a recipe trains on, and their models, by kind of base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from openpulid.pipelines.presets import (
    Preset,
    flux,
    flux2_klein,
    flux_schnell,
    sdxl,
    sdxl_v1,
)
from openpulid.pipelines.request import ModelSelection
from openpulid.training.pulid.flux2_model import Flux2Model
from openpulid.training.pulid.flux_model import FluxModel
from openpulid.training.pulid.models import BaseModel, SDXLModel
from openpulid.training.pulid.qwen_image_model import QwenImageModel
from openpulid.training.pulid.recipe import DEFAULT_PIXELS, Recipe
from openpulid.training.pulid.z_image_model import ZImageModel


@dataclass(frozen=True)
class Bases:
    """How the models of one kind of base are found and created.

    Attributes:
        find_presets: model sets of the diffusion branch, and of the lightning branch.
        create_models: models of their pipelines.
    """

    find_presets: Callable[[Recipe, str | None, Sequence[str]], list[Preset]]
    create_models: Callable[[Recipe, Sequence[Any]], Sequence[BaseModel]]


def _sdxl_presets(recipe: Recipe, base: str | None, few_step_models: Sequence[str]) -> list[Preset]:
    presets = [sdxl(base or "sdxl-base").with_models(sampler=None)]
    if recipe.few_step_batch:
        lightning = sdxl_v1()
        presets += [
            lightning.with_models(pipeline=name, unet=None, sampler=None)
            for name in few_step_models
        ] or [lightning]
    return presets


def _flux_presets(recipe: Recipe, base: str | None, few_step_models: Sequence[str]) -> list[Preset]:
    return [flux(base or "flux-dev"), *_rollout_presets(recipe, flux_schnell(), few_step_models)]


def _klein_presets(
    recipe: Recipe, base: str | None, few_step_models: Sequence[str]
) -> list[Preset]:
    klein = flux2_klein(base or "flux2-klein-base").with_models(is_distilled=None)
    return [klein, *_rollout_presets(recipe, flux2_klein(), few_step_models)]


def _z_image_presets(
    recipe: Recipe, base: str | None, few_step_models: Sequence[str]
) -> list[Preset]:
    """Return the model sets of Z-Image, with FLUX's face models."""
    names = [base or "z-image-base"]
    if recipe.few_step_batch and recipe.id_loss != "naive":
        names += few_step_models or ["z-image-turbo"]
    return [_without_preset(name, "z-image", "z_image_stage1") for name in names]


def _qwen_image_presets(
    recipe: Recipe, base: str | None, few_step_models: Sequence[str]
) -> list[Preset]:
    """Return the model set of Qwen-Image, with FLUX's face models."""
    return [_without_preset(base or "qwen-image-base", "qwen-image", "qwen_image_stage1")]


def _rollout_presets(
    recipe: Recipe, default: Preset, few_step_models: Sequence[str]
) -> list[Preset]:
    """Return the model sets of the lightning branch, if the recipe has one."""
    if not recipe.few_step_batch or recipe.id_loss == "naive":
        return []
    return [default.with_models(pipeline=name) for name in few_step_models] or [default]


def _without_preset(pipeline: str, family: str, recipe: str) -> Preset:
    """Return a model set of a family that has no preset; its name is for messages."""
    preset = flux(pipeline).with_models(
        family=family, adapter=None, recipe=recipe, guidance_embeds=None
    )
    return replace(preset, selection=ModelSelection(preset=family))


def _sdxl_models(recipe: Recipe, pipes: Sequence[Any]) -> list[SDXLModel]:
    return [SDXLModel(pipe) for pipe in pipes]


def _flux_models(recipe: Recipe, pipes: Sequence[Any]) -> list[FluxModel]:
    """Create the models."""
    base, *few_step = pipes
    _share_parts(base, few_step, ("text_encoder", "text_encoder_2", "vae"))
    guidance = [recipe.guidance_embedding] + [recipe.few_step_guidance_embedding] * len(few_step)
    return [
        FluxModel(pipe, guidance=value, **_flow_options(recipe))
        for pipe, value in zip(pipes, guidance, strict=True)
    ]


def _klein_models(recipe: Recipe, pipes: Sequence[Any]) -> list[Flux2Model]:
    """Create the models; those of the lightning branch have the schedule of its few steps."""
    base, *few_step = pipes
    _share_parts(base, few_step, ("text_encoder", "vae"))
    options = _flow_options(recipe)
    models = [Flux2Model(base, guidance=recipe.guidance_embedding, **options)]
    for pipe in few_step:
        value = recipe.few_step_guidance_embedding
        models.append(Flux2Model(pipe, num_steps=recipe.rollout_steps, guidance=value, **options))
    return models


def _z_image_models(recipe: Recipe, pipes: Sequence[Any]) -> list[ZImageModel]:
    """Create the models; each has the schedule of its pipeline."""
    base, *few_step = pipes
    _share_parts(base, few_step, ("text_encoder", "vae"))
    return [ZImageModel(pipe, **_flow_options(recipe)) for pipe in pipes]


def _qwen_image_models(recipe: Recipe, pipes: Sequence[Any]) -> list[QwenImageModel]:
    return [QwenImageModel(pipe, **_flow_options(recipe)) for pipe in pipes]


def _flow_options(recipe: Recipe) -> dict[str, Any]:
    """Return the options that every flow model takes."""
    return {
        "pixels": recipe.pixels or DEFAULT_PIXELS,
        "max_sequence_length": recipe.text_tokens,
        "logit_mean": recipe.logit_mean,
        "logit_std": recipe.logit_std,
    }


def _share_parts(base: Any, few_step: Sequence[Any], names: Sequence[str]) -> None:
    """Give all pipelines the text encoders and VAE of the first: the checkpoints have the same."""
    for pipe in few_step:
        pipe.register_modules(**{name: getattr(base, name) for name in names})


BASES = {
    "sdxl": Bases(_sdxl_presets, _sdxl_models),
    "flux": Bases(_flux_presets, _flux_models),
    "flux2-klein": Bases(_klein_presets, _klein_models),
    "z-image": Bases(_z_image_presets, _z_image_models),
    "qwen-image": Bases(_qwen_image_presets, _qwen_image_models),
}
"""By `Recipe.base`."""
