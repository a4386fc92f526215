"""The demo: generate images of a held-out person from one reference image, and score them."""

from __future__ import annotations

import base64
import html
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from openpulid.bench import metrics
from openpulid.io.files import write_new
from openpulid.io.image_grid import labeled_grid, to_pil, to_tensor
from openpulid.io.metadata import encode_image
from openpulid.io.xmp import DigitalSourceType
from openpulid.mini.evaluation.scorers import FaceScorer
from openpulid.pipelines.loading import load
from openpulid.world import HELD_OUT_PEOPLE, Person, Scene, render

PROMPTS = (
    "portrait, color photo, smiling, blue background, red shirt",
    "portrait, film noir, light from the left, looking right",
    "a person, photo, wearing a green beanie, yellow background, laughing",
    "portrait, photo, long blond hair, sunset light, purple background",
    "portrait, pencil sketch, turned left, with a beard",
    "portrait, poster art, orange dotted background, surprised",
)
COLUMNS = ("the only picture given", "without the identity", "with the identity")
SOURCE_TYPES = (
    DigitalSourceType.RENDERED,
    DigitalSourceType.GENERATED,
    DigitalSourceType.GENERATED,
)
TITLE = "Somebody nobody trained on, from one picture"
NUM_OTHER_PEOPLE = 32
"""Number of people that the result should not resemble."""
SEED = 7


@dataclass(frozen=True)
class DemoResult:
    """Paths of the results, and the scores.

    Attributes:
        image: the grid of all images.
        page: the HTML page.
        figures: the scores by name.
    """

    image: Path
    page: Path
    figures: dict[str, float]


def run(
    folder: Path,
    *,
    people_seed: int = 0,
    device: str | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> DemoResult:
    """Run the demo and write `demo.png`, `index.html` and `demo.json`.

    No existing file is replaced: beside another one of its name, a file gets a number.

    Args:
        folder: an existing folder.
        people_seed: index of the held-out person.
        device: where to compute; the best device by default.
        log: receives a line about each step.
    """
    start = time.perf_counter()
    seed = HELD_OUT_PEOPLE + people_seed
    log(f"Rendering held-out person {seed} and {NUM_OTHER_PEOPLE} people to compare with ...")
    portraits = _render_portraits(range(seed, seed + 1 + NUM_OTHER_PEOPLE))
    log("Loading the miniature ...")
    studio = load("mini", device=device)
    identity = studio.identify([portraits[0]])
    without, with_identity = [], []
    for k, prompt in enumerate(PROMPTS):
        log(f"{k + 1} of {len(PROMPTS)}: {prompt}")
        without += studio.generate(prompt, seed=SEED + k).images
        with_identity += studio.generate(prompt, identity=identity, seed=SEED + k).images
    figures = score_images(FaceScorer.load(), portraits, without, with_identity)
    figures["seconds"] = round(time.perf_counter() - start, 1)
    log(
        f"Face similarity {figures['same_person']:.2f} to the person, "
        f"{figures['other_person']:.2f} to other people."
    )
    rows = [
        (prompt, (portraits[0], without[k], with_identity[k])) for k, prompt in enumerate(PROMPTS)
    ]
    return _write_results(folder, rows, figures)


def score_images(
    faces: metrics.DetectFaces,
    portraits: Sequence[Image.Image],
    without: Sequence[Image.Image],
    with_identity: Sequence[Image.Image],
) -> dict[str, float]:
    """Compute the scores of the demo, means over its images.

    Args:
        faces: detects and embeds faces.
        portraits: of the person, then of other people.
        without: images without identity.
        with_identity: images of the same prompts and seeds with identity.

    Returns:
        same_person: face similarity to the person's portrait; other_person: to the other portraits;
        changed_outside_face: mean absolute difference outside the face, in [0, 1].
    """
    portrait_images = to_tensor(portraits)
    base_images = to_tensor(without)
    images = to_tensor(with_identity)
    gallery = faces(portrait_images)
    base_faces = faces(base_images)
    image_faces = faces(images)
    inputs = [
        metrics.MetricInputs(
            images,
            base_images,
            image_faces,
            base_faces,
            torch.full((len(images),), person),
            portrait_images,
            gallery,
            prompts=(),
        )
        for person in range(len(portraits))
    ]
    similarity = torch.stack([metrics.FaceSim()(x).mean() for x in inputs])
    return {
        "same_person": round(similarity[0].item(), 4),
        "other_person": round(similarity[1:].mean().item(), 4),
        "changed_outside_face": round(metrics.OutsideFace()(inputs[0]).mean().item(), 4),
    }


def _render_portraits(seeds: Sequence[int]) -> list[Image.Image]:
    people = [Person.from_seed(seed) for seed in seeds]
    return to_pil(render(people, [Scene()] * len(people)).image)


Rows = Sequence[tuple[str, Sequence[Image.Image]]]


def _write_results(folder: Path, rows: Rows, figures: dict[str, float]) -> DemoResult:
    image = write_new(folder / "demo.png", encode_image(labeled_grid(TITLE, COLUMNS, rows)))
    page = write_new(folder / "index.html", _format_page(rows, figures).encode())
    scores = {name: value for name, value in figures.items() if name != "seconds"}
    write_new(folder / "demo.json", (json.dumps(scores) + "\n").encode())
    return DemoResult(image, page, figures)


STYLE = """
body { font: 17px/1.5 system-ui, sans-serif; color: #202024; background: #faf9f6 } body { margin:
2rem auto; max-width: 60rem } table { border-spacing: .8rem; width: 100% } th { font-weight: normal;
color: #78766f; text-align: left } img { width: 100%; min-width: 8rem; display: block } td { width:
33% } td[colspan] { padding-top: 1rem }
"""


def _format_page(rows: Rows, figures: dict[str, float]) -> str:
    """Format one HTML file with embedded images, so that it can be sent by mail."""
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in COLUMNS)
    body = ""
    for prompt, images in rows:
        body += f'<tr><td colspan="3">{html.escape(prompt)}</td></tr>'
        cells = map(_format_cell, images, SOURCE_TYPES)
        body += f"<tr>{''.join(cells)}</tr>\n"
    change = 100 * figures["changed_outside_face"]
    summary = (
        "A face recognition model that was not used in training compares the faces on the right: "
        f"similarity {figures['same_person']:.2f} to the person (1 is the same image), "
        f"{figures['other_person']:.2f} to other people. "
        f"Outside the face, colors changed by {change:.1f}% on average."
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8">'
        f"<title>{TITLE}</title><style>{STYLE}</style>\n"
        f"<h1>{TITLE}</h1>\n<p>{summary}</p>\n<table><tr>{heads}</tr>\n{body}</table></html>\n"
    )


def _format_cell(image: Image.Image, source_type: DigitalSourceType) -> str:
    data = base64.b64encode(encode_image(image, source_type=source_type)).decode()
    return f'<td><img alt="" src="data:image/png;base64,{data}"></td>'
