"""Benchmark suites: subjects, prompts and seeds, described by a JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from openpulid.errors import OptionError, suggest
from openpulid.pipelines.request import MAX_SEED, GenerationOptions

SUITES = Path(__file__).parent / "suites"


@dataclass(frozen=True)
class Prompt:
    """A prompt and the attributes that its image should show.

    Attributes:
        text: the prompt.
        attributes: attribute name -> class, for example "glasses" -> "sunglasses"; empty where no
            classifier can check them.
    """

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
        """Build a suite from the data of a JSON file."""
        fields = dict(data)
        prompts = tuple(Prompt(**prompt) for prompt in fields.pop("prompts"))
        return cls(prompts=prompts, **fields)

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
        names = sorted(file.stem for file in SUITES.glob("*.json"))
        raise OptionError(
            f"there is no suite {name!r}{suggest(name, names)}; "
            f"choose from {', '.join(names)}, or pass a JSON file."
        )
    try:
        suite = Suite.from_json({"name": path.stem, **json.loads(path.read_text("utf-8"))})
    except (ValueError, TypeError, KeyError) as error:
        raise OptionError(
            f"{path} is not a valid suite ({error}); see {SUITES / 'quick.json'} for an example."
        ) from None
    _validate(suite, path)
    return suite


def _validate(suite: Suite, path: Path) -> None:
    if not suite.prompts or not suite.seeds:
        raise OptionError(f"{path}: a suite needs at least one prompt and one seed.")
    seeds = suite.seeds if isinstance(suite.seeds, (list, tuple)) else [None]
    if any(type(seed) is not int or not 0 <= seed <= MAX_SEED for seed in seeds):
        raise OptionError(f"{path}: seeds of a suite are whole numbers from 0 to {MAX_SEED}.")
    if not set(suite.identity_prompts) <= set(range(len(suite.prompts))):
        raise OptionError(
            f"{path}: identity_prompts of a suite are indices of its prompts, starting at 0."
        )
    try:
        GenerationOptions.from_options(**suite.options)
    except OptionError as error:
        raise OptionError(f"{path}: options of the suite: {error}") from None
