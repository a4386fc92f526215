"""Tests of the training benchmark, on a base of a few thousand random weights."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from openpulid.bench.perf import training
from openpulid.bench.perf.random_models import RandomSDXL, random_base
from openpulid.errors import OptionError
from openpulid.training.pulid.recipe import Recipe
from tests.support import tiny_sdxl as tiny

pytestmark = pytest.mark.usefixtures("both_precisions")


@pytest.fixture
def base() -> RandomSDXL:
    pipe = tiny.pipe()
    return RandomSDXL(pipe.unet, pipe.vae)


@pytest.mark.parametrize("rollouts", [(2,), (1, 2)])
def test_every_candidate_is_measured(base, rollouts: tuple[int, ...]) -> None:
    captions = {"id_prompt": None, "align_prompts": ()} if 1 in rollouts else {}
    recipe = Recipe(
        "tiny",
        "mini",
        encoder_width=16,
        batch=2,
        few_step_batch=1,
        id_loss="accurate",
        semantic_weight=0.6,
        layout_weight=0.1,
        **captions,
    )
    costs = training.measure(training.random_task(recipe, base), grad_steps=(1, 2), rounds=1)
    assert [(cost.grad_steps, cost.checkpointing, cost.rollouts) for cost in costs] == list(
        product((1, 2), (False, True), rollouts)
    )
    assert costs[0].ratio == 1.0 and all(cost.seconds > 0 for cost in costs)


def test_random_miniature_has_the_miniatures_sizes() -> None:
    base = random_base("mini", torch.device("cpu"))
    assert base.latent_shape() == (20, 12, 12) and base.unet.dtype == torch.float32
    assert base.decode(torch.zeros(1, 20, 12, 12)).shape == (1, 3, 96, 96)
    text = base.encode_text(["portrait"], guided=True)
    assert text.embeds.shape == (2, 77, base.unet.config.cross_attention_dim)


def test_unknown_base_is_rejected() -> None:
    with pytest.raises(OptionError, match="mini or sdxl"):
        random_base("flux", torch.device("cpu"))
