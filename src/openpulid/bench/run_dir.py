"""The cells of a benchmark's run, one image each, and how they lie in its folder.

RUN/suite.json                      what was asked, of whom, of which methods
RUN/people/NAME.png                 the picture that each identity is made from; NAME-other.png, another one
RUN/cells/METHOD/NAME-P-S.json      prompt P, seed S: status, seconds, measures, where it was made and in which start
RUN/cells/METHOD/NAME-P-S.png       the image
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops

from openpulid.bench.suite import Suite
from openpulid.errors import OptionError

BASE = "base"
"""The base model without anybody: what every method is compared with."""

WEIGHTS = "weights"
"""Where a record's configuration says which weights an image was made with."""


@dataclass(frozen=True)
class Subject:
    """A person: the picture given, and another one of them where there is one, which no method sees."""

    name: str
    portrait: Image.Image
    other: Image.Image | None = None


@dataclass(frozen=True)
class SampleKey:
    """One image."""

    method: str
    person: str
    prompt: int
    seed: int

    @property
    def stem(self) -> str:
        """Of its files, below RUN/cells."""
        return f"{self.method}/{self.person}-{self.prompt}-{self.seed}"


@dataclass(frozen=True)
class Job:
    """All seeds of one method, person and prompt: made together, so that an image does not depend on who makes the rest."""

    cells: tuple[SampleKey, ...]


class RunDir:
    """A run on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, suite: Suite, methods: Sequence[str], sitters: Sequence[Subject]) -> None:
        """Writes down what is asked.

        Raises:
            OptionError: the folder holds a run of something else, or of other pictures of the people. More methods of the same
                suite and people are welcome.
        """
        facts = {
            "suite": suite.as_json(),
            "people": [sitter.name for sitter in sitters],
            "methods": list(methods),
        }
        if (file := self.path / "suite.json").is_file():
            known = json.loads(file.read_text("utf-8"))
            was, now = (
                {**one, "published": None} for one in (known["suite"], suite.as_json())
            )  # those make no image
            if was != now or known["people"] != facts["people"]:
                raise OptionError(
                    f"{self.path} holds another suite or other people; choose another folder with -o."
                )
            facts["methods"] = [
                *known["methods"],
                *(name for name in methods if name not in known["methods"]),
            ]
        for sitter in sitters:
            for suffix, picture in (("", sitter.portrait), ("-other", sitter.other)):
                if picture is None:
                    continue
                place = self.path / "people" / f"{sitter.name}{suffix}.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                if not place.is_file():
                    save(place, picture)
                elif ImageChops.difference(
                    Image.open(place).convert("RGB"), picture.convert("RGB")
                ).getbbox():
                    raise OptionError(
                        f"{place} is another picture than the one given now; choose another folder with -o."
                    )
        write(file, facts)

    def facts(self) -> dict[str, Any]:
        """What `begin` wrote.

        Raises:
            OptionError: this is no run's folder.
        """
        file = self.path / "suite.json"
        if not file.is_file():
            raise OptionError(
                f"{self.path} holds no run; `pulid bench run SUITE -o {self.path}` makes one."
            )
        facts: dict[str, Any] = json.loads(file.read_text("utf-8"))
        return facts

    def record(self, cell: SampleKey) -> dict[str, Any] | None:
        """What is known of a cell; None before it was tried."""
        file = self.path / "cells" / f"{cell.stem}.json"
        return json.loads(file.read_text("utf-8")) if file.is_file() else None

    def keep(
        self, cell: SampleKey, record: dict[str, Any], image: Image.Image | None = None
    ) -> None:
        """Image first: a record says that its image is there."""
        file = self.path / "cells" / f"{cell.stem}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        if image is not None:
            save(self.image(cell), image)
        write(file, record)

    def image(self, cell: SampleKey) -> Path:
        """Where its picture lies."""
        return self.path / "cells" / f"{cell.stem}.png"

    def done(self, cell: SampleKey, configuration: Mapping[str, Any] | None = None) -> bool:
        """Whether it was made, with this configuration if one is given; one that failed is tried again. Records of older runs
        do not say which weights the base and the readers of faces had; there the rest of the configuration decides."""
        record = self.record(cell)
        if record is None or record["status"] != "done" or not self.image(cell).is_file():
            return False
        if configuration is None:
            return True
        made: dict[str, Any] = record["configuration"]
        asked = {
            name: value for name, value in configuration.items() if name != WEIGHTS or name in made
        }
        return made == asked


def chunks(suite: Suite, methods: Sequence[str], people: Sequence[str]) -> Iterator[Job]:
    """All of them, methods by turns: what slows a machine for a while slows every method alike."""
    for person in people:
        for prompt in range(len(suite.prompts)):
            for method in methods:
                yield Job(tuple(SampleKey(method, person, prompt, seed) for seed in suite.seeds))


def save(file: Path, image: Image.Image) -> None:
    """A PNG that appears whole or not at all."""
    unfinished = file.with_name(f".{file.stem}.{os.getpid()}.png")
    image.save(unfinished)
    os.replace(unfinished, file)


def write(file: Path, facts: Any) -> None:
    """JSON that appears whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    os.replace(unfinished, file)
