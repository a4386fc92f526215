"""Measure how often the miniature keeps the pose of the prompt, and what that costs in similarity.

    python benchmarks/measure_pose.py -o benchmarks/pose.json

Every person is generated in every pose of the world, in scenes held out of training. The attribute
classifier, which no method uses, says which pose an image has. Each preset is measured at its own
values and, with fewer people, in a sweep over the identity's start and scale, from which the values
for `pose_from_prompt` are chosen.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openpulid.bench.measurement import describe_measurement
from openpulid.bench.metrics import bootstrap
from openpulid.identity.identity import Identity
from openpulid.io.files import write_json
from openpulid.io.image_grid import to_pil
from openpulid.mini.evaluation.evaluate import BATCH, generate_images
from openpulid.mini.evaluation.prompts import EvalPrompt, render_ground_truth, render_portraits
from openpulid.mini.evaluation.scorers import MiniScorers
from openpulid.pipelines.loading import load
from openpulid.pipelines.presets import find_preset
from openpulid.pipelines.studio import Studio
from openpulid.world import ATTRIBUTES, HELD_OUT_PEOPLE, Scene

POSES = ATTRIBUTES["pose"]

Options = dict[str, float | None]

STARTS = {"mini": (0.0, 0.2, 0.4), "mini-lightning": (0.0, 0.25, 0.5)}
SCALES = {"mini": (0.7, 1.0, 1.5), "mini-lightning": (0.7, 1.0, 2.0, 3.0)}
"""The values of the sweep."""
ABOUT = "Share of prompts whose pose the image has, with and without identity, and similarity"
STRONG = 2.0
"""Identity scale at which poses are lost; the similarity does not grow any more."""


def main() -> None:
    """Generate the images, score them, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--people", type=int, default=64)
    parser.add_argument("--sweep-people", type=int, default=8, help="0 leaves out the sweep")
    parser.add_argument("--preset", action="append", choices=list(STARTS))
    parser.add_argument("-o", "--out", type=Path)
    arguments = parser.parse_args()
    measurements = []
    for preset in arguments.preset or list(STARTS):
        studio = load(preset)
        runs = {
            "the preset's values": (arguments.people, select_values(preset)),
            "sweep over start and scale": (arguments.sweep_people, sweep_values(preset)),
        }
        for name, (people, choices) in runs.items():
            if not people:
                continue
            rows = measure(studio, people, choices)
            configuration = {"preset": preset, "people": people, "poses": POSES}
            measurement = describe_measurement(configuration, {"rows": rows}, torch.device("cpu"))
            measurements.append({"name": f"{preset}, {name}", **measurement})
    if arguments.out is not None:
        write_json(arguments.out, {"about": ABOUT, "measurements": measurements})


def select_values(preset: str) -> list[Options]:
    """Return start and scale of a preset with and without `pose_from_prompt`, and a high scale."""
    defaults, pose = find_preset(preset).defaults.identity, find_preset(preset).pose
    return [
        {"start": start, "scale": scale}
        for scale in (pose.scale, STRONG)
        for start in (defaults.start, pose.start)
    ]


def sweep_values(preset: str) -> list[Options]:
    """Return all combinations of start and scale of the sweep."""
    return [{"start": x, "scale": y} for y in SCALES[preset] for x in STARTS[preset]]


def measure(studio: Studio, people: int, choices: Sequence[Options]) -> list[dict[str, Any]]:
    """Measure one preset.

    Args:
        studio: of the preset.
        people: number of people.
        choices: start and scale of the identity.

    Returns:
        A row for each choice; the first ones are of the rendered scenes, and without identity.
    """
    scorers = MiniScorers.load()
    prompts = sample_poses(people)
    portraits = render_portraits(people)
    references = scorers.faces(portraits).embeddings
    identities = [studio.identify([portrait]) for portrait in to_pil(portraits)]

    def score(name: str, images: Tensor, **options: float | None) -> dict[str, Any]:
        row: dict[str, Any] = {"name": name, **options}
        row |= score_images(scorers, prompts, images, references)
        print(json.dumps(row), flush=True)
        return row

    rows = [
        score("rendered", render_ground_truth(prompts, people)[0]),
        score("no identity", generate(studio, prompts, None)),
    ]
    for options in choices:
        varied = Studio(
            studio.pipe, studio.adapter, studio.extractor, studio.preset.with_defaults(**options)
        )
        rows.append(score("identity", generate(varied, prompts, identities), **options))
    return rows


def sample_poses(people: int) -> list[EvalPrompt]:
    """Sample a prompt of a held-out scene for each person and pose."""
    prompts = []
    for person in range(people):
        generator = torch.Generator().manual_seed(HELD_OUT_PEOPLE + person)
        for pose in POSES:
            scene = Scene.sample(generator, held_out=True, pose=pose)
            seed = int(torch.randint(2**31, (), generator=generator))
            prompts.append(EvalPrompt(person, scene.prompt(generator, keep=1.0), seed, scene))
    return prompts


def generate(
    studio: Studio, prompts: Sequence[EvalPrompt], identities: Sequence[Identity] | None
) -> Tensor:
    """Generate the images of the prompts, (B, 3, H, W) in [0, 1]."""
    batches = [prompts[start : start + BATCH] for start in range(0, len(prompts), BATCH)]
    return generate_images(studio, batches, identities)


@torch.no_grad()
def score_images(
    scorers: MiniScorers, prompts: Sequence[EvalPrompt], images: Tensor, references: Tensor
) -> dict[str, Any]:
    """Score images.

    Args:
        scorers: the metric networks.
        prompts: B prompts.
        images: (B, 3, H, W).
        references: (P, D) face embeddings of the reference images.

    Returns:
        `pose_kept`: share of the images with the pose of the prompt; `poses`: the same for each
        pose; `similarity`: of the faces to the reference image; both with 95% intervals.
    """
    person = torch.tensor([prompt.person for prompt in prompts])
    wanted = torch.tensor([POSES.index(prompt.scene.pose) for prompt in prompts])
    is_kept = (scorers.read(images)["pose"].argmax(1) == wanted).float()
    similarity = torch.cosine_similarity(
        scorers.faces(images).embeddings, references[person], dim=1
    )
    row: dict[str, Any] = {
        "poses": {
            pose: round(is_kept[wanted == index].mean().item(), 3)
            for index, pose in enumerate(POSES)
        }
    }
    for name, values in {"pose_kept": is_kept, "similarity": similarity}.items():
        interval = bootstrap(values, person)
        row[name] = round(interval.mean, 4)
        row[f"{name}_interval"] = [round(interval.low, 4), round(interval.high, 4)]
    return row


if __name__ == "__main__":
    main()
