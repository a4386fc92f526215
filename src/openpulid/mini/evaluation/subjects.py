"""Synthetic subjects of the benchmark: a reference image and a second image of each person."""

from __future__ import annotations

import torch

from openpulid.bench.run_dir import Subject
from openpulid.io.image_grid import to_pil
from openpulid.world import HELD_OUT_PEOPLE, Person, Scene, render


def synthetic_subjects(count: int, first: int) -> list[Subject]:
    """Render held-out people.

    Args:
        count: number of subjects.
        first: offset of the first subject from `HELD_OUT_PEOPLE`.

    Returns:
        Subjects, named by their seed, with a neutral portrait and an image in a held-out scene that
        no method sees.
    """
    subjects = []
    for seed in range(HELD_OUT_PEOPLE + first, HELD_OUT_PEOPLE + first + count):
        person = Person.from_seed(seed)
        # this seed itself gives the values of the person's face
        scene = Scene.sample(torch.Generator().manual_seed(2**32 + seed), held_out=True)
        portrait, second = to_pil(render([person, person], [Scene(), scene]).image)
        subjects.append(Subject(f"{seed}", portrait, second))
    return subjects
