"""What a benchmark asks of every method: a suite is data, one JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from openpulid.errors import OptionError
from openpulid.pipelines.request import GenerationOptions

SUITES = Path(__file__).parent / "suites"


@dataclass(frozen=True)
class Prompt:
    """A sentence, and what must be seen in the image where that can be read: attribute -> class."""

    text: str
    wanted: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Suite:
    """People x prompts x seeds.

    Attributes:
        about: one sentence.
        preset: that every method is used with.
        prompts: each for every person.
        seeds: each for every prompt; the noise of a seed is the same for every method.
        people: how many procedural ones; 0 where photographs are to be given.
        first: the first of them, counted from the first held-out one.
        options: of a generation, in place of the preset's: fields of `GenerationOptions` and of
            `IdentityOptions`.
        likeness: prompts (by number) on which the likeness is measured; empty for all. The others tell of the rest.
        published: source -> method -> measure -> number, to stand beside what is measured.
    """

    name: str
    about: str
    preset: str
    prompts: Sequence[Prompt]
    seeds: Sequence[int]
    people: int = 0
    first: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    likeness: Sequence[int] = ()
    published: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """All of it, as it is written down in a run's folder."""
        return json.loads(json.dumps(asdict(self)))


def find_suite(name: str) -> Suite:
    """A suite by its name, or the path of a JSON file with one.

    Raises:
        OptionError: neither, or a file that is no suite.
    """
    file = SUITES / f"{name}.json"
    if not file.is_file():
        file = Path(name)
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in SUITES.glob("*.json")))
        raise OptionError(f"there is no suite {name!r}; name one of {known}, or a JSON file.")
    try:
        facts = {"name": file.stem, **json.loads(file.read_text("utf-8"))}
        prompts = tuple(Prompt(**prompt) for prompt in facts.pop("prompts"))
        suite = Suite(prompts=prompts, **facts)
    except (ValueError, TypeError, KeyError) as error:
        raise OptionError(
            f"{file} is no suite ({error}); {SUITES / 'quick.json'} is one."
        ) from None
    if not prompts or not suite.seeds or not set(suite.likeness) <= set(range(len(prompts))):
        raise OptionError(
            f"{file}: a suite has prompts and seeds, and `likeness` counts its prompts from 0."
        )
    try:
        GenerationOptions.from_options(**suite.options)
    except OptionError as error:
        raise OptionError(f"{file}: options of the suite: {error}") from None
    return suite
