"""The parts of the miniature, each a function that trains one, writes its weights and says how good it is."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerFast,
)

from openpulid.diffusion.patch_vae import PatchAutoencoderKL
from openpulid.errors import TrainingError, WeightsError
from openpulid.faces.mini_detector import MiniFaceDetector
from openpulid.faces.mini_recognition import RECOGNITION_MODELS
from openpulid.io.checkpoints import load_module, save_module
from openpulid.mini.data.captions import Captions
from openpulid.mini.data.latents import Latents
from openpulid.mini.data.negatives import load_photographs
from openpulid.mini.models.attribute_classifier import AttributeClassifier
from openpulid.mini.models.pipeline import TextEncoders, build_pipeline, build_unet, save_folder
from openpulid.mini.models.tokenizer import build_tokenizer as build_tokenizer
from openpulid.mini.train import autoencoder as pictures
from openpulid.mini.train import clip as words
from openpulid.mini.train import pulid as adapter
from openpulid.mini.train import recognition as people
from openpulid.mini.train.attribute_classifier import AttributeClassifierTask, reader_figures
from openpulid.mini.train.detector import DetectorTask
from openpulid.mini.train.detector import detector_figures as finder_figures
from openpulid.mini.train.distill import STUDENT_TIMESTEPS, LightningTask, TeacherTrajectories
from openpulid.mini.train.progress import progress
from openpulid.mini.train.unet import BaseTask
from openpulid.mini.train.unet import ImageEvaluator as Images
from openpulid.mini.train.vision_encoder import VisionEncoderTask, build_tower
from openpulid.training.config import TrainerConfig
from openpulid.training.precision import autocast
from openpulid.training.pulid.export import revision, save_adapter
from openpulid.training.pulid.recipes import find_recipe
from openpulid.training.trainer import Task, TrainingResult, run
from openpulid.world.dataset import Plan, WorldDataset
from openpulid.world.dataset import build_dataset as render_world

NUM_EVAL_PROMPTS = 256
"""Images that the base and its student are examined on."""


@dataclass
class BuildContext:
    """Where things lie, how long a part may take, and what has been trained since it was opened."""

    runs: Path
    weights: Path
    device: torch.device
    minutes: float | None = None
    results: dict[str, TrainingResult] = field(default_factory=dict)
    plan: Plan = field(default_factory=Plan)
    held_out_plan: Plan = field(default_factory=lambda: Plan(people=256, scenes=8, held_out=True))
    portrait_plan: Plan = field(
        default_factory=lambda: Plan(people=6144, scenes=2, seed=3, portraits=True)
    )

    @cached_property
    def data(self) -> WorldDataset:
        return self.open("world")

    @cached_property
    def held_out(self) -> WorldDataset:
        return self.open("world-held-out")

    def open(self, name: str) -> WorldDataset:
        """One of the world's data sets; TrainingError when it is not there."""
        try:
            return WorldDataset.open(self.runs / name)
        except FileNotFoundError as error:
            raise TrainingError(str(error)) from None

    def train(
        self, name: str, task: Task, schedule: TrainerConfig, share: float = 1.0
    ) -> TrainingResult:
        """Runs a task in its own folder, for its share of the part's minutes."""
        minutes = None if self.minutes is None else share * self.minutes
        self.results[name] = run(
            task, schedule, self.runs / name, minutes=minutes, device=self.device
        )
        return self.results[name]

    def facts(self, name: str, schedule: TrainerConfig) -> dict[str, object]:
        """What is written beside weights."""
        result = self.results[name]
        return {
            "revision": revision(),
            "seed": schedule.seed,
            "steps": result.steps,
            "minutes": round(result.seconds / 60, 1),
        }

    def folder(self, cls: Any, *names: str) -> Any:
        """A model of diffusers or transformers from the weights, in float32, frozen; WeightsError when it is not there."""
        folder = self.weights.joinpath(*names)
        if not (folder / "config.json").exists():
            raise WeightsError(
                f"{folder} is not there yet; the part that makes it comes before this one in `pulid mini build`."
            )
        model = cls.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
        return model.to(self.device).eval().requires_grad_(False)

    def words(self) -> TextEncoders:
        first = self.folder(CLIPTextModel, "pipeline", "text_encoder")
        return TextEncoders(
            first, self.folder(CLIPTextModelWithProjection, "pipeline", "text_encoder_2")
        ).to(self.device)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return PreTrainedTokenizerFast.from_pretrained(
            self.weights / "pipeline" / "tokenizer", local_files_only=True
        )

    def vae(self) -> PatchAutoencoderKL:
        vae = self.folder(PatchAutoencoderKL, "pipeline", "vae")
        return vae.to(memory_format=torch.channels_last)

    def captions(self, name: str = "world") -> Captions:
        file = self.runs / f"captions{name.removeprefix('world')}"
        return Captions.build(
            self.open(name), self.tokenizer(), file, on_progress=progress("sentences")
        )

    def latents(self, name: str = "world") -> Latents:
        folder = self.runs / f"latents{name.removeprefix('world')}"
        with autocast(self.device):
            return Latents.build(
                self.vae(), self.open(name), folder, on_progress=progress("latents")
            )

    def examination(self, **options: Any) -> Images:
        """Of images: with the finder, when there is one already."""
        reader = load_module(
            AttributeClassifier, self.weights / "attribute-classifier.safetensors", self.device
        )
        file = self.weights / "detector.safetensors"
        finder = load_module(MiniFaceDetector, file, self.device) if file.exists() else None
        known = {"vae": self.vae(), "words": self.words(), "tokenizer": self.tokenizer()}
        return Images.with_wishes(
            NUM_EVAL_PROMPTS, **known, reader=reader, finder=finder, **options
        )


def world(shop: BuildContext) -> dict[str, float]:
    """The pictures that everything else is trained and examined on."""
    shop.runs.mkdir(parents=True, exist_ok=True)
    made = {}
    plans = {
        "world": shop.plan,
        "world-held-out": shop.held_out_plan,
        adapter.PORTRAITS: shop.portrait_plan,
    }
    for name, plan in plans.items():
        made[name] = len(
            render_world(
                shop.runs / name, plan, device=str(shop.device), on_progress=progress(name)
            )
        )
    return {
        "pictures": made["world"],
        "held_out": made["world-held-out"],
        "portraits": made[adapter.PORTRAITS],
    }


def finder(shop: BuildContext) -> dict[str, float]:
    schedule = TrainerConfig(steps=20_000, lr=2e-3, decay=0.3, seed=1, validate_every=400)
    torch.manual_seed(schedule.seed)
    network = MiniFaceDetector()
    task = DetectorTask(network, shop.data, shop.held_out, load_photographs())
    shop.train("finder", task, schedule)
    save_module(
        network,
        shop.weights / "detector.safetensors",
        shop.facts("finder", schedule),
        torch.float16,
    )
    return {**finder_figures(network, shop.held_out), "refused": task.refused(shop.held_out, 512)}


def recogniser(name: str, seed: int) -> Callable[[BuildContext], dict[str, float]]:
    """The part that trains one of the three, each with another architecture and its own seed, and says what moves it."""

    def train(shop: BuildContext) -> dict[str, float]:
        schedule = TrainerConfig(
            steps=20_000, lr=3e-3, optimizer="muon", weight_decay=0.1, warmup=50, decay=0.6, ema=0.995, seed=seed,
            validate_every=800,
        )  # fmt: skip
        torch.manual_seed(seed)
        examination = people.RecognitionEvaluator.make(shop.held_out, shop.runs / "moved.npy")
        network: Any = RECOGNITION_MODELS[name]()
        run_name = f"recognition-{name}"
        task = people.RecognitionTask(network, shop.data, examination)
        shop.train(run_name, task, schedule)
        people.whitened(task)
        save_module(
            network,
            shop.weights / f"{run_name}.safetensors",
            shop.facts(run_name, schedule),
            torch.float16,
        )
        (shop.runs / run_name / "report.md").write_text(people.report({name: network}, examination))
        return examination.figures(network)

    return train


def clip(shop: BuildContext) -> dict[str, float]:
    """CLIP and both text encoders of the pipeline; the picture tower, which only the judge asks, trains longer than they do."""
    schedule = TrainerConfig(
        steps=20_000, lr=3e-3, optimizer="muon", weight_decay=0.1, warmup=50, decay=0.6, ema=0.99, seed=3, validate_every=400
    )  # fmt: skip
    torch.manual_seed(schedule.seed)
    tokenizer = build_tokenizer()
    captions = Captions.build(
        shop.data, tokenizer, shop.runs / "captions", on_progress=progress("sentences")
    )
    network, text = words.build_clip(tokenizer), words.build_first_text(tokenizer)
    known = (network, text, tokenizer, shop.data, captions, shop.held_out)
    shop.train("clip", words.ClipTask(*known), schedule, 13 / 18)
    some = torch.arange(0, len(shop.data), max(1, len(shop.data) // 512))
    tokens = captions.rows(some, torch.zeros(1, dtype=torch.long)).to(shop.device)
    for model in (network, text):
        words.loudened(model.text_model, model.text_projection, tokens)
    shop.train("clip/locked", words.ClipTask(*known, locked=True), schedule, 5 / 18)
    _save_clip(shop, network, text, tokenizer, shop.facts("clip", schedule))
    return words.figures(network, text, tokenizer, shop.held_out, most=2048)


def _save_clip(
    shop: BuildContext, network: Any, text: Any, tokenizer: Any, facts: Mapping[str, object]
) -> None:
    """CLIP's picture tower, which the judge asks; its text tower and the smaller one as SDXL's two text encoders."""
    seeing = CLIPVisionModelWithProjection(network.config.vision_config)
    seeing.vision_model.load_state_dict(network.vision_model.state_dict())
    seeing.visual_projection.load_state_dict(network.visual_projection.state_dict())
    first = CLIPTextModel(text.config)
    first.load_state_dict(text.text_model.state_dict())
    second = CLIPTextModelWithProjection(network.config.text_config)
    second.text_model.load_state_dict(network.text_model.state_dict())
    second.text_projection.load_state_dict(network.text_projection.state_dict())
    for name, model in {
        "clip": seeing,
        "pipeline/text_encoder": first,
        "pipeline/text_encoder_2": second,
    }.items():
        save_folder(model, shop.weights / name)
        stamp(shop.weights / name, facts)
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer.save_pretrained(shop.weights / "pipeline" / name)


def vision(shop: BuildContext) -> dict[str, float]:
    """The identity encoder's vision tower."""
    schedule = TrainerConfig(
        steps=40_000, lr=3e-3, optimizer="muon", weight_decay=0.1, warmup=50, decay=0.6, ema=0.99, seed=6, validate_every=400
    )  # fmt: skip
    torch.manual_seed(schedule.seed)
    network = shop.folder(CLIPTextModelWithProjection, "pipeline", "text_encoder_2")
    task = VisionEncoderTask(build_tower(), network, shop.data, shop.captions(), shop.held_out)
    shop.train("vision", task, schedule)
    save_module(
        task.tower,
        shop.weights / "vision-encoder.safetensors",
        shop.facts("vision", schedule),
        torch.float16,
    )
    return dict(task.validate())


def reader(shop: BuildContext) -> dict[str, float]:
    """The attribute reader, the judge of prompts."""
    schedule = TrainerConfig(
        steps=20_000, lr=2e-3, decay=0.4, ema=0.995, seed=7, validate_every=400, weight_decay=0.05
    )
    torch.manual_seed(schedule.seed)
    task = AttributeClassifierTask(AttributeClassifier(), shop.data, shop.held_out)
    shop.train("reader", task, schedule)
    save_module(
        task.reader,
        shop.weights / "attribute-classifier.safetensors",
        shop.facts("reader", schedule),
        torch.float16,
    )
    return reader_figures(task.reader, shop.held_out, most=2048)


def autoencoder(shop: BuildContext) -> dict[str, float]:
    schedule = TrainerConfig(
        steps=40_000, lr=8e-4, decay=0.4, ema=0.998, seed=0, validate_every=1000
    )
    torch.manual_seed(schedule.seed)
    vae = pictures.build_autoencoder(shop.data)
    shop.train("autoencoder", pictures.AutoencoderTask(vae, shop.data, shop.held_out), schedule)
    pictures.standardised(vae, shop.data)
    save_folder(vae, shop.weights / "pipeline" / "vae")
    stamp(shop.weights / "pipeline" / "vae", shop.facts("autoencoder", schedule))
    return {**pictures.figures(vae, shop.held_out), **_likeness(shop, vae)}


def _likeness(shop: BuildContext, vae: PatchAutoencoderKL, most: int = 512) -> dict[str, float]:
    """The judge's cosine between pictures and what comes back; nothing before there is a judge."""
    if not (shop.weights / "recognition-scorer.safetensors").exists():
        return {}
    judge = people.embedded
    network = load_module(
        RECOGNITION_MODELS["scorer"], shop.weights / "recognition-scorer.safetensors", shop.device
    )
    before: list[torch.Tensor] = []
    after: list[torch.Tensor] = []
    for rows in pictures.batches(len(shop.held_out), most):
        images, masks, landmarks = people.faces_of(shop.held_out, rows, shop.device)
        for shown, kept in ((images, before), (pictures.there_and_back(vae, images), after)):
            kept.append(
                (people.align_faces(shown, masks, landmarks, people.CROP) * 255)
                .round()
                .byte()
                .cpu()
            )
    cosine = (judge(network, torch.cat(before)) * judge(network, torch.cat(after))).sum(-1)
    return {"judge": cosine.mean().item()}


def base(shop: BuildContext) -> dict[str, float]:
    schedule = TrainerConfig(
        steps=200_000, lr=3e-3, optimizer="muon", weight_decay=0.1, warmup=100, decay=0.6, ema=0.999, seed=4,
        validate_every=1500,
    )  # fmt: skip
    torch.manual_seed(schedule.seed)
    names = (
        "world",
        adapter.PORTRAITS,
    )  # the second for more faces than the families of the first have
    shown = Latents.concatenate([shop.latents(name) for name in names])
    captions = Captions.concatenate([shop.captions(name) for name in names])
    text, examination = shop.words(), shop.examination()
    channels, size = shown.images.shape[1], shown.images.shape[-1]
    unet = build_unet(channels, text.width, text.second.config.projection_dim, size=size)
    task = BaseTask(unet, text, shown, captions, examination, compiled=can_compile(shop.device))
    shop.train("base", task, schedule)
    folder = shop.weights / "pipeline"
    save_folder(unet, folder / "unet")
    stamp(folder / "unet", shop.facts("base", schedule))
    pipe = build_pipeline(unet, examination.vae, text, examination.tokenizer)
    pipe.scheduler.save_pretrained(folder / "scheduler")
    pipe.save_config(folder)
    return examination.figures(unet)


def lightning(shop: BuildContext, count: int = 4096, seeing: float = 0.6) -> dict[str, float]:
    """The student: `count` walks of the teacher first, then training for `seeing` of the minutes. On two cores the walks take
    nine minutes or so."""
    schedule = TrainerConfig(
        steps=60_000, lr=1e-3, optimizer="muon", warmup=50, decay=0.5, ema=0.998, seed=5, validate_every=2000
    )  # fmt: skip
    torch.manual_seed(schedule.seed)
    text = shop.words()
    teacher = shop.folder(UNet2DConditionModel, "pipeline", "unet").to(
        memory_format=torch.channels_last
    )
    with autocast(shop.device):
        walks = TeacherTrajectories.of(
            teacher,
            text,
            shop.captions(),
            count,
            shop.runs / "lightning" / "walks",
            on_progress=progress("walks"),
        )
    student = deepcopy(teacher).requires_grad_(True)
    examination = shop.examination(steps=STUDENT_TIMESTEPS, guidance=1.0, order=1)
    task = LightningTask(student, text, walks, examination, compiled=can_compile(shop.device))
    shop.train("lightning", task, schedule, seeing)
    save_folder(student, shop.weights / "lightning")
    stamp(shop.weights / "lightning", shop.facts("lightning", schedule))
    return examination.figures(student)


def stage(name: str) -> Callable[[BuildContext], dict[str, float]]:
    """The part that trains the adapter of the recipe mini_NAME and writes it beside the other weights, in bfloat16."""

    def train(shop: BuildContext) -> dict[str, float]:
        recipe = find_recipe(f"mini_{name}")
        trained, result = adapter.train(
            recipe,
            shop.runs / name,
            minutes=shop.minutes,
            device=shop.device,
            runs=shop.runs,
            weights=shop.weights,
        )
        shop.results[name] = result
        save_adapter(
            deepcopy(trained).bfloat16(), shop.weights / f"pulid-{name}.safetensors", recipe, result
        )
        return dict(result.metrics)

    return train


def can_compile(device: torch.device) -> bool:
    """Whether `torch.compile` finds what it needs: on a CPU a C++ compiler."""
    return device.type != "cpu" or any(shutil.which(name) for name in ("g++", "clang++"))


def stamp(place: Path, facts: Mapping[str, object]) -> None:
    """Writes facts into the metadata of a safetensors file, or of all in a folder."""
    for path in [place] if place.is_file() else place.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            metadata = dict(file.metadata() or {})
        save_file(
            tensors, path, metadata=metadata | {key: str(value) for key, value in facts.items()}
        )
