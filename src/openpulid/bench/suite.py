"""Benchmark suites: subjects, prompts and seeds, described by a JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict

from openpulid.bench.parsing import STRICT, parse, read_json
from openpulid.errors import OptionError
from openpulid.pipelines.request import GenerationOptions

SUITES = Path(__file__).parent / "suites"


@dataclass(frozen=True)
class Prompt:
    """A prompt and the attributes that its image should show.

    Attributes:
        text: the prompt.
        attributes: attribute name -> class, for example "glasses" -> "sunglasses"; empty where no
            classifier can check them.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    text: str
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Suite:
    """Subjects x prompts x seeds.

    Attributes:
        about: description in one sentence.
        preset: the preset of every method.
        prompts: generated for every subject.
        seeds: generated for every prompt; the noise of a seed is the same for every method.
        num_people: number of synthetic subjects; 0 if the subjects are photos.
        first_person: index of the first synthetic subject among the held-out people.
        options: replace the preset's; fields of `GenerationOptions` and `IdentityOptions`.
        identity_prompts: indices of the prompts on which identity is measured. The remaining
            prompts are used for all other metrics. Empty: every prompt is used for everything.
        published: source -> method -> metric -> value, shown next to the measured values.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: str
    about: str
    preset: str
    prompts: Sequence[Prompt]
    seeds: Sequence[int]
    num_people: int = 0
    first_person: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    identity_prompts: Sequence[int] = ()
    published: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)

    @property
    def uses_miniature(self) -> bool:
        """Whether the suite runs on the miniature, whose metric models are shipped."""
        return self.preset.startswith("mini")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Suite:
        """Build a suite from the data of a JSON file.

        Raises:
            ValueError: the data have other fields or types.
        """
        return parse(dict(data), cls)

    def to_json(self) -> dict[str, Any]:
        """Return all fields as JSON data."""
        data: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return data

    def is_scored(self, prompt: int, *, identity: bool) -> bool:
        """Return whether a prompt counts for the metrics of identity, or for the others."""
        if not self.identity_prompts:
            return True
        return (prompt in self.identity_prompts) == identity


def load_suite(name: str) -> Suite:
    """Load a suite by its name or from a JSON file.

    Raises:
        OptionError: there is no such suite, or the file is invalid.
    """
    path = SUITES / f"{name}.json"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in SUITES.glob("*.json")))
        raise OptionError(f"there is no suite {name!r}; choose from {names}, or pass a JSON file.")
    example = SUITES / "quick.json"
    suite = read_json(path, Suite, f"see {example} for an example of a suite", name=path.stem)
    _validate(suite, path)
    return suite


def _validate(suite: Suite, path: Path) -> None:
    if not suite.prompts or not suite.seeds:
        raise OptionError(f"{path}: a suite needs at least one prompt and one seed.")
    if not set(suite.identity_prompts) <= set(range(len(suite.prompts))):
        raise OptionError(
            f"{path}: identity_prompts of a suite are indices of its prompts, starting at 0."
        )
    try:
        GenerationOptions.from_options(**suite.options)
    except OptionError as error:
        raise OptionError(f"{path}: options of the suite: {error}") from None
