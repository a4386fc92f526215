"""The frozen models of a training at full size, by the names of their checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch

from openpulid.device import training_dtype
from openpulid.faces.arcface import build_face_embedder, load_arcface_ir_se50
from openpulid.faces.embed import FaceEmbedder
from openpulid.identity.photo_extractor import PhotoExtractor
from openpulid.io.checkpoints import fingerprint, hash_weights
from openpulid.pipelines.factory import (
    load_extractor,
    load_pipeline,
    require_weights,
    resolve_path,
)
from openpulid.pipelines.lora_loading import fuse_lora
from openpulid.pipelines.loras import open_lora
from openpulid.pipelines.presets import Preset
from openpulid.pipelines.request_inputs import Lora
from openpulid.pipelines.selection import resolve_preset
from openpulid.training.pulid.models import BaseModel
from openpulid.training.pulid.photo_bases import BASES
from openpulid.training.pulid.recipe import Recipe

ID_LOSS_WEIGHTS = "arcface-loss"


@dataclass(frozen=True)
class TrainingModels:
    """All frozen models of a training at full size.

    Attributes:
        base: model of the diffusion branch.
        extractor: extracts the identities.
        few_step_models: models of the lightning branch, used in round-robin order.
        face_embedder: embeds faces for the ID loss.
        hashes: option -> fingerprint of the weights it names.
    """

    base: BaseModel
    extractor: PhotoExtractor
    few_step_models: Sequence[BaseModel] = ()
    face_embedder: FaceEmbedder | None = None
    hashes: Mapping[str, str] = field(default_factory=dict)

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
        base: checkpoint of the diffusion branch; SDXL's base, FLUX.1-dev, FLUX.2 klein base,
            Z-Image or Qwen-Image by default.
        few_step_models: checkpoints of the lightning branch; SDXL-Lightning, FLUX.1-schnell, the
            distilled FLUX.2 klein or Z-Image-Turbo by default.
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
    hashes = {"--base": hash_bases(presets[:1]), "--few-step-model": hash_bases(presets[1:])}
    if lora is not None:
        hashes["--few-step-lora"] = fingerprint(lora.path)
    return TrainingModels(models[0], extractor, models[1:], embedder, hashes)


def hash_bases(presets: Sequence[Preset]) -> str:
    """Return the fingerprints of the base models of presets, separated by spaces."""
    sources = [
        source
        for preset in presets
        for source in (preset.models.pipeline, preset.models.unet, preset.models.transformer)
        if source
    ]
    return " ".join(value for source in sources for value in hash_weights(resolve_path(source)))
