"""`pulid bench train`, `speed` and `identify`: measure time and memory."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openpulid.cli.options import (
    AsJson,
    Device,
    Memory,
    Overwrite,
    check_new_output,
    make_directory,
    print_json,
    print_progress,
)

if TYPE_CHECKING:
    import torch


Rounds = Annotated[
    int, typer.Option(min=1, help="Number of rounds; candidates are interleaved in each.")
]


Output = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        help="JSON file for the figures with command, date, revision, hardware and versions.",
    ),
]


def measure_training(
    base: Annotated[str, typer.Option(help="mini or sdxl; full size, random weights.")] = "mini",
    recipe: Annotated[str | None, typer.Option(help="Recipe; BASE_stage3 by default.")] = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Batch of the diffusion branch; the recipe's by default."),
    ] = None,
    few_step_batch: Annotated[
        int | None,
        typer.Option(min=1, help="Batch of the lightning branch; the recipe's by default."),
    ] = None,
    pixels: Annotated[
        int | None, typer.Option(min=8, help="Width of the lightning branch's images.")
    ] = None,
    rounds: Rounds = 5,
    out: Output = None,
    overwrite: Overwrite = False,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure a training step: gradients through 1 to 4 steps, with and without checkpointing."""
    _check_output(out, overwrite)
    from openpulid.bench.perf import random_models, training
    from openpulid.training.pulid import find_recipe

    torch_device = select_device(device)
    sizes: dict[str, Any] = {"batch": batch, "few_step_batch": few_step_batch, "pixels": pixels}
    changes = {name: value for name, value in sizes.items() if value}
    selected = replace(find_recipe(recipe or f"{base}_stage3"), **changes)
    dtype = random_models.dtype_of(base, torch_device, in_training=True)
    task = training.random_task(selected, random_models.random_base(base, torch_device, dtype))
    costs = training.measure(task, rounds=rounds, on_progress=None if as_json else print_progress)
    configuration = {
        "base": base,
        "recipe": selected.name,
        "batch": selected.batch,
        "few_step_batch": selected.few_step_batch,
        "device": str(torch_device),
        "dtype": str(dtype),
        "rounds": rounds,
    }
    if not as_json:
        training.print_costs(costs)
    _write_figures(out, configuration, {"rows": [asdict(cost) for cost in costs]}, torch_device)


def measure_inference(
    base: Annotated[
        str, typer.Option(help="mini, sdxl or flux; full size, random weights.")
    ] = "sdxl",
    size: Annotated[int, typer.Option(min=64, help="Width and height in pixels.")] = 1024,
    batch: Annotated[int, typer.Option(min=1, help="Number of images.")] = 1,
    guided: Annotated[
        bool,
        typer.Option("--guided", help="SDXL: with guidance, as one batch and in two passes."),
    ] = False,
    depth_scale: Annotated[
        float, typer.Option(min=0.01, max=1, help="FLUX: share of the blocks.")
    ] = 1.0,
    memory: Memory = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="SDXL: with compiled identity attention.")
    ] = False,
    blocks: Annotated[
        bool,
        typer.Option(
            "--compile-blocks",
            help="With the base's repeated blocks compiled; SDXL's but for the cross-attention.",
        ),
    ] = False,
    rounds: Rounds = 5,
    out: Output = None,
    overwrite: Overwrite = False,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure one denoising step: base, PuLID, and PuLID with keys and values recomputed."""
    _check_output(out, overwrite)
    from openpulid.bench.perf import inference
    from openpulid.bench.perf.random_models import dtype_of

    torch_device = select_device(device)
    level = memory or "full"
    target = inference.speed_target(
        base, torch_device, size, batch, guided, depth_scale, level, compiled
    )
    on_progress = None if as_json else print_progress
    with inference.compile_blocks(target) if blocks else nullcontext():
        steps = inference.measure(target, rounds, on_progress)
    configuration = {
        "base": base,
        "size": size,
        "batch": batch,
        "guided": guided,
        "depth_scale": depth_scale,
        "memory": level,
        "compiled": compiled,
        "compiled_blocks": blocks,
        "device": str(torch_device),
        "dtype": str(dtype_of(base, torch_device)),
        "rounds": rounds,
    }
    _write_figures(out, configuration, {"rows": [asdict(step) for step in steps]}, torch_device)


def measure_face_analysis(
    rounds: Rounds = 5,
    out: Output = None,
    overwrite: Overwrite = False,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure the extraction of an identity by stage, here and in the reference implementation."""
    _check_output(out, overwrite)
    from openpulid.bench.perf import face_analysis
    from openpulid.device import training_dtype

    torch_device = select_device(device)
    stages = face_analysis.measure(torch_device, rounds, None if as_json else print_progress)
    total = stages[-1]
    ratio = round((total.seconds or 0) / (total.reference or 1), 3)
    configuration = {
        "device": str(torch_device),
        "dtype": str(training_dtype(torch_device)),
        "rounds": rounds,
    }
    figures = {"ratio": ratio, "rows": [asdict(stage) for stage in stages]}
    _write_figures(out, configuration, figures, torch_device)


def _check_output(out: Path | None, overwrite: bool) -> None:
    """Check the output file before the measurement, which may take long."""
    if out is not None:
        make_directory(check_new_output(out, overwrite).parent)


def _write_figures(
    out: Path | None,
    configuration: Mapping[str, Any],
    figures: Mapping[str, Any],
    device: torch.device,
) -> None:
    if out is not None:
        from openpulid.bench.measurement import write_measurement

        write_measurement(out, configuration, figures, device)
    print_json({**configuration, **figures})


def select_device(name: str | None) -> torch.device:
    """Return the device of a name, or the best one.

    Raises:
        OptionError: there is no such device.
    """
    from openpulid import device

    return device.select_device(name)
