"""The components of the page."""

from __future__ import annotations

from typing import Any

import gradio as gr

from openpulid.pipelines.presets import Preset
from openpulid.web import prompts
from openpulid.web.about import describe_preset
from openpulid.web.components import Page
from openpulid.web.editor import edit_canvas
from openpulid.web.fields import find_fields
from openpulid.web.layout_add_ons import add_add_ons
from openpulid.web.layout_people import add_group, add_person
from openpulid.web.session import WebSession
from openpulid.web.sizes import list_sizes

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


def build_layout(session: WebSession) -> Page:
    """Build all components."""
    page = Page(session.preset(session.models))
    page.values["mode"] = gr.Textbox("create", visible=False)
    page.parts["job"] = gr.Textbox("", visible=False)
    # part of the page, because its changes cancel a job that waits
    page.parts["cancelled"] = gr.Textbox("", visible="hidden")
    page.parts["visitor"] = gr.BrowserState(None, storage_key="openpulid-visitor")
    page.parts["images"] = gr.State([])
    page.parts["problem"] = gr.State(None)
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
            pass
        if session.history.is_on:
            with gr.Tab("History", id="history") as page.parts["history"]:
                _add_history(page)
        with gr.Tab("About", id="about") as page.parts["about"]:
            page.parts["description"] = gr.Markdown(describe_preset(page.preset))


def _add_edit(page: Page) -> None:
    gr.Markdown("Add an image. Paint over the part that is to change, or nothing to change all.")
    page.values["edit_image"] = edit_canvas(page.preset.models.native_side // 12)
    page.add_mark("edit")
    page.add_fields("edit")
    with gr.Accordion("A mask file instead of paint", open=False):
        page.values["edit_mask"] = gr.File(label="Mask (white: what changes)", height=140)
    page.values["several"] = gr.Checkbox(
        False, label="Several people", info="Each in their own region.", elem_id="several"
    )


def _add_history(page: Page) -> None:
    page.parts["past"] = gr.Gallery(
        label="The newest first",
        columns=4,
        height="auto",
        object_fit="contain",
        allow_preview=False,
        interactive=False,
        buttons=[],
        elem_id="past",
    )
    page.parts["past_images"] = gr.State([])
    gr.Markdown(
        "The images since the page was started. Select one to restore its settings. Only this "
        "browser sees them."
    )
    page.parts["clear"] = gr.Button("Delete all", size="sm")


def _add_shared(page: Page, session: WebSession) -> None:
    """Add what every kind of request has: prompt, buttons, options."""
    values, parts = page.values, page.parts
    with gr.Column(elem_id="shared"):
        with gr.Column(elem_id="person"):
            add_person(page)
        with gr.Column(elem_id="group"):
            add_group(page)
        page.add_fields("prompt")
        page.add_mark("prompt")
        _add_prompt_helper(page)
        with gr.Row():
            num_images, seed, scale = find_fields("main")
            for entry in (num_images, seed):
                page.add_field(entry)
            values["size"] = gr.Dropdown(
                size_choices(page.preset),
                value="",
                label="Size",
                allow_custom_value=True,
            )
        page.add_field(scale)
        page.add_mark("main")
        values["also_without_identity"] = gr.Checkbox(
            False, label="Also generate without identity, to compare"
        )
        _add_models(page, session)
        with gr.Accordion("More options", open=False) as parts["more"]:
            page.add_mark("more", "more")
            page.add_fields("more")
        with gr.Accordion("Small faces", open=False) as parts["small_faces"]:
            page.add_mark("faces", "small_faces")
            page.add_fields("faces")
        add_add_ons(page)
        with gr.Accordion("Restore the settings of an image", open=False) as parts["restoring"]:
            page.add_mark("restore", "restoring")
            parts["restore"] = gr.File(
                label="PNG image of this page", height=120, elem_id="restore"
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
        page.values["preset"] = gr.Dropdown(
            session.preset_names(), value=name, label="Preset", min_width=200
        )
        page.values["method"] = gr.Dropdown(methods, value="pulid", label="Method", min_width=200)
    page.add_mark("models")


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
