"""PuLID's training as a `Task` of the loop: an adapter, a base it is attached to, and a source of batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from openpulid.methods.pulid.adapter import PuLID
from openpulid.training.branches import Base, diffusion_branch
from openpulid.training.data import Draw
from openpulid.training.losses import DiffusionLoss
from openpulid.training.recipe import Recipe

HELD_OUT_BATCHES = 4


class Batch(NamedTuple):
    """B pictures and who is in them. Features are of the face cropped from the picture itself (PuLID, section
    3.2)."""

    latents: Tensor  # (B, c, h, w) as the base wants them
    masks: Tensor | None  # (B, 1, h, w), 1 inside the face
    prompts: Sequence[str]
    id_cond: Tensor  # (B, C)
    hidden: Sequence[Tensor]  # five times (B, 1 + N, D)

    def to(self, device: torch.device) -> Batch:
        latents, masks, prompts, id_cond, hidden = self
        return Batch(
            latents.to(device),
            None if masks is None else masks.to(device),
            prompts,
            id_cond.to(device),
            [level.to(device) for level in hidden],
        )


class Source(Protocol):
    """Where batches come from. The batch size is the source's; everything random is drawn from `draw`."""

    def batch(self, draw: Draw) -> Batch:
        """The rank's part of the global batch."""


class PuLIDTask:
    """Stage 1 (PuLID, section 3.2): only the adapter trains, on L_diff, the identity sometimes left out.

    Args:
        recipe: what to do; its weights and rates.
        base: frozen; the adapter is attached to its pipeline here.
        adapter: in float32, on the base's device.
        data: batches to train on.
        held_out: batches of people who are not trained on; without it nothing is validated.
        picture: makes the contact sheet of a validation.
    """

    def __init__(
        self,
        recipe: Recipe,
        base: Base,
        adapter: PuLID,
        data: Source,
        held_out: Source | None = None,
        picture: Callable[[], Image.Image] | None = None,
    ) -> None:
        self.recipe, self.base, self.adapter = recipe, base, adapter
        self.data, self.held_out, self.picture = data, held_out, picture
        self.diffusion = DiffusionLoss(base.schedule, recipe.gamma, recipe.inside)
        adapter.attach(base.pipe)

    def modules(self) -> Mapping[str, nn.Module]:
        return {"adapter": self.adapter}

    def losses(self, draw: Draw) -> Mapping[str, Tensor]:
        """{"diffusion": L_diff}. The identity stays in use until the backward pass is done."""
        batch = self.data.batch(draw).to(self.base.device)
        draw.note("latents", batch.latents)
        draw.note("id_cond", batch.id_cond)
        kept = draw.rand(batch.latents.shape[:1], "drop") >= self.recipe.drop_identity
        return {"diffusion": self._diffusion(draw, batch, without(batch, ~kept))}

    @torch.no_grad()
    def validate(self) -> Mapping[str, float]:
        """L_diff on held-out people with their own identity, with another's, and with none; same noise in all
        three."""
        if self.held_out is None:
            return {}
        sums = dict.fromkeys(("own", "other", "none"), 0.0)
        for step in range(HELD_OUT_BATCHES):
            batch = self.held_out.batch(Draw(self.recipe.seed, step)).to(self.base.device)
            everyone = torch.ones(len(batch.latents), dtype=torch.bool)
            people = {"own": batch, "other": turned(batch), "none": without(batch, everyone)}
            for name, shown in people.items():
                with Draw(self.recipe.seed, step) as draw:
                    sums[name] += self._diffusion(draw, batch, shown).item() / HELD_OUT_BATCHES
        return {f"held_out_{name}": value for name, value in sums.items()}

    def sheet(self) -> Image.Image | None:
        return None if self.picture is None else self.picture()

    def _diffusion(self, draw: Draw, batch: Batch, shown: Batch) -> Tensor:
        text = self.base.encode_text(batch.prompts)
        tokens = self.adapter.encode(shown.id_cond, shown.hidden)
        options = {
            "projection": self.recipe.projection,
            "num_zero": self.recipe.num_zero,
            "pipe": self.base.pipe,
        }
        draw.until_backward(self.adapter.use_tokens(tokens, guided=False, **options))
        return self.diffusion(diffusion_branch(self.base, draw, batch.latents, text), batch.masks)


def without(batch: Batch, dropped: Tensor) -> Batch:
    """The identity left out where `dropped` (B,): all features zero, as for the unconditional identity at
    inference."""
    kept = (~dropped).to(batch.id_cond)
    hidden = [level * kept[:, None, None].to(level) for level in batch.hidden]
    return batch._replace(id_cond=batch.id_cond * kept[:, None], hidden=hidden)


def turned(batch: Batch) -> Batch:
    """Everyone's identity is the next one's."""
    return batch._replace(id_cond=batch.id_cond.roll(1, 0), hidden=[level.roll(1, 0) for level in batch.hidden])
