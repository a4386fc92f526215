"""Change the settings of the form: another preset or method, or those of an image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from openpulid.errors import PulidError
from openpulid.pipelines.presets import Preset
from openpulid.web.about import describe_preset
from openpulid.web.add_ons import (
    CONTROL_PREFIXES,
    control_choices,
    has_controls,
    has_loras,
    style_choices,
)
from openpulid.web.components import Page
from openpulid.web.fields import FIELDS
from openpulid.web.layout import size_choices
from openpulid.web.marks import show_problem
from openpulid.web.messages import describe_error, error_html, status_html
from openpulid.web.regions import MASK_FILE, PERSON_PREFIXES, SIDE_BY_SIDE, describe_group
from openpulid.web.restore import read_image
from openpulid.web.session import WebSession

Updates = dict[Any, Any]

ADDED_FILES = (
    *("edit_mask", "style_image", "loras", "embeddings"),
    *(f"{prefix}control_image" for prefix in CONTROL_PREFIXES),
)
"""Components with uploads that are removed when the settings of an image are restored."""


def select_preset(session: WebSession, page: Page, name: str) -> Updates:
    """Show the methods, sizes and defaults of a preset, and what it knows."""
    preset = session.preset(session.select_models(name))
    methods = session.method_names(preset)
    is_miniature = preset.models.is_miniature
    parts = page.parts
    updates: Updates = {
        page.values["method"]: gr.Dropdown(choices=methods, value=methods[0]),
        page.values["size"]: gr.update(choices=size_choices(preset), value=""),
        parts["description"]: describe_preset(preset),
        parts["words"]: gr.Accordion(visible=is_miniature),
        parts["photo_examples"]: gr.Dataset(visible=not is_miniature),
        parts["start"]: gr.Button(visible=is_miniature),
    }
    for prefix in page.prefixes:
        updates[parts[prefix + "invent"]] = gr.Button(visible=is_miniature)
    return {**updates, **show_defaults(page, preset)}


def select_method(session: WebSession, page: Page, preset: str, method: str) -> Updates:
    """Show the defaults of a method on a preset."""
    return show_defaults(page, session.preset(session.select_models(preset, method)))


def show_defaults(page: Page, preset: Preset) -> Updates:
    """Show the options of a preset with its defaults, and hide those without effect."""
    controls, styles = control_choices(preset), style_choices(preset)
    add_ons: Updates = {
        page.values[prefix + "control"]: gr.update(choices=controls, value="")
        for prefix in CONTROL_PREFIXES
    }
    add_ons |= {
        page.parts["nets"]: gr.Accordion(visible=has_controls(preset)),
        page.parts["style"]: gr.Accordion(visible=bool(styles)),
        page.values["style_model"]: gr.update(
            choices=styles, value=styles[0][1] if styles else None
        ),
        page.parts["loras"]: gr.Accordion(visible=has_loras(preset)),
    }
    return {**add_ons, **_show_regions(page, preset)} | {
        page.values[entry.name]: gr.update(
            value=entry.default(preset), visible=entry.is_supported(preset)
        )
        for entry in FIELDS
        if entry.is_option
    }


def _show_regions(page: Page, preset: Preset) -> Updates:
    """Show the regions of several people, or hide and reset them for a method without any."""
    has_regions = preset.models.supports_masks
    updates: Updates = {
        page.parts["group"]: describe_group(preset.models),
        page.parts["drawing"]: gr.update(visible=has_regions),
    }
    for prefix in PERSON_PREFIXES:
        region, mask = page.values[prefix + "region"], page.values[prefix + "mask"]
        updates[region] = gr.update(visible=has_regions)
        if not has_regions:
            updates[region] = gr.update(visible=False, value=SIDE_BY_SIDE)
            updates[mask] = gr.update(visible=False)
    return updates


def restore_settings(session: WebSession, page: Page, file: str | None) -> Updates:
    """Show the settings with which an image was generated.

    Nothing is opened because the image names it: files are added again by the user.
    """
    message = page.parts["message"]
    if not file:
        return {message: ""}
    try:
        restored = read_image(session, file)
    except PulidError as error:
        text = describe_error(error, [file])
        return {**show_problem(page, (text, "restore")), message: error_html(text)}
    preset, values = restored.preset, restored.values
    updates = select_preset(session, page, preset.name)
    methods = session.method_names(preset)
    updates[page.values["preset"]] = preset.name
    updates[page.values["method"]] = gr.Dropdown(choices=methods, value=preset.models.method)
    updates |= show_defaults(page, preset)
    updates |= show_problem(page, None)
    for name, value in values.items():
        component = page.values[name]
        is_field = isinstance(updates.get(component), dict)
        updates[component] = {**updates[component], "value": value} if is_field else value
    # other files would give another image; those of people are easily noticed
    for name in ADDED_FILES:
        updates[page.values[name]] = None
    for prefix in PERSON_PREFIXES:
        is_file = values.get(prefix + "region") == MASK_FILE
        updates[page.values[prefix + "mask"]] = gr.File(value=None, visible=is_file)
    updates[page.parts["tabs"]] = gr.Tabs(selected=values["mode"])
    text = f"The settings of {Path(file).name} are restored. {restored.files}"
    return {**updates, message: status_html(text.strip())}
