"""`pulid train`: train an adapter by a named recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openpulid.cli.options import Device, print_table
from openpulid.errors import OptionError, explain_out_of_memory

if TYPE_CHECKING:
    from openpulid.training.pulid import Recipe

MEMORY_ADVICE = (
    "use more micro-batches (--accumulate), share the frozen networks among several processes "
    "(--shard, for photos), or train on another --device"
)


@explain_out_of_memory(MEMORY_ADVICE)
def train(
    recipe: Annotated[
        str, typer.Argument(help="Recipe, for example mini_stage1, sdxl_stage1 or flux_stage1.")
    ],
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
        str | None,
        typer.Option(
            help="Photos: folder of images NAME.jpg with captions NAME.txt, or dataset of "
            "`pulid data prepare`, also at a URL."
        ),
    ] = None,
    held_out: Annotated[
        str | None, typer.Option(help="Photos: same as --data, with people not trained on.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Photos: checkpoint of the diffusion branch: sdxl-base, flux-dev, "
            "flux2-klein-base, z-image-base, qwen-image-base, or another of the same base."
        ),
    ] = None,
    few_step_model: Annotated[
        list[str] | None,
        typer.Option(help="Photos: checkpoint of the lightning branch; repeatable."),
    ] = None,
    few_step_lora: Annotated[
        str | None,
        typer.Option(help="Photos: acceleration LoRA; the lightning branch is --base with it."),
    ] = None,
    faces: Annotated[
        Path | None,
        typer.Option(help="Photos: `open`, or the folder of another insightface pack."),
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
    paired: Annotated[
        bool,
        typer.Option(
            "--paired",
            help="Photos: features from another image of the same person, who has a folder.",
        ),
    ] = False,
    aspect_buckets: Annotated[
        bool,
        typer.Option("--aspect-buckets", help="Photos: several aspect ratios, not only squares."),
    ] = False,
    shard: Annotated[
        bool,
        typer.Option("--shard", help="Photos: share the frozen networks among the processes."),
    ] = False,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Photos: predict memory and time on 1 and 8 GPUs, and end."),
    ] = False,
) -> None:
    """Train an adapter by a named recipe, or continue its run."""
    from openpulid.training.pulid import check_processes, find_recipe

    settings = find_recipe(recipe)
    changed = _change(
        settings,
        steps=steps,
        batch=batch,
        few_step_batch=few_step_batch,
        accumulate=accumulate,
        paired=paired or None,
        aspect_buckets=aspect_buckets or None,
    )
    few_step_models = {"--few-step-model": few_step_model, "--few-step-lora": few_step_lora}
    _check_few_step(settings, {"--few-step-batch": few_step_batch, **few_step_models})
    _check_batches(changed)
    if plan:
        _print_plan(changed)
        return
    batches = {"--batch": changed.batch, "--few-step-batch": changed.few_step_batch}
    check_processes(batches, changed.accumulate, is_sharded=shard and not settings.is_miniature)
    run_dir = out or Path("runs") / recipe

    if settings.is_miniature:
        photo_options = {
            "--data": data,
            "--held-out": held_out,
            "--base": base,
            **few_step_models,
            "--faces": faces,
            "--paired": paired,
            "--aspect-buckets": aspect_buckets,
            "--shard": shard,
        }
        _refuse(photo_options, f"{recipe} trains on the synthetic world with the miniature")
        from openpulid.mini.train import pulid

        pulid.train(
            changed,
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
    from openpulid.device import select_device
    from openpulid.training.pulid import check_init_adapter, prepare_run_dir
    from openpulid.training.pulid.photo_models import load_models
    from openpulid.training.pulid.train_photos import check_data, train_on_photos

    # everything that needs no models first: they take minutes to load, and gigabytes to download
    check_init_adapter(changed, begin)
    check_data(data, held_out, is_paired=paired)
    selected_device = select_device(device)
    prepare_run_dir(run_dir, begin, is_fresh=not resume)
    models = load_models(
        changed,
        selected_device,
        base=base,
        few_step_models=few_step_model or (),
        few_step_lora=few_step_lora,
        faces=faces,
    )
    train_on_photos(
        changed,
        models,
        data,
        run_dir,
        held_out=held_out,
        init_adapter=begin,
        minutes=minutes,
        is_sharded=shard,
    )


def _change(recipe: Recipe, **options: int | None) -> Recipe:
    """Return a recipe with the settings that the user passed."""
    from dataclasses import replace

    changes: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    return replace(recipe, **changes)


def _check_few_step(recipe: Recipe, options: Mapping[str, object]) -> None:
    """Check the options of the lightning branch.

    Raises:
        OptionError: the recipe has none, or two options exclude each other.
    """
    if not recipe.few_step_batch:
        _refuse(options, f"{recipe.name} has no lightning branch")
    if options["--few-step-model"] and options["--few-step-lora"]:
        raise OptionError("pass either --few-step-model or --few-step-lora, not both.")


def _print_plan(recipe: Recipe) -> None:
    """Print what a recipe needs, a line for each setup of GPUs.

    Raises:
        OptionError: there is no plan for the recipe.
    """
    from openpulid.training.pulid import DEFAULT_PIXELS
    from openpulid.training.pulid.plan import GB, SETUPS, UTILIZATION, plan_training

    plans = plan_training(recipe)
    rows = []
    for prediction in plans:
        few_step = f" + {prediction.few_step_images}" if prediction.few_step_images else ""
        rows.append(
            (
                prediction.setup.name,
                f"{prediction.images}{few_step}",
                str(prediction.accumulate),
                f"{prediction.peak / GB:.0f} GB",
                f"{prediction.seconds:.2f} s",
                f"{recipe.batch / prediction.seconds:.1f}",
                f"{prediction.seconds * recipe.steps / 3600:.0f} h",
            )
        )
    columns = (
        "setup",
        "images at a time",
        "micro-batches",
        "peak",
        "per step",
        "images/s",
        "whole run",
    )
    print_table(columns, rows)
    print(
        f"{recipe.name}: {recipe.steps:,} steps of {recipe.batch} images of "
        f"{recipe.pixels or DEFAULT_PIXELS} pixels. Predicted from shapes, not measured; times for "
        f"H100 GPUs at {UTILIZATION:.0%} of their peak."
    )
    planned = [prediction.setup for prediction in plans]
    if omitted := [setup.name for setup in SETUPS if setup not in planned]:
        print(f"Not listed, because they cannot share the batches evenly: {', '.join(omitted)}.")
    largest = max(plans, key=lambda prediction: prediction.peak)
    parts = sorted(largest.memory.items(), key=lambda part: -part[1])
    listed = ", ".join(f"{name} {size / GB:.1f}" for name, size in parts)
    print(f"{largest.setup.name}, in GB: {listed}.")


def _refuse(options: Mapping[str, object], reason: str) -> None:
    """Raise OptionError if an option is set that has no effect."""
    if names := [name for name, is_set in options.items() if is_set]:
        raise OptionError(f"{reason}: leave out {', '.join(names)}.")


def _check_batches(recipe: Recipe) -> None:
    """Check what the batches of a recipe have in common, before anything is loaded."""
    if recipe.few_step_batch > recipe.batch:
        raise OptionError(
            f"--few-step-batch {recipe.few_step_batch} is a part of --batch {recipe.batch}: choose "
            "a smaller one."
        )
    for option, size in (("--batch", recipe.batch), ("--few-step-batch", recipe.few_step_batch)):
        if size % recipe.accumulate:
            raise OptionError(
                f"{option} {size} cannot be divided into {recipe.accumulate} micro-batches of "
                "--accumulate: choose a multiple."
            )
