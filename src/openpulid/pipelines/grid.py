"""Grids of images: one option takes several values along each axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from PIL import Image

from openpulid.errors import OptionError
from openpulid.io.image_grid import labeled_grid
from openpulid.pipelines.request import GenerationRequest

MAX_CELLS = 400


@dataclass(frozen=True)
class Axis:
    """One axis of a grid.

    Attributes:
        option: name of the option.
        values: its values, as text.
    """

    option: str
    values: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Axis:
        """Parse OPTION=VALUE,VALUE. Values that contain commas are separated by "|" instead.

        Raises:
            OptionError: it has another form.
        """
        option, _, listed = text.partition("=")
        values = [value.strip() for value in listed.split("|" if "|" in listed else ",")]
        if not option.strip() or not all(values):
            raise OptionError(f"expected OPTION=VALUE,VALUE for a grid, got {text!r}.")
        return cls(option.strip().lstrip("-"), tuple(values))

    def label(self, value: str) -> str:
        """Return the label of a value."""
        return f"{self.option} {value}"


@dataclass(frozen=True)
class Grid:
    """The cells of a grid. The first axis gives the columns, the other axes the rows.

    Attributes:
        axes: one or more axes.
    """

    axes: tuple[Axis, ...]

    def __post_init__(self) -> None:
        names = [axis.option for axis in self.axes]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise OptionError(f"{repeated[0]} is on two axes of the grid; list all values on one.")
        if len(self.cells()) > MAX_CELLS:
            raise OptionError(f"the grid has {len(self.cells())} cells; use at most {MAX_CELLS}.")

    def cells(self) -> list[dict[str, str]]:
        """Return option -> value of each cell, row by row."""
        columns, *rows = self.axes
        names = [axis.option for axis in (*rows, columns)]
        values = [axis.values for axis in (*rows, columns)]
        return [dict(zip(names, chosen, strict=True)) for chosen in product(*values)]

    def draw(
        self,
        requests: Sequence[GenerationRequest],
        cells: Sequence[Sequence[Image.Image]],
        side: int,
    ) -> Image.Image:
        """Draw the labeled sheet; each seed of a cell has a row of its own.

        Args:
            requests: of the cells.
            cells: the images of each cell.
            side: longest side of an image on the sheet, in pixels.
        """
        columns, *others = self.axes
        width = len(columns.values)
        has_seeds = "seed" not in [axis.option for axis in self.axes]
        rows = []
        for start, cell in list(enumerate(self.cells()))[::width]:
            labels = [axis.label(cell[axis.option]) for axis in others]
            for number in range(len(cells[start])):
                seed = [f"seed {requests[start].seed + number}"] if has_seeds else []
                images = [images[number] for images in cells[start : start + width]]
                rows.append((", ".join(labels + seed), images))
        title = requests[0].prompt
        return labeled_grid(title, [columns.label(value) for value in columns.values], rows, side)
