"""`pulid train`: train an adapter by a named recipe."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Annotated

import typer

from openpulid.cli.options import Device, find_set_options
from openpulid.errors import OptionError

SDXL_OPTIONS = ("data", "held_out", "base", "few_step_model", "faces")
"""Options that recipes of the miniature do not use."""

logger = logging.getLogger(__name__)


def train(
    ctx: typer.Context,
    recipe: Annotated[str, typer.Argument(help="Recipe, for example mini_stage1 or sdxl_stage1.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Run directory (default: runs/RECIPE).")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Number of steps (default: the recipe's).")
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            min=0, help="Time budget in minutes (the learning rate decay is always completed)."
        ),
    ] = None,
    device: Device = None,
    begin: Annotated[
        Path | None,
        typer.Option(help="Adapter to start from, for a recipe that continues another one."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume/--fresh", help="Continue the run, or delete it and start again."),
    ] = True,
    data: Annotated[
        Path | None, typer.Option(help="sdxl: folder of images NAME.jpg with captions NAME.txt.")
    ] = None,
    held_out: Annotated[
        Path | None, typer.Option(help="sdxl: same as --data, with people not trained on.")
    ] = None,
    base: Annotated[
        str, typer.Option(help="sdxl: checkpoint of the diffusion branch.")
    ] = "sdxl-base",
    few_step_model: Annotated[
        list[str] | None,
        typer.Option(help="sdxl: checkpoint of the lightning branch; repeatable."),
    ] = None,
    faces: Annotated[
        Path | None, typer.Option(help="sdxl: folder of another insightface pack.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Images per step, over all processes.")
    ] = None,
    few_step_batch: Annotated[
        int | None, typer.Option(min=1, help="Images in the lightning branch, of each batch.")
    ] = None,
    accumulate: Annotated[
        int | None, typer.Option(min=1, help="Micro-batches per step, to save memory.")
    ] = None,
) -> None:
    """Train an adapter by a named recipe, or continue its run."""
    from dataclasses import replace

    from openpulid.training.pulid import find_recipe

    settings = find_recipe(recipe)
    options = find_set_options(ctx)
    unused = [options[name] for name in SDXL_OPTIONS if name in options]
    if settings.base == "mini" and unused:
        raise OptionError(
            f"{recipe} trains on the miniature's own data and models; leave out: "
            f"{', '.join(unused)}."
        )
    if steps is not None and steps > settings.steps:
        logger.warning("%s has %d steps; more have no effect", recipe, settings.steps)
    settings = replace(
        settings,
        steps=min(steps or settings.steps, settings.steps),
        batch=batch or settings.batch,
        few_step_batch=few_step_batch or settings.few_step_batch,
        accumulate=accumulate or settings.accumulate,
    )
    run_dir = out or Path("runs") / recipe

    if settings.base == "mini":
        from openpulid.mini.train import pulid

        pulid.train(
            settings,
            run_dir,
            minutes=minutes,
            device=device,
            fresh=not resume,
            init_adapter=begin,
        )
        return

    if data is None:
        raise OptionError(
            f"{recipe} trains on photos: pass a folder with --data, with a caption NAME.txt for "
            "each NAME.jpg."
        )
    import torch

    from openpulid.device import best_device
    from openpulid.training.pulid import check_init_adapter
    from openpulid.training.pulid.train_sdxl import load_models, train_on_photos

    check_init_adapter(settings, begin)
    if not resume:
        shutil.rmtree(run_dir, ignore_errors=True)
    models = load_models(
        settings,
        torch.device(device) if device else best_device(),
        base=base,
        few_step_models=few_step_model or (),
        faces=faces,
    )
    train_on_photos(
        settings,
        models,
        data,
        run_dir,
        held_out=held_out,
        init_adapter=begin,
        minutes=minutes,
    )
