"""Sample sheet of an adapter in training."""

from __future__ import annotations

import torch
from PIL import Image

from openpulid.io.image_grid import image_grid, to_pil
from openpulid.pipelines.studio import Studio
from openpulid.world import HELD_OUT_PEOPLE, Person, Scene, render

PROMPTS = (
    "portrait, photo, smiling, blue background",
    "portrait, pencil sketch, turned left",
)
NUM_PEOPLE = 6


@torch.no_grad()
def draw_sheet(studio: Studio, num_people: int = NUM_PEOPLE) -> Image.Image:
    """Draw held-out people: their portrait, then each prompt without and with their identity."""
    rows = []
    for k in range(num_people):
        portrait = to_pil(render([Person.from_seed(HELD_OUT_PEOPLE + k)], [Scene()]).image)[0]
        identity = studio.identify([portrait])
        row = [portrait]
        for prompt in PROMPTS:
            row += studio.generate(prompt, seed=k).images
            row += studio.generate(prompt, identity, seed=k).images
        rows.append(row)
    return image_grid(rows, 144)
