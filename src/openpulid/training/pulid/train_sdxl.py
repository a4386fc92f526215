"""PuLID's training at full size: photographs, any number of SDXL bases, and the published names in what comes out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from openpulid.errors import OptionError
from openpulid.faces.embed import FaceEmbedder
from openpulid.identity.photo_extractor import PhotoExtractor
from openpulid.io.checkpoints import load_state
from openpulid.methods.pulid.encoders import IDEncoder, IDFormer
from openpulid.methods.pulid.sdxl import PuLID
from openpulid.training.distributed import DistributedContext
from openpulid.training.pulid.export import save_adapter
from openpulid.training.pulid.models import SDXLModel
from openpulid.training.pulid.photo_dataset import INDEX, PhotoDataset
from openpulid.training.pulid.recipes import Recipe
from openpulid.training.pulid.task import PuLIDTask
from openpulid.training.rng import StepRNG
from openpulid.training.trainer import TrainingResult, run


def train(
    recipe: Recipe,
    data: Path,
    folder: Path,
    *,
    base: SDXLModel,
    features: PhotoExtractor,
    fast: Sequence[SDXLModel] = (),
    faces: FaceEmbedder | None = None,
    held_out: Path | None = None,
    begin: Path | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    encoder: dict[str, Any] | None = None,
) -> tuple[PuLID, TrainingResult]:
    """Trains an adapter on a folder of photographs, or continues; writes `adapter.safetensors` into `folder`.

    The frozen parts compute in the precision that they are in, the adapter in float32.

    Args:
        data: pictures with a sentence beside each, `NAME.jpg` and `NAME.txt`.
        base: of the diffusion branch; fast: those of the lightning branch, taken by turns and by ranks.
        features: reads the faces; faces: sees them for the ID loss, with another recogniser.
        held_out: pictures of people who are not trained on.
        begin: the adapter that the recipe continues.
        steps, minutes: shorten it.
        encoder: sizes of the identity encoder that differ from the published ones.

    Raises:
        OptionError: the recipe continues an adapter and none is named, or one with another encoder, or one that learned with
            other features; or it lacks what its losses need.
        WeightsError: the named adapter is none, or of another U-Net or other sizes.
        TrainingError: no picture with a sentence and a face.
    """
    if recipe.begin and begin is None:
        raise OptionError(f"{recipe.name} continues {recipe.begin}: name its adapter with --begin.")
    begun = None if begin is None else _begun(recipe, begin, base, features)
    recipe = replace(recipe, steps=min(steps or recipe.steps, recipe.steps))
    pixels = recipe.pixels or base.unet.config.sample_size * base.pipe.vae_scale_factor
    known: dict[str, Any] = {
        "base": base,
        "features": features,
        "batch": recipe.batch,
        "pixels": pixels,
        "seen": recipe.id_loss != "none",
    }
    source = PhotoDataset.open(data, folder / INDEX, **known)
    others = (
        PhotoDataset.open(held_out, folder / f"held-out-{INDEX}", **known) if held_out else None
    )
    if recipe.checkpoint:
        base.unet.enable_gradient_checkpointing()
    torch.manual_seed(recipe.seed)
    adapter = fresh_adapter(recipe, base, source, encoder or {})
    if begun is not None:
        load_state(
            adapter,
            begun.state_dict(),
            f"{begin} has other sizes than {recipe.name} makes, name another adapter",
        )
    task = PuLIDTask(recipe, base, adapter, source, others, fast=fast, faces=faces)
    result = run(task, recipe.schedule(), folder, minutes=minutes, device=base.device)
    if DistributedContext(base.device).rank == 0:
        facts = {"models": json.dumps(features.models)}
        save_adapter(adapter, folder / "adapter.safetensors", recipe, result, facts)
    return adapter, result


def _begun(recipe: Recipe, begin: Path, base: SDXLModel, features: PhotoExtractor) -> PuLID:
    """The adapter that a recipe continues. What does not fit is said here, before hours of looking for faces."""
    begun = PuLID.load(begin)
    begun.require(features.models)
    if (known := type(begun.encoder).__name__) != recipe.encoder:
        raise OptionError(
            f"{recipe.name} trains an {recipe.encoder} and {begin} holds an {known}; name an adapter with that encoder, or the "
            "recipe's other version, with or without _v11."
        )
    begun.check(base.unet)
    return begun


def fresh_adapter(
    recipe: Recipe, base: SDXLModel, source: PhotoDataset, sizes: dict[str, Any]
) -> PuLID:
    """An untrained adapter of the recipe's encoder; the widths that it reads are those of the source's features."""
    # one picture is enough, but all are named: where one cannot be read any more, the next takes its place
    known = (source.folder, source.names, source.faces, source.base, source.features)
    seen = PhotoDataset(*known, batch=1, pixels=source.pixels, seen=False).batch(
        StepRNG(recipe.seed, 0)
    )
    tokens = base.unet.config.cross_attention_dim
    read = {
        "width": seen.id_cond.shape[-1],
        "vit_dim": seen.hidden[0].shape[-1],
        "hidden_dim": recipe.encoder_width,
    }
    if recipe.encoder == "IDEncoder":
        encoder: IDEncoder | IDFormer = IDEncoder(**{"context_dim": tokens, **read, **sizes})
    else:
        encoder = IDFormer(**{"output_dim": tokens, **read, **sizes})
    return PuLID.for_unet(base.unet, encoder).to(base.device, torch.float32)
