"""Predictions for training at full size, against figures that are known otherwise."""

from __future__ import annotations

from dataclasses import replace

import pytest
from typer.testing import CliRunner

from openpulid.cli.main import app
from openpulid.errors import OptionError
from openpulid.training.pulid.plan import GB, Plan, plan_training
from openpulid.training.pulid.plan_costs import Costs, measure_costs
from openpulid.training.pulid.recipes import find_recipe


@pytest.fixture(scope="module")
def costs() -> Costs:
    return measure_costs(find_recipe("flux_stage1"))


@pytest.fixture(scope="module")
def plans(costs: Costs) -> dict[str, list[Plan]]:
    return {
        "flux_stage1": plan_training(find_recipe("flux_stage1"), costs=costs),
        "flux_stage3": plan_training(find_recipe("flux_stage3")),
    }


def test_products_of_a_call(costs: Costs) -> None:
    """12 x 3072^2 weights per token and single block, twice as many in double blocks for a pair of
    streams, and attention of all tokens to all."""
    tokens, width = 32**2 + 128, 3072
    linear = 2 * tokens * (19 + 38) * 12 * width**2
    attention = 4 * tokens**2 * width * (19 + 38)
    assert costs.call_flops == pytest.approx(linear + attention, rel=0.01)


def test_bytes_of_a_call(costs: Costs) -> None:
    # image and text of each block; the rest is the embedding of the time and the ends
    inputs = (19 + 38) * (32**2 + 128) * 3072 * 2
    assert inputs < costs.block_inputs < 1.03 * inputs
    # the keys and values of 32 tokens in 16 heads, and their gradients, in float32
    assert costs.projections == 2 * 20 * 2 * 3072 * 16 * 32 * 4
    assert costs.block > 10 * (32**2 + 128) * 3072 * 2
    assert costs.adapter == pytest.approx(0.57e9, rel=0.01)


def test_plan_fits_eighty_gigabytes(plans: dict[str, list[Plan]]) -> None:
    for name, predictions in plans.items():
        recipe = find_recipe(name)
        for plan in predictions:
            assert plan.peak < 80 * GB
            assert plan.images * plan.accumulate * plan.setup.gpus == recipe.batch
            assert plan.memory["adapter and optimizer"] == pytest.approx(5 * 4 * 0.571e9, rel=0.01)
        one, eight, sharded = predictions
        assert one.seconds == pytest.approx(8 * eight.seconds)
        assert sharded.memory["networks"] < eight.memory["networks"] / 4
    # the lightning branch has a transformer of its own
    one_gpu = [plans[name][0].memory["networks"] for name in ("flux_stage1", "flux_stage3")]
    assert one_gpu[0] == pytest.approx(23.8 * GB, rel=0.01) and one_gpu[1] == 2 * one_gpu[0]


def test_smaller_memory_means_smaller_micro_batches(costs: Costs) -> None:
    recipe = find_recipe("flux_stage1")
    large, small = (plan_training(recipe, limit, costs)[0] for limit in (80 * GB, 60 * GB))
    assert small.accumulate > large.accumulate and small.peak < 60 * GB < large.peak
    (fixed, *_) = plan_training(replace(recipe, accumulate=32), costs=costs)
    assert fixed.images == 2


def test_command_prints_a_plan() -> None:
    result = CliRunner().invoke(app, ["train", "flux_stage2", "--plan"])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].split("\t")[:2] == ["setup", "images at a time"]
    assert [line.split("\t")[0] for line in lines[1:4]] == [
        "1 GPU",
        "8 GPUs",
        "8 GPUs with --shard",
    ]
    assert "not measured" in result.output and "networks 47.6" in result.output


def test_gpus_that_cannot_share_the_batches_are_left_out(costs: Costs) -> None:
    recipe = replace(find_recipe("flux_stage1"), batch=12)
    assert [plan.setup.name for plan in plan_training(recipe, costs=costs)] == ["1 GPU"]
    recipe = replace(recipe, batch=16, accumulate=4)
    assert [plan.setup.gpus for plan in plan_training(recipe, costs=costs)] == [1]


def test_sdxl_at_full_size() -> None:
    """2.57 billion weights; a rollout keeps nothing but the inputs of calls."""
    costs = measure_costs(find_recipe("sdxl_stage1"))
    assert costs.weights["network"] == pytest.approx(2 * 2_567_463_684)
    assert costs.adapter == pytest.approx(0.396e9, rel=0.01)
    # published: 2.98 * 10^12 products of convolutions and linear layers at 1024 pixels
    assert costs.call_flops == pytest.approx(2 * 2.98e12, rel=0.15)
    assert costs.block_inputs + costs.block < costs.call / 10
    one, eight, sharded = plan_training(find_recipe("sdxl_stage3"))
    assert one.memory["networks"] == 2 * costs.weights["network"]
    assert sharded.peak < eight.peak < one.peak < 80 * GB


def test_flux2_klein_at_full_size() -> None:
    recipe = find_recipe("flux2_klein_stage3")
    costs = measure_costs(recipe)
    assert costs.weights["network"] == pytest.approx(2 * 3.88e9, rel=0.01)
    assert costs.checkpoints_blocks and costs.block_inputs < costs.call / 20
    assert plan_training(recipe, costs=costs)[0].peak < 80 * GB


def test_z_image_at_full_size() -> None:
    recipe = find_recipe("z_image_stage1")
    costs = measure_costs(recipe)
    assert costs.weights["network"] == pytest.approx(2 * 6.15e9, rel=0.01)
    assert costs.checkpoints_blocks and costs.block_inputs < costs.call / 10
    assert plan_training(recipe, costs=costs)[0].peak < 80 * GB


def test_qwen_image_at_full_size() -> None:
    """20 billion weights need several GPUs."""
    recipe = find_recipe("qwen_image_stage1")
    costs = measure_costs(recipe)
    assert costs.weights["network"] == pytest.approx(2 * 20.4e9, rel=0.01)
    one, eight, sharded = plan_training(recipe, costs=costs)
    assert sharded.peak < 80 * GB and sharded.peak < eight.peak <= one.peak


def test_miniature_has_no_plan() -> None:
    with pytest.raises(OptionError, match="a plan is made for a base of full size"):
        plan_training(find_recipe("mini_stage1"))
