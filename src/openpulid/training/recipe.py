"""What is trained, by name: one flat dataclass, and a plain function per variant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from openpulid.errors import OptionError
from openpulid.methods.pulid.projection import Projection
from openpulid.training.schedule import Schedule


@dataclass(frozen=True)
class Recipe:
    """Figures of one training. What the paper (arXiv 2404.16022) does not disclose is a choice, and marked
    so."""

    name: str
    base: str  # "mini" or "sdxl"

    # the adapter
    encoder: str = "IDEncoder"  # v1; "IDFormer" is v1.1
    encoder_width: int = 1024  # hidden width of the encoder's MLPs; published 1024
    projection: Projection = "none"  # while training: choice; at inference ortho_v2
    num_zero: int = 0  # zero tokens while training: choice

    # the loss
    drop_identity: float = 0.1  # features zeroed, so that guidance has a "nobody": choice
    gamma: float | None = None  # min-SNR-gamma: choice
    inside: float = 1.0  # weight of the face over the rest: choice

    # the optimizer: all choices
    batch: int = 32  # over all processes
    steps: int = 100_000
    lr: float = 1e-4
    warmup: int = 500
    decay: float = 0.2
    weight_decay: float = 0.01
    ema: float = 0.999
    seed: int = 0
    bf16: bool = True
    validate_every: int = 1000

    def schedule(self) -> Schedule:
        """The loop's part of the recipe."""
        return Schedule(
            steps=self.steps,
            lr=self.lr,
            warmup=self.warmup,
            decay=self.decay,
            weight_decay=self.weight_decay,
            ema=self.ema,
            seed=self.seed,
            bf16=self.bf16,
            validate_every=self.validate_every,
        )


def mini_stage1() -> Recipe:
    """The paper's stage 1, L_diff alone, on the miniature.

    The rate is higher and the batch larger than at full size because the adapter is three orders smaller. A face is
    a third of the picture and the only part that says who it is, hence its weight. No min-SNR: with the v-prediction
    it would forget high noise, where the shape of a face is decided.
    """
    return Recipe(
        "mini_stage1",
        base="mini",
        encoder_width=256,
        inside=3.0,
        batch=48,
        steps=12_000,
        lr=5e-4,
        warmup=200,
        validate_every=1000,
    )


RECIPES: dict[str, Callable[[], Recipe]] = {f.__name__: f for f in (mini_stage1,)}


def find(name: str) -> Recipe:
    """The recipe called `name`. Raises OptionError that lists what there is."""
    if name not in RECIPES:
        raise OptionError(f"there is no recipe {name!r}; the known ones are {', '.join(sorted(RECIPES))}")
    return RECIPES[name]()
