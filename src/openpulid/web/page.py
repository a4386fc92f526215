"""The studio in the browser: photos and a sentence in, images out. It is served to this machine alone unless told otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from openpulid.errors import OptionError, PulidError, explain_out_of_memory
from openpulid.io.metadata import save_image
from openpulid.web.session import WebSession, installed_controls, installed_presets

HELP = """**Photos** of one person, sharp and from the front; several are read together. **Scale** is how strongly the person
shows: more likeness against more of the prompt. **Seed**: image k has seed + k, and comes out the same each time.
Uploads stay on the machine that serves this page and are deleted after an hour, images when it is stopped."""
PHOTOS: dict[str, Any] = {
    "columns": 3,
    "height": 180,
    "object_fit": "contain",
    "fit_columns": False,
    "file_types": ["image"],
    "interactive": True,
    "buttons": [],
}
KEEP: Any = ["download", "fullscreen"]
"""What can be done with a picture of somebody: nothing that sends it anywhere."""
KEPT = (600, 3600)
"""Every so many seconds uploads older than so many are deleted."""


def page(desk: WebSession) -> Any:
    """The whole page, as Gradio's Blocks."""
    import gradio as gr

    def changed(name: str) -> tuple[Any, ...]:
        from openpulid.pipelines.factory import installed_methods

        here = installed_methods(desk.resolved(name))
        return (
            gr.Dropdown(choices=here, value=here[0]),
            *_acts(desk, name, here[0]),
            gr.Button(visible=name.startswith("mini")),
        )

    with gr.Blocks(title="openpulid", analytics_enabled=False, delete_cache=KEPT) as blocks:
        gr.Markdown("# openpulid\nA person into any image, from one photo.")
        with gr.Row():
            with gr.Column(scale=2):
                fields = _fields(desk)
            with gr.Column(scale=3):
                shown = gr.Gallery(
                    label="Images",
                    format="png",
                    columns=2,
                    object_fit="contain",
                    height=640,
                    buttons=KEEP,
                )
                seen = gr.Image(
                    label="What is read of the photos", visible=False, format="png", buttons=KEEP
                )
                gr.Markdown(HELP)
        photos, file, chosen, method = (
            fields[name] for name in ("photos", "identity_file", "preset", "method")
        )
        one: dict[str, Any] = {
            "concurrency_limit": 1,
            "concurrency_id": "desk",
        }  # one studio, one thing at a time
        acts = [fields[name] for name in ("scale", "start", "end")]
        chosen.input(changed, chosen, [method, *acts, fields["invent"]], api_name=False)
        method.input(partial(_acts, desk), [chosen, method], acts, api_name=False)
        fields["invent"].click(partial(_invented, desk.folder), None, photos, api_name="person")
        asked = [photos, file, fields["face"], chosen, method]
        look = fields["look"].click(_said(desk.faces), asked, seen, api_name="faces", **one)
        look.success(lambda: gr.Image(visible=True), None, seen, api_name=False)
        wanted = [fields[name] for name in fields if name not in ("invent", "look", "make")]
        fields["make"].click(_said(desk.generate), wanted, shown, api_name="generate", **one)
    return blocks


def _fields(desk: WebSession) -> dict[str, Any]:
    """What is asked, by the names of `Desk.generate` and in its order, and three buttons. No number is empty: Gradio
    shows 0 for that, so 0 has to mean it."""
    import gradio as gr

    from openpulid.pipelines.factory import installed_methods

    preset = desk.preset
    fields: dict[str, Any] = {}
    fields["photos"] = gr.Gallery(label="Photos of one person", **PHOTOS)
    with gr.Row():
        fields["invent"] = gr.Button(
            "Invent a person", visible=preset.startswith("mini"), size="sm"
        )
        fields["look"] = gr.Button("What is read of them?", size="sm")
    with gr.Accordion("An identity file, or which face", open=False):
        fields["identity_file"] = gr.File(
            label="Of pulid identify, instead of photos", file_types=[".safetensors"], height=140
        )
        fields["face"] = gr.Number(
            0, label="Which face of photos with several (0: the largest)", precision=0, minimum=0
        )
    fields["prompt"] = gr.Textbox(label="Prompt", value="portrait, film noir, smiling", lines=2)
    fields["make"] = gr.Button("Make", variant="primary")
    with gr.Row():
        fields["preset"] = gr.Dropdown(
            list(dict.fromkeys([preset, *installed_presets()])), value=preset, label="Preset"
        )
        fields["method"] = gr.Dropdown(
            installed_methods(desk.resolved(preset)), value="pulid", label="Method"
        )
    fields["scale"] = gr.Slider(
        0, 2, value=_acts(desk, preset, "pulid")[0], step=0.05, label="Scale"
    )
    with gr.Row():
        fields["images"] = gr.Number(4, label="Images", precision=0, minimum=1, maximum=64)
        fields["seed"] = gr.Number(0, label="Seed", precision=0, minimum=0)
    fields["alone"] = gr.Checkbox(False, label="each without the person too")
    with gr.Accordion("More", open=False):
        fields["negative"] = gr.Textbox(label="What not to show")
        with gr.Row():
            fields["steps"] = gr.Number(0, label="Steps (0: the preset's)", precision=0, minimum=0)
            fields["guidance"] = gr.Number(0, label="Guidance (0: the preset's)", minimum=0)
        fields["size"] = gr.Textbox(label="Size", placeholder="832x1216")
        with gr.Row():
            fields["start"] = gr.Slider(0, 1, value=0.0, step=0.05, label="The person acts from")
            fields["end"] = gr.Slider(
                0, 1, value=1.0, step=0.05, label="to this share of the steps"
            )
    here = installed_controls()
    with gr.Accordion("ControlNet: what else the image keeps to", open=False, visible=bool(here)):
        fields["control"] = gr.Dropdown(
            [("none", ""), *here], value="", label="ControlNet, of SDXL"
        )
        fields["control_picture"] = gr.Image(
            type="filepath", label="What it is shown; for edges any picture", height=180
        )
        fields["control_scale"] = gr.Slider(
            0, 2, value=1.0, step=0.05, label="How strongly it acts"
        )
    return fields


def _acts(desk: WebSession, preset: str, method: str) -> tuple[float, float, float]:
    """How strongly a method acts on a preset and between which shares of the steps, where nobody says."""
    known = desk.resolved(preset, method)
    return known.scale, known.start, known.end


def _invented(folder: Path) -> list[str]:
    """A picture of somebody whom nobody has trained on."""
    from random import randrange

    from openpulid.world import HELD_OUT_PEOPLE
    from openpulid.world.gallery import render_portrait

    number = HELD_OUT_PEOPLE + randrange(100_000)
    file = folder / f"person-{number}.png"
    save_image(render_portrait(number), file)
    return [str(file)]


def _said(work: Callable[..., Any]) -> Callable[..., Any]:
    """The same, with what a user can put right said on the page."""
    from functools import wraps

    import gradio as gr

    @wraps(work)
    def told(*args: Any) -> Any:
        try:
            with explain_out_of_memory():
                return work(*args)
        except PulidError as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from None

    return told


@contextmanager
def open_app(preset: str = "mini", device: str | None = None, **given: Any) -> Iterator[Any]:
    """The page and a folder for its images, which is gone when this closes.

    Args:
        given: as `Desk` has it.

    Raises:
        OptionError: Gradio is not installed, or the preset is unknown or cannot be had so, or its files are not here.
        WeightsError: the base is not.
    """
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise OptionError("the page needs Gradio: pip install 'openpulid[web]'.") from None
    from tempfile import TemporaryDirectory

    from openpulid.pipelines.factory import missing_weights, resolve_path

    with TemporaryDirectory(prefix="openpulid-") as folder:
        desk = WebSession(Path(folder), device, preset, **given)
        chosen = desk.resolved(preset)
        if lacking := missing_weights(chosen):
            here = ", ".join(installed_presets())
            lacks = f"{preset} is not on this machine, it lacks {', '.join(lacking)}"
            raise OptionError(f"{lacks}; {here} are, and `pulid weights get {preset}` gets it.")
        for base in (chosen.pipeline, chosen.transformer):
            if base is not None:
                resolve_path(base)  # one that was given is said to be missing before the page opens
        yield page(desk)
