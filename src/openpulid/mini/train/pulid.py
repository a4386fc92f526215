"""Training of the miniature's PuLID adapters on images of the synthetic world."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch

from openpulid.device import select_device
from openpulid.errors import OptionError, TrainingError
from openpulid.identity.extractor import MiniExtractor
from openpulid.methods.pulid import PuLID, PuLIDFlux
from openpulid.mini.train.build_context import PORTRAITS
from openpulid.mini.train.loss_models import (
    create_model,
    load_face_embedder,
    load_scorer,
    load_student,
)
from openpulid.mini.train.portraits import Mixture, open_portraits
from openpulid.mini.train.sheet import draw_sheet
from openpulid.pipelines.factory import load_extractor, load_pipeline
from openpulid.pipelines.presets import MINIATURE, mini, mini_flux
from openpulid.pipelines.studio import Studio
from openpulid.training import TrainingResult
from openpulid.training.pulid import (
    ADAPTER_FILE,
    Recipe,
    Validation,
    build_adapter,
    hash_init_adapter,
    prepare_run_dir,
    train_adapter,
)


def train(
    recipe: Recipe,
    run_dir: Path,
    *,
    minutes: float | None = None,
    device: str | torch.device | None = None,
    fresh: bool = False,
    init_adapter: Path | None = None,
    runs: Path = Path("runs/mini"),
    weights: Path = MINIATURE,
) -> tuple[PuLID | PuLIDFlux, TrainingResult]:
    """Train an adapter of the miniature, or continue its run.

    Writes `adapter.safetensors` into the run directory.

    Args:
        recipe: what to train.
        run_dir: the run directory.
        minutes: time budget.
        device: where to compute; by default the best device.
        fresh: delete the run in the directory first.
        init_adapter: the adapter that the recipe continues; by default the one of the recipe it
            names, next to the run directory or among the weights.
        runs: folder of the synthetic world's datasets.
        weights: the other models of the miniature.

    Raises:
        OptionError: the recipe is for another base, or the run would replace another file.
        TrainingError: the datasets do not exist yet, or there is no adapter to continue.
    """
    if not recipe.is_miniature:
        raise OptionError(
            f"{recipe.name} trains on {recipe.base}, not on the miniature: use "
            "openpulid.training.pulid.train_photos."
        )
    if recipe.init_from and init_adapter is None:
        init_adapter = find_init_adapter(recipe.init_from, run_dir, weights)
    prepare_run_dir(run_dir, init_adapter, is_fresh=fresh)
    torch_device = select_device(device)
    preset = (mini_flux if recipe.is_flow else mini)(weights)
    pipe = load_pipeline(preset, torch_device)
    extractor = cast(MiniExtractor, load_extractor(preset, torch_device))
    model = create_model(recipe, pipe)
    adapter = build_adapter(
        recipe,
        model,
        encoder_config(recipe, extractor),
        init_adapter=init_adapter,
        extractor_models=extractor.models,
    )
    # load all models before the datasets: a missing file is reported within seconds
    loss_models: dict[str, Any] = {}
    if recipe.few_step_batch:
        loss_models = {
            "few_step_models": [load_student(recipe, weights, torch_device)],
            "face_embedder": load_face_embedder(weights, torch_device, recipe.id_ensemble),
        }
    world, portraits, held_out = (
        open_portraits(
            runs,
            name,
            pipe,
            extractor,
            recipe.batch,
            with_images=recipe.id_loss != "none",
            paired=recipe.paired,
        )
        for name in ("world", PORTRAITS, "world-held-out")
    )
    studio = Studio(pipe, adapter, extractor, preset)
    result = train_adapter(
        recipe,
        model,
        adapter,
        Mixture([world, portraits]),
        run_dir,
        validation=Validation(
            held_out, load_scorer(weights, torch_device), lambda: draw_sheet(studio)
        ),
        minutes=minutes,
        inputs=hash_init_adapter(init_adapter),
        **loss_models,
    )
    return adapter, result


def find_init_adapter(recipe: str, run_dir: Path, weights: Path = MINIATURE) -> Path:
    """Find the adapter that a recipe trained: in its run directory, or among the weights.

    Args:
        recipe: name of the recipe.
        run_dir: another run directory, next to that of the recipe.
        weights: the models of the miniature.

    Raises:
        TrainingError: no such adapter exists.
    """
    stage = recipe.removeprefix("mini_").replace("flux_", "flux-")
    candidates = [
        run_dir.parent / recipe / ADAPTER_FILE,
        run_dir.parent / stage / ADAPTER_FILE,
        adapter_file(weights, stage),
    ]
    for path in candidates:
        if path.exists():
            return path
    raise TrainingError(
        f"no adapter of {recipe} to continue ({candidates[0]} does not exist): train it with "
        f"`pulid train {recipe}`, or name its file with --begin."
    )


def adapter_file(weights: Path, stage: str) -> Path:
    """Return the file of a stage's adapter; that of "flux-stage1" is in the folder `flux`."""
    folder = weights / "flux" if stage.startswith("flux-") else weights
    return folder / f"pulid-{stage.removeprefix('flux-')}.safetensors"


def encoder_config(recipe: Recipe, extractor: MiniExtractor) -> dict[str, Any]:
    """Return the encoder's constructor arguments: widths of the features, and smaller sizes."""
    recognition: Any = extractor.recognition
    vision = extractor.vision_encoder.config
    config: dict[str, Any] = {
        "width": recognition.config["dim"] + vision["num_classes"],
        "vit_dim": vision["embed_dim"],
    }
    if recipe.encoder == "IDFormer":
        width = recipe.encoder_width
        heads = max(1, width // 64)
        config |= {"dim": width, "depth": 5, "dim_head": 64, "heads": heads, "ff_mult": 2}
        if recipe.is_flow:  # SDXL's U-Net tells the width of the tokens
            config["output_dim"] = width
    return config
