"""The fields of the form: which component of the page sets which value of a request.

A new value of a request needs one entry in `FIELDS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from openpulid.methods.pulid import Projection
from openpulid.pipelines.presets import Preset
from openpulid.pipelines.request import (
    IDENTITY_NAMES,
    OPTION_NAMES,
    FaceRefinement,
)
from openpulid.pipelines.request_fields import ResizeMode
from openpulid.pipelines.request_part import RequestPart
from openpulid.web.prompts import DEFAULT_PROMPT

Section = Literal["prompt", "main", "more", "edit", "faces"]


@dataclass(frozen=True)
class Field:
    """A component of the form, and the value of the request that it sets.

    Attributes:
        path: the value, as a dotted path in the request.
        label: of the component, also in messages.
        component: class of Gradio.
        section: where the component is on the page.
        value: what the component shows first. An option of a preset shows the preset's default.
        limits: smallest and largest value on the page. One visitor's request keeps the others
            waiting, so these can be narrower than those of a request.
        settings: further arguments of the component.
        alias: the name of the component, by default the last part of the path.
    """

    path: str
    label: str
    component: str
    section: Section
    value: Any = None
    limits: tuple[float, float] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    alias: str = ""

    @property
    def name(self) -> str:
        """The name of the component in the form, and of the parameter in the page's API."""
        return self.alias or self.path.rpartition(".")[2]

    @property
    def is_option(self) -> bool:
        """Whether every preset has a default for it, or does not support it."""
        return self.path.removeprefix("identity.") in (*OPTION_NAMES, *IDENTITY_NAMES)

    def is_supported(self, preset: Preset) -> bool:
        """Whether the value has an effect with the models of a preset."""
        return not self.is_option or self.name in preset.options

    def default(self, preset: Preset) -> Any:
        """Return what the component shows for a preset. No component is empty but a text.

        Gradio shows an empty number as 0, so 0 means None.
        """
        value = self.read(preset.defaults) if self.is_option else self.value
        if self.component == "Checkbox":
            return bool(value)
        if value is not None:
            return value
        if "choices" in self.settings:
            return self.settings["choices"][0]
        return 0 if self.component == "Number" else ""

    def is_within_limits(self, value: Any) -> bool:
        """Whether a value is one that the page offers."""
        return self.limits is None or self.limits[0] <= value <= self.limits[1]

    def read(self, part: RequestPart) -> Any:
        """Return the value in a request, or in the defaults of a preset."""
        value: Any = part
        for name in self.path.split("."):
            value = getattr(value, name, None)
        return bool(value) if self.component == "Checkbox" else value


FIELDS = (
    Field(
        "prompt",
        "Prompt",
        "Textbox",
        "prompt",
        DEFAULT_PROMPT,
        settings={"lines": 2, "max_lines": 8},
    ),
    Field("num_images", "Images", "Number", "main", 4, (1, 64), {"precision": 0}),
    Field("seed", "Seed", "Textbox", "main", "random", settings={"max_lines": 1}),
    Field("identity.scale", "Identity scale", "Slider", "main", limits=(0, 2)),
    Field(
        "init_image.strength",
        "Strength",
        "Slider",
        "edit",
        0.6,
        (0.05, 1),
        {"info": "How much is changed. For a painted area, 0.8 or more."},
    ),
    Field(
        "init_image.resize",
        "Another ratio than the size",
        "Radio",
        "edit",
        "crop",
        settings={"choices": get_args(ResizeMode)},
    ),
    Field("negative_prompt", "Negative prompt", "Textbox", "more", settings={"lines": 2}),
    Field("num_inference_steps", "Steps", "Number", "more", limits=(1, 200)),
    Field("guidance_scale", "Guidance", "Number", "more", limits=(0, 100)),
    Field("true_cfg_scale", "Guidance by the negative prompt", "Number", "more", limits=(1, 100)),
    Field(
        "timestep_to_start_cfg",
        "Step at which that guidance starts",
        "Number",
        "more",
        limits=(0, 200),
        settings={"precision": 0},
    ),
    Field("max_sequence_length", "Longest prompt in tokens", "Number", "more", limits=(1, 512)),
    Field("identity.start", "Identity start (fraction of steps)", "Slider", "more", limits=(0, 1)),
    Field("identity.end", "Identity end (fraction of steps)", "Slider", "more", limits=(0, 1)),
    Field(
        "identity.start_step",
        "Identity start (step; 0: as above)",
        "Number",
        "more",
        limits=(0, 200),
        settings={"precision": 0},
    ),
    Field(
        "identity.projection",
        "Projection",
        "Dropdown",
        "more",
        settings={"choices": get_args(Projection)},
    ),
    Field("identity.num_zero", "Zero tokens", "Number", "more", limits=(0, 100)),
    Field(
        "identity.pose_from_prompt",
        "Pose from the prompt",
        "Checkbox",
        "more",
        settings={"info": "The identity starts later and acts less."},
    ),
    Field(
        "identity.compiled",
        "Compile identity attention",
        "Checkbox",
        "more",
        settings={"info": "Faster for many images of one size, on a GPU."},
    ),
    Field(
        "refine_faces",
        "Refine small faces",
        "Checkbox",
        "faces",
        settings={"info": "Each face that comes out small is painted again, enlarged."},
    ),
    Field(
        "refine_faces.strength",
        "Change of refined faces",
        "Slider",
        "faces",
        FaceRefinement().strength,
        (0.05, 1),
        {"info": "The fraction of the steps that is run again."},
        "refine_strength",
    ),
    Field(
        "refine_faces.max_size",
        "Largest face that is refined",
        "Slider",
        "faces",
        FaceRefinement().max_size,
        (0.05, 1),
        {"info": "A fraction of the image's shorter side."},
        "refine_size",
    ),
)
"""All fields with one value, in the order of the page."""


def find_fields(*sections: Section) -> list[Field]:
    """Return the fields of some sections of the page."""
    return [entry for entry in FIELDS if entry.section in sections]
