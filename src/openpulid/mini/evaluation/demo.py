"""The demo: generate images of held-out people from one reference image each, and score them."""

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
from torch import Tensor
from torch.nn.functional import normalize

from openpulid.bench import metrics
from openpulid.io.files import write_new
from openpulid.io.image_grid import labeled_grid, to_pil, to_tensor
from openpulid.io.metadata import encode_image
from openpulid.io.xmp import DigitalSourceType
from openpulid.mini.evaluation.adapters import find_miniature
from openpulid.mini.evaluation.scorers import FaceScorer
from openpulid.pipelines.loading import load
from openpulid.pipelines.studio import Studio
from openpulid.world import HELD_OUT_PEOPLE, Person, Scene, render

SHOTS: dict[str, Scene] = {
    "portrait, photo, smiling, blue background, red shirt, short brown hair": Scene(
        expression="smile", background="blue", clothing="red"
    ),
    "portrait, film noir, light from the left, looking right, long hair": Scene(
        style="noir", light="left", pose="right", hair_length="long"
    ),
    "a person, photo, wearing a green beanie, yellow background, laughing": Scene(
        hat="beanie", hat_color="green", background="yellow", expression="laugh"
    ),
    "portrait, photo, long blond hair, sunset light, purple background": Scene(
        hair_length="long", hair_color="blond", light="sunset", background="purple"
    ),
    "portrait, pencil sketch, turned left, short hair": Scene(style="pencil", pose="left"),
    "portrait, poster art, orange dotted background, surprised, black bob hair": Scene(
        style="poster",
        background="orange",
        pattern="dots",
        expression="surprised",
        hair_color="black",
        hair_length="bob",
    ),
    "a person, photo, red bob hair, moonlight, green background": Scene(
        hair_length="bob", hair_color="red", light="moon", background="green"
    ),
    "portrait, photo, wearing a red hat with a brim, teal background, looking up": Scene(
        hat="brimmed", background="teal", pose="up"
    ),
}
"""Prompts, and the scenes that they describe."""
TITLE = "A person not seen in training, from one reference image"
PEOPLE_TITLE = "Three people not seen in training, each from one reference image"
REFERENCE = "reference image"
NUM_PEOPLE = 3
"""People of the second sheet; the first of them is the person of the first sheet."""
NUM_REFERENCES = 8
"""Reference images that each image of the second sheet is matched to."""
NUM_OTHER_PEOPLE = 32
"""Number of people that the result should not resemble."""
SEED = 7
SIDE = 176
"""Width and height of an image on the sheets, in pixels."""

Rows = Sequence[tuple[str, Sequence[Image.Image | None]]]


@dataclass(frozen=True)
class DemoResult:
    """Paths of the results, and the scores.

    Attributes:
        image: the person without and with the identity.
        people: the same prompts without an identity, and with three people.
        page: the HTML page with both.
        figures: the scores by name.
    """

    image: Path
    people: Path
    page: Path
    figures: dict[str, float]


def run(
    folder: Path,
    *,
    people_seed: int = 0,
    preset: str = "mini",
    device: str | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> DemoResult:
    """Run the demo and write `demo.png`, `people.png`, `index.html` and `demo.json`.

    No existing file is replaced: beside another one of its name, a file gets a number.

    Args:
        folder: an existing folder.
        people_seed: index of the held-out person.
        preset: of the miniature.
        device: where to compute; the best device by default.
        log: receives a line about each step.

    Raises:
        OptionError: the preset is not one of the miniature.
    """
    selected = find_miniature(preset)
    start = time.perf_counter()
    seed = HELD_OUT_PEOPLE + people_seed
    log(f"Rendering held-out person {seed} and {NUM_OTHER_PEOPLE} people to compare with ...")
    portraits = _render_portraits(range(seed, seed + 1 + NUM_OTHER_PEOPLE))
    log("Loading the miniature ...")
    studio = load(selected, device=device)
    without, *with_identity = _generate(studio, portraits[:NUM_PEOPLE], log)
    scorer = FaceScorer.load()
    figures = score_images(scorer, portraits, without, with_identity[0])
    rendered = render([Person.from_seed(seed)] * len(SHOTS), list(SHOTS.values())).image
    figures["perfect"] = round(_similarities(scorer, rendered, portraits)[:, 0].mean().item(), 4)
    figures["matched_of_8"] = round(match_references(scorer, portraits, with_identity), 4)
    figures["seconds"] = round(time.perf_counter() - start, 1)
    log(
        f"Face similarity {figures['same_person']:.2f} to the person, "
        f"{figures['other_person']:.2f} to other people."
    )
    return _write_results(folder, portraits, without, with_identity, figures)


def _generate(
    studio: Studio, portraits: Sequence[Image.Image], log: Callable[[str], None]
) -> list[list[Image.Image]]:
    """Generate one image per prompt without identity, then of each person with it."""
    identities = [None, *(studio.identify([portrait]) for portrait in portraits)]
    columns = []
    for k, prompt in enumerate(SHOTS):
        log(f"{k + 1} of {len(SHOTS)}: {prompt}")
        columns.append(
            [
                studio.generate(prompt, identity=identity, seed=SEED + k).images[0]
                for identity in identities
            ]
        )
    return [list(row) for row in zip(*columns, strict=True)]


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
        without_identity: of the images without identity to the person's portrait;
        changed_outside_face: mean absolute difference outside the face, in [0, 1].
    """
    base_images, images = to_tensor(without), to_tensor(with_identity)
    similarity = _similarities(faces, images, portraits)
    inputs = metrics.MetricInputs(
        images,
        base_images,
        faces(images),
        faces(base_images),
        torch.zeros(len(images), dtype=torch.long),
        to_tensor(portraits),
        faces(to_tensor(portraits)),
        prompts=(),
    )
    return {
        "same_person": round(similarity[:, 0].mean().item(), 4),
        "other_person": round(similarity[:, 1:].mean().item(), 4),
        "without_identity": round(
            _similarities(faces, base_images, portraits)[:, 0].mean().item(), 4
        ),
        "changed_outside_face": round(metrics.OutsideFace()(inputs).mean().item(), 4),
    }


def match_references(
    faces: metrics.DetectFaces,
    portraits: Sequence[Image.Image],
    images: Sequence[Sequence[Image.Image]],
) -> float:
    """Match each image to the most similar of `NUM_REFERENCES` reference images.

    Args:
        faces: detects and embeds faces.
        portraits: the reference images; those of the people of `images` come first.
        images: images of each person.

    Returns:
        The share of images that are matched to their own person.
    """
    correct = []
    for person, row in enumerate(images):
        similarity = _similarities(faces, to_tensor(row), portraits[:NUM_REFERENCES])
        has_face = similarity.any(1)  # without one, all similarities are 0
        correct.append((similarity.argmax(1) == person) & has_face)
    return torch.cat(correct).float().mean().item()


def _similarities(
    faces: metrics.DetectFaces, images: Tensor, portraits: Sequence[Image.Image]
) -> Tensor:
    """Compute the face similarity of B images to P portraits, (B, P); 0 without a face."""
    detected, references = faces(images), faces(to_tensor(portraits))
    a, b = (normalize(x.embeddings.float(), dim=-1) for x in (detected, references))
    return a @ b.T


def _render_portraits(seeds: Sequence[int]) -> list[Image.Image]:
    people = [Person.from_seed(seed) for seed in seeds]
    return to_pil(render(people, [Scene()] * len(people)).image)


def _write_results(
    folder: Path,
    portraits: Sequence[Image.Image],
    without: Sequence[Image.Image],
    with_identity: Sequence[Sequence[Image.Image]],
    figures: dict[str, float],
) -> DemoResult:
    columns = [REFERENCE, *SHOTS]
    summary = _summarize(figures)
    pair: Rows = [
        ("without the identity", [None, *without]),
        ("with the identity", [portraits[0], *with_identity[0]]),
    ]
    texts = ["with the identity of each person", *[""] * (len(with_identity) - 1)]
    people: Rows = [
        ("without an identity", [None, *without]),
        *(
            (text, [portrait, *images])
            for text, portrait, images in zip(texts, portraits, with_identity, strict=False)
        ),
    ]
    matched = f"Images that a face recognition model matches to the right one of {NUM_REFERENCES} "
    matched += f"reference images: {100 * figures['matched_of_8']:.0f}%."
    sheets = {
        "demo.png": labeled_grid(TITLE, columns, pair, SIDE, summary),
        "people.png": labeled_grid(PEOPLE_TITLE, columns, people, SIDE, matched),
    }
    image, people_image = (
        write_new(folder / name, encode_image(sheet)) for name, sheet in sheets.items()
    )
    sections = [(TITLE, summary, pair), (PEOPLE_TITLE, matched, people)]
    page = write_new(folder / "index.html", _format_page(columns, sections).encode())
    scores = {name: value for name, value in figures.items() if name != "seconds"}
    write_new(folder / "demo.json", (json.dumps(scores) + "\n").encode())
    return DemoResult(image, people_image, page, figures)


def _summarize(figures: dict[str, float]) -> str:
    return (
        "Face similarity to the picture, by a recognition model that was not used in training: "
        f"{figures['same_person']:.2f} with the identity, {figures['without_identity']:.2f} "
        f"without it, {figures['perfect']:.2f} for a perfect method, "
        f"{figures['other_person']:.2f} to other people. Outside the face, colors changed by "
        f"{100 * figures['changed_outside_face']:.1f}% on average."
    )


STYLE = """
body { font: 17px/1.5 system-ui, sans-serif; color: #202024; background: #faf9f6 }
body { margin: 2rem auto; max-width: 90rem; padding: 0 1rem }
.scroll { overflow-x: auto }
table { border-spacing: .6rem; width: 100%; min-width: 60rem; table-layout: fixed }
th { font-weight: normal; font-size: .85rem; line-height: 1.3; color: #78766f }
th { text-align: left; vertical-align: bottom }
img { width: 100%; display: block }
"""


def _format_page(columns: Sequence[str], sections: Sequence[tuple[str, str, Rows]]) -> str:
    """Format one HTML file with embedded images, so that it can be sent by mail."""
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = ""
    for title, summary, rows in sections:
        body += f"<h1>{html.escape(title)}</h1>\n<p>{html.escape(summary)}</p>\n"
        body += f'<div class="scroll"><table><tr>{heads}</tr>\n'
        for text, images in rows:
            if text:
                body += f'<tr><td colspan="{len(columns)}">{html.escape(text)}</td></tr>'
            reference, *generated = images
            cells = [_format_cell(reference, DigitalSourceType.RENDERED)]
            cells += [_format_cell(image, DigitalSourceType.GENERATED) for image in generated]
            body += f"<tr>{''.join(cells)}</tr>\n"
        body += "</table></div>\n"
    return (
        '<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{TITLE}</title><style>{STYLE}</style>\n{body}</html>\n"
    )


def _format_cell(image: Image.Image | None, source_type: DigitalSourceType) -> str:
    if image is None:
        return "<td></td>"
    data = base64.b64encode(encode_image(image, source_type=source_type)).decode()
    return f'<td><img alt="" src="data:image/png;base64,{data}"></td>'
