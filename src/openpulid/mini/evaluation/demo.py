"""The demonstration: somebody nobody trained on, from one picture into new ones, and how well it went."""

from __future__ import annotations

import base64
import html
import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from openpulid.bench import metrics
from openpulid.io.image_grid import labeled_grid, to_pil, to_tensor
from openpulid.mini.evaluation.scorers import FaceScorer
from openpulid.pipelines import studio as studios
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
OTHERS = 32  # people that the result must not resemble
SEED = 7


@dataclass(frozen=True)
class DemoResult:
    """Where the results lie, and the figures of the last line."""

    picture: Path
    page: Path
    figures: dict[str, float]


def run(
    folder: Path,
    *,
    people_seed: int = 0,
    device: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> DemoResult:
    """Draw the person, make and judge the images, write `demo.png`, `index.html`, `demo.json` into `folder`.

    Args:
        people_seed: which of the people that no training has seen.
        device: where to compute; the best there is by default.
        say: gets one line about each thing that is being done.
    """
    start = time.perf_counter()
    seed = HELD_OUT_PEOPLE + people_seed
    say(
        f"Drawing person {seed}, whom no training has seen, and {OTHERS} others to compare with ..."
    )
    portraits = _render_portraits(
        [seed, *(HELD_OUT_PEOPLE + people_seed + 1 + k for k in range(OTHERS))]
    )
    say("Loading the miniature ...")
    studio = studios.load("mini", device=device)
    identity = studio.identify([portraits[0]])
    without, with_identity = [], []
    for k, prompt in enumerate(PROMPTS):
        say(f"{k + 1} of {len(PROMPTS)}: {prompt}")
        without += studio.generate(prompt, seed=SEED + k).images
        with_identity += studio.generate(prompt, identity=identity, seed=SEED + k).images
    figures = score_images(FaceScorer.load(), portraits, without, with_identity)
    figures["seconds"] = round(time.perf_counter() - start, 1)
    say("The face is {same_person:.2f} alike (others {other_person:.2f}).".format(**figures))
    rows = [
        (prompt, (portraits[0], without[k], with_identity[k])) for k, prompt in enumerate(PROMPTS)
    ]
    return _write_results(folder, rows, figures)


def score_images(
    faces: metrics.FindFaces,
    portraits: Sequence[Image.Image],
    without: Sequence[Image.Image],
    with_identity: Sequence[Image.Image],
) -> dict[str, float]:
    """The demo's figures: means over its images.

    Args:
        portraits: of the person, then of others.
        without, with_identity: the same prompts and seeds.

    Returns:
        same_person: face similarity to the person's portrait; other_person: to the others' portraits;
        changed_outside_face: mean absolute difference outside the face, between 0 and 1.
    """
    known, before, after = (to_tensor(pictures) for pictures in (portraits, without, with_identity))
    gallery, was, seen = faces(known), faces(before), faces(after)
    everyone = torch.arange(len(portraits))[:, None].expand(-1, len(after))
    compared = [
        metrics.MetricInputs(after, before, seen, was, who, known, gallery, prompts=())
        for who in everyone
    ]
    likeness = torch.stack([metrics.FaceSim()(evidence).mean() for evidence in compared])
    return {
        "same_person": round(likeness[0].item(), 4),
        "other_person": round(likeness[1:].mean().item(), 4),
        "changed_outside_face": round(metrics.OutsideFace()(compared[0]).mean().item(), 4),
    }


def _render_portraits(seeds: Sequence[int]) -> list[Image.Image]:
    people = [Person.from_seed(seed) for seed in seeds]
    return to_pil(render(people, [Scene()] * len(people)).image)


Rows = Sequence[tuple[str, Sequence[Image.Image]]]


def _write_results(folder: Path, rows: Rows, figures: dict[str, float]) -> DemoResult:
    title = "Somebody nobody trained on, from one picture"
    picture, page = folder / "demo.png", folder / "index.html"
    labeled_grid(title, COLUMNS, rows).save(picture)
    page.write_text(_format_page(title, rows, figures), "utf-8")
    (folder / "demo.json").write_text(json.dumps(figures) + "\n", "utf-8")
    return DemoResult(picture, page, figures)


STYLE = """
body { font: 17px/1.5 system-ui, sans-serif; color: #202024; background: #faf9f6 }
body { margin: 2rem auto; max-width: 60rem }
table { border-spacing: .8rem; width: 100% } th { font-weight: normal; color: #78766f; text-align: left }
img { width: 100%; min-width: 8rem; display: block } td { width: 33% } td[colspan] { padding-top: 1rem }
"""


def _format_page(title: str, rows: Rows, figures: dict[str, float]) -> str:
    """One HTML file with the pictures inside: it can be mailed."""
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in COLUMNS)
    body = "".join(
        f'<tr><td colspan="3">{html.escape(prompt)}</td></tr><tr>{"".join(map(_format_cell, pictures))}</tr>\n'
        for prompt, pictures in rows
    )
    facts = (
        "A recogniser that took no part in the training finds the faces on the right "
        f"{figures['same_person']:.2f} alike to the person's (1 is the same picture) "
        f"and {figures['other_person']:.2f} alike to other people's. "
        f"Outside the face, colours moved by {100 * figures['changed_outside_face']:.1f}% on average."
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8">'
        f"<title>{title}</title><style>{STYLE}</style>\n"
        f"<h1>{title}</h1>\n<p>{facts}</p>\n<table><tr>{heads}</tr>\n{body}</table></html>\n"
    )


def _format_cell(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<td><img alt="" src="data:image/png;base64,{data}"></td>'
