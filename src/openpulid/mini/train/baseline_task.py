"""Training task of a baseline: L_diff with the settings of PuLID's first stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
from PIL import Image
from torch import Tensor, nn

from openpulid.mini.train.baselines import Baseline, draw_uniform
from openpulid.training import StepRNG
from openpulid.training.pulid import (
    HELD_OUT_BATCHES,
    BaseModel,
    Batch,
    BatchSource,
    DiffusionLoss,
    DiffusionStep,
    Recipe,
    SDXLModel,
    diffusion_branch,
    loss_weight_map,
    swap_identities,
)
from openpulid.training.pulid.models import AttentionQK

PRETRAINED = "pretrained"
"""Name of the module that trains with a smaller learning rate."""


class BaselineTask:
    """Trains a baseline with L_diff and the baseline's own losses. A `trainer.Task`.

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
        base: BaseModel,
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
        modules = {"baseline": self.baseline.trained}
        if self.baseline.pretrained is not None:
            modules[PRETRAINED] = self.baseline.pretrained
        return modules

    def losses(self, rng: StepRNG) -> Mapping[str, Tensor]:
        """Compute L_diff and the baseline's own losses."""
        baseline = self.baseline
        batch = self.data.batch(rng).to(self.base.device)
        dropped = rng.rand(batch.latents.shape[:1], "drop") < self.recipe.drop_identity
        if not baseline.needs_identity:
            batch = baseline.drop(batch, dropped, rng)
        step, attention = self._predict(rng, batch, self.recipe.timestep_bias, is_training=True)
        is_masked = baseline.masks_loss and draw_uniform(rng, "inside") < 0.5
        loss = baseline.masked_loss(step, batch) if is_masked else None
        if loss is None:
            loss = self._weigh(step, batch, self.face_loss if is_masked else self.image_loss)
        others = self._predict_comparisons(rng, batch)
        return {
            "diffusion": loss,
            **baseline.extra_losses(batch, self.base.pipe, attention),
            **baseline.comparison_losses(step, others, batch),
        }

    @torch.no_grad()
    def validate(self) -> Mapping[str, float]:
        """Measure L_diff on held-out people with their own identity, another one and none.

        A method that never drops the identity has no figure without one; FastComposer and
        PhotoMaker drop the caption with it. InstantID's landmarks are always the image's own.
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
                "none": self.baseline.drop(batch, all_rows, StepRNG(self.recipe.seed, step)),
            }
            for name in names:
                condition = conditions[name]
                assert condition is not None, "a batch of the miniature shows several people"
                rng = StepRNG(self.recipe.seed, step)
                predicted, _ = self._predict(rng, condition, 0.0)
                loss = self._weigh(predicted, batch, self.image_loss)
                sums[name] += loss.item() / HELD_OUT_BATCHES
        return {f"held_out_{name}": value for name, value in sums.items()}

    def sheet(self) -> Image.Image | None:
        """Draw the sample sheet, if there is a function for it."""
        return self.make_sheet() if self.make_sheet else None

    @torch.no_grad()
    def _predict_comparisons(self, rng: StepRNG, batch: Batch) -> list[DiffusionStep]:
        """Predict what the baseline compares with, from the noised images of the step."""
        bias = self.recipe.timestep_bias
        predictions = []
        for other in self.baseline.comparisons(batch, rng):
            if other is not None:
                predictions.append(self._predict(rng, other, bias)[0])
            else:
                text = self.base.encode_text(batch.prompts)
                predictions.append(diffusion_branch(self.base, rng, batch.latents, text, bias))
        return predictions

    def _predict(
        self, rng: StepRNG, batch: Batch, timestep_bias: float, is_training: bool = False
    ) -> tuple[DiffusionStep, Sequence[AttentionQK]]:
        """Predict with the identities of a batch; return it and the attention that is needed."""
        base = self.base
        with ExitStack() as stack:
            # the block encodes the text, too, because some methods change its encoding
            stack.enter_context(self.baseline.use(batch, base.pipe, rng if is_training else None))
            if self.baseline.trains_text:
                assert isinstance(base, SDXLModel)
                text = base.encode_text_with_gradient(batch.prompts)
            else:
                text = base.encode_text(batch.prompts)
            attention: Sequence[AttentionQK] = ()
            if is_training and self.baseline.reads_attention:
                attention = stack.enter_context(base.capture_attention())
            step = diffusion_branch(base, rng, batch.latents, text, timestep_bias)
        return step, attention

    def _weigh(self, step: DiffusionStep, batch: Batch, loss: DiffusionLoss) -> Tensor:
        return loss(step, loss_weight_map(batch, self.recipe.landmark_loss_weight))
