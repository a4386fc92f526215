"""Training task of a baseline: L_diff alone, with the settings of PuLID's first stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from PIL import Image
from torch import Tensor, nn

from openpulid.mini.train.baselines import Baseline
from openpulid.training import StepRNG
from openpulid.training.pulid import (
    HELD_OUT_BATCHES,
    Batch,
    BatchSource,
    DiffusionLoss,
    Recipe,
    SDXLModel,
    diffusion_branch,
    drop_identity,
    loss_weight_map,
    swap_identities,
)


class BaselineTask:
    """Trains a baseline with L_diff. A `trainer.Task`.

    Args:
        recipe: PuLID's first stage: batch, timesteps, loss weights, fraction of dropped identities.
        base: of a pipeline that never runs, so that its guidance state is never set.
        baseline: the method to train.
        data: batches to train on.
        held_out: batches of people who are not in the training data; None validates nothing.
        make_sheet: draws the sample sheet of a validation.
    """

    def __init__(
        self,
        recipe: Recipe,
        base: SDXLModel,
        baseline: Baseline,
        data: BatchSource,
        held_out: BatchSource | None = None,
        make_sheet: Callable[[], Image.Image] | None = None,
    ) -> None:
        self.recipe = recipe
        self.base = base
        self.baseline = baseline
        self.data = data
        self.held_out = held_out
        self.make_sheet = make_sheet
        gamma = recipe.min_snr_gamma
        self.image_loss = DiffusionLoss(base.schedule, gamma, recipe.face_loss_weight)
        self.face_loss = DiffusionLoss(base.schedule, gamma, face_weight=1e3)
        baseline.method.attach(base.pipe)

    def modules(self) -> Mapping[str, nn.Module]:
        """Return what the baseline trains."""
        return {"baseline": self.baseline.trained}

    def losses(self, rng: StepRNG) -> Mapping[str, Tensor]:
        """Compute L_diff, in half of PhotoMaker's steps on the face alone."""
        batch = self.data.batch(rng).to(self.base.device)
        dropped = rng.rand(batch.latents.shape[:1], "drop") < self.recipe.drop_identity
        loss = self.image_loss
        if self.baseline.needs_identity:
            dropped = torch.zeros_like(dropped)
            if torch.rand((), generator=rng.generator("inside")) < 0.5:
                loss = self.face_loss
        identities = drop_identity(batch, dropped)
        return {"diffusion": self._loss(rng, batch, identities, self.recipe.timestep_bias, loss)}

    @torch.no_grad()
    def validate(self) -> Mapping[str, float]:
        """Measure L_diff on held-out people with their own identity, another one and none.

        PhotoMaker has no figure without identity. InstantID's landmarks are always the image's own.
        """
        if self.held_out is None:
            return {}
        names = ["own", "other"]
        if not self.baseline.needs_identity:
            names.append("none")
        sums = dict.fromkeys(names, 0.0)
        for step in range(HELD_OUT_BATCHES):
            batch = self.held_out.batch(StepRNG(self.recipe.seed, step)).to(self.base.device)
            all_rows = torch.ones(len(batch.latents), dtype=torch.bool)
            conditions = {
                "own": batch,
                "other": swap_identities(batch),
                "none": drop_identity(batch, all_rows),
            }
            for name in names:
                rng = StepRNG(self.recipe.seed, step)
                loss = self._loss(rng, batch, conditions[name], 0.0, self.image_loss)
                sums[name] += loss.item() / HELD_OUT_BATCHES
        return {f"held_out_{name}": value for name, value in sums.items()}

    def sheet(self) -> Image.Image | None:
        """Draw the sample sheet, if there is a function for it."""
        return self.make_sheet() if self.make_sheet else None

    def _loss(
        self,
        rng: StepRNG,
        batch: Batch,
        identities: Batch,
        timestep_bias: float,
        loss: DiffusionLoss,
    ) -> Tensor:
        with self.baseline.use(identities, self.base.pipe):
            # inside the block, because PhotoMaker changes the text encoding
            text = self.base.encode_text(batch.prompts)
            step = diffusion_branch(self.base, rng, batch.latents, text, timestep_bias)
        return loss(step, loss_weight_map(batch, self.recipe.landmark_loss_weight))
