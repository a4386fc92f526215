"""Experiments on stage 1 with FLUX's architecture, on tiny random weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from openpulid.cli.main import app
from openpulid.errors import OptionError
from openpulid.methods.pulid import IDFormer, PuLIDFlux
from openpulid.methods.transformer_kinds import select_block_keys
from openpulid.mini.evaluation import flux_models, flux_stage1
from openpulid.mini.evaluation.added_size import record_added_sizes
from openpulid.mini.evaluation.flux_variants import (
    REFERENCE,
    SETTINGS,
    VARIANTS,
    select_variants,
    variant_recipe,
)
from openpulid.mini.evaluation.variants import variant_folder
from openpulid.mini.models import save_folder
from openpulid.mini.models.flux import save_flux_pipeline
from openpulid.mini.train.build_context import PORTRAITS
from openpulid.mini.train.guidance import add_guidance_embedding
from openpulid.mini.train.loss_models import GUIDED_TRANSFORMER
from openpulid.pipelines.presets import MINIATURE
from openpulid.training.pulid import FluxModel, find_recipe
from openpulid.world.dataset import Plan, build_dataset
from tests.support import mini_networks as networks
from tests.support.flow_training import SIZES

CHOSEN = ("random output", "student", "guidance 2.5")


def test_variants_change_exactly_what_they_name() -> None:
    reference = asdict(variant_recipe(VARIANTS[REFERENCE], 300, 16))
    full = asdict(find_recipe("mini_flux_stage1"))
    shortened = {"steps", "warmup", "ema", "batch", "validate_every"}
    assert {name for name in full if full[name] != reference[name]} == shortened | set(SETTINGS)
    for name, variant in VARIANTS.items():
        recipe = asdict(variant_recipe(variant, 300, 16))
        changed = {field for field in recipe if recipe[field] != reference[field]}
        assert changed == set(variant.changes), name
        assert changed or name == REFERENCE or variant.model != "base"
    names = ("rate x0.1", "rate x0.3", "rate x3")
    rates = [VARIANTS[name].changes["lr"] / reference["lr"] for name in names]
    assert rates == pytest.approx([0.1, 1 / 3, 3])


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        (REFERENCE, [*(("double", i) for i in range(2)), *(("single", i) for i in range(6))]),
        ("places 2 and 4", [("double", 0), ("single", 0), ("single", 4)]),
        ("places first", [("double", 0), ("double", 1), ("single", 0)]),
    ],
)
def test_places_in_the_miniature(name: str, blocks: list[tuple[str, int]]) -> None:
    recipe = variant_recipe(VARIANTS[name], 300, 16)
    assert select_block_keys(2, 6, recipe.double_interval, recipe.single_interval) == blocks


def test_guidance_is_that_of_the_training() -> None:
    labels = [VARIANTS[name].condition.label for name in (REFERENCE, "rate x3", "student")]
    assert labels == ["base", "base", "student"]
    for value in ("1", "2.5", "4"):
        variant = VARIANTS[f"guidance {value}"]
        assert variant.condition.label == f"guided {value}"
        assert variant_recipe(variant, 300, 16).guidance_embedding == float(value)


def test_reference_is_always_selected() -> None:
    assert list(select_variants(["student"])) == [REFERENCE, "student"]
    with pytest.raises(OptionError, match="did you mean 'student'"):
        select_variants(["studnt"])


def test_another_recipe_or_base_has_another_folder(tmp_path: Path) -> None:
    recipe = variant_recipe(VARIANTS[REFERENCE], 300, 16)
    shorter = variant_recipe(VARIANTS[REFERENCE], 200, 16)
    options = [(recipe, "a"), (recipe, "b"), (shorter, "a"), (recipe, "a")]
    folders = [variant_folder(tmp_path, "noise mean 0", one, base) for one, base in options]
    assert folders[0] == folders[3] and len(set(folders)) == 3
    assert folders[0].name.startswith("noise-mean-0-")


@torch.no_grad()
def test_added_size_is_that_of_the_attention() -> None:
    model = FluxModel(networks.small_flux_pipeline(), 96, max_sequence_length=32)
    torch.manual_seed(0)
    adapter = PuLIDFlux.for_transformer(
        model.network, IDFormer(**SIZES), dim_head=8, heads=2, single_interval=2
    ).eval()
    adapter.attach(model.pipe)
    tokens = torch.randn(2, 3, SIZES["output_dim"])
    x_t = torch.randn(2, *model.latent_shape())
    text = model.encode_text(["portrait, photo", "photo, a person"])
    outputs = []

    def predict() -> dict[str, list[float]]:
        with adapter.use_tokens(tokens), record_added_sizes(adapter, model.pipe) as sizes:
            model.predict(x_t, torch.tensor([0.3, 0.8]), text)
        return sizes

    assert predict() == {"double 0": [0.0], "single 0": [0.0]}
    first = model.network.transformer_blocks[0]
    for layer in adapter.layers:
        layer.to_out.reset_parameters()
    handle = first.register_forward_hook(lambda *call: outputs.append(call[-1][1]), prepend=True)
    sizes = predict()
    handle.remove()
    image = outputs[0]
    added = adapter.layers[0](tokens, image)
    expected = (added.flatten(1).norm(dim=1) / image.flatten(1).norm(dim=1)).mean().item()
    assert sizes["double 0"] == [pytest.approx(expected, rel=1e-4)] and expected > 0.01
    assert not first._forward_hooks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny world in `runs/mini`, and weights with a tiny random FLUX."""
    root = tmp_path_factory.mktemp("flux")
    weights = root / "weights"
    weights.mkdir()
    for file in MINIATURE.glob("*.safetensors"):
        (weights / file.name).symlink_to(file)
    pipe = networks.small_flux_pipeline(2)
    save_flux_pipeline(pipe, weights / "flux" / "pipeline")
    networks.save_random_lora(pipe.transformer, weights / "flux")
    guided = add_guidance_embedding(pipe.transformer)
    torch.nn.init.normal_(guided.time_text_embed.guidance_embedder.linear_2.weight)
    save_folder(guided, weights / GUIDED_TRANSFORMER)
    runs = root / "runs" / "mini"
    build_dataset(runs / "world", Plan(people=4, scenes=3), workers=1, compiled=False)
    for name in ("world-held-out", PORTRAITS):
        shutil.copytree(runs / "world", runs / name)
    return root


def sweep(folder: Path, *options: object) -> Result:
    command = ["mini", "sweep", "--experiments", "flux-stage1", "--device", "cpu", "--json"]
    for name in CHOSEN:
        command += ["--variant", name]
    weights = ["--weights", folder / "weights", "--steps", 2, "--batch", 4, *options]
    return CliRunner().invoke(app, [*command, *map(str, weights)])


def test_experiments_write_figures_and_plot(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(flux_models, "CURVE_BATCH", 4)
    monkeypatch.setattr(flux_models, "MEASURE_BATCH", 4)
    monkeypatch.setattr(flux_stage1, "MEASURE_BATCHES", 2)
    monkeypatch.setattr("openpulid.training.logger.draw_curves", lambda history, path: None)
    done = sweep(folder, "-o", "flux.png")
    assert done.exit_code == 0, done.output
    assert (folder / "flux.png").stat().st_size > 10_000
    data = json.loads((folder / "flux.json").read_text())
    (measurement,) = data["measurements"]
    assert data["about"] and measurement["name"] == "144 tokens, 2 steps of 4 images"
    assert measurement["configuration"]["held_out_images"] == 8
    rows: dict[str, Any] = measurement["figures"]
    assert list(rows) == [REFERENCE, *CHOSEN]
    assert {name: list(row["measured"]) for name, row in rows.items()} == {
        REFERENCE: ["base", "student", "guided 1", "guided 2.5", "guided 4"],
        "random output": ["base"],
        "student": ["base", "student"],
        "guidance 2.5": ["base", "guided 2.5"],
    }
    untrained_losses = {
        name: losses["held_out_untrained"] for name, losses in rows[REFERENCE]["measured"].items()
    }
    assert len(set(untrained_losses.values())) == 5  # each guidance is another model
    for name, row in rows.items():
        base = row["measured"]["base"]
        gain = base["held_out_none"] - base["held_out_own"]
        assert base["held_out_over_none"] == pytest.approx(gain, abs=3e-6)
        assert base["held_out_over_other_se"] > 0
        assert (base["over_none_versus_recipe"] == 0) == (name == REFERENCE)
        untrained = rows[REFERENCE]["measured"]["base"]["held_out_untrained"]
        assert base["held_out_untrained"] == untrained
        assert 0 < abs(base["held_out_none"] - untrained) < 0.5 * untrained
        trained_on = row["measured"][row["trained_on"]]
        assert "own_image_over_other_image" in trained_on
        assert [point["step"] for point in row["curve"]] == [1, 2]
        assert row["training"][-1]["gradient_norm"] > 0
        assert row["steps"] == 2 and len(row["added"]) == 4
    # two steps have moved the output from zero, but not as far as it is at random
    assert 0 < rows[REFERENCE]["added_mean"] < 0.5 * rows["random output"]["added_mean"]

    # finished variants are read, not trained again
    adapters = sorted((folder / "runs/mini/sweep/flux-stage1").glob("*/adapter.safetensors"))
    times = [path.stat().st_mtime_ns for path in adapters]
    assert len(times) == 4
    again = sweep(folder, "-o", "flux.png", "--overwrite")
    assert again.exit_code == 0 and [path.stat().st_mtime_ns for path in adapters] == times
    assert json.loads((folder / "flux.json").read_text())["measurements"][0]["figures"] == rows

    # without the guided base the variant is left out, and nothing is trained again
    (folder / "weights" / GUIDED_TRANSFORMER).rename(folder / "guided-transformer")
    setup = flux_stage1.Experiments(
        2, 4, folder / "runs" / "mini", folder / "weights", torch.device("cpu")
    )
    messages: list[str] = []
    results = flux_stage1.run_experiments(setup, ["guidance 2.5"], messages.append)
    command = f"pulid mini build flux-guidance --weights {folder / 'weights'}"
    assert messages == [f"guidance 2.5: left out, its model is not trained yet ({command})"]
    assert list(results) == [REFERENCE] and list(results[REFERENCE]["losses"]) == [
        "base",
        "student",
    ]


def test_options_of_other_experiments_are_rejected(tmp_path: Path) -> None:
    plot = str(tmp_path / "plot.png")
    for options, message in (
        (["--batch", "4"], "--batch is only available for --experiments flux-stage1."),
        (
            ["--experiments", "flux-stage1", "--people", "4"],
            "--people is only available for --experiments stages.",
        ),
    ):
        refused = CliRunner().invoke(app, ["mini", "sweep", "-o", plot, *options])
        assert refused.exit_code and message in str(refused.exception)
