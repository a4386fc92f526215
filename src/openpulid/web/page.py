"""The web page: reference images and a prompt in, images out.

It is served to this machine alone by default.
"""

from __future__ import annotations

import html
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from openpulid.errors import (
    OptionError,
    PulidError,
    explain_missing_library,
    explain_out_of_memory,
)
from openpulid.io.metadata import save_image
from openpulid.io.xmp import DigitalSourceType
from openpulid.pipelines.request import ModelSelection
from openpulid.pipelines.request_fields import RequestError
from openpulid.web.form import FIELD_LABELS, FormValues, PreviewValues, adapt_message
from openpulid.web.network import without_proxy
from openpulid.web.notes import show_notes
from openpulid.web.session import WebSession, open_session

HELP = """**Reference images** of one person, sharp and from the front; several are combined.
**Identity scale**: a higher one is more similar to the person and follows the prompt less.
**Seed**: image k uses seed + k and is the same each time. Uploads stay on the machine that serves
this page and are deleted after an hour, images when it stops."""
UPLOADS: dict[str, Any] = {
    "columns": 3,
    "height": 180,
    "object_fit": "contain",
    "fit_columns": False,
    # the content decides what is an image, not the name: a photo may have none of the usual endings
    "file_types": ["file"],
    "interactive": True,
    "buttons": [],
}
IMAGE_BUTTONS: Any = ["download", "fullscreen"]
"""Buttons of images of a person: none that sends them anywhere."""
OUT_OF_MEMORY_ADVICE = (
    "choose a smaller size, or start the page with --memory 12gb (FLUX only) or another --device"
)
# One visitor's request keeps the others waiting, so these are below the maxima of a request.
MAX_IMAGES = 64
MAX_STEPS = 200
MAX_GUIDANCE = 100
DELETE_CACHE = (600, 3600)
"""Every 600 seconds, uploads older than 3600 seconds are deleted."""


def build_page(session: WebSession) -> Any:
    """Build the page.

    Returns:
        Gradio's Blocks.
    """
    import gradio as gr

    with gr.Blocks(title="openpulid", analytics_enabled=False, delete_cache=DELETE_CACHE) as blocks:
        gr.Markdown("# openpulid\nGenerate images of a person from one photo.")
        with gr.Row():
            with gr.Column(scale=2):
                form = _build_form(session)
            with gr.Column(scale=3):
                gallery = gr.Gallery(
                    label="Images",
                    format="png",
                    columns=2,
                    object_fit="contain",
                    height=640,
                    buttons=IMAGE_BUTTONS,
                )
                preview = gr.Image(
                    label="Detected faces", visible=False, format="png", buttons=IMAGE_BUTTONS
                )
                gr.Markdown(HELP)
        _connect(session, form, gallery, preview)
    return blocks


def _connect(session: WebSession, form: dict[str, Any], gallery: Any, preview: Any) -> None:
    """Connect the events of the page."""
    import gradio as gr

    # one studio, one request at a time
    limits: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "studio"}
    preset, method = form["preset"], form["method"]
    defaults = [form[name] for name in ("scale", "start", "end")]
    preset.input(
        partial(_select_preset, session),
        preset,
        [method, *defaults, form["random_person"]],
        api_name=False,
    )
    method.input(partial(_method_defaults, session), [preset, method], defaults, api_name=False)
    form["random_person"].click(
        partial(_random_person, session.directory),
        None,
        form["reference_images"],
        api_name="person",
    )
    event = form["preview"].click(
        _form_handler(partial(_preview, session), PreviewValues),
        [form[field.name] for field in fields(PreviewValues)],
        preview,
        api_name="faces",
        **limits,
    )
    event.success(lambda: gr.Image(visible=True), None, preview, api_name=False)
    form["generate"].click(
        _form_handler(partial(_generate, session), FormValues),
        [form[field.name] for field in fields(FormValues)],
        gallery,
        api_name="generate",
        **limits,
    )


def _build_form(session: WebSession) -> dict[str, Any]:
    """Build the components of the form.

    Returns:
        One component for each field of `FormValues`, by its name, and three buttons. No number is
        empty: Gradio shows an empty one as 0, so 0 stands for the preset's default.
    """
    import gradio as gr

    form: dict[str, Any] = {}
    _add_person(session, form)
    form["prompt"] = gr.Textbox(label="Prompt", value="portrait, film noir, smiling", lines=2)
    form["generate"] = gr.Button("Generate", variant="primary")
    _add_models(session, form)
    with gr.Row():
        form["num_images"] = gr.Number(
            4, label="Images", precision=0, minimum=1, maximum=MAX_IMAGES
        )
        form["seed"] = gr.Number(0, label="Seed", precision=0, minimum=0)
    form["also_without_identity"] = gr.Checkbox(False, label="Also generate without identity")
    with gr.Accordion("More", open=False):
        form["negative_prompt"] = gr.Textbox(label="Negative prompt (blank: the preset's)")
        with gr.Row():
            form["num_inference_steps"] = gr.Number(
                0, label="Steps (0: the preset's)", precision=0, minimum=0, maximum=MAX_STEPS
            )
            form["guidance_scale"] = gr.Number(
                0, label="Guidance (0: the preset's)", minimum=0, maximum=MAX_GUIDANCE
            )
        form["size"] = gr.Textbox(label="Size", placeholder="WIDTHxHEIGHT")
        with gr.Row():
            form["start"] = gr.Slider(
                0, 1, value=0.0, step=0.05, label="Identity start (fraction of steps)"
            )
            form["end"] = gr.Slider(
                0, 1, value=1.0, step=0.05, label="Identity end (fraction of steps)"
            )
    _add_controls(form)
    return form


def _add_person(session: WebSession, form: dict[str, Any]) -> None:
    import gradio as gr

    form["reference_images"] = gr.Gallery(label="Reference images of one person", **UPLOADS)
    is_miniature = session.preset(session.models).models.is_miniature
    with gr.Row():
        form["random_person"] = gr.Button("Random person", visible=is_miniature, size="sm")
        form["preview"] = gr.Button("Preview face crops", size="sm")
    with gr.Accordion("Identity file, or which face", open=False):
        form["identity_file"] = gr.File(
            label="Identity file (.safetensors)", file_types=[".safetensors"], height=140
        )
        form["face_index"] = gr.Number(
            0, label="Face in images with several (0: the largest)", precision=0, minimum=0
        )


def _add_models(session: WebSession, form: dict[str, Any]) -> None:
    import gradio as gr

    from openpulid.pipelines.weights import find_installed_methods, find_installed_presets

    name = session.models.preset
    names = list(dict.fromkeys([name, *find_installed_presets()]))
    methods = find_installed_methods(session.preset(session.models))
    scale, _, _ = _method_defaults(session, name, "pulid")
    with gr.Row():
        form["preset"] = gr.Dropdown(names, value=name, label="Preset")
        form["method"] = gr.Dropdown(methods, value="pulid", label="Method")
    form["scale"] = gr.Slider(0, 2, value=scale, step=0.05, label="Identity scale")


def _add_controls(form: dict[str, Any]) -> None:
    import gradio as gr

    from openpulid.pipelines.weights import find_installed_controls

    names = find_installed_controls()
    with gr.Accordion("ControlNet", open=False, visible=bool(names)):
        form["control"] = gr.Dropdown([("none", ""), *names], value="", label="ControlNet (SDXL)")
        # not gr.Image, which decodes the file: it drops alpha and profile, and fails on HEIC
        form["control_image"] = gr.File(
            label="Control image; any image for control-edges", height=140
        )
        form["control_scale"] = gr.Slider(0, 2, value=1.0, step=0.05, label="ControlNet scale")


def _form_handler(function: Callable[[Any], Any], form: type) -> Callable[..., Any]:
    """Wrap a function of a form's values for Gradio, which passes the values in order.

    The order is that of the fields of the form's dataclass, and so are the names of the
    parameters in the page's API. Errors of the user, and warnings, are shown on the page.
    """
    import gradio as gr

    names = [field.name for field in fields(form)]

    def handle(*values: Any) -> Any:
        submitted = form(**dict(zip(names, values, strict=True)))

        def show_note(note: str) -> None:
            gr.Warning(html.escape(adapt_message(note, submitted.files())))

        try:
            with (
                show_notes(show_note),
                explain_out_of_memory(OUT_OF_MEMORY_ADVICE),
                explain_missing_library(),
            ):
                return function(submitted)
        except PulidError as error:
            shown = error.rename(FIELD_LABELS) if isinstance(error, RequestError) else error
            message = html.escape(adapt_message(str(shown), submitted.files()), quote=False)
            raise gr.Error(message, duration=None, print_exception=False) from None

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in names]
    handle.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return handle


def _generate(session: WebSession, values: FormValues) -> list[tuple[str, str]]:
    request = values.to_request(session.select_models(values.preset, values.method))
    return session.generate(request, values.also_without_identity)


def _preview(session: WebSession, values: PreviewValues) -> Any:
    models = session.select_models(values.preset, values.method)
    face_index = int(values.face_index) if values.face_index else None
    return session.preview(values.images(), face_index, models)


def _select_preset(session: WebSession, name: str) -> tuple[Any, ...]:
    """Return the methods of a preset, the defaults of the first, and whether people are random."""
    import gradio as gr

    from openpulid.pipelines.weights import find_installed_methods

    preset = session.preset(session.select_models(name))
    methods = find_installed_methods(preset)
    return (
        gr.Dropdown(choices=methods, value=methods[0]),
        *_method_defaults(session, name, methods[0]),
        gr.Button(visible=preset.models.is_miniature),
    )


def _method_defaults(session: WebSession, preset: str, method: str) -> tuple[Any, Any, Any]:
    """Return the default scale, start and end of a method on a preset."""
    identity = session.preset(session.select_models(preset, method)).defaults.identity
    return identity.scale, identity.start, identity.end


def _random_person(directory: Path) -> list[str]:
    """Write a reference image of a held-out synthetic person."""
    from random import randrange

    from openpulid.world import HELD_OUT_PEOPLE
    from openpulid.world.gallery import render_portrait

    number = HELD_OUT_PEOPLE + randrange(100_000)
    path = directory / f"person-{number}.png"
    save_image(render_portrait(number), path, source_type=DigitalSourceType.RENDERED)
    return [str(path)]


@contextmanager
def open_app(
    preset: str = "mini", device: str | None = None, **changes: str | None
) -> Iterator[Any]:
    """Build the page, with a directory for its images that is deleted at the end.

    Args:
        preset: the preset that is selected first.
        device: where to compute.
        changes: what is changed in the preset: fields of `ModelSelection`.

    Raises:
        OptionError: Gradio is not installed, or there is no such preset, or a change does not
            apply to it, or its files are not installed.
        WeightsError: the base model is not installed.
    """
    if find_spec("gradio") is None:
        raise OptionError("the page needs Gradio: pip install 'openpulid[web]'.")
    from openpulid.pipelines.factory import check_models
    from openpulid.pipelines.weights import find_installed_presets, missing_weights

    models = ModelSelection.model_validate({"preset": preset, **changes})
    with without_proxy(), open_session(device, models) as session:
        resolved = session.preset(models)
        if missing := missing_weights(resolved):
            raise OptionError(
                f"preset {preset!r} is not installed, it lacks {', '.join(missing)}; installed: "
                f"{', '.join(find_installed_presets())}. `pulid weights get {preset}` downloads it."
            )
        check_models(resolved)  # fail before the page opens
        yield build_page(session)
