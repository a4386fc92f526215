"""Nodes for several people in one image. They need ComfyUI's list of inputs that grows."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .adapters import ApplyOptions, Person, apply_people
from .nodes_adapter import (
    CATEGORY,
    ApplyNode,
    PulidAdapter,
    find_problem,
    mask_input,
    projection_inputs,
    scale_input,
    span_inputs,
)
from .nodes_identity import PulidIdentity
from .packages import explain_missing_packages

MAX_PEOPLE = 10

PulidPerson = io.Custom("OPENPULID_PERSON")


class DescribePerson(ApplyNode):
    """Gives an identity its weight and place."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return io.Schema(
            node_id="OpenPulidPerson",
            display_name="Person",
            category=CATEGORY,
            description="One of several people in an image: an identity, its scale, and a mask "
            "that is white where the person may be. For Apply PuLID (people).",
            inputs=[PulidIdentity.Input("identity"), scale_input(), mask_input()],
            outputs=[PulidPerson.Output(display_name="person")],
        )

    @classmethod
    def execute(cls, identity: Any, scale: float, mask: Any = None) -> io.NodeOutput:
        """Return the person."""
        return io.NodeOutput(Person(identity, scale, mask))


class ApplyPulidToPeople(io.ComfyNode):
    """Shows several people with a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        people = io.Autogrow.TemplatePrefix(
            PulidPerson.Input("person"), prefix="person_", min=1, max=MAX_PEOPLE
        )
        return io.Schema(
            node_id="OpenPulidApplyPeople",
            display_name="Apply PuLID (people)",
            category=CATEGORY,
            description="Show several people in the images of a model, the same as Apply PuLID "
            "once per person. Connect a Person to each input.",
            inputs=[
                io.Model.Input("model"),
                PulidAdapter.Input("pulid"),
                io.Autogrow.Input("people", template=people),
                *span_inputs(),
                *projection_inputs(),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def validate_inputs(
        cls,
        people: Any = None,
        start: float | None = None,
        end: float | None = None,
        num_zero: int | None = None,
    ) -> bool | str:
        """Check the values before the workflow runs; people are computed by other nodes."""
        return find_problem(start=start, end=end, num_zero=num_zero)

    @classmethod
    @explain_missing_packages
    def execute(
        cls,
        model: Any,
        pulid: Any,
        people: dict[str, Person],
        start: float,
        end: float,
        projection: str,
        num_zero: int,
    ) -> io.NodeOutput:
        """Patch a clone of the model."""
        options = ApplyOptions(1.0, start, end, projection, num_zero)
        return io.NodeOutput(apply_people(model, pulid, people.values(), options))
