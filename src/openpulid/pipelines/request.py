"""One generation, described completely: a frozen, validated object that reads and writes JSON.

The command line, the web page, the benchmark's suites and the metadata of image files all build
or read a `GenerationRequest`. `Studio.generate` runs it. Field names are those of diffusers where
diffusers has one. A field that is None takes the default of the preset.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from openpulid.errors import OptionError, suggest
from openpulid.methods.pulid import Projection
from openpulid.pipelines.request_fields import (
    DEFAULT_FACE_ORDER,
    LONGEST_QUOTE,
    MAX_FILES,
    MAX_GUIDANCE,
    MAX_IMAGES,
    MAX_PEOPLE,
    MAX_SEED,
    MAX_STEPS,
    Box,
    Count,
    FaceOrder,
    FilePath,
    Fraction,
    Guidance,
    Name,
    Prompt,
    ResizeMode,
    Scale,
    Seed,
    Side,
    quote,
)
from openpulid.pipelines.request_fields import RequestError as RequestError

SCHEMA_VERSION = 1
MOST_PROBLEMS = 5
"""Problems of a request that one message names."""


def _translate(error: ValidationError) -> RequestError:
    """Turn pydantic's report into one sentence per problem."""
    sentences = []
    fields: list[str] = []
    for problem in error.errors()[:MOST_PROBLEMS]:
        cause = problem.get("ctx", {}).get("error")
        if isinstance(cause, RequestError):
            location = [str(part) for part in problem["loc"]]
            template = cause.template
            # a check of one value does not know its name
            paths = [".".join([*location, field] if field else location) for field in cause.fields]
        else:
            template = _sentence(problem)
            paths = [".".join(map(str, problem["loc"]))]
        sentences.append(_shift_placeholders(template, len(fields)).rstrip("."))
        fields += paths
    return RequestError("; ".join(sentences) + ".", *fields)


def _shift_placeholders(template: str, offset: int) -> str:
    """Renumber `{0}`, `{1}`, ... of a sentence that follows others with `offset` fields."""
    return re.sub(r"(?<!{){(\d)}", lambda match: f"{{{int(match[1]) + offset}}}", template)


def _sentence(problem: Mapping[str, Any]) -> str:
    limits = problem.get("ctx", {})
    kind = problem["type"]
    got = f", got {quote(problem.get('input'))}."
    if kind == "json_invalid":
        return "the request is not valid JSON."
    if kind == "extra_forbidden":
        name = str(problem["loc"][-1])
        if name == "size":
            return "there is no option {0}; use width and height."
        if name in ("mask", "face_index", "face_order") and len(problem["loc"]) == 1:
            return "{0} belongs to a person; use people=[Person(images=[...], {0}=...)]."
        fields = [*GenerationRequest.model_fields, *IDENTITY_NAMES, *Person.model_fields]
        return "there is no option {0}" + suggest(name, fields) + "."
    if kind == "missing":
        return "{0} is missing."
    if kind in ("greater_than_equal", "less_than_equal"):
        low, high = limits.get("ge"), limits.get("le")
        bound = f"at least {low}" if low is not None else f"at most {high}"
        return "{0} must be " + bound.removesuffix(".0") + got
    if kind == "literal_error":
        choices = re.findall(r"'([^']+)'", limits["expected"])
        similar = suggest(problem.get("input"), choices)
        return "{0} must be " + limits["expected"] + got.removesuffix(".") + similar + "."
    if kind == "string_too_short":
        return "{0} must not be empty."
    if kind in ("string_too_long", "too_long"):
        unit = "characters" if kind == "string_too_long" else "entries"
        return f"{{0}} must have at most {limits['max_length']} {unit}."
    if kind == "string_unicode":
        return "{0} is not valid UTF-8 text."
    if kind == "string_type":
        return "{0} must be text" + got
    if kind == "tuple_type":
        return "{0} must be a list" + got
    if kind.startswith("int"):
        return "{0} must be a whole number" + got
    if kind.startswith(("float", "finite")):
        return "{0} must be a number" + got
    return "{0}: " + quote(problem["msg"]).strip("'\"") + got


@contextmanager
def _plain_errors() -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        raise _translate(error) from None


Part = TypeVar("Part", bound="RequestPart")


class RequestPart(BaseModel):
    """Base of a request and its parts: frozen, without unknown fields.

    The fields of a part can be given in order, required ones first, as in
    `Control("control-pose", "pose.png")`.

    Raises:
        RequestError: a field is unknown, missing or out of range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=False)

    def __init__(self, *args: Any, **data: Any) -> None:
        fields = type(self).model_fields
        names = sorted(fields, key=lambda name: not fields[name].is_required())
        if len(args) > len(names):
            raise RequestError(f"expected at most {len(names)} values, got {len(args)}.")
        positional = dict(zip(names, args, strict=False))
        if repeated := [name for name in positional if name in data]:
            raise RequestError("{0} is given twice.", repeated[0])
        with _plain_errors():
            super().__init__(**positional, **data)

    # Tells pydantic that validation of nested parts need not call __init__: errors of a nested
    # part then keep their path in the whole request.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def model_validate(cls: type[Part], obj: Any, **options: Any) -> Part:
        """Build from a mapping. Raises RequestError."""
        with _plain_errors():
            return super().model_validate(obj, **options)

    @classmethod
    def model_validate_json(cls: type[Part], json_data: Any, **options: Any) -> Part:
        """Build from JSON. Raises RequestError."""
        with _plain_errors():
            return super().model_validate_json(json_data, **options)


class Person(RequestPart):
    """A person to show: reference images or an identity file.

    Attributes:
        images: reference images of the person. Several are combined into one identity.
        identity: an identity file of `pulid identify`, instead of images.
        face_index: which face of an image with several, counted from 0 in `face_order`. By
            default the first, with a warning if there are several.
        face_order: how faces are counted.
        mask: an image that is white where the identity may act. By default everywhere.
        box: left, top, right and bottom of the region where the identity may act, as fractions of
            the image's sides, instead of a mask.
        scale: identity scale of this person; by default that of `IdentityOptions`.
    """

    images: tuple[FilePath, ...] = Field(default=(), max_length=MAX_FILES)
    identity: FilePath | None = None
    face_index: Count | None = None
    face_order: FaceOrder = DEFAULT_FACE_ORDER
    mask: FilePath | None = None
    box: Box | None = None
    scale: Scale | None = None

    @property
    def has_region(self) -> bool:
        """Whether the identity is restricted to a part of the image."""
        return self.mask is not None or self.box is not None

    @model_validator(mode="after")
    def _check_source(self) -> Person:
        if self.images and self.identity:
            raise RequestError("provide either images or an identity file, not both.")
        if self.mask and self.box:
            raise RequestError("provide either {0} or {1}, not both.", "mask", "box")
        names = ("face_index", "mask", "box")
        dependent = [name for name in names if getattr(self, name) is not None]
        if self.face_order != DEFAULT_FACE_ORDER:
            dependent.append("face_order")
        for name in dependent:
            if self.identity and name not in ("mask", "box"):
                raise RequestError(
                    "{0} cannot be used with an identity file; pass an image with {1}.",
                    name,
                    "images",
                )
        if not self.images and not self.identity:
            if dependent:
                raise RequestError(
                    "{0} requires a person; pass an image with {1}.", dependent[0], "images"
                )
            raise RequestError(
                "{0} is missing: a person needs images or an identity file.", "images"
            )
        return self


class IdentityOptions(RequestPart):
    """How the identity acts. A field that is None takes the preset's default.

    Attributes:
        scale: identity scale; 0 disables it.
        start, end: fractions of the schedule between which the identity acts, [start, end).
        projection: PuLID on SDXL: how the identity's attention joins the prompt's, see
            `methods.pulid.projection`.
        num_zero: PuLID on SDXL: zero tokens added to the identity's; more of them weaken it.
        start_step: FLUX: step from which the identity acts, instead of `start`.
    """

    scale: Scale | None = None
    start: Fraction | None = None
    end: Fraction | None = None
    projection: Projection | None = None
    num_zero: Count | None = None
    start_step: Count | None = None


class Control(RequestPart):
    """A ControlNet and its image.

    Attributes:
        model: name of published weights, such as `control-pose`, or a directory of diffusers.
        image: the control image. For `control-edges` any image; its edges are detected.
        scale: conditioning scale of the ControlNet.
    """

    model: FilePath
    image: FilePath
    scale: Scale = 1.0


class InitImage(RequestPart):
    """The image to start from: image-to-image, and inpainting with a mask.

    Attributes:
        image: the image. Without a size in the request, its ratio is kept.
        strength: how much is changed, from 0 to 1: the fraction of the steps that is run.
        mask: white where the image is painted anew. The rest stays as it is.
        resize: how an image of another ratio is brought to the size of the request.
    """

    image: FilePath
    strength: Fraction = 0.6
    mask: FilePath | None = None
    resize: ResizeMode = "crop"


class ModelSelection(RequestPart):
    """The models of a request: a preset, and what is changed in it.

    Attributes:
        preset: name of a preset, or a directory with weights laid out like the miniature's.
        base: another base checkpoint: a directory, a single file, or OWNER/NAME in the hub's cache.
        method: another method than PuLID, such as `instantid`.
        adapter: another adapter file of the method.
        face_pack: directory of another insightface pack for detection and recognition.
        memory: FLUX: memory level, see `flux_memory.LEVELS`.
    """

    preset: FilePath = "mini"
    base: FilePath | None = None
    method: Name | None = None
    adapter: FilePath | None = None
    face_pack: FilePath | None = None
    memory: Name | None = None


class GenerationOptions(RequestPart):
    """The options of a generation that have a default in every preset.

    Attributes:
        negative_prompt: negative prompt. "" is an empty one; None is the preset's.
        width, height: size of the image in pixels.
        num_inference_steps: sampling steps.
        guidance_scale: classifier-free guidance scale; on FLUX the distilled guidance.
        true_cfg_scale: FLUX: scale of classifier-free guidance with the negative prompt.
        timestep_to_start_cfg: FLUX: step from which that guidance acts.
        max_sequence_length: FLUX: longest prompt in tokens of T5.
        identity: how the identity acts.
    """

    negative_prompt: Prompt | None = None
    width: Side | None = None
    height: Side | None = None
    num_inference_steps: int | None = Field(default=None, ge=1, le=MAX_STEPS)
    guidance_scale: Guidance | None = None
    true_cfg_scale: float | None = Field(default=None, ge=1, le=MAX_GUIDANCE, allow_inf_nan=False)
    timestep_to_start_cfg: Count | None = None
    max_sequence_length: int | None = Field(default=None, ge=1, le=512)
    identity: IdentityOptions = IdentityOptions()

    @classmethod
    def from_options(cls: type[Part], **options: Any) -> Part:
        """Build from fields of this class and of `IdentityOptions` alike.

        `from_options(guidance_scale=2, scale=0.5)` sets `guidance_scale` and `identity.scale`.
        """
        identity = {name: options.pop(name) for name in IDENTITY_NAMES if name in options}
        if identity:
            options["identity"] = identity
        return cls(**options)

    def list_options(self) -> list[str]:
        """Return the names of all options that are not None, the identity's included."""
        names = [name for name in OPTION_NAMES if getattr(self, name) is not None]
        return names + [name for name in IDENTITY_NAMES if getattr(self.identity, name) is not None]

    def fill_from(self: Part, defaults: GenerationOptions) -> Part:
        """Return a copy in which options that are None have the values of `defaults`."""
        own_identity = self.identity  # type: ignore[attr-defined]
        identity = _fill_missing(own_identity, defaults.identity, IDENTITY_NAMES)
        return _fill_missing(self, defaults, OPTION_NAMES).model_copy(update={"identity": identity})


def _fill_missing(part: Part, defaults: RequestPart, names: tuple[str, ...]) -> Part:
    missing = [name for name in names if getattr(part, name) is None]
    return part.model_copy(update={name: getattr(defaults, name) for name in missing})


IDENTITY_NAMES = tuple(IdentityOptions.model_fields)
OPTION_NAMES = tuple(name for name in GenerationOptions.model_fields if name != "identity")


class GenerationRequest(GenerationOptions):
    """Everything that one generation needs.

    Attributes:
        prompt: what to generate.
        seed: image k uses `seed + k`, so any image can be regenerated on its own. None and -1
            draw a random seed, which the request then has.
        num_images: how many images.
        people: the people to show. Of several, each needs a mask or a box.
        init_image: the image to start from, instead of noise.
        controls: ControlNets. At most one today.
        model: the models; None stands for those of the studio that runs the request.
        resolved: every option has a value; a request that is stored in an image is resolved.
        schema_version: version of this schema.
    """

    prompt: Prompt = Field(min_length=1)
    seed: Seed = 0
    num_images: int = Field(default=1, ge=1, le=MAX_IMAGES)
    people: tuple[Person, ...] = Field(default=(), max_length=MAX_PEOPLE)
    init_image: InitImage | None = None
    controls: tuple[Control, ...] = Field(default=(), max_length=MAX_FILES)
    model: ModelSelection | None = None
    resolved: bool = False
    schema_version: int = SCHEMA_VERSION

    @model_validator(mode="after")
    def _check(self) -> GenerationRequest:
        if self.schema_version != SCHEMA_VERSION:
            raise RequestError(
                f"schema_version {self.schema_version} is not supported; "
                f"this version of openpulid reads {SCHEMA_VERSION}."
            )
        if not self.prompt.strip():
            raise RequestError("{0} must not be empty.", "prompt")
        if self.seed + self.num_images - 1 > MAX_SEED:
            raise RequestError(
                f"{{0}} {self.seed} is too large for {self.num_images} images with the seeds "
                f"after it; the last seed is at most {MAX_SEED}, use a smaller {{0}} or {{1}}.",
                "seed",
                "num_images",
            )
        nowhere = [k for k, person in enumerate(self.people) if not person.has_region]
        if len(self.people) > 1 and nowhere:
            raise RequestError(
                "each of several people needs {0} or {1}, which say where in the image the person "
                f"is; person {nowhere[0] + 1} has none.",
                f"people.{nowhere[0]}.mask",
                f"people.{nowhere[0]}.box",
            )
        if len(self.controls) > 1:
            raise RequestError(
                f"{{0}}: a request can use one ControlNet, got {len(self.controls)}.", "controls"
            )
        return self

    @property
    def identity_scales(self) -> tuple[float, ...]:
        """The identity scale of each person of a resolved request."""
        default = 1.0 if self.identity.scale is None else self.identity.scale
        return tuple(default if person.scale is None else person.scale for person in self.people)

    def for_image(self, seed: int, width: int, height: int) -> GenerationRequest:
        """Return the request that regenerates one image on its own."""
        return self.model_copy(
            update={"seed": seed, "num_images": 1, "width": width, "height": height}
        )

    def with_memory(self, memory: str) -> GenerationRequest:
        """Return the request with another memory level."""
        model = (self.model or ModelSelection()).model_copy(update={"memory": memory})
        return self.model_copy(update={"model": model})

    def without_people(self) -> GenerationRequest:
        """Return the request of the same images without identity."""
        return self.model_copy(update={"people": (), "identity": IdentityOptions()})

    def input_files(self) -> Iterator[tuple[str, str]]:
        """Yield the path of every field that can name a file, and what it names.

        The presets and published weights among them are names, not files.
        """
        for number, person in enumerate(self.people):
            for position, image in enumerate(person.images):
                yield f"people.{number}.images.{position}", image
            if person.identity:
                yield f"people.{number}.identity", person.identity
            if person.mask:
                yield f"people.{number}.mask", person.mask
        if self.init_image is not None:
            yield "init_image.image", self.init_image.image
            if self.init_image.mask:
                yield "init_image.mask", self.init_image.mask
        for number, control in enumerate(self.controls):
            yield f"controls.{number}.model", control.model
            yield f"controls.{number}.image", control.image
        for name in ("preset", "base", "adapter", "face_pack"):
            path = getattr(self.model, name, None)
            if path:
                yield f"model.{name}", path

    def with_files(self, files: Mapping[str, str | os.PathLike[str]]) -> GenerationRequest:
        """Return the request with other input files.

        Args:
            files: path of a field, as in `input_files` -> the file.

        Raises:
            RequestError: a path is none.
        """
        data = self.model_dump()
        for field, path in files.items():
            *parents, last = (int(part) if part.isdigit() else part for part in field.split("."))
            part: Any = data
            for key in parents:
                part[key] = list(part[key]) if isinstance(part[key], tuple) else part[key]
                part = part[key]
            part[last] = path
        return GenerationRequest.model_validate(data)


def parse_size(text: str) -> tuple[int, int]:
    """Parse WIDTHxHEIGHT.

    Raises:
        OptionError: the text is no size.
    """
    match = re.fullmatch(r"\s*([0-9]{1,9})\s*[xX×*]\s*([0-9]{1,9})\s*", text)
    if match is None:
        got = repr(text if len(text) <= LONGEST_QUOTE else text[:LONGEST_QUOTE] + "...")
        raise OptionError(f"expected WIDTHxHEIGHT in pixels, got {got}.")
    return int(match[1]), int(match[2])
