"""The command `pulid`: arguments in, parts wired, one plain sentence where something is wrong.

Nothing heavy is imported before a command runs, so that help and mistakes answer at once.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openpulid.cli import bench as measures
from openpulid.cli import train as workshop
from openpulid.cli import weights as stores
from openpulid.cli.options import (
    AsJson,
    Base,
    Device,
    Faces,
    Folder,
    folder,
    last_line,
    picture_file,
    say,
    silent,
)
from openpulid.cli.web import web
from openpulid.errors import OptionError, PulidError, explain_out_of_memory
from openpulid.io import metadata as again
from openpulid.io.metadata import image_name, save_image
from openpulid.pipelines.controlnet import use_controlnet
from openpulid.pipelines.request import parse_size, request_of

if TYPE_CHECKING:
    from openpulid.identity.identity import Identity
    from openpulid.pipelines import presets
    from openpulid.pipelines.studio import Studio

Preset = Annotated[str, typer.Option(help="The model, see `pulid presets list`; or a folder.")]
Face = Annotated[
    str | None, typer.Option(help="Which face of a picture with several, from 0; `all` lists them.")
]
Order = Annotated[
    str,
    typer.Option(
        help="How faces are counted: large-small, left-right, top-bottom, or the reverse."
    ),
]

WAYS: dict[str, dict[str, Any]] = {
    "fidelity": {"projection": "ortho_v2", "num_zero": 8},
    "style": {"projection": "ortho", "num_zero": 16},
    "neutral": {"projection": "none", "num_zero": 0},
}
"""Three ways of joining that users of PuLID know by name, in place of a method's."""

OPTIONS = (
    *("negative", "steps", "guidance", "scale", "start", "end", "projection", "num_zero"),
    *("start_step", "true_cfg", "timestep_to_start_cfg", "text_tokens"),
)
"""What `Studio.generate` has by the same name."""

REQUEST = (
    *(
        "prompt",
        "id",
        "face",
        "order",
        "preset",
        "base",
        "method",
        "size",
        "mask",
        "seed",
        "memory",
        "faces",
        "adapter",
    ),
    *("control", "control_picture", "control_scale", "fingerprints", *OPTIONS),
)
"""What an image carries, and `--from` makes it again by."""

AGAIN = ("source", "out", "device", "memory")
"""What may be said beside an image that is made again."""

KNOWN_AS = {
    "id-scale": "scale",
    "weight": "scale",
    "start-at": "start",
    "end-at": "end",
    "attn-mask": "mask",
    "timestep-to-start-cfg": "start-cfg",
    "max-sequence-length": "text-tokens",
    "input-faces-index": "face",
    "input-faces-order": "order",
}
"""Options by the names that they have in PuLID's own programs and in ComfyUI's nodes."""


def known_as(name: str) -> str:
    """The name of an option here, from another program's; underscores are as good as dashes."""
    name = name.replace("_", "-")
    return KNOWN_AS.get(name, name)


app = typer.Typer(
    name="pulid",
    context_settings={"token_normalize_func": known_as},
    help="Put a person into any image a diffusion model can make, from one photo.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(stores.weights, name="weights")
app.add_typer(stores.presets, name="presets")
app.add_typer(workshop.world, name="world")
app.add_typer(workshop.mini, name="mini")
app.add_typer(measures.bench, name="bench")
app.command()(workshop.train)
app.command()(web)


def main() -> None:
    """Entry point. What a user can put right is one sentence on stderr and an exit code, no traceback."""
    # The libraries' own notes are for those who write programs with them.
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    warnings.simplefilter("ignore", FutureWarning)
    try:
        with explain_out_of_memory():
            app()
    except PulidError as error:
        print(f"pulid: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


@app.command()
def demo(
    out: Folder = Path("demo"),
    people_seed: Annotated[
        int, typer.Option(min=0, help="Which of the people nobody trained on.")
    ] = 0,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """A person nobody trained on, from one picture into several new ones."""
    from openpulid.mini.evaluation import demo as show

    outcome = show.run(
        folder(out), people_seed=people_seed, device=device, log=silent if as_json else say
    )
    if not as_json:
        print(f"{outcome.image}\n{outcome.page}")
    last_line(outcome.figures)


@app.command()
def identify(
    picture: Annotated[list[str], typer.Argument(help="One or several pictures of one person.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The identity file to write (.safetensors).")
    ] = None,
    face: Face = None,
    order: Order = "large-small",
    fusion: Annotated[
        str, typer.Option(help="Of several pictures: concat, mean, norm_id or max_norm.")
    ] = "concat",
    show: Annotated[
        Path | None, typer.Option(help="A picture to write: boxes, landmarks, and what is read.")
    ] = None,
    preset: Preset = "mini",
    method: Annotated[
        str | None,
        typer.Option(help="Another method than PuLID, which may read people differently."),
    ] = None,
    faces: Faces = None,
    device: Device = None,
) -> None:
    """Picture to identity: a file to use again and again. It is biometric data: only you can read it."""
    listed, number = face == "all", _number(face)
    if not listed and (out is None or out.suffix != ".safetensors"):
        raise OptionError(
            f"-o names the identity file, such as {out.stem if out else 'anna'}.safetensors."
        )
    for name in picture:
        _check_picture(name)
    shown = picture_file(show) if show else None
    studio = _reader(preset, device, _method(method)["method"], faces)
    if shown:
        save_image(studio.show(picture, face=number, order=order), shown)
    if listed or out is None:
        from openpulid.faces.select import describe_faces as lines

        print(
            *(
                line
                for label, found in studio.faces(picture)
                for line in lines(found, order, label)
            ),
            sep="\n",
        )
        return
    identity = studio.identify(picture, face=number, order=order, fusion=fusion)
    folder(out.parent)
    identity.save(out)
    print(out)


@app.command()
def generate(
    ctx: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="What to show.")] = None,
    who: Annotated[
        str | None, typer.Option("--id", help="Identity file or picture of the person.")
    ] = None,
    face: Annotated[
        int | None, typer.Option(min=0, help="Which face of a picture with several, from 0.")
    ] = None,
    order: Order = "large-small",
    preset: Preset = "mini",
    base: Base = None,
    out: Folder = Path("."),
    num: Annotated[int, typer.Option(min=1, help="How many images.")] = 1,
    seed: Annotated[
        int, typer.Option(min=0, help="The first image's seed; image k has seed + k.")
    ] = 0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Sampling steps; the preset's by default.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0, help="How strongly the prompt acts.")
    ] = None,
    negative: Annotated[
        str | None, typer.Option(help="What not to show; the preset's by default.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels.")] = None,
    scale: Annotated[
        float | None, typer.Option(min=0, help="How strongly the identity acts; 0 is not at all.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="instantid, faceid, ... instead of PuLID; or PuLID's fidelity, style, neutral."
        ),
    ] = None,
    projection: Annotated[str | None, typer.Option(help="ortho_v2, ortho or none.")] = None,
    num_zero: Annotated[
        int | None, typer.Option(min=0, help="Zero tokens; more leave the prompt more room.")
    ] = None,
    start: Annotated[
        float | None, typer.Option(min=0, max=1, help="Fraction of the steps where it begins.")
    ] = None,
    end: Annotated[
        float | None, typer.Option(min=0, max=1, help="Fraction of the steps where it ends.")
    ] = None,
    mask: Annotated[
        str | None, typer.Option(help="A picture, white where the identity may act.")
    ] = None,
    start_step: Annotated[
        int | None, typer.Option(min=0, help="FLUX: the step from which the identity acts.")
    ] = None,
    true_cfg: Annotated[
        float | None, typer.Option(min=1, help="FLUX: guidance by the negative prompt.")
    ] = None,
    start_cfg: Annotated[
        int | None, typer.Option(min=0, help="FLUX: the step from which that guidance counts.")
    ] = None,
    text_tokens: Annotated[
        int | None, typer.Option(min=1, max=512, help="FLUX: how long a prompt may be.")
    ] = None,
    control: Annotated[
        str | None,
        typer.Option(
            help="A ControlNet beside: control-edges, control-depth, control-pose, or a folder."
        ),
    ] = None,
    control_picture: Annotated[
        str | None, typer.Option(help="What it is shown; for edges any picture.")
    ] = None,
    control_scale: Annotated[
        float | None, typer.Option(min=0, help="How strongly it acts; 1 by default.")
    ] = None,
    memory: Annotated[str | None, typer.Option(help="FLUX: full, 24gb, 16gb or 12gb.")] = None,
    faces: Faces = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Another file of the method, such as one of your training.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option("--from", help="An image of this command: make it again, as it was."),
    ] = None,
    device: Device = None,
) -> None:
    """Prompt and identity to images, as PNG with the full request inside."""
    if source is not None:
        _alone(ctx)
        request, num = _request(source, memory), 1
    else:
        request = {
            "prompt": prompt,
            "id": who,
            "preset": preset,
            "base": base,
            "size": size,
            "mask": mask,
            "seed": seed,
        }
        request |= {"face": face, "order": order if who else None}
        request |= {
            "negative": negative,
            "steps": steps,
            "guidance": guidance,
            "scale": scale,
            "start": start,
            "end": end,
        }
        request |= {
            "start_step": start_step,
            "true_cfg": true_cfg,
            "timestep_to_start_cfg": start_cfg,
        }
        strength = 1.0 if control and control_scale is None else control_scale
        request |= {
            "control": control,
            "control_picture": control_picture,
            "control_scale": strength,
        }
        request |= {"text_tokens": text_tokens, "memory": memory, **_method(method, preset)}
        request |= {
            "faces": str(faces) if faces else None,
            "adapter": str(adapter) if adapter else None,
        }
        said = {
            "projection": projection,
            "num_zero": num_zero,
        }  # goes before what a way brings with it
        request |= {
            name: value for name, value in said.items() if value is not None or name not in request
        }
    if not request["prompt"]:
        raise OptionError(
            "say what to show: pulid generate PROMPT, or --from IMAGE that this command has made."
        )
    _generate(request, num, folder(out), device, negative)


def _generate(
    request: dict[str, Any], num: int, out: Path, device: str | None, negative: str | None
) -> None:
    """`negative` is what the user says; an image's own may be a preset's, which may be longer than the model reads."""
    from openpulid.pipelines.presets import with_options

    who, mask = request["id"], request["mask"]
    saved = _identity(who) if who and who.endswith(".safetensors") else None
    if request["face"] is not None and (saved or not who):
        raise OptionError(
            "--face chooses in a picture, and an identity file has chosen already; give a picture with --id."
        )
    for name in (None if saved else who, mask, request["control_picture"]):
        if name:
            _check_picture(name)
    preset = _preset(request)
    request = {**request, "fingerprints": again.fingerprints(request)}
    size = parse_size(request["size"], 16 if preset.family == "flux" else 8)
    studio = _studio(
        with_options(preset, size=size, **{name: request[name] for name in OPTIONS}), device
    )
    which = {
        "face": request["face"],
        "order": request["order"] or "large-small",
    }  # older images do not say
    identity: Any = saved or (studio.identify(who, **which) if who else None)
    if mask:
        from openpulid.io.images import open_image

        if identity is None:
            raise OptionError("a mask says where an identity acts; give one with --id.")
        identity = [(identity, open_image(mask))]
    with use_controlnet(
        studio, *(request[name] for name in ("control", "control_picture", "control_scale"))
    ):
        result = studio.generate(
            request["prompt"], identity, seed=request["seed"], num_images=num, negative=negative
        )
    for image, seed in zip(result.images, result.seeds, strict=True):
        path = out / image_name(request["prompt"], seed)
        save_image(image, path, request_of(request, result, image, seed))
        print(path)


def _method(name: str | None, preset: str = "") -> dict[str, Any]:
    """What a name says: one of PuLID's ways, or another method."""
    from openpulid.methods.registry import METHODS
    from openpulid.pipelines.presets import find_preset

    if name in WAYS and preset and find_preset(preset).family == "flux":
        raise OptionError(
            f"{name} is one of PuLID's ways on SDXL; on {preset} --start-step says it: 4, or for styles 0 or 1."
        )
    if name is None or name in WAYS:
        return {"method": None, **WAYS.get(name or "", {})}
    if name not in METHODS:
        raise OptionError(
            f"there is no method {name!r}; the known ones are {', '.join([*METHODS, *WAYS])}."
        )
    return {"method": name}


def _alone(ctx: typer.Context) -> None:
    """An image that is made again is made as it was: options beside it would be left out in silence."""
    given = {
        name
        for name in ctx.params
        if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }
    if others := [
        parameter.opts[0]
        for parameter in ctx.command.params
        if parameter.name in given - set(AGAIN)
    ]:
        raise OptionError(
            f"--from makes an image as it was made; leave {', '.join(others)} out, or --from."
        )


def _request(path: str, memory: str | None) -> dict[str, Any]:
    """What an image of this command says of its making; `memory` goes before what it says of that."""
    from openpulid.pipelines.presets import options_of

    _check_picture(path)
    request = {**dict.fromkeys(REQUEST), **again.read_request(path)}
    again.verify_inputs(path, request)
    request["memory"] = memory or request["memory"]
    acting = options_of(_preset(request))  # older images carry options that did not act, too
    return request | {name: None for name in OPTIONS if name not in acting}


def _preset(request: dict[str, Any]) -> presets.Preset:
    from openpulid.pipelines.studio import resolve_preset

    return resolve_preset(
        *(request[name] for name in ("preset", "base", "memory", "method", "faces", "adapter"))
    )


def _studio(preset: presets.Preset, device: str | None) -> Studio:
    from openpulid.pipelines.studio import load

    return load(preset, device)


def _reader(preset: str, device: str | None, method: str | None, faces: Path | None) -> Studio:
    from openpulid.pipelines.studio import load_reader

    return load_reader(preset, device, method, faces)


def _number(face: str | None) -> int | None:
    """Which face was asked for; None where nobody said, or all are to be listed."""
    if face is None or face == "all":
        return None
    if not face.isdigit():
        raise OptionError(f"--face {face}: say which, counted from 0, or all.")
    return int(face)


def _identity(path: str) -> Identity:
    from openpulid.identity.identity import Identity

    return Identity.load(path)


def _check_picture(path: str) -> None:
    """A file that is no picture is found out at once, before any model is loaded."""
    from openpulid.io.images import open_image

    open_image(path)


if __name__ == "__main__":
    main()
