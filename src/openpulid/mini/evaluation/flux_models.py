"""The models and data that experiments with FLUX's miniature share: loaded once, used by all."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch

from openpulid.identity.extractor import MiniExtractor
from openpulid.methods.pulid import PuLIDFlux
from openpulid.mini.train.build_context import PORTRAITS
from openpulid.mini.train.loss_models import GUIDED_TRANSFORMER, create_model
from openpulid.mini.train.portraits import Mixture, Portraits, open_portraits
from openpulid.mini.train.pulid import encoder_config
from openpulid.pipelines.factory import load_extractor, load_pipeline
from openpulid.pipelines.presets import mini_flux, mini_flux_4step
from openpulid.training.pulid import (
    PuLIDTask,
    Recipe,
    Validation,
    build_adapter,
    train_adapter,
)

CURVE_BATCH = 24
"""Images per batch of the validation during a training."""
MEASURE_BATCH = 48
"""Images per batch of the last measurement."""


class FluxModels:
    """Base, student, guided base and images of the miniature with FLUX's architecture.

    Args:
        runs: folder of the datasets.
        weights: folder of the miniature's weights, with the folder `flux`.
        device: where to compute.

    Raises:
        WeightsError: FLUX's base is not trained yet.
    """

    def __init__(self, runs: Path, weights: Path, device: torch.device) -> None:
        self.runs = runs
        self.device = device
        self.pipes: dict[str, Any] = {"base": load_pipeline(mini_flux(weights), device)}
        student = mini_flux_4step(weights)
        if cast(Path, student.models.few_step_lora).exists():
            self.pipes["student"] = load_pipeline(student, device)
        if (transformer := weights / GUIDED_TRANSFORMER).exists():
            guided = mini_flux(weights).with_models(transformer=transformer, guidance_embeds=None)
            self.pipes["guided"] = load_pipeline(guided, device)
        self.extractor = cast(MiniExtractor, load_extractor(mini_flux(weights), device))

    @property
    def num_tokens(self) -> int:
        """Image tokens of the base."""
        pipe = self.pipes["base"]
        return int((pipe.vae.config.sample_size // pipe.vae_scale_factor // 2) ** 2)

    def portraits(self, name: str, batch: int, paired: bool = True) -> Portraits:
        """Open a dataset of the synthetic world.

        Args:
            name: of the dataset.
            batch: images per batch.
            paired: take the features from another image of the same person.

        Raises:
            TrainingError: it does not exist yet.
        """
        return open_portraits(
            self.runs,
            name,
            self.pipes["base"],
            self.extractor,
            batch,
            with_images=False,
            paired=paired,
        )

    @cached_property
    def curve_data(self) -> Portraits:
        """The held-out images of the validation, with features of other images."""
        return self.portraits("world-held-out", CURVE_BATCH)

    @cached_property
    def paired_data(self) -> Portraits:
        """The held-out images of the last measurement, with features of other images."""
        return self.portraits("world-held-out", MEASURE_BATCH)

    @cached_property
    def own_image_data(self) -> Portraits:
        """The same images, with features of themselves."""
        return self.portraits("world-held-out", MEASURE_BATCH, paired=False)

    def train(self, model: str, recipe: Recipe, run_dir: Path) -> None:
        """Train an adapter on a model, or continue its training; write it into the run directory.

        Raises:
            TrainingError: a dataset does not exist yet, or see `trainer.run`.
        """
        base = create_model(recipe, self.pipes[model])
        adapter = self.create_adapter(model, recipe)
        sources = [
            self.portraits(name, recipe.batch, recipe.paired) for name in ("world", PORTRAITS)
        ]
        validation = Validation(self.curve_data)
        train_adapter(recipe, base, adapter, Mixture(sources), run_dir, validation=validation)

    def create_adapter(self, model: str, recipe: Recipe) -> PuLIDFlux:
        """Create an untrained adapter for a model."""
        base = create_model(recipe, self.pipes[model])
        adapter = build_adapter(recipe, base, encoder_config(recipe, self.extractor))
        return cast(PuLIDFlux, adapter)

    def load_adapter(self, path: Path) -> PuLIDFlux:
        """Load a trained adapter."""
        return PuLIDFlux.load(path).to(self.device)

    def create_task(self, model: str, recipe: Recipe, adapter: PuLIDFlux) -> PuLIDTask:
        """Create a task that measures a trained adapter on a model."""
        base = create_model(recipe, self.pipes[model])
        return PuLIDTask(recipe, base, adapter, self.paired_data)
