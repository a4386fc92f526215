"""What the miniature's benchmark needs beside PuLID: rivals (`pulid mini build --method NAME`), a reader of faces' numbers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from transformers import CLIPVisionModelWithProjection

from openpulid.faces.mini_recognition import RECOGNITION_MODELS
from openpulid.identity.clip_extractor import ClipExtractor
from openpulid.identity.extractor import DetectedFaces
from openpulid.io.checkpoints import load_module, read_metadata, save_module
from openpulid.mini.data.latents import Latents
from openpulid.mini.evaluation.parameter_probe import fit_probe, measure_probe
from openpulid.mini.train import pulid
from openpulid.mini.train.baselines import BASELINES, Baseline, BaselineTask, ClassTokens
from openpulid.mini.train.progress import progress
from openpulid.mini.train.stages import BuildContext, stamp
from openpulid.pipelines.factory import load_extractor, load_pipeline
from openpulid.pipelines.presets import mini, with_method
from openpulid.pipelines.studio import Studio
from openpulid.training.precision import autocast
from openpulid.training.pulid.export import revision
from openpulid.training.pulid.models import SDXLModel
from openpulid.training.pulid.recipes import find_recipe
from openpulid.world.dataset import WorldDataset


def part(name: str) -> Callable[[BuildContext], dict[str, float]]:
    """The part that trains a rival by the recipe of PuLID's first stage, for as many steps as that had, and writes it beside
    the other weights. Fewer where the minutes do not suffice."""

    def train(shop: BuildContext) -> dict[str, float]:
        known = read_metadata(shop.weights / "pulid-stage1.safetensors")
        recipe = replace(find_recipe("mini_stage1"), name=f"mini_{name}", steps=int(known["steps"]))
        preset = mini(shop.weights)
        pipe = load_pipeline(preset, shop.device)
        features: Any = load_extractor(preset, shop.device)
        torch.manual_seed(recipe.seed)
        if name == "photomaker":
            tower = shop.folder(CLIPVisionModelWithProjection, "clip")
            rival = BASELINES[name](pipe, tower)
            read: Callable[[WorldDataset], Any] = lambda data: ClassTokens.of(tower, data)  # noqa: E731
        else:
            rival = BASELINES[name](pipe, features.recogniser.config["dim"])
            faces = features.recogniser.config["dim"]
            read = lambda data: FaceAlone(pulid.features_of(features, data, shop.runs), faces)  # noqa: E731
        sources = [
            _source(shop, data, read, pipe.tokenizer, recipe.batch)
            for data in ("world", pulid.PORTRAITS)
        ]
        held_out = _source(shop, "world-held-out", read, pipe.tokenizer, recipe.batch)
        unrun = type(pipe)(**pipe.components)  # a pipeline that never runs is never guided
        sheet = _sheet(rival, pipe, features, name)
        task = BaselineTask(
            recipe, SDXLModel(unrun), rival, pulid.Mixture(sources), held_out, sheet
        )
        shop.train(name, task, recipe.schedule())
        stamp(rival.save(shop.weights / name, unrun), shop.facts(name, recipe.schedule()))
        return dict(task.validate())

    return train


def values(shop: BuildContext) -> dict[str, float]:
    """The judge's reader of facial values, from the judge as it is."""
    begun = time.monotonic()
    judge = load_module(
        RECOGNITION_MODELS["scorer"], shop.weights / "recognition-scorer.safetensors", shop.device
    )
    reader = fit_probe(judge, shop.data, on_progress=progress("values"))
    facts = {
        "revision": revision(),
        "seed": "none: solved, not trained",
        "minutes": round((time.monotonic() - begun) / 60, 1),
    }
    save_module(reader, shop.weights / "parameter-probe.safetensors", facts)
    return measure_probe(reader, judge, shop.held_out)


class FaceAlone:
    """Of the features of faces only the recogniser's, the first D: all that FaceID and InstantID read."""

    def __init__(self, features: Any, width: int) -> None:
        self.features, self.width = features, width

    def rows(
        self, rows: Any, device: torch.device | str = "cpu"
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(B, D), and nothing."""
        return torch.from_numpy(self.features.id_cond[rows, : self.width]).to(device), []


def _source(
    shop: BuildContext, name: str, read: Callable[[WorldDataset], Any], tokenizer: Any, batch: int
) -> pulid.Portraits:
    data = shop.open(name)
    with autocast(shop.device):
        latents: Latents = shop.latents(name)
        features = read(data)
    return pulid.Portraits(
        data, latents, shop.captions(name), features, tokenizer, batch, shop.device, False, True
    )


def _sheet(rival: Baseline, pipe: Any, features: Any, name: str) -> Callable[[], Image.Image]:
    reader: Any = features
    if name == "photomaker":
        reader = ClipExtractor(DetectedFaces(features.finder), rival.method.encoder, "picture", -1)
    studio = Studio(pipe, reader, rival.method, with_method(mini(), name))
    return lambda: pulid.sheet(studio)
