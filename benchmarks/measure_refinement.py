"""Measure what the second pass on small faces does for identity similarity, in the miniature.

    python benchmarks/measure_refinement.py -o benchmarks/refinement.json

The miniature generates portraits alone. A scene with a small face is therefore an initial image: a
rendering of another person in the scene of the prompt, at a third of the size of a larger image.
Image-to-image changes it a little, which is all that a face of this size survives. The face is then
generated again with the identity. Identity similarity is that of the benchmark's face recognition
model, which no method uses, to the reference image; an image without a face counts as 0. For the
small scenes, the third with the person is enlarged to the size of a portrait.

Each preset is measured with the default refinement, and with fewer people in a sweep over the
strength, from which the default is chosen.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from openpulid.bench.measurement import describe_measurement
from openpulid.bench.metrics import bootstrap
from openpulid.io.files import write_json
from openpulid.io.image_grid import image_grid, to_pil, to_tensor
from openpulid.mini.evaluation.scorers import FaceScorer
from openpulid.pipelines.loading import load
from openpulid.pipelines.request import FaceRefinement
from openpulid.pipelines.studio import Studio
from openpulid.world import HELD_OUT_PEOPLE, Person, Scene, render

PORTRAIT = 96
CANVAS = 128
"""Sides of the full-size and of the small scenes in pixels."""
SMALL = CANVAS // 3
STEPS = 50
"""Steps in the small scenes, so that one of them can change little."""
PRESETS = ("mini", "mini-lightning")
STRENGTHS = (0.3, 0.5, 0.7, 0.9)
"""The values of the sweep."""
OTHER_PERSON = 500
"""Distance to the person of the initial image."""
ABOUT = "Similarity of small faces with and without the second pass"
NUM_DRAWN = 6
"""People in the picture."""


def main() -> None:
    """Generate the images, score them, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--people", type=int, default=32)
    parser.add_argument("--sweep-people", type=int, default=10, help="0 leaves out the sweep")
    parser.add_argument("--preset", action="append", choices=PRESETS)
    parser.add_argument("--first-pass", type=float, default=0.02)
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--picture", type=Path, help="of the first preset")
    arguments = parser.parse_args()
    scorer = FaceScorer.load()
    default = FaceRefinement()
    runs = {
        "second pass": (arguments.people, [default.strength]),
        "sweep over the strength": (arguments.sweep_people, STRENGTHS),
    }
    measurements = []
    rows: list[list[Image.Image]] = []
    for preset in arguments.preset or PRESETS:
        studio = load(preset)
        for name, (people, strengths) in runs.items():
            if not people:
                continue
            images = []
            for number in range(people):
                images.append(generate(studio, number, arguments.first_pass, strengths))
                print(f"{preset}, {name}: {number + 1}/{people}", flush=True)
            rows = rows or [arrange(row) for row in images[:NUM_DRAWN]]
            figures = score(scorer, images)
            print(json.dumps(figures, indent=1), flush=True)
            configuration = {
                "preset": preset,
                "people": people,
                "first_pass": arguments.first_pass,
                "num_inference_steps": STEPS,
                "strengths": list(strengths),
                "max_size": default.max_size,
            }
            measurement = describe_measurement(configuration, figures, torch.device("cpu"))
            measurements.append({"name": f"{preset}, {name}", **measurement})
    if arguments.out is not None:
        write_json(arguments.out, {"about": ABOUT, "measurements": measurements})
    if arguments.picture is not None:
        image_grid(rows, 128).save(arguments.picture)


def arrange(row: dict[str, Image.Image]) -> list[Image.Image]:
    """Return the images of one person for the picture, the small face also enlarged."""
    small, refined = row["small"], list(row.values())[-1]
    return [row["reference"], small, refined, view(small), view(refined)]


def score(scorer: FaceScorer, images: Sequence[dict[str, Image.Image]]) -> dict[str, Any]:
    """Score the images of several people, see `generate`; those with a second pass also alone."""
    columns: dict[str, list[Tensor]] = {}
    is_refined = []
    for row in images:
        faces = scorer(to_tensor([view(image) for image in row.values()]))
        for name, has_face, embedding in zip(row, faces.has_face, faces.embeddings, strict=True):
            similarity = torch.cosine_similarity(embedding, faces.embeddings[0], dim=0)
            columns.setdefault(name, []).append(torch.stack([similarity, has_face.float()]))
        is_refined.append(list(row.values())[-1].tobytes() != row["small"].tobytes())
    values = {name: torch.stack(column) for name, column in columns.items()}
    refined = torch.tensor(is_refined)
    figures = {"refined": round(refined.float().mean().item(), 3), "all": tabulate(values)}
    if any(is_refined):
        figures["where_a_face_was_refined"] = tabulate({k: x[refined] for k, x in values.items()})
    return figures


def generate(
    studio: Studio, number: int, first_pass: float, strengths: Sequence[float]
) -> dict[str, Image.Image]:
    """Generate the images of one person.

    Args:
        studio: the models.
        number: of the person.
        first_pass: strength of image-to-image on the small scene.
        strengths: of the second pass.

    Returns:
        Images by name; the first one is the reference image.
    """
    person = Person.from_seed(HELD_OUT_PEOPLE + number)
    other = Person.from_seed(HELD_OUT_PEOPLE + OTHER_PERSON + number)
    generator = torch.Generator().manual_seed(HELD_OUT_PEOPLE + number)
    scene = Scene.sample(generator, held_out=True, style="photo", hat="none")
    prompt = scene.prompt(generator, keep=1.0)
    reference, rendered, initial = to_pil(
        render([person, person, other], [Scene(), scene, scene], PORTRAIT).image
    )
    identity = studio.identify([reference])
    images = {
        "reference": reference,
        "rendered, full size": rendered,
        "rendered, small": shrink(rendered),
        "full size": studio.generate(prompt, identity=identity, seed=number).images[0],
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "initial.png"
        shrink(initial).save(file)
        for name, strength in {"small": None, **{f"refined {x:g}": x for x in strengths}}.items():
            result = studio.generate(
                prompt,
                identity=identity,
                seed=number,
                width=CANVAS,
                height=CANVAS,
                num_inference_steps=STEPS,
                init_image={"image": file, "strength": first_pass},
                refine_faces=strength and {"strength": strength},
            )
            images[name] = result.images[0]
    return images


def shrink(portrait: Image.Image) -> Image.Image:
    """Shrink a portrait, and place it at the bottom of a larger image with its borders."""
    small = to_tensor([portrait.resize((SMALL, SMALL), Image.Resampling.LANCZOS)])
    left = (CANVAS - SMALL) // 2
    sides = (left, CANVAS - SMALL - left, CANVAS - SMALL, 0)
    return to_pil(pad(small, sides, mode="replicate"))[0]


def view(image: Image.Image) -> Image.Image:
    """Return a portrait as it is, and the person of a larger image enlarged to a portrait."""
    if image.width == PORTRAIT:
        return image
    left = (CANVAS - SMALL) // 2
    box = (left, CANVAS - SMALL, left + SMALL, CANVAS)
    return image.crop(box).resize((PORTRAIT, PORTRAIT), Image.Resampling.LANCZOS)


def tabulate(columns: dict[str, Tensor]) -> dict[str, Any]:
    """Return a row for each kind of image, and what is left of the loss after the second pass."""
    rows = {name: summarize(values) for name, values in columns.items()}
    full, small = rows["full size"]["similarity"], rows["small"]["similarity"]
    for name, row in rows.items():
        if name.startswith("refined"):
            row["remaining_loss"] = round((full - row["similarity"]) / (full - small), 3)
    return rows


def summarize(values: Tensor) -> dict[str, Any]:
    """Return means of (P, 2) similarities and detected faces, with a 95% interval over people."""
    interval = bootstrap(values[:, 0], torch.arange(len(values)))
    is_single = len(values) == 1  # has no interval
    return {
        "similarity": round(interval.mean, 4),
        "interval": None if is_single else [round(interval.low, 4), round(interval.high, 4)],
        "faces_found": round(values[:, 1].mean().item(), 3),
    }


if __name__ == "__main__":
    main()
