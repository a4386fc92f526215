"""The finished images on the page, and what can be done with them."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from openpulid.web.components import Page
from openpulid.web.history import ARCHIVE
from openpulid.web.updates import PageImage


def show_images(page: Page, images: Sequence[PageImage]) -> dict[Any, Any]:
    """Show images in place of the previous ones, which cannot be selected any more."""
    images = list_present(images)
    files = [(image.file, image.caption) for image in images]
    updates = {
        page.parts["gallery"]: gr.Gallery(value=files, visible=True),
        page.parts["welcome"]: gr.Column(visible=False),
        page.parts["images"]: images,
    }
    if len(images) == 1:
        updates[page.parts["selected"]] = 0
    return updates


def finish(page: Page, images: Sequence[PageImage]) -> dict[Any, Any]:
    """Show all images with what can be done with them; without one, the previous ones stay."""
    parts = page.parts
    updates = {parts["live"]: gr.Image(value=None, visible=False)}
    images = list_present(images)
    if not images:
        return updates
    return {
        **updates,
        **show_images(page, images),
        parts["selected"]: 0,
        parts["actions"]: gr.Row(visible=True),
        parts["compare"]: compare(images, 0),
        parts["download_all"]: zip_images(images),
    }


def list_present(images: Sequence[PageImage]) -> list[PageImage]:
    """Return the images with a file: a visitor may delete all images while others are computed."""
    present = []
    for image in images:
        if Path(image.file).exists():
            has_before = image.before is not None and Path(image.before).exists()
            present.append(image if has_before else replace(image, before=None))
    return present


def compare(images: Sequence[PageImage], index: int) -> Any:
    """Return the update of the slider for one of the images."""
    if not 0 <= index < len(images) or images[index].before is None:
        return gr.ImageSlider(visible=False)
    return gr.ImageSlider(value=(images[index].before, images[index].file), visible=True)


def zip_images(images: Sequence[PageImage]) -> str:
    """Write an archive of a run into its folder, without compressing the images again."""
    path = Path(images[0].file).parent / ARCHIVE.format(images[0].seed)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for image in images:
            archive.write(image.file, Path(image.file).name)
    return str(path)


def connect_results(page: Page) -> None:
    """Connect what can be done with finished images."""
    values, parts = page.values, page.parts
    images, selected = parts["images"], parts["selected"]

    def select(shown: list[PageImage], event: gr.SelectData) -> tuple[int, Any]:
        return event.index, compare(shown, event.index)

    def reuse_seed(shown: list[PageImage], index: int) -> str:
        return str(shown[index].seed)

    def edit(shown: list[PageImage], index: int) -> dict[Any, Any]:
        canvas: dict[str, Any] = {"background": shown[index].file, "layers": [], "composite": None}
        return {
            parts["tabs"]: gr.Tabs(selected="edit"),
            values["mode"]: "edit",
            values["edit_image"]: canvas,
            values["edit_mask"]: None,  # that of another image
        }

    private: dict[str, Any] = {"api_visibility": "private"}
    parts["gallery"].select(select, images, [selected, parts["compare"]], **private)
    parts["reuse_seed"].click(reuse_seed, [images, selected], values["seed"], **private)
    parts["edit_this"].click(
        edit,
        [images, selected],
        [parts["tabs"], values["mode"], values["edit_image"], values["edit_mask"]],
        **private,
    )
