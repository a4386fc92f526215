"""One generation, described completely: a frozen, validated object that reads and writes JSON.

The command line, the web page, the benchmark's suites and the metadata of image files all build
or read a `GenerationRequest`. `Studio.generate` runs it. Field names are those of diffusers where
diffusers has one. A field that is None takes the default of the preset.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    model_validator,
)

from openpulid.methods.pulid import Projection
from openpulid.pipelines.request_fields import (
    MAX_CONTROLS,
    MAX_FILES,
    MAX_GUIDANCE,
    MAX_IMAGES,
    MAX_PEOPLE,
    MAX_SEED,
    MAX_STEPS,
    Count,
    FilePath,
    Fraction,
    Guidance,
    Name,
    Prompt,
    RequestError,
    Scale,
    Seed,
    Side,
    quote,
)
from openpulid.pipelines.request_inputs import (
    Control,
    Embedding,
    InitImage,
    Lora,
    Person,
    StyleImage,
)
from openpulid.pipelines.request_part import Part, RequestPart

SCHEMA_VERSION = 1


def _none_if_false(value: bool | None) -> bool | None:
    return value or None


class IdentityOptions(RequestPart):
    """How the identity acts. A field that is None takes the preset's default.

    Attributes:
        scale: identity scale; 0 disables it.
        start, end: fractions of the schedule between which the identity acts, [start, end).
        projection: PuLID on SDXL: how the identity's attention joins the prompt's, see
            `methods.pulid.projection`.
        num_zero: PuLID on SDXL: zero tokens added to the identity's; more of them weaken it.
        start_step: FLUX: step from which the identity acts, instead of `start`.
        compiled: PuLID on SDXL: compile identity attention, which changes the image by rounding. By
            default where it saves time: on an NVIDIA GPU for many images.
        pose_from_prompt: start later and at a lower scale, so that the prompt decides on the pose.
            It sets `start` and `scale` where they are None.
    """

    scale: Scale | None = None
    start: Fraction | None = None
    end: Fraction | None = None
    projection: Projection | None = None
    num_zero: Count | None = None
    start_step: Count | None = None
    compiled: bool | None = None
    pose_from_prompt: Annotated[bool | None, AfterValidator(_none_if_false)] = None

    @property
    def adapter_options(self) -> dict[str, Any]:
        """The options that the method itself takes."""
        return self.model_dump(exclude={"pose_from_prompt"})

    def fill_pose(self, pose: IdentityOptions) -> IdentityOptions:
        """Return the options with start and scale of `pose` if the prompt decides on the pose.

        Args:
            pose: the values of the preset. What is set already is kept.
        """
        if not self.pose_from_prompt:
            return self
        names = ["scale"]
        if self.start is None and self.start_step is None:
            names.append("start")
        return _fill_missing(self, pose, tuple(names))


class FaceRefinement(RequestPart):
    """A second pass on small faces: each is enlarged, repainted with the identity, and put back.

    Attributes:
        strength: how much of the face is changed, from 0 to 1: the fraction of the steps that is
            run.
        max_size: faces are refined whose longer side is below this fraction of the image's shorter
            side.
    """

    strength: Fraction = 0.5
    max_size: Fraction = 0.3


def _parse_refinement(value: Any) -> Any:
    """Replace True by the default refinement, and False by none."""
    if isinstance(value, bool):
        return FaceRefinement() if value else None
    return value


def _parse_method(name: str | None) -> str | None:
    return None if name == "pulid" else name


OPEN_FACES = "open"
"""The `face_pack` of face models whose licenses allow commercial use."""


class ModelSelection(RequestPart):
    """The models of a request: a preset, and what is changed in it.

    Attributes:
        preset: name of a preset, or a directory with weights laid out like the miniature's.
        base: another base checkpoint: a directory, a single file, or OWNER/NAME in the hub's cache.
        method: another method than PuLID, such as `instantid`; "pulid" is stored as None.
        adapter: another adapter file of the method.
        face_pack: "open" for face models whose licenses allow commercial use, or the directory of
            another insightface pack for detection and recognition.
        memory: memory level, see `memory_levels.LEVELS`.
    """

    files = ("preset", "base", "adapter", "face_pack")

    preset: FilePath = "mini"
    base: FilePath | None = None
    method: Annotated[Name | None, AfterValidator(_parse_method)] = None
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
        people: the people to show. Of several, each needs a mask or a box; with FastComposer none
            has one, and each needs a word in the prompt, in the same order.
        init_image: the image to start from, instead of noise.
        controls: ControlNets; their effects add up.
        loras: LoRAs of the base model.
        embeddings: words of textual inversion.
        style_image: an image whose style the result takes.
        refine_faces: a second pass on small faces; True for one with the default options.
        model: the models; None stands for those of the studio that runs the request.
        resolved: every option has a value; a request that is stored in an image is resolved.
        schema_version: version of this schema.
    """

    prompt: Prompt = Field(min_length=1)
    seed: Seed = 0
    num_images: int = Field(default=1, ge=1, le=MAX_IMAGES)
    people: tuple[Person, ...] = Field(default=(), max_length=MAX_PEOPLE)
    init_image: InitImage | None = None
    controls: tuple[Control, ...] = Field(default=(), max_length=MAX_CONTROLS)
    loras: tuple[Lora, ...] = Field(default=(), max_length=MAX_FILES)
    embeddings: tuple[Embedding, ...] = Field(default=(), max_length=MAX_FILES)
    style_image: StyleImage | None = None
    refine_faces: Annotated[FaceRefinement | None, BeforeValidator(_parse_refinement)] = None
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
        self._check_tokens()
        return self

    def _check_tokens(self) -> None:
        """Check that no word of textual inversion is part of another word, which it would split."""
        for number, embedding in enumerate(self.embeddings):
            token = re.escape(embedding.word)
            for field in ("prompt", "negative_prompt"):
                match = re.search(rf"\w+{token}\w*|{token}\w+", getattr(self, field) or "")
                if match and re.fullmatch(r"\w+", embedding.word):
                    raise RequestError(
                        f"the word {quote(embedding.word)} of an embedding is part of "
                        f"{quote(match[0])} in {{1}}; set {{0}} to another word.",
                        f"embeddings.{number}.token",
                        field,
                    )

    @property
    def identity_scales(self) -> tuple[float, ...]:
        """The identity scale of each person of a resolved request."""
        default = 1.0 if self.identity.scale is None else self.identity.scale
        return tuple(default if person.scale is None else person.scale for person in self.people)

    def image_size(self, native_side: int) -> tuple[int, int]:
        """Return the width and height of the images in pixels.

        Args:
            native_side: of the models; the length of a side that is None.
        """
        return self.width or native_side, self.height or native_side

    def for_image(self, seed: int, width: int, height: int) -> GenerationRequest:
        """Return the request that regenerates one image on its own."""
        return self.model_copy(
            update={"seed": seed, "num_images": 1, "width": width, "height": height}
        )

    def with_memory(self, memory: str) -> GenerationRequest:
        """Return the request with another memory level."""
        model = (self.model or ModelSelection()).model_copy(update={"memory": memory})
        return self.model_copy(update={"model": model})

    def with_compiled(self, compiled: bool) -> GenerationRequest:
        """Return the request with or without compiled identity attention."""
        identity = self.identity.model_copy(update={"compiled": compiled})
        return self.model_copy(update={"identity": identity})

    def without_people(self) -> GenerationRequest:
        """Return the request of the same images without identity."""
        return self.model_copy(update={"people": (), "identity": IdentityOptions()})

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
        RequestError: the text is no size.
    """
    match = re.fullmatch(r"\s*([0-9]{1,9})\s*[xX×*]\s*([0-9]{1,9})\s*", text)
    if match is None:
        message = f"expected WIDTHxHEIGHT in pixels, got {quote(text)}."
        raise RequestError(message, "width", "height")
    return int(match[1]), int(match[2])
