"""Measuring the images of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from openpulid.bench.cells import BASE, Cell, Folder, write
from openpulid.bench.metrics import FID, LIKENESS, Evidence, Faces, FindFaces, Metric


class Judges(Protocol):
    """The networks of a benchmark, none of which a method uses."""

    @property
    def faces(self) -> FindFaces:
        """Finds and recognises them."""

    def measures(self) -> Sequence[Metric]:
        """All that can be told with the networks that are here."""

    def sets(self) -> Sequence[FID]:
        """Those that give one number for all images of a method."""

    def truth(self, people: Sequence[str]) -> Tensor | None:
        """(P, V): what is known exactly of the people of these names; None of photographs."""

    def wanted(self, named: Mapping[str, str]) -> Mapping[str, int]:
        """What a prompt of the suite asks for, as classes of the attribute reader."""


def judge(folder: Folder, judges: Judges) -> None:
    """Writes the measures of every image into its record, and those of whole methods into RUN/sets.json."""
    facts = folder.facts()
    sets: dict[str, Any] = {}
    for method in facts["methods"]:
        made = [cell for cell in cells_of(facts, method) if folder.done(cell)]
        sets[method] = {}
        for likeness in (True, False):
            part = [cell for cell in made if counts(facts, cell.prompt, likeness)]
            if not part:
                continue
            measures = [m for m in judges.measures() if (m.name in LIKENESS) == likeness]
            evidence = gathered(folder, facts, part, judges)
            values = {measure.name: measure(evidence) for measure in measures}
            for row, cell in enumerate(part):
                record = folder.record(cell) or {}
                told = {name: _number(column[row]) for name, column in values.items()}
                folder.keep(cell, record | {"metrics": record.get("metrics", {}) | told})
            if not likeness and method != BASE:
                sets[method] = {one.name: round(one(evidence), 4) for one in judges.sets()}
    write(folder.path / "sets.json", sets)


def counts(facts: Mapping[str, Any], prompt: int, likeness: bool) -> bool:
    """Whether a prompt's images count for the likeness, or for the rest."""
    named = facts["suite"]["likeness"]
    return not named or (prompt in named) == likeness


def cells_of(facts: Mapping[str, Any], method: str) -> list[Cell]:
    """All of a method."""
    suite = facts["suite"]
    return [
        Cell(method, person, prompt, seed)
        for person in facts["people"]
        for prompt in range(len(suite["prompts"]))
        for seed in suite["seeds"]
    ]


def gathered(folder: Folder, facts: Mapping[str, Any], cells: Sequence[Cell], judges: Judges) -> Evidence:
    """What the measures look at, read from the run's folder."""
    prompts = facts["suite"]["prompts"]
    images = opened([folder.image(cell) for cell in cells])
    before = opened([folder.image(Cell(BASE, cell.person, cell.prompt, cell.seed)) for cell in cells])
    people = [folder.path / "people" / f"{name}.png" for name in facts["people"]]
    portraits = opened(people)
    person = torch.tensor([facts["people"].index(cell.person) for cell in cells])
    others = [file.with_name(f"{file.stem}-other.png") for file in people]
    second: Faces | None = None
    if all(file.is_file() for file in others):
        second = judges.faces(opened(others)).rows(person)
    return Evidence(
        images=images,
        before=before,
        seen=judges.faces(images),
        was=judges.faces(before),
        person=person,
        portraits=portraits,
        gallery=judges.faces(portraits),
        prompts=[prompts[cell.prompt]["text"] for cell in cells],
        wanted=[judges.wanted(prompts[cell.prompt]["wanted"]) for cell in cells],
        others=second,
        truth=judges.truth(facts["people"]),
    )


def opened(files: Sequence[Path]) -> Tensor:
    """(B, 3, H, W) in [0, 1]; pictures of other sizes are fitted to the first one's."""
    size = Image.open(files[0]).size
    pictures = [np.asarray(Image.open(file).convert("RGB").resize(size)) for file in files]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


def _number(value: Tensor) -> float | None:
    """JSON has no NaN."""
    return None if value.isnan() else round(value.item(), 5)
