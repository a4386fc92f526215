"""The miniature's adapters: the base-agnostic training of `openpulid.training` on the world's pictures."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from openpulid.device import best_device
from openpulid.errors import OptionError, TrainingError
from openpulid.faces.embed import FaceEmbedder
from openpulid.faces.mini_detector import MiniFaceDetector
from openpulid.faces.mini_recognition import RECOGNITION_MODELS
from openpulid.identity.extractor import MiniExtractor
from openpulid.io.checkpoints import load_module
from openpulid.io.image_grid import image_grid, to_pil
from openpulid.methods.pulid.encoders import IDEncoder, IDFormer
from openpulid.methods.pulid.sdxl import PuLID
from openpulid.mini.data.captions import Captions
from openpulid.mini.data.features import FaceFeatures
from openpulid.mini.data.latents import Latents
from openpulid.mini.train.recognition import faces_of
from openpulid.pipelines.factory import load_extractor, load_pipeline
from openpulid.pipelines.presets import MINIATURE, mini_lightning
from openpulid.pipelines.presets import mini as mini_preset
from openpulid.pipelines.studio import Studio
from openpulid.training.distributed import DistributedContext
from openpulid.training.precision import autocast
from openpulid.training.pulid.export import save_adapter
from openpulid.training.pulid.models import SDXLModel
from openpulid.training.pulid.recipes import Recipe
from openpulid.training.pulid.task import Batch, PuLIDTask, Source
from openpulid.training.rng import StepRNG
from openpulid.training.trainer import TrainingResult, run
from openpulid.world import ATTRIBUTES, HELD_OUT_PEOPLE, Person, Scene, render
from openpulid.world.dataset import WorldDataset

PORTRAITS = "world-portraits"
"""The data set of many strangers in simple scenes."""
CLEAR = {"pose": "front", "glasses": "none", "style": "photo"}
"""What a picture must be for features to be taken from it. In others half of a face cannot be seen, and an adapter that
learns from them learns to trust features half."""
WORN = ("glasses", "beard")
"""What hides part of a face because a sentence asks for it. An ID loss that wants the face without takes it off: glasses
from half of the images that should have shown some (benchmarks/mini-ablation.md)."""
SHEET_PROMPTS = (
    "portrait, photo, smiling, blue background",
    "portrait, pencil sketch, turned left",
)
SHEET_PEOPLE = 6


class Portraits:
    """Pictures, their sentences, and the features of the faces in them: a `training.task.Source`.

    Args:
        data, latents, captions, features: the same pictures, row by row; of features `rows` is asked, as `FaceFeatures` has it.
        tokenizer: turns tokens back into sentences.
        batch: pictures per step, over all processes.
        device: where they are wanted.
        seen: whether the pictures that an ID loss wants are wanted too: those that the features are of, or, of somebody who
            wears what hides the face, the picture itself.
        paired: features are of another picture of the same person, a clear one.
    """

    def __init__(
        self,
        data: WorldDataset,
        latents: Latents,
        captions: Captions,
        features: Any,
        tokenizer: Any,
        batch: int,
        device: torch.device | str = "cpu",
        seen: bool = True,
        paired: bool = False,
    ) -> None:
        self.data, self.latents, self.captions, self.features = data, latents, captions, features
        self.tokenizer, self.size, self.device, self.seen = tokenizer, batch, device, seen
        people = torch.from_numpy(np.array(data.people))
        self.of_person = rows_by_person(people, torch.from_numpy(clear(data))) if paired else None
        self.hidden = torch.from_numpy(worn(data))

    @torch.no_grad()
    def batch(self, draw: StepRNG) -> Batch:
        rows = draw.indices(len(self.data), self.size)
        latents, faces = self.latents.rows(rows, self.device)
        variants = draw.randint(self.captions.tokens.shape[1], rows.shape, "variants")
        tokens = self.captions.rows(rows, variants)
        prompts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        shown = rows if self.of_person is None else mates(rows, self.of_person, draw)
        id_cond, hidden = self.features.rows(shown.numpy(), self.device)
        wanted = torch.where(self.hidden[rows], rows, shown)
        pictures = (
            faces_of(self.data, wanted.numpy(), torch.device(self.device))[0] if self.seen else None
        )
        landmarks = torch.from_numpy(self.data.landmarks[rows.numpy()] / self.data.images.shape[-1])
        return Batch(latents, faces, prompts, id_cond, hidden, pictures, landmarks)


class Mixture:
    """One of several sources at each step, all equally often: a `training.task.Source`."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = sources

    def batch(self, draw: StepRNG) -> Batch:
        chosen = int(
            torch.randint(len(self.sources), (), generator=draw.generator("source"))
        )  # one for all ranks
        return self.sources[chosen].batch(draw)


def clear(data: WorldDataset) -> np.ndarray:
    """(N,) bool: pictures of the kind that somebody would give to show a person."""
    columns = [np.asarray(data.attributes[:, list(ATTRIBUTES).index(name)]) for name in CLEAR]
    wanted = [ATTRIBUTES[name].index(value) for name, value in CLEAR.items()]
    return np.all([column == value for column, value in zip(columns, wanted, strict=True)], axis=0)


def worn(data: WorldDataset) -> np.ndarray:
    """(N,) bool: pictures of somebody who wears something of `WORN`."""
    columns = [np.asarray(data.attributes[:, list(ATTRIBUTES).index(name)]) for name in WORN]
    return np.any(
        [
            column != ATTRIBUTES[name].index("none")
            for column, name in zip(columns, WORN, strict=True)
        ],
        axis=0,
    )


def rows_by_person(people: Tensor, clear: Tensor) -> list[Tensor]:
    """For each row (N,), where `people` says whose it is: the other rows of the same person, in order.

    Only the `clear` (N,) ones, unless there are none; the row itself where a person has only one.
    """
    order = people.argsort(stable=True)
    groups = order.split(people.unique(return_counts=True)[1].tolist())
    by_person = {int(people[group[0]]): group for group in groups}
    found = []
    for row, person in enumerate(people.tolist()):
        others = by_person[person][by_person[person] != row]
        some = others[clear[others]]
        found.append(some if len(some) else others if len(others) else torch.tensor([row]))
    return found


def mates(rows: Tensor, of_person: Sequence[Tensor], draw: StepRNG) -> Tensor:
    """(B,) rows -> as many, each one of those that `of_person` has for it."""
    steps = draw.rand(rows.shape, "mates")
    found = []
    for row, step in zip(rows.tolist(), steps.tolist(), strict=True):
        others = of_person[row]
        found.append(int(others[int(step * len(others))]))
    return torch.tensor(found)


def fresh_adapter(pipe: Any, features: MiniExtractor, recipe: Recipe) -> PuLID:
    """An untrained adapter for the pipeline's U-Net; widths are those of its text and of the features."""
    unet = pipe.unet
    face, seen = cast(Any, features.recogniser).config["dim"], features.tower.config["num_classes"]
    width, tokens = recipe.encoder_width, unet.config.cross_attention_dim
    known: dict[str, Any] = {
        "width": face + seen,
        "vit_dim": features.tower.config["embed_dim"],
        "hidden_dim": width,
    }
    if recipe.encoder == "IDEncoder":
        return PuLID.for_unet(unet, IDEncoder(context_dim=tokens, **known))
    heads = max(1, width // 64)
    return PuLID.for_unet(
        unet,
        IDFormer(
            dim=width, depth=5, dim_head=64, heads=heads, output_dim=tokens, ff_mult=2, **known
        ),
    )


def train(
    recipe: Recipe,
    folder: Path,
    *,
    steps: int | None = None,
    minutes: float | None = None,
    device: str | torch.device | None = None,
    fresh: bool = False,
    begin: Path | None = None,
    runs: Path = Path("runs/mini"),
    weights: Path = MINIATURE,
) -> tuple[PuLID, TrainingResult]:
    """Trains an adapter of the miniature by a recipe in `folder`, or continues; writes `adapter.safetensors` there.

    Args:
        steps, minutes: shorten it.
        begin: the adapter to start from; by default what the recipe names, from the folder beside this one or the weights.
        runs: where the world's pictures lie; weights: the rest of the miniature.

    Raises:
        OptionError: a recipe for another base.
        TrainingError: the pictures are not there yet, or nothing to begin from.
    """
    if recipe.base != "mini":
        raise OptionError(f"{recipe.name} trains on {recipe.base}, which `training.full` does.")
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    recipe = replace(recipe, steps=min(steps or recipe.steps, recipe.steps))
    chosen = torch.device(device) if device else best_device()
    preset = mini_preset(weights)
    pipe = load_pipeline(preset, chosen)
    features = cast(MiniExtractor, load_extractor(preset, chosen))
    torch.manual_seed(recipe.seed)
    adapter = fresh_adapter(pipe, features, recipe).to(chosen)
    if recipe.begin:
        adapter.load_state_dict(
            PuLID.load(begin or beginning(recipe.begin, folder, weights)).state_dict()
        )
    more = (
        _lightning(weights, chosen) if recipe.fast_batch else {}
    )  # what is missing is said before minutes of reading
    names = ("world", PORTRAITS, "world-held-out")
    world, sittings, held_out = (_portraits(runs, name, pipe, features, recipe) for name in names)
    source = Mixture([world, sittings])
    studio = Studio(pipe, features, adapter, preset)
    task = PuLIDTask(
        recipe, SDXLModel(pipe), adapter, source, held_out, lambda: sheet(studio), **more
    )
    result = run(task, recipe.schedule(), folder, minutes=minutes, device=chosen)
    if DistributedContext(chosen).rank == 0:
        save_adapter(adapter, folder / "adapter.safetensors", recipe, result)
    return adapter, result


def beginning(name: str, folder: Path, weights: Path = MINIATURE) -> Path:
    """The adapter that the recipe `name` has made: in its own folder beside `folder`, or among the weights.

    Raises:
        TrainingError: neither.
    """
    short = name.removeprefix("mini_")
    beside = (folder.parent / some / "adapter.safetensors" for some in (name, short))
    places = [*beside, weights / f"pulid-{short}.safetensors"]
    for place in places:
        if place.exists():
            return place
    raise TrainingError(
        f"there is no adapter of {name} to begin with ({places[0]}): `pulid train {name}` makes it."
    )


def _lightning(weights: Path, device: torch.device) -> dict[str, Any]:
    """What the later stages need beside the base: the student, and a recogniser that is not the encoder's."""
    finder = load_module(MiniFaceDetector, mini_preset(weights).finder, device)
    recogniser = load_module(
        RECOGNITION_MODELS["loss"], weights / "recognition-loss.safetensors", device
    )
    student = load_pipeline(mini_lightning(weights), device)
    return {"fast": [SDXLModel(student)], "faces": FaceEmbedder(finder.detect, recogniser)}


def _portraits(
    runs: Path, name: str, pipe: Any, extractor: MiniExtractor, recipe: Recipe
) -> Portraits:
    try:
        data = WorldDataset.open(runs / name)
    except FileNotFoundError as error:
        raise TrainingError(str(error)) from None
    suffix = name.removeprefix("world")
    captions = Captions.build(data, pipe.tokenizer, runs / f"captions{suffix}")
    with autocast(extractor.device):
        latents = Latents.build(pipe.vae, data, runs / f"latents{suffix}")
        features = features_of(extractor, data, runs)
    seen = recipe.id_loss != "none"
    tokenizer, device = pipe.tokenizer, extractor.device
    return Portraits(
        data, latents, captions, features, tokenizer, recipe.batch, device, seen, recipe.paired
    )


def features_of(extractor: MiniExtractor, data: WorldDataset, runs: Path) -> FaceFeatures:
    """The features of a data set's faces, kept in `runs` beside it."""
    return FaceFeatures.build(
        extractor, data, runs / f"features{data.folder.name.removeprefix('world')}"
    )


@torch.no_grad()
def sheet(studio: Studio, people: int = SHEET_PEOPLE) -> Image.Image:
    """Held-out people: their portrait, then each prompt without and with them."""
    rows = []
    for k in range(people):
        portrait = to_pil(render([Person.from_seed(HELD_OUT_PEOPLE + k)], [Scene()]).image)[0]
        identity = studio.identify([portrait])
        row = [portrait]
        for prompt in SHEET_PROMPTS:
            row += (
                studio.generate(prompt, seed=k).images
                + studio.generate(prompt, identity, seed=k).images
            )
        rows.append(row)
    return image_grid(rows, 144)
