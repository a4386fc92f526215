"""The components of the page by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from openpulid.pipelines.presets import Preset
from openpulid.web.fields import Field, Section, find_fields
from openpulid.web.regions import PERSON_PREFIXES


@dataclass
class Page:
    """The components of the page.

    Attributes:
        preset: the preset that is selected first.
        values: the components whose values describe a request, by the names of `FormValues`.
        parts: all others, such as buttons and results.
        panels: place of a message, see `places` -> names of the accordions around it in `parts`.
        prefixes: of the names of the components of each person.
    """

    preset: Preset
    values: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)
    panels: dict[str, tuple[str, ...]] = field(default_factory=dict)
    prefixes: tuple[str, ...] = ("", *PERSON_PREFIXES)

    def add_fields(self, *sections: Section) -> None:
        """Add the components of all fields of some sections."""
        for entry in find_fields(*sections):
            self.add_field(entry)

    def add_field(self, entry: Field) -> None:
        """Add the component of a field."""
        self.values[entry.name] = build_field(entry, self.preset)

    def add_mark(self, place: str, *panels: str) -> None:
        """Add the message of an error next to the components that it is about.

        Args:
            place: one of `places`.
            panels: names of the accordions around it, which are opened with it.
        """
        self.parts[mark_name(place)] = gr.HTML("", elem_classes="mark")
        self.panels[place] = panels


RESULTS = ("gallery", "images", "actions", "compare", "download_all", "welcome")
"""Names of the components that `remove_results` changes."""


def remove_results(page: Page) -> dict[Any, Any]:
    """Show no images any more: the page is as at its start."""
    parts = page.parts
    return {
        parts["gallery"]: gr.Gallery(value=None, visible=False),
        parts["images"]: [],
        parts["actions"]: gr.Row(visible=False),
        parts["compare"]: gr.ImageSlider(value=None, visible=False),
        parts["download_all"]: gr.DownloadButton(value=None),
        parts["welcome"]: gr.Column(visible=True),
    }


def mark_name(place: str) -> str:
    """Return the name of the component for errors in a place."""
    return f"{place}_mark"


def build_field(entry: Field, preset: Preset) -> Any:
    """Build the component of a field, with the default of a preset."""
    settings = dict(entry.settings)
    if entry.component == "Slider":
        assert entry.limits is not None
        settings |= {"minimum": entry.limits[0], "maximum": entry.limits[1], "step": 0.05}
    return getattr(gr, entry.component)(
        value=entry.default(preset),
        label=entry.label,
        visible=entry.is_supported(preset),
        **settings,
    )
