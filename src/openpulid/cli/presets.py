"""The commands `pulid presets`."""

from __future__ import annotations

from typing import Annotated

import typer

from openpulid.cli.options import command_group, name_options, print_table
from openpulid.errors import OptionError

presets = command_group("List presets, and predict the memory they need.")


@presets.command("list")
def list_presets() -> None:
    """List all presets, and the methods whose weights are installed."""
    from openpulid.pipelines.presets import PRESETS
    from openpulid.pipelines.weights import find_installed_methods, missing_weights

    rows = []
    for name, build in PRESETS.items():
        preset = build()
        if missing_weights(preset):
            installed = f"`{preset.models.build_command or f'pulid weights get {name}'}`"
        else:
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
    preset: Annotated[
        str, typer.Argument(help="flux, flux-krea, flux-schnell or chroma.")
    ] = "flux",
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT; the preset's by default.")] = None,
    method: Annotated[str | None, typer.Option(help="infiniteyou instead of PuLID.")] = None,
) -> None:
    """Predict the device memory of each memory level, by phase and component."""
    from openpulid.pipelines.flux_memory import GIB, LEVELS, predict_memory
    from openpulid.pipelines.request import GenerationRequest, parse_size
    from openpulid.pipelines.selection import resolve_preset

    chosen = resolve_preset(preset, method=method)
    if "memory" not in chosen.options:
        raise OptionError("memory levels are only available for FLUX presets.")
    width, height = (None, None) if size is None else parse_size(size)
    with name_options():
        request = GenerationRequest(prompt="any prompt", width=width, height=height)
        request = chosen.resolve(request)
    rows = []
    for name in LEVELS:
        phases = predict_memory(
            name,
            request.width or 0,
            request.height or 0,
            request.max_sequence_length or 0,
            chosen.models.family,
            chosen.models.method,
        )
        largest = max(phases, key=lambda phase: phase.total)
        for phase in phases:
            parts = ", ".join(
                f"{part} {size_in_bytes / GIB:.1f}"
                for part, size_in_bytes in phase.parts.items()
                if size_in_bytes
            )
            peak = " (peak)" if phase is largest else ""
            rows.append((name, phase.phase, f"{phase.total / GIB:.1f}{peak}", parts))
    print_table(("level", "phase", "GiB", "of which"), rows)
