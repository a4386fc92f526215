"""Measure how often the miniature keeps the pose of the prompt, and what that costs in similarity.

    python benchmarks/measure_pose.py -o benchmarks/pose.json
    python benchmarks/measure_pose.py --sweep --people 16

Every person is generated in every pose of the world, in scenes held out of training. The attribute
classifier, which no method uses, says which pose an image has. The second command varies the
identity's start and scale, from which the presets' values for `pose_from_prompt` are chosen.
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

STARTS = {"mini": (0.0, 0.2, 0.4), "mini-lightning": (0.0, 0.25, 0.5)}
SCALES = {"mini": (0.7, 1.0, 1.5), "mini-lightning": (0.7, 1.0, 2.0)}
"""The values of the sweep."""
ABOUT = "Share of prompts whose pose the image has, with and without identity, and similarity"
STRONG = 2.0
"""Identity scale at which poses are lost; the similarity does not grow any more."""


def main() -> None:
    """Generate the images, score them, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--people", type=int, default=64)
    parser.add_argument("--preset", action="append", choices=list(STARTS))
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("-o", "--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    for preset in arguments.preset or list(STARTS):
        rows += measure(preset, arguments.people, arguments.sweep)
    if arguments.out is not None:
        configuration = {"people": arguments.people, "poses": POSES}
        measurement = describe_measurement(configuration, {"rows": rows}, torch.device("cpu"))
        report = {"about": ABOUT, "measurements": [{"name": "poses", **measurement}]}
        write_json(arguments.out, report)


def measure(preset: str, people: int, is_sweep: bool) -> list[dict[str, Any]]:
    """Measure one preset.

    Args:
        preset: name of the preset.
        people: number of people.
        is_sweep: whether to vary start and scale.

    Returns:
        A row for each choice of options; the first one is without identity.
    """
    scorers = MiniScorers.load()
    prompts = sample_poses(people)
    studio = load(preset)
    portraits = render_portraits(people)
    references = scorers.faces(portraits).embeddings
    identities = [studio.identify([portrait]) for portrait in to_pil(portraits)]

    def score(name: str, images: Tensor, **options: float | None) -> dict[str, Any]:
        row = {"preset": preset, "name": name, **options}
        row |= score_images(scorers, prompts, images, references)
        print(json.dumps(row), flush=True)
        return row

    rows = [
        score("rendered", render_ground_truth(prompts, people)[0]),
        score("no identity", generate(studio, prompts, None)),
    ]
    if is_sweep:
        choices = [{"start": x, "scale": y} for y in SCALES[preset] for x in STARTS[preset]]
    else:
        defaults, pose = find_preset(preset).defaults.identity, find_preset(preset).pose
        choices = [
            {"start": start, "scale": scale}
            for scale in (pose.scale, STRONG)
            for start in (defaults.start, pose.start)
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
