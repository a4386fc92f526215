"""`pulid world`: images of synthetic people."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from openpulid.cli.options import (
    MAX_PERSON,
    Overwrite,
    check_image_path,
    command_group,
    print_path,
    write_image,
)

world = command_group("Synthetic people: images to start from.")


@world.command()
def person(
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            max=MAX_PERSON,
            help="The person; none from 1000000 on is in the training data.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Image file to write.")],
    size: Annotated[
        int, typer.Option(min=32, max=1024, help="Width in pixels; the miniature uses 96.")
    ] = 96,
    overwrite: Overwrite = False,
) -> None:
    """Draw one image of one synthetic person."""
    from openpulid.io.xmp import DigitalSourceType
    from openpulid.world.gallery import render_portrait

    check_image_path(out)
    write_image(out, render_portrait(seed, size), overwrite, DigitalSourceType.RENDERED)
    print_path(out)


@world.command()
def sheet(
    out: Annotated[Path, typer.Option("--out", "-o", help="Image file to write.")],
    seed: Annotated[int, typer.Option(min=0, max=MAX_PERSON, help="The first person.")] = 0,
    size: Annotated[
        int, typer.Option(min=32, max=512, help="Width of each image in pixels.")
    ] = 160,
    overwrite: Overwrite = False,
) -> None:
    """Draw eight people in eight scenes, one person per row."""
    from openpulid.io.xmp import DigitalSourceType
    from openpulid.world.gallery import render_people_sheet

    check_image_path(out)
    write_image(out, render_people_sheet(seed, size), overwrite, DigitalSourceType.RENDERED)
    print_path(out)


@world.command()
def words() -> None:
    """List the attributes and words that the miniature's prompts can use."""
    from openpulid.world import ATTRIBUTES, VOCABULARY

    for name, values in ATTRIBUTES.items():
        print(f"{name.replace('_', ' ')}: {', '.join(values)}")
    print(f"\n{' '.join(word for word in VOCABULARY if word.isalpha())}")
