"""Synthetic people to start from."""

from __future__ import annotations

from pathlib import Path
from random import randrange

from openpulid.io.metadata import save_image
from openpulid.io.xmp import DigitalSourceType
from openpulid.world import HELD_OUT_PEOPLE
from openpulid.world.gallery import render_portrait


def invent_person(directory: Path) -> list[str]:
    """Write a reference image of a synthetic person that is in no training data."""
    number = HELD_OUT_PEOPLE + randrange(100_000)
    path = directory / f"person-{number}.png"
    save_image(render_portrait(number), path, source_type=DigitalSourceType.RENDERED)
    return [str(path)]
