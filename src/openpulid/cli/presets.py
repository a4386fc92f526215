"""The commands `pulid presets`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import typer

from openpulid.cli.options import command_group, name_options, print_table
from openpulid.errors import OptionError

presets = command_group("List presets, and predict the memory they need.")


@presets.command("list")
def list_presets() -> None:
    """List all presets, and the methods whose weights are installed."""
    from openpulid.pipelines.presets import PRESETS
    from openpulid.pipelines.weights import find_installed_methods, find_next_command

    rows = []
    for name, build in PRESETS.items():
        preset = build()
        command = find_next_command(preset)
        installed = f"`{command}`"
        if command is None:
            installed = f"yes: {', '.join(find_installed_methods(preset))}"
        steps = str(preset.defaults.num_inference_steps)
        scale = preset.defaults.guidance_scale
        if scale is None and (preset.defaults.true_cfg_scale or 1) > 1:
            scale = preset.defaults.true_cfg_scale
        guidance = "-" if scale is None else f"{scale:g}"
        rows.append((name, preset.description, steps, guidance, installed))
    print_table(("preset", "description", "steps", "guidance", "installed"), rows)


@presets.command()
def memory(
    presets: Annotated[
        list[str] | None,
        typer.Argument(help="Presets of full-size models; by default sdxl and flux."),
    ] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT; the preset's by default.")] = None,
    method: Annotated[str | None, typer.Option(help="FLUX: infiniteyou instead of PuLID.")] = None,
    controls: Annotated[int, typer.Option(min=0, help="Number of ControlNets.")] = 0,
) -> None:
    """Predict the device memory of each memory level, by phase and component."""
    names = presets or (["sdxl", "flux"] if method is None else ["flux"])
    rows = [row for name in names for row in _predict(name, size, method, controls)]
    print_table(("preset", "level", "phase", "GiB", "of which"), rows)


def _predict(
    preset: str, size: str | None, method: str | None, controls: int
) -> Iterator[tuple[str, ...]]:
    """Yield a row for each memory level and phase of a preset."""
    from openpulid.pipelines.memory_levels import LEVELS
    from openpulid.pipelines.memory_prediction import GIB, predict_memory
    from openpulid.pipelines.request import GenerationRequest, parse_size
    from openpulid.pipelines.selection import resolve_preset

    chosen = resolve_preset(preset, method=method)
    if "memory" not in chosen.options:
        raise OptionError(f"{chosen.label} has no memory levels; choose a preset of SDXL or FLUX.")
    width, height = (None, None) if size is None else parse_size(size)
    with name_options():
        request = GenerationRequest(prompt="any prompt", width=width, height=height)
        request = chosen.resolve(request)
    for level in LEVELS[chosen.models.family]:
        phases = predict_memory(
            level,
            request.width or 0,
            request.height or 0,
            request.max_sequence_length or 0,
            chosen.models.family,
            chosen.models.method,
            controls,
        )
        largest = max(phases, key=lambda phase: phase.total)
        for phase in phases:
            parts = ", ".join(
                f"{part} {size_in_bytes / GIB:.1f}"
                for part, size_in_bytes in phase.parts.items()
                if size_in_bytes
            )
            peak = " (peak)" if phase is largest else ""
            yield (preset, level, phase.phase, f"{phase.total / GIB:.1f}{peak}", parts)
