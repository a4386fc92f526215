"""Benchmark suites: subjects, prompts and seeds, described by a JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast, get_args

from pydantic import ConfigDict, Field

from openpulid.bench.files import parse_json, read_json
from openpulid.errors import OptionError, suggest
from openpulid.pipelines.presets import PRESETS, find_preset
from openpulid.pipelines.request import GenerationOptions
from openpulid.pipelines.request_fields import MAX_PROMPT
from openpulid.world import ATTRIBUTES

SUITES = Path(__file__).parent / "suites"

# A suite comes from anybody, like a request.
MAX_PEOPLE = 10_000
MAX_PROMPTS = 10_000
MAX_SEEDS = 1000
MAX_BATCH = 1000

Recognition = Literal["curricularface", "sface"]

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=0, le=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**64)]


@dataclass(frozen=True)
class Prompt:
    """A prompt and the attributes that its image should show.

    Attributes:
        text: the prompt.
        attributes: attribute name -> class, for example "glasses" -> "sunglasses"; empty where no
            classifier can check them.
        person: the only subject that the prompt is for; empty if it is for all.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    text: Annotated[Text, Field(max_length=MAX_PROMPT)]
    attributes: Mapping[str, str] = field(default_factory=dict)
    person: str = ""


@dataclass(frozen=True)
class Suite:
    """Subjects x prompts x seeds.

    Attributes:
        name: of the file by default.
        about: description in one sentence.
        preset: the preset of every method.
        seeds: generated for every prompt; the noise of a seed is the same for every method.
        prompts: generated for every subject, or for the one that a prompt names.
        num_people: number of synthetic subjects; 0 if the subjects are photos.
        first_person: index of the first synthetic subject among the held-out people.
        options: replace the preset's; fields of `GenerationOptions` and `IdentityOptions`.
        identity_prompts: indices of the prompts on which identity is measured. The remaining
            prompts are used for all other metrics. Empty: every prompt is used for everything.
        case_list: name of a list in MultiID-Bench's format, in the folder of the people. Each of
            its cases has a subject, a second image and a prompt.
        shares_seeds: whether all subjects have the same seeds, as in the paper. Otherwise those of
            each subject follow those of the one before, so that there are as many images of the
            base as of a method.
        batch_size: images of a subject that are generated at once, with all their prompts. More
            may be faster, and needs more memory.
        recognition: face recognition model that scores photos: CurricularFace, as in the paper, or
            SFace, whose license allows commercial use.
        published: source -> method -> metric -> value, shown next to the measured values.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    about: str
    preset: Text
    seeds: Annotated[Sequence[Seed], Field(min_length=1, max_length=MAX_SEEDS)]
    prompts: Annotated[Sequence[Prompt], Field(max_length=MAX_PROMPTS)] = ()
    name: str = ""
    num_people: Annotated[int, Field(ge=0, le=MAX_PEOPLE)] = 0
    first_person: Count = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    identity_prompts: Sequence[Count] = ()
    case_list: str = ""
    shares_seeds: bool = True
    batch_size: Annotated[int, Field(ge=1, le=MAX_BATCH)] = 1
    recognition: Recognition = "curricularface"
    published: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)

    @property
    def uses_miniature(self) -> bool:
        """Whether the suite runs on the miniature, whose metric models are shipped.

        A directory is one of a trained miniature.
        """
        return self.preset.startswith("mini") or self.preset not in PRESETS

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Suite:
        """Build a suite from the data of a JSON file.

        Raises:
            OptionError: a field is unknown, missing or of another type.
        """
        return parse_json(cls, json.dumps(dict(data)))

    def with_recognition(self, name: str) -> Suite:
        """Return the suite scored by another face recognition model.

        Published similarities are left out: those of two models cannot be compared.

        Raises:
            OptionError: there is no such model, or the suite has models of its own.
        """
        if name not in get_args(Recognition):
            raise OptionError(
                f"unknown face recognition model {name!r}; choose from "
                f"{', '.join(get_args(Recognition))}."
            )
        if self.uses_miniature:
            raise OptionError(f"suite {self.name} is scored by the miniature's own models.")
        if name == self.recognition:
            return self
        published = {
            source: {
                method: {key: value for key, value in values.items() if key != "face_sim"}
                for method, values in methods.items()
            }
            for source, methods in self.published.items()
        }
        return replace(self, recognition=cast(Recognition, name), published=published)

    def with_preset(self, name: str) -> Suite:
        """Return the suite on another preset.

        Published values are left out: they were measured with another base model. Other presets
        than the miniature's do not know its synthetic people, and no classifier finds attributes in
        their images: a suite of the miniature keeps its prompts and seeds, for photos.

        Raises:
            OptionError: there is no such preset, or the suite is for photos, which the miniature
                cannot show.
        """
        is_miniature = find_preset(name).models.is_miniature
        if name == self.preset:
            return self
        if is_miniature and not self.uses_miniature:
            raise OptionError(
                f"suite {self.name} is for photos, and preset {name!r} shows synthetic people "
                "only; choose the suite miniature or quick."
            )
        suite = replace(self, preset=name, published={})
        if is_miniature or not self.uses_miniature:
            return suite
        return replace(
            suite,
            about=f"The prompts of the suite {self.name} with photos.",
            num_people=0,
            first_person=0,
            batch_size=1,
            prompts=[replace(prompt, attributes={}) for prompt in self.prompts],
        )

    def to_json(self) -> dict[str, Any]:
        """Return all fields as JSON data."""
        data: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return data

    def prompts_of(self, person: str) -> list[int]:
        """Return the indices of the prompts that are generated for a subject."""
        return [index for index, prompt in enumerate(self.prompts) if prompt.person in ("", person)]

    def seeds_of(self, index: int) -> list[int]:
        """Return the seeds of the subject with this index in the run."""
        step = 0 if self.shares_seeds else max(self.seeds) - min(self.seeds) + 1
        return [(seed + index * step) % 2**64 for seed in self.seeds]

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
    advice = f"see {SUITES / 'quick.json'} for an example of a suite."
    suite = read_json(Suite, path, advice)
    suite = replace(suite, name=suite.name or path.stem)
    check_suite(suite, path)
    return suite


def check_suite(suite: Suite, path: Path) -> None:
    """Check what the types of a suite's fields do not say.

    Raises:
        OptionError: names the problem and the file.
    """
    if len(set(suite.seeds)) < len(suite.seeds):
        raise OptionError(f"{path}: the seeds of a suite must differ.")
    if not suite.prompts and not suite.case_list:
        raise OptionError(f"{path}: a suite needs at least one prompt.")
    if Path(suite.case_list).name != suite.case_list:
        raise OptionError(f"{path}: case_list of a suite must be the name of a file.")
    if not set(suite.identity_prompts) <= set(range(len(suite.prompts))):
        raise OptionError(
            f"{path}: identity_prompts of a suite are indices of its prompts, starting at 0."
        )
    try:
        GenerationOptions.from_options(**suite.options)
    except OptionError as error:
        raise OptionError(f"{path}: options of the suite: {error}") from None
    if suite.uses_miniature:
        for prompt in suite.prompts:
            _check_attributes(prompt, path)


def _check_attributes(prompt: Prompt, path: Path) -> None:
    """Raise OptionError if the attribute classifier does not know an attribute."""
    for name, value in prompt.attributes.items():
        if name not in ATTRIBUTES:
            raise OptionError(
                f"{path}: there is no attribute {name!r}; choose from {', '.join(ATTRIBUTES)}."
            )
        if value not in ATTRIBUTES[name]:
            raise OptionError(
                f"{path}: the attribute {name} is one of {', '.join(ATTRIBUTES[name])}, "
                f"not {value!r}."
            )
