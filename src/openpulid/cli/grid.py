"""The option `--grid`: one request for each combination of values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer

from openpulid.cli.build_request import build_request
from openpulid.cli.options import find_set_options
from openpulid.cli.run import ImageOutput, run_grid_requests
from openpulid.errors import OptionError, suggest

NO_AXES = ("out", "num", "grid", "name", "source", "no_metadata", "device", "help")
"""Parameters that cannot differ between the cells of a grid."""


def run_grid(
    axes: Sequence[str],
    ctx: typer.Context,
    output: ImageOutput,
    device: str | None,
    note: str | None,
) -> None:
    """Generate the images of a grid, and a labeled sheet of all of them.

    Args:
        axes: the options `--grid`.
        ctx: the other options.
        output: where the images are written.
        device: where to compute.
        note: logged as a warning before the images are generated.

    Raises:
        OptionError: an axis is no option, or a value of it is refused.
    """
    from openpulid.pipelines.grid import Axis, Grid

    parsed = tuple(Axis.parse(text) for text in axes)
    for axis in parsed:
        check_axis(ctx, axis.option)
    grid = Grid(parsed)
    common = dict(ctx.params)
    requests = []
    for cell in grid.cells():
        changes: dict[str, Any] = {}
        for option, value in cell.items():
            changes |= parse_option(ctx, option, value)
        requests.append(build_request({**common, **changes}))
        if "seed" not in changes:
            common["seed"] = requests[0].seed  # one that is drawn is the same in all cells
    run_grid_requests(grid, requests, output, device, note)


def check_axis(ctx: typer.Context, option: str) -> None:
    """Check that an option can differ between the cells of a grid.

    Raises:
        OptionError: there is no such option.
    """
    known = {
        name.lstrip("-")
        for parameter in ctx.command.params
        for name in parameter.opts
        if parameter.name not in NO_AXES
    }
    if option not in known:
        raise OptionError(
            f"--grid has no option {option!r}{suggest(option, sorted(known))}; an axis is an "
            "option of `pulid generate`."
        )


def parse_option(ctx: typer.Context, option: str, value: str) -> dict[str, Any]:
    """Return the parameter that an option with this value sets."""
    arguments = [value] if option == "prompt" else [f"--{option}={value}"]
    parsed = ctx.command.make_context(ctx.info_name, arguments, parent=ctx.parent)
    names = find_set_options(parsed)
    return {name: parsed.params[name] for name in names}
