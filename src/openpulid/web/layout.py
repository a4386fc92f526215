"""The components of the page."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from openpulid.pipelines.presets import Preset
from openpulid.web import prompts
from openpulid.web.about import describe_preset
from openpulid.web.add_ons import (
    CONTROL_PREFIXES,
    MAP_CHOICES,
    control_choices,
    has_loras,
    style_choices,
)
from openpulid.web.editor import edit_canvas, region_canvas
from openpulid.web.fields import Field, Section, find_fields
from openpulid.web.form import DRAWN, PERSON_COLORS, PERSON_PREFIXES, REGIONS, SIDE_BY_SIDE
from openpulid.web.session import WebSession
from openpulid.web.sizes import canvas_size, list_sizes

UPLOADS: dict[str, Any] = {
    "object_fit": "contain",
    "fit_columns": False,
    # the content decides what is an image, not the name: a photo may have none of the usual endings
    "file_types": ["file"],
    "interactive": True,
    "buttons": [],
}
IMAGE_BUTTONS: Any = ["download", "fullscreen"]
"""Buttons of images of a person: none that sends them anywhere."""

AUTOMATIC_SIZE = ("Automatic", "")
"""The preset's size; with an image to edit, its ratio."""

WELCOME = """### Your images appear here

1. Add one or more images of a person, or invent one.
2. Describe the image in the prompt.
3. Press **Generate**."""


def size_choices(preset: Preset) -> list[tuple[str, str]]:
    """Return label and value of the sizes that are offered."""
    return [AUTOMATIC_SIZE, *list_sizes(preset)]


def fit_canvas(size: str | None) -> Any:
    """Return the update of the canvas for regions that gives it the ratio of a size."""
    return gr.ImageEditor(canvas_size=canvas_size(size))


@dataclass
class Page:
    """The components of the page.

    Attributes:
        preset: the preset that is selected first.
        values: the components whose values describe a request, by the names of `FormValues`.
        parts: all others, such as buttons and results.
        prefixes: of the names of the components of each person.
    """

    preset: Preset
    values: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)
    prefixes: tuple[str, ...] = ("", *PERSON_PREFIXES)

    def add_fields(self, *sections: Section) -> None:
        """Add the components of all fields of some sections."""
        for entry in find_fields(*sections):
            self.values[entry.name] = build_field(entry, self.preset)


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


def build_layout(session: WebSession) -> Page:
    """Build all components."""
    page = Page(session.preset(session.models))
    page.values["mode"] = gr.Textbox("create", visible=False)
    page.parts["job"] = gr.Textbox("", visible=False)
    page.parts["visitor"] = gr.BrowserState(None, storage_key="openpulid-visitor")
    page.parts["images"] = gr.State([])
    page.parts["selected"] = gr.State(0)
    gr.Markdown(
        "# openpulid\nGenerate images of a person from one photo, without training.",
        elem_id="title",
    )
    with gr.Row(elem_id="columns"):
        with gr.Column(scale=5, min_width=340):
            _add_tabs(page, session)
            _add_shared(page, session)
        with gr.Column(scale=6, min_width=340, elem_id="results"):
            _add_results(page)
    return page


def _add_tabs(page: Page, session: WebSession) -> None:
    with gr.Tabs(elem_id="tabs") as page.parts["tabs"]:
        with gr.Tab("Create", id="create", elem_id="create") as page.parts["create"]:
            pass
        with gr.Tab("Edit", id="edit", elem_id="edit") as page.parts["edit"]:
            _add_edit(page)
        with gr.Tab("Several people", id="people", elem_id="people") as page.parts["people"]:
            _add_people(page)
        if session.history.is_on:
            with gr.Tab("History", id="history") as page.parts["history"]:
                _add_history(page)
        with gr.Tab("About", id="about") as page.parts["about"]:
            page.parts["description"] = gr.Markdown(describe_preset(page.preset))


def _add_edit(page: Page) -> None:
    gr.Markdown("Add an image. Paint over the part that is to change, or nothing to change all.")
    page.values["edit_image"] = edit_canvas(page.preset.models.native_side // 12)
    page.add_fields("edit")


def _add_people(page: Page) -> None:
    gr.Markdown(
        "Two to four people in one image, each in their own region. The prompt describes the image."
    )
    for pair in (PERSON_PREFIXES[:2], PERSON_PREFIXES[2:]):
        with gr.Row():
            for prefix in pair:
                with gr.Column(min_width=240):
                    _add_person_card(page, prefix)
    with gr.Accordion("Draw the regions", open=False) as page.parts["drawing"]:
        _add_drawing(page)


def _add_person_card(page: Page, prefix: str) -> None:
    number = PERSON_PREFIXES.index(prefix)
    title = f"Person {number + 1} ({PERSON_COLORS[number]})"
    with gr.Accordion(title if number < 2 else f"{title}, optional", open=number < 2):
        _add_person(page, prefix)
        page.values[prefix + "region"] = gr.Dropdown(
            [SIDE_BY_SIDE, *REGIONS, DRAWN], value=SIDE_BY_SIDE, label="Region"
        )
        page.values[prefix + "scale"] = gr.Slider(
            0, 2, value=0, step=0.05, label="Scale (0: as for all)"
        )


def _add_drawing(page: Page) -> None:
    colors = ", ".join(f"person {k} in {color}" for k, color in enumerate(PERSON_COLORS, 1))
    gr.Markdown(f"Choose the brush and paint {colors}. Leave gaps between people.")
    page.values["regions"] = region_canvas()


def _add_person(page: Page, prefix: str = "") -> None:
    """Add the images or the identity file of one person."""
    label = "Reference images of one person" if not prefix else "Reference images"
    height = 140 if prefix else 180
    values, parts = page.values, page.parts
    small: Any = {"size": "sm", "min_width": 60}
    values[prefix + "reference_images"] = gr.Gallery(
        label=label, height=height, columns=2 if prefix else 4, **UPLOADS
    )
    with gr.Row(elem_classes="actions"):
        parts[prefix + "invent"] = gr.Button(
            "Invent" if prefix else "Invent a person",
            visible=page.preset.models.is_miniature,
            **small,
        )
        parts[prefix + "preview"] = gr.Button("Faces" if prefix else "Preview faces", **small)
        parts[prefix + "save"] = gr.Button("Save" if prefix else "Save identity", **small)
    parts[prefix + "download"] = gr.DownloadButton("Download", visible=False, size="sm")
    with gr.Accordion("Identity file, or which face", open=False):
        values[prefix + "identity_file"] = gr.File(
            label="Identity file (.safetensors)", file_types=[".safetensors"], height=140
        )
        values[prefix + "face_index"] = gr.Number(
            0, label="Face in images with several (0: the largest)", precision=0
        )


def _add_history(page: Page) -> None:
    page.parts["past"] = gr.Gallery(
        label="Images since the page was started, the newest first",
        columns=4,
        height=420,
        object_fit="contain",
        allow_preview=False,
        interactive=False,
        buttons=[],
    )
    gr.Markdown("Select an image to restore its settings. Only this browser sees them.")
    page.parts["clear"] = gr.Button("Delete all", size="sm")


def _add_shared(page: Page, session: WebSession) -> None:
    """Add what every kind of request has: prompt, buttons, options."""
    values, parts = page.values, page.parts
    with gr.Column(elem_id="shared"):
        with gr.Column(elem_id="person"):
            _add_person(page)
        page.add_fields("prompt")
        _add_prompt_helper(page)
        with gr.Row():
            num_images, seed, scale = find_fields("main")
            for entry in (num_images, seed):
                values[entry.name] = build_field(entry, page.preset)
            values["size"] = gr.Dropdown(
                size_choices(page.preset),
                value="",
                label="Size",
                allow_custom_value=True,
            )
        values[scale.name] = build_field(scale, page.preset)
        values["also_without_identity"] = gr.Checkbox(
            False, label="Also generate without identity, to compare"
        )
        _add_models(page, session)
        with gr.Accordion("More options", open=False):
            page.add_fields("more")
        _add_add_ons(page)
        with gr.Accordion("Restore the settings of an image", open=False):
            parts["restore"] = gr.File(
                label="Drop a PNG image of this page; its settings are restored", height=120
            )
    with gr.Column(elem_id="run"):
        parts["message"] = gr.HTML("", label="Message", elem_id="message")
        with gr.Row():
            parts["generate"] = gr.Button("Generate", variant="primary", elem_id="generate")
            parts["stop"] = gr.Button("Stop", variant="stop", visible=False, elem_id="stop")


def _add_prompt_helper(page: Page) -> None:
    """Add words and examples to choose from."""
    is_miniature = page.preset.models.is_miniature
    chips: Any = {"components": [gr.Textbox(visible=False)], "type": "index"}
    page.parts["photo_examples"] = gr.Dataset(
        samples=[[text] for text in prompts.PHOTO_EXAMPLES],
        label="Examples",
        visible=not is_miniature,
        **chips,
    )
    with gr.Accordion(
        "Words that the miniature knows", open=False, visible=is_miniature
    ) as page.parts["words"]:
        page.parts["mini_examples"] = gr.Dataset(
            samples=[[text] for text in prompts.MINI_EXAMPLES], label="Examples", **chips
        )
        for topic, phrases in prompts.list_topics().items():
            page.parts[f"words_{topic}"] = gr.Dataset(
                samples=[[phrase] for phrase in phrases],
                label=topic.capitalize(),
                samples_per_page=40,
                **chips,
            )


def _add_models(page: Page, session: WebSession) -> None:
    name = session.models.preset
    methods = session.method_names(page.preset)
    with gr.Row():
        page.values["preset"] = gr.Dropdown(session.preset_names(), value=name, label="Preset")
        page.values["method"] = gr.Dropdown(methods, value="pulid", label="Method")


def _add_add_ons(page: Page) -> None:
    """Add ControlNets, the style image, LoRAs and textual inversion, as far as there are any."""
    choices = control_choices(page.preset)
    with gr.Accordion("ControlNet", open=False, visible=len(choices) > 1) as page.parts["nets"]:
        for prefix in CONTROL_PREFIXES:
            _add_control(page, prefix, choices)
    styles = style_choices(page.preset)
    with gr.Accordion("Style of another image", open=False, visible=bool(styles)) as page.parts[
        "style"
    ]:
        page.values["style_image"] = gr.File(label="Style image", height=140)
        page.values["style_scale"] = gr.Slider(0, 1, value=0.5, step=0.05, label="Style scale")
        page.values["style_model"] = gr.Dropdown(
            styles, value=styles[0] if styles else None, label="IP-Adapter"
        )
    with gr.Accordion(
        "LoRA and textual inversion", open=False, visible=has_loras(page.preset)
    ) as page.parts["loras"]:
        files: Any = {"file_count": "multiple", "file_types": [".safetensors"], "height": 140}
        page.values["loras"] = gr.File(label="LoRAs (.safetensors)", **files)
        page.values["lora_scale"] = gr.Slider(-2, 2, value=1.0, step=0.05, label="LoRA scale")
        page.values["embeddings"] = gr.File(
            label="Textual inversion (.safetensors); the name of a file is a word for the prompt",
            **files,
        )


def _add_control(page: Page, prefix: str, choices: list[tuple[str, str]]) -> None:
    values = page.values
    name = "Second ControlNet" if prefix else "ControlNet"
    values[prefix + "control"] = gr.Dropdown(choices, value="", label=name)
    # not gr.Image, which decodes the file: it drops alpha and profile, and fails on HEIC
    values[prefix + "control_image"] = gr.File(label=f"Image of the {name}", height=140)
    values[prefix + "control_map"] = gr.Dropdown(
        MAP_CHOICES, value="", label="What the control image shows"
    )
    values[prefix + "control_scale"] = gr.Slider(0, 2, value=1.0, step=0.05, label=f"{name} scale")
    with gr.Row():
        for end, value in (("start", 0.0), ("end", 1.0)):
            values[f"{prefix}control_{end}"] = gr.Slider(
                0, 1, value=value, step=0.05, label=f"{name} {end} (fraction of steps)"
            )


def _add_results(page: Page) -> None:
    parts = page.parts
    with gr.Column(elem_id="welcome") as parts["welcome"]:
        gr.Markdown(WELCOME)
        parts["start"] = gr.Button(
            "Invent a person and generate",
            visible=page.preset.models.is_miniature,
            variant="primary",
        )
    parts["live"] = gr.Image(
        label="In progress",
        visible=False,
        height=300,
        buttons=[],
        interactive=False,
        elem_id="live",
    )
    parts["gallery"] = gr.Gallery(
        label="Images",
        format="png",
        columns=2,
        object_fit="contain",
        height="auto",
        visible=False,
        interactive=False,
        buttons=IMAGE_BUTTONS,
        elem_id="images",
    )
    with gr.Row(visible=False, elem_classes="actions") as parts["actions"]:
        parts["download_all"] = gr.DownloadButton("Download all", size="sm")
        parts["reuse_seed"] = gr.Button("Reuse this seed", size="sm")
        parts["edit_this"] = gr.Button("Edit this image", size="sm")
    parts["compare"] = gr.ImageSlider(
        label="Before and after",
        type="filepath",
        format="png",
        visible=False,
        interactive=False,
        buttons=["fullscreen"],
        max_height=420,
        elem_id="compare",
    )
    parts["faces"] = gr.Image(
        label="Detected faces", visible=False, format="png", buttons=IMAGE_BUTTONS
    )
