"""Sample images of the procedural world."""

from __future__ import annotations

from PIL import Image

from openpulid.io.image_grid import image_grid, to_pil
from openpulid.world import Person, Scene, render

SCENES = (
    Scene(),
    Scene(pose="left", expression="smile", background="green", clothing="red", hair_length="bob"),
    Scene(expression="laugh", light="left", background="teal", hat="beanie", hair_color="black"),
    Scene(style="noir", light="right", background="black", glasses="glasses"),
    Scene(
        expression="surprised",
        light="sunset",
        background="brown",
        hair_color="blond",
        hair_length="long",
    ),
    Scene(style="pencil", pose="right", hair_length="long", beard="moustache"),
    Scene(
        style="poster", background="yellow", pattern="dots", expression="angry", clothing="purple"
    ),
    Scene(light="neon", background="purple", pattern="stripes", hair_color="red", beard="beard"),
)
"""Scenes that show most attributes of a prompt once."""


def render_portrait(seed: int, size: int = 96) -> Image.Image:
    """Render the person of a seed in the neutral scene, `size` x `size` pixels."""
    return to_pil(render([Person.from_seed(seed)], [Scene()], size).image)[0]


def render_people_sheet(first: int = 0, side: int = 160, people: int = 8) -> Image.Image:
    """Render a grid with one person per row and one scene of `SCENES` per column.

    Args:
        first: seed of the first person.
        side: width and height of each image in pixels.
        people: number of rows.
    """
    rows = []
    for seed in range(first, first + people):
        rendering = render([Person.from_seed(seed)] * len(SCENES), SCENES, side)
        rows.append(to_pil(rendering.image))
    return image_grid(rows, side)
