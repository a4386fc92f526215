"""The frozen models of a training at full size, by the names of their checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from openpulid.device import training_dtype
from openpulid.faces.arcface import build_face_embedder, load_arcface_ir_se50
from openpulid.faces.embed import FaceEmbedder
from openpulid.identity.photo_extractor import PhotoExtractor
from openpulid.pipelines.factory import (
    load_extractor,
    load_pipeline,
    require_weights,
    resolve_path,
)
from openpulid.pipelines.lora_loading import fuse_lora
from openpulid.pipelines.loras import open_lora
from openpulid.pipelines.presets import (
    Preset,
    flux,
    flux2_klein,
    flux_schnell,
    sdxl,
    sdxl_v1,
)
from openpulid.pipelines.request_inputs import Lora
from openpulid.pipelines.selection import resolve_preset
from openpulid.training.pulid.flux2_model import Flux2Model
from openpulid.training.pulid.flux_model import FluxModel
from openpulid.training.pulid.models import BaseModel, SDXLModel
from openpulid.training.pulid.recipes import Recipe

ID_LOSS_WEIGHTS = "arcface-loss"
FLUX_PIXELS = 1024
"""Width of FLUX's own images."""


@dataclass(frozen=True)
class TrainingModels:
    """All frozen models of a training at full size.

    Attributes:
        base: model of the diffusion branch.
        extractor: extracts the identities.
        few_step_models: models of the lightning branch, used in round-robin order.
        face_embedder: embeds faces for the ID loss.
    """

    base: BaseModel
    extractor: PhotoExtractor
    few_step_models: Sequence[BaseModel] = ()
    face_embedder: FaceEmbedder | None = None

    @property
    def feature_widths(self) -> dict[str, int]:
        """The identity encoder's input widths, from the sizes of the extractor's networks."""
        vision = self.extractor.vision_encoder.config
        return {
            "width": self.extractor.recognition.dim + vision["num_classes"],
            "vit_dim": vision["embed_dim"],
        }


def load_models(
    recipe: Recipe,
    device: torch.device,
    *,
    base: str | None = None,
    few_step_models: Sequence[str] = (),
    few_step_lora: str | None = None,
    faces: Path | None = None,
) -> TrainingModels:
    """Load the models that a recipe needs, from local files.

    All files are located before the first is opened.

    Args:
        recipe: a recipe without lightning branch or ID loss needs fewer models.
        device: of all models.
        base: checkpoint of the diffusion branch; SDXL's base, FLUX.1-dev or FLUX.2 klein base by
            default.
        few_step_models: checkpoints of the lightning branch; SDXL-Lightning, FLUX.1-schnell or the
            distilled FLUX.2 klein by default.
        few_step_lora: LoRA with which the base itself is the model of the lightning branch, such as
            an acceleration LoRA of FLUX.1-dev.
        faces: "open", or the folder of another insightface pack.

    Raises:
        WeightsError: a file is missing or damaged, or the LoRA is for another base.
    """
    bases = BASES[recipe.base]
    presets = bases.find_presets(recipe, base, few_step_models)
    lora = None
    if few_step_lora is not None:
        presets = [presets[0], presets[0]]
        lora = open_lora(Lora(model=few_step_lora))
        lora.check(presets[0].models)
    presets[0] = resolve_preset(presets[0], face_pack=faces)
    adapters = {preset.models.adapter for preset in presets}
    sources = [source for preset in presets for source in preset.models.sources]
    needed = [source for source in sources if source not in adapters]
    if recipe.id_loss != "none":
        needed.append(ID_LOSS_WEIGHTS)
    require_weights(presets[0], needed)
    id_loss_file = resolve_path(ID_LOSS_WEIGHTS) if recipe.id_loss != "none" else None

    extractor = cast(PhotoExtractor, load_extractor(presets[0], device))
    dtype = training_dtype(device)
    pipes = [load_pipeline(preset, device, dtype) for preset in presets]
    if lora is not None:
        fuse_lora(pipes[-1], lora.path, lora.scale)
    models = bases.create_models(recipe, pipes)
    embedder = None
    if id_loss_file is not None:
        embedder = build_face_embedder(
            extractor.detection.detector, load_arcface_ir_se50(id_loss_file, device)
        )
    return TrainingModels(models[0], extractor, models[1:], embedder)


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
    presets = [flux(base or "flux-dev")]
    if recipe.few_step_batch and recipe.id_loss != "naive":
        schnell = flux_schnell()
        presets += [schnell.with_models(pipeline=name) for name in few_step_models] or [schnell]
    return presets


def _klein_presets(
    recipe: Recipe, base: str | None, few_step_models: Sequence[str]
) -> list[Preset]:
    presets = [flux2_klein(base or "flux2-klein-base").with_models(is_distilled=None)]
    if recipe.few_step_batch and recipe.id_loss != "naive":
        distilled = flux2_klein()
        presets += [distilled.with_models(pipeline=name) for name in few_step_models] or [distilled]
    return presets


def _sdxl_models(recipe: Recipe, pipes: Sequence[Any]) -> list[SDXLModel]:
    return [SDXLModel(pipe) for pipe in pipes]


def _flux_models(recipe: Recipe, pipes: Sequence[Any]) -> list[FluxModel]:
    """Create the models."""
    base, *few_step = pipes
    _share_parts(base, few_step, ("text_encoder", "text_encoder_2", "vae"))
    guidance = [recipe.guidance_embedding] + [recipe.few_step_guidance_embedding] * len(few_step)
    return [
        FluxModel(
            pipe,
            recipe.pixels or FLUX_PIXELS,
            value,
            recipe.text_tokens,
            recipe.logit_mean,
            recipe.logit_std,
        )
        for pipe, value in zip(pipes, guidance, strict=True)
    ]


def _klein_models(recipe: Recipe, pipes: Sequence[Any]) -> list[Flux2Model]:
    """Create the models; those of the lightning branch have the schedule of its few steps."""
    base, *few_step = pipes
    _share_parts(base, few_step, ("text_encoder", "vae"))
    options: dict[str, Any] = {
        "max_sequence_length": recipe.text_tokens,
        "logit_mean": recipe.logit_mean,
        "logit_std": recipe.logit_std,
    }
    pixels = recipe.pixels or FLUX_PIXELS
    models = [Flux2Model(base, pixels, guidance=recipe.guidance_embedding, **options)]
    for pipe in few_step:
        value = recipe.few_step_guidance_embedding
        models.append(Flux2Model(pipe, pixels, recipe.rollout_steps, guidance=value, **options))
    return models


def _share_parts(base: Any, few_step: Sequence[Any], names: Sequence[str]) -> None:
    """Give all pipelines the text encoders and VAE of the first: the checkpoints have the same."""
    for pipe in few_step:
        pipe.register_modules(**{name: getattr(base, name) for name in names})


@dataclass(frozen=True)
class _Bases:
    """How the models of one kind of base are found and created.

    Attributes:
        find_presets: model sets of the diffusion branch, and of the lightning branch.
        create_models: models of their pipelines.
    """

    find_presets: Callable[[Recipe, str | None, Sequence[str]], list[Preset]]
    create_models: Callable[[Recipe, Sequence[Any]], Sequence[BaseModel]]


BASES = {
    "sdxl": _Bases(_sdxl_presets, _sdxl_models),
    "flux": _Bases(_flux_presets, _flux_models),
    "flux2-klein": _Bases(_klein_presets, _klein_models),
}
"""By `Recipe.base`."""
