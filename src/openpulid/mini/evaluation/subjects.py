"""Procedural people for the benchmark: the picture given, and another that no method sees."""

from __future__ import annotations

import torch

from openpulid.bench.run_dir import Subject
from openpulid.io.image_grid import to_pil
from openpulid.world import HELD_OUT_PEOPLE, Person, Scene, render


def synthetic_subjects(count: int, first: int) -> list[Subject]:
    """Held-out people: a neutral portrait each, and a picture of theirs in a held-out scene."""
    found = []
    for number in range(HELD_OUT_PEOPLE + first, HELD_OUT_PEOPLE + first + count):
        person = Person.from_seed(number)
        scene = Scene.sample(torch.Generator().manual_seed(number), held_out=True)
        given, other = to_pil(render([person, person], [Scene(), scene]).image)
        found.append(Subject(f"{number}", given, other))
    return found
