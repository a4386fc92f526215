"""Pictures of the procedural world to look at and to start from."""

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
"""One of most things that a prompt can ask for."""


def render_portrait(seed: int, size: int = 96) -> Image.Image:
    """The person of a seed in the neutral scene."""
    return to_pil(render([Person.from_seed(seed)], [Scene()], size).image)[0]


def render_people_sheet(first: int = 0, side: int = 160, people: int = 8) -> Image.Image:
    """One person along each row, one scene down each column; `side` is a picture's width in pixels."""
    rows = []
    for seed in range(first, first + people):
        rendering = render([Person.from_seed(seed)] * len(SCENES), SCENES, side)
        rows.append(to_pil(rendering.image))
    return image_grid(rows, side)
