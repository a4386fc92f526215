"""An image of the same person, prompt and noise after every stage of the training."""

from __future__ import annotations

from PIL import Image

from openpulid.io.image_grid import labeled_grid, to_pil
from openpulid.mini.evaluation.ablation import PRESET
from openpulid.mini.evaluation.adapters import find_adapters, find_miniature, iterate_models
from openpulid.mini.evaluation.evaluate import generate_images
from openpulid.mini.evaluation.prompts import render_portraits, sample_prompts
from openpulid.pipelines.loading import load

COLUMNS = {
    "base": "without",
    "stage1": "stage 1",
    "naive": "naive ID loss",
    "stage2": "stage 2",
    "stage3": "stage 3",
}


def draw_stages(
    people: int = 6, people_seed: int = 0, side: int = 176, preset: str = PRESET
) -> Image.Image:
    """Draw one row per person: the reference image, then the same prompt and seed at every stage.

    Args:
        people: number of held-out people.
        people_seed: the first person, from `HELD_OUT_PEOPLE`.
        side: width and height of each image in pixels.
        preset: of the miniature.

    Raises:
        OptionError: the preset is not one of the miniature.
    """
    selected = find_miniature(preset)
    prompts = sample_prompts(people, 1, people_seed)
    portraits = render_portraits(people, people_seed)
    adapters = find_adapters(selected.models.family)
    studio = load(selected, adapter=next(iter(adapters.values()), None))
    identities = [studio.identify([portrait]) for portrait in to_pil(portraits)]
    columns = {
        "reference": portraits,
        COLUMNS["base"]: generate_images(studio, [prompts], None),
    }
    for model, model_studio in iterate_models(studio, adapters):
        images = generate_images(model_studio, [prompts], identities)
        columns[COLUMNS[model]] = images
    images_by_column = [to_pil(images) for images in columns.values()]
    rows = [
        (prompt.prompt, [images[row] for images in images_by_column])
        for row, prompt in enumerate(prompts)
    ]
    title = "One person per row, held out of training"
    return labeled_grid(title, list(columns), rows, side)
