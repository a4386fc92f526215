"""The miniature's adapters: the base-agnostic training of `openpulid.training` on the world's pictures."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image

from openpulid.errors import TrainingError
from openpulid.identity.features import FeatureExtractor
from openpulid.methods.pulid.adapter import PuLID
from openpulid.methods.pulid.encoders import IDEncoder
from openpulid.mini.captions import Captions
from openpulid.mini.latents import Latents
from openpulid.mini.pictures import checkered, to_pictures
from openpulid.mini.recognisers import faces_of
from openpulid.presets import MINIATURE
from openpulid.presets import mini as mini_preset
from openpulid.studio import Studio, best_device, load_pipeline
from openpulid.training.branches import SDXLBase
from openpulid.training.checkpoint import save_adapter
from openpulid.training.data import Draw
from openpulid.training.loop import Result, run
from openpulid.training.recipe import Recipe
from openpulid.training.task import Batch, PuLIDTask
from openpulid.world import HELD_OUT_PEOPLE, Person, Scene, render
from openpulid.world.dataset import WorldDataset

SHEET_PROMPTS = ("portrait, photo, smiling, blue background", "portrait, pencil sketch, turned left")
SHEET_PEOPLE = 6


class Portraits:
    """Pictures, their sentences, and the features of the faces in them: a `training.task.Source`.

    Args:
        data, latents, captions: the same pictures, row by row.
        features: reads the faces, with the world's exact masks and landmarks.
        tokenizer: turns tokens back into sentences.
        batch: pictures per step, over all processes.
    """

    def __init__(
        self,
        data: WorldDataset,
        latents: Latents,
        captions: Captions,
        features: FeatureExtractor,
        tokenizer: Any,
        batch: int,
    ) -> None:
        self.data, self.latents, self.captions = data, latents, captions
        self.features, self.tokenizer, self.size = features, tokenizer, batch

    @torch.no_grad()
    def batch(self, draw: Draw) -> Batch:
        rows = draw.indices(len(self.data), self.size)
        device = self.features.device
        latents, faces = self.latents.rows(rows, device)
        variants = draw.randint(self.captions.tokens.shape[1], rows.shape, "variants")
        tokens = self.captions.rows(rows, variants)
        prompts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        id_cond, hidden = self.features.features(*faces_of(self.data, rows.numpy(), device))
        return Batch(latents, faces, prompts, id_cond.float(), [level.float() for level in hidden])


def fresh_adapter(pipe: Any, features: FeatureExtractor, recipe: Recipe) -> PuLID:
    """An untrained adapter for the pipeline's U-Net; widths are those of its text and of the features."""
    unet = pipe.unet
    face, seen = cast(Any, features.recogniser).config["dim"], features.tower.config["num_classes"]
    encoder = IDEncoder(
        width=face + seen,
        context_dim=unet.config.cross_attention_dim,
        vit_dim=features.tower.config["embed_dim"],
        hidden_dim=recipe.encoder_width,
    )
    return PuLID.for_unet(unet, encoder)


def train(
    recipe: Recipe,
    folder: Path,
    *,
    steps: int | None = None,
    minutes: float | None = None,
    device: str | torch.device | None = None,
    fresh: bool = False,
    runs: Path = Path("runs/mini"),
    weights: Path = MINIATURE,
) -> tuple[PuLID, Result]:
    """Trains an adapter of the miniature by a recipe in `folder`, or continues; writes `adapter.safetensors` there.

    Args:
        steps, minutes: shorten it.
        runs: where the world's pictures lie; weights: the rest of the miniature.

    Raises:
        TrainingError: the pictures are not there yet.
    """
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    recipe = replace(recipe, steps=min(steps or recipe.steps, recipe.steps))
    chosen = torch.device(device) if device else best_device()
    preset = mini_preset(weights)
    pipe = load_pipeline(preset, chosen)
    features = FeatureExtractor.load(preset.finder, preset.recogniser, preset.vision, chosen)
    torch.manual_seed(recipe.seed)
    adapter = fresh_adapter(pipe, features, recipe).to(chosen)
    source, held_out = (_portraits(runs, name, pipe, features, recipe.batch) for name in ("world", "world-held-out"))
    studio = Studio(pipe, features, adapter, preset)
    task = PuLIDTask(recipe, SDXLBase(pipe), adapter, source, held_out, lambda: sheet(studio))
    result = run(task, recipe.schedule(), folder, minutes=minutes, device=chosen)
    save_adapter(adapter, folder / "adapter.safetensors", recipe, result)
    return adapter, result


def _portraits(runs: Path, name: str, pipe: Any, features: FeatureExtractor, batch: int) -> Portraits:
    try:
        data = WorldDataset.open(runs / name)
    except FileNotFoundError as error:
        raise TrainingError(str(error)) from None
    tokenizer = pipe.tokenizer
    suffix = name.removeprefix("world")
    captions = Captions.of(data, tokenizer, runs / f"captions{suffix}.npy")
    with torch.autocast(features.device.type, torch.bfloat16):
        latents = Latents.of(pipe.vae, data, runs / f"latents{suffix}")
    return Portraits(data, latents, captions, features, tokenizer, batch)


@torch.no_grad()
def sheet(studio: Studio, people: int = SHEET_PEOPLE) -> Image.Image:
    """Held-out people: their portrait, then each prompt without and with them."""
    rows = []
    for k in range(people):
        portrait = to_pictures(render([Person.from_seed(HELD_OUT_PEOPLE + k)], [Scene()]).image)[0]
        identity = studio.identify([portrait])
        row = [portrait]
        for prompt in SHEET_PROMPTS:
            row += studio.generate(prompt, seed=k).images + studio.generate(prompt, identity, seed=k).images
        rows.append(row)
    return checkered(rows, 144)
