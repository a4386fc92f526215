"""Measuring the images of a run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from openpulid.bench.metrics import (
    FID,
    LIKENESS,
    Attributes,
    Faces,
    FindFaces,
    Metric,
    MetricInputs,
)
from openpulid.bench.run_dir import BASE, RunDir, SampleKey, write

LARGEST = 1024  # pixels of a portrait's longer side, as the judges see it


class Scorers(Protocol):
    """The networks of a benchmark; the recogniser of faces is one that no method uses."""

    @property
    def faces(self) -> FindFaces:
        """Finds and recognises them."""

    def measures(self) -> Sequence[Metric]:
        """All that can be told with the networks that are here."""

    def sets(self) -> Sequence[FID]:
        """Those that give one number for all images of a method, each time anew."""

    def truth(self, people: Sequence[str]) -> Tensor | None:
        """(P, V): what is known exactly of the people of these names; None of photographs."""

    def wanted(self, named: Mapping[str, str]) -> Mapping[str, int]:
        """What a prompt of the suite asks for, as classes of the attribute reader."""


@dataclass(frozen=True)
class References:
    """All people of a run as the judges see them, (P, ...); `others` are their second pictures, where all have one."""

    portraits: Tensor
    gallery: Faces
    others: Faces | None
    truth: Tensor | None

    @classmethod
    def of(cls, folder: RunDir, facts: Mapping[str, Any], judges: Scorers) -> References:
        """Read from the run's folder."""
        people = [folder.path / "people" / f"{name}.png" for name in facts["people"]]
        others = [file.with_name(f"{file.stem}-other.png") for file in people]
        portraits = fitted(people)
        second = judges.faces(fitted(others)) if all(file.is_file() for file in others) else None
        return cls(portraits, judges.faces(portraits), second, judges.truth(facts["people"]))


def score_run(folder: RunDir, judges: Scorers) -> None:
    """Writes the measures of every image into its record, and those of whole methods into RUN/sets.json. A method that is
    measured already is left as it is."""
    facts, sets, file = folder.facts(), known_sets(folder), folder.path / "sets.json"
    names = [measure.name for measure in judges.measures()]
    sitting: References | None = None
    for method in facts["methods"]:
        if not unmeasured(folder, facts, method, names, [one.name for one in judges.sets()]):
            continue
        if sets.pop(
            method, None
        ):  # of the images before: a run that is stopped now must not leave them
            write(file, sets)
        sitting = sitting or References.of(folder, facts, judges)
        whole = judges.sets()
        for person in range(
            len(facts["people"])
        ):  # one by one: all images of a large run fit no memory
            _judge(folder, facts, method, person, sitting, judges, whole)
        values = {one.name: one.compute() for one in whole} if method != BASE else {}
        sets[method] = {
            name: None if math.isnan(value) else round(value, 4) for name, value in values.items()
        }
        write(file, sets)


def _judge(
    folder: RunDir,
    facts: Mapping[str, Any],
    method: str,
    person: int,
    sitting: References,
    judges: Scorers,
    whole: Sequence[FID],
) -> None:
    """One person's images of one method."""
    made = [
        cell
        for cell in sample_keys(facts, method)
        if cell.person == facts["people"][person] and comparable(folder, cell)
    ]
    for likeness in (True, False):
        part = [cell for cell in made if counts(facts, cell.prompt, likeness)]
        if not part:
            continue
        evidence = gathered(folder, facts, part, person, sitting, judges)
        measures = [m for m in judges.measures() if (m.name in LIKENESS) == likeness]
        values = {m.name: m(evidence) for m in measures}
        asked = next((m.each(evidence) for m in measures if isinstance(m, Attributes)), None)
        for row, cell in enumerate(part):
            record = folder.record(cell) or {}
            told = {name: _number(column[row]) for name, column in values.items()}
            seen = {} if asked is None else {"asked": asked[row]}
            folder.keep(cell, {**record, **seen, "metrics": record.get("metrics", {}) | told})
        if not likeness and method != BASE:
            for one in whole:
                one.update(evidence)


def unmeasured(
    folder: RunDir,
    facts: Mapping[str, Any],
    method: str,
    names: Sequence[str],
    sets: Sequence[str] = (),
) -> bool:
    """Whether an image of a method lacks one of these measures, or what was seen of each attribute; or all its images together
    lack one of `sets`, which the base has none of."""
    if method != BASE and not set(sets) <= set(known_sets(folder).get(method, {})):
        return True
    for cell in sample_keys(facts, method):
        if comparable(folder, cell):
            record = folder.record(cell) or {}
            told = record.get("metrics", {})
            expected = {name for name in names if counts(facts, cell.prompt, name in LIKENESS)}
            if not expected <= set(told) or (Attributes.name in expected and "asked" not in record):
                return True
    return False


def comparable(folder: RunDir, cell: SampleKey) -> bool:
    """Whether an image is there, and the base's of the same prompt and noise."""
    return folder.done(cell) and folder.done(SampleKey(BASE, cell.person, cell.prompt, cell.seed))


def known_sets(folder: RunDir) -> dict[str, dict[str, float | None]]:
    """Method -> the measures of all its images together, so far; None where it was tried and cannot be told."""
    file = folder.path / "sets.json"
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}


def counts(facts: Mapping[str, Any], prompt: int, likeness: bool) -> bool:
    """Whether a prompt's images count for the likeness, or for the rest."""
    named = facts["suite"]["likeness"]
    return not named or (prompt in named) == likeness


def sample_keys(facts: Mapping[str, Any], method: str) -> list[SampleKey]:
    """All of a method."""
    suite = facts["suite"]
    return [
        SampleKey(method, person, prompt, seed)
        for person in facts["people"]
        for prompt in range(len(suite["prompts"]))
        for seed in suite["seeds"]
    ]


def gathered(
    folder: RunDir,
    facts: Mapping[str, Any],
    cells: Sequence[SampleKey],
    person: int,
    sitting: References,
    judges: Scorers,
) -> MetricInputs:
    """What the measures look at, read from the run's folder."""
    prompts = facts["suite"]["prompts"]
    images = opened([folder.image(cell) for cell in cells])
    before = opened(
        [folder.image(SampleKey(BASE, cell.person, cell.prompt, cell.seed)) for cell in cells]
    )
    rows = torch.full((len(cells),), person)
    return MetricInputs(
        images=images,
        before=before,
        seen=judges.faces(images),
        was=judges.faces(before),
        person=rows,
        portraits=sitting.portraits,
        gallery=sitting.gallery,
        prompts=[prompts[cell.prompt]["text"] for cell in cells],
        wanted=[judges.wanted(prompts[cell.prompt]["wanted"]) for cell in cells],
        others=sitting.others.rows(rows) if sitting.others else None,
        truth=sitting.truth,
    )


def opened(files: Sequence[Path]) -> Tensor:
    """(B, 3, H, W) in [0, 1], of pictures of one size."""
    return _tensor([Image.open(file).convert("RGB") for file in files])


def fitted(files: Sequence[Path]) -> Tensor:
    """The same of pictures of any sizes: if they differ, or are large, each in the middle of a white square, undistorted."""
    pictures = [Image.open(file).convert("RGB") for file in files]
    longest = max(max(picture.size) for picture in pictures)
    if longest > LARGEST or len({picture.size for picture in pictures}) > 1:
        side = min(longest, LARGEST)
        pictures = [ImageOps.pad(picture, (side, side), color="white") for picture in pictures]
    return _tensor(pictures)


def _tensor(pictures: Sequence[Image.Image]) -> Tensor:
    return (
        torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
        .permute(0, 3, 1, 2)
        .float()
        / 255
    )


def _number(value: Tensor) -> float | None:
    """JSON has no NaN."""
    return None if value.isnan() else round(value.item(), 5)
