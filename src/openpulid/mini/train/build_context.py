"""What the build stages share: folders, datasets, trained models, device and time budget."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import safe_open
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerFast

from openpulid.diffusion.patch_vae import PatchAutoencoderKL
from openpulid.errors import TrainingError, WeightsError
from openpulid.faces.miniature import RECOGNITION_MODELS
from openpulid.io.checkpoints import load_module, save_module, save_tensors
from openpulid.mini.data import Captions, Latents, PairDataset, cache_folder
from openpulid.mini.models import TextEncoders
from openpulid.training import Task, TrainerConfig, TrainingResult, autocast, revision, run
from openpulid.world.dataset import Plan, WorldDataset

PORTRAITS = "world-portraits"
"""The dataset of many different people in simple scenes."""


@dataclass
class BuildContext:
    """Folders, device and time budget of a stage, and the results of its trainings.

    Attributes:
        runs: folder of datasets, checkpoints and caches.
        weights: folder of the trained weights.
        device: where to compute.
        minutes: time budget of the stage; None trains all steps.
        results: name of the training -> its result, filled by `train`.
        plan: plan of the training images.
        held_out_plan: plan of the images of held-out people.
        portrait_plan: plan of the images of many people in simple scenes.
        begin: folder of a pipeline whose networks the base starts from; None starts from
            nothing.
        tokens: image tokens of FLUX's base, see `LATENT_PATCHES`.
    """

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
    begin: Path | None = None
    tokens: int = 36

    @cached_property
    def data(self) -> WorldDataset:
        """The dataset of training images."""
        return self.open("world")

    @cached_property
    def held_out(self) -> WorldDataset:
        """The dataset of held-out people."""
        return self.open("world-held-out")

    def open(self, name: str) -> WorldDataset:
        """Open a dataset of the synthetic world.

        Raises:
            TrainingError: it does not exist.
        """
        try:
            return WorldDataset.open(self.runs / name)
        except FileNotFoundError as error:
            raise TrainingError(str(error)) from None

    def train(
        self, name: str, task: Task, config: TrainerConfig, time_share: float = 1.0
    ) -> TrainingResult:
        """Run a task in its own folder, or continue its run.

        Args:
            name: name of the folder and of the result.
            task: the task.
            config: configuration of the trainer.
            time_share: share of the stage's time budget.
        """
        minutes = None if self.minutes is None else time_share * self.minutes
        self.results[name] = run(
            task, config, self.runs / name, minutes=minutes, device=self.device
        )
        return self.results[name]

    def describe_training(self, name: str, config: TrainerConfig) -> dict[str, object]:
        """Return the facts about a training that are stored with its weights."""
        result = self.results[name]
        return {
            "revision": revision(),
            "seed": config.seed,
            "steps": result.steps,
            "minutes": round(result.seconds / 60, 1),
        }

    def save_module(
        self, module: nn.Module, name: str, config: TrainerConfig, training: str | None = None
    ) -> None:
        """Save a trained module in float16 as `NAME.safetensors`.

        Args:
            module: the module.
            name: name of the file.
            config: configuration of its training.
            training: name of its training; by default that of the file.
        """
        facts = self.describe_training(training or name, config)
        save_module(module, self.weights / f"{name}.safetensors", facts, torch.float16)

    def load_model(self, cls: Any, *names: str) -> Any:
        """Load a trained model of diffusers or transformers in float32, frozen.

        Args:
            cls: class of the model.
            *names: path of its folder below the weights.

        Raises:
            WeightsError: the model is not trained yet.
        """
        return self._load_folder(cls, self.weights.joinpath(*names))

    def load_recognition(self, name: str) -> nn.Module:
        """Load a trained face recognition model, frozen.

        Args:
            name: a key of `RECOGNITION_MODELS`.

        Raises:
            WeightsError: the model is not trained yet.
        """
        path = self.weights / f"recognition-{name}.safetensors"
        return load_module(RECOGNITION_MODELS[name], path, self.device)

    def load_first_model(self, cls: Any, name: str) -> Any:
        """Load a model of the pipeline in `begin`, as `load_model` does.

        Raises:
            WeightsError: there is none.
        """
        assert self.begin is not None
        return self._load_folder(cls, self.begin / name)

    def _load_folder(self, cls: Any, folder: Path) -> Any:
        if not (folder / "config.json").exists():
            raise WeightsError(
                f"{folder} does not exist yet; run the earlier stages of `pulid mini build` first."
            )
        model = cls.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
        return model.to(self.device).eval().requires_grad_(False)

    def load_tokenizer(self) -> PreTrainedTokenizerFast:
        """Load the tokenizer of the pipeline."""
        return PreTrainedTokenizerFast.from_pretrained(
            self.weights / "pipeline" / "tokenizer", local_files_only=True
        )

    def load_text_encoders(self) -> TextEncoders:
        """Load both text encoders of the pipeline."""
        first = self.load_model(CLIPTextModel, "pipeline", "text_encoder")
        second = self.load_model(CLIPTextModelWithProjection, "pipeline", "text_encoder_2")
        return TextEncoders(first, second).to(self.device)

    def load_vae(self) -> PatchAutoencoderKL:
        """Load the autoencoder of the pipeline."""
        vae = self.load_model(PatchAutoencoderKL, "pipeline", "vae")
        return vae.to(memory_format=torch.channels_last)

    def load_captions(
        self,
        name: str = "world",
        tokenizer: Any = None,
        data: WorldDataset | PairDataset | None = None,
    ) -> Captions:
        """Tokenize the captions of a dataset, or load them from the cache.

        Args:
            name: name of the dataset.
            tokenizer: by default that of the pipeline.
            data: the dataset, if it is open already.
        """
        return Captions.build(
            self.open(name) if data is None else data,
            self.load_tokenizer() if tokenizer is None else tokenizer,
            cache_folder(self.runs, "captions", name),
            on_progress=make_progress_printer("captions"),
        )

    def load_latents(
        self, name: str = "world", data: WorldDataset | PairDataset | None = None
    ) -> Latents:
        """Encode the images of a dataset, or load their latents from the cache.

        Args:
            name: name of the dataset.
            data: the dataset, if it is open already.
        """
        with autocast(self.device):
            return Latents.build(
                self.load_vae(),
                self.open(name) if data is None else data,
                cache_folder(self.runs, "latents", name),
                on_progress=make_progress_printer("latents"),
            )


@dataclass(frozen=True)
class Stage:
    """A stage of the build.

    Attributes:
        name: name on the command line and of the folder of its run.
        minutes: usual duration on two CPU cores.
        train: trains the stage's models, writes their weights and returns its figures on held-out
            people.
        needs: names of stages that are selected with it, because nothing else needs their weights.
        find_folders: returns the names of the folders that the stage fills; by default one with the
            stage's name.
    """

    name: str
    minutes: float
    train: Callable[[BuildContext], dict[str, float]]
    needs: tuple[str, ...] = ()
    find_folders: Callable[[BuildContext], Sequence[str]] | None = None

    def delete_runs(self, context: BuildContext) -> None:
        """Delete what an earlier build of the stage has left, so that it starts again."""
        names = [self.name] if self.find_folders is None else self.find_folders(context)
        for name in names:
            shutil.rmtree(context.runs / name, ignore_errors=True)


def stamp(path: Path, facts: Mapping[str, object]) -> None:
    """Add facts to the metadata of a safetensors file, or of all such files in a folder."""
    files = [path] if path.is_file() else path.rglob("*.safetensors")
    for file in files:
        with safe_open(file, framework="pt") as reader:
            tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
            metadata = dict(reader.metadata() or {})
        metadata |= {key: str(value) for key, value in facts.items()}
        save_tensors(tensors, file, metadata)


def make_progress_printer(name: str) -> Callable[[int, int], None]:
    """Build a callback (done, total) that prints a line at every 5 % of progress.

    Args:
        name: what is computed; starts each line.
    """
    console = Console(stderr=True)
    printed_step = -1

    def print_progress(done: int, total: int) -> None:
        nonlocal printed_step
        step = done * 20 // total
        if step > printed_step:
            printed_step = step
            console.print(f"{name}  {done}/{total}", highlight=False)

    return print_progress
