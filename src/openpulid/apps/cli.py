"""The command `pulid`: arguments in, parts wired, one plain sentence where something is wrong.

Nothing heavy is imported before a command runs, so that help and mistakes answer at once.
"""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openpulid.apps import measures, stores, workshop
from openpulid.apps.common import (
    AsJson,
    Device,
    Folder,
    folder,
    image_name,
    last_line,
    picture_file,
    save_picture,
    say,
    sides,
    silent,
)
from openpulid.apps.web import web
from openpulid.errors import OptionError, PulidError

if TYPE_CHECKING:
    from openpulid.identity.identity import Identity
    from openpulid.studio import Studio

Preset = Annotated[str, typer.Option(help="The model, see `pulid presets list`; or a folder.")]
Base = Annotated[str | None, typer.Option(help="Another checkpoint for the preset: a folder or a single file.")]
Face = Annotated[int | None, typer.Option(help="Which face of a picture with several, from 0; `--show` draws them all.")]
Order = Annotated[str, typer.Option(help="How faces are counted: large-small, left-right, top-bottom, or the reverse.")]

WAYS: dict[str, dict[str, Any]] = {
    "fidelity": {"projection": "ortho_v2", "num_zero": 8},
    "style": {"projection": "ortho", "num_zero": 16},
    "neutral": {"projection": "none", "num_zero": 0},
}
"""Three ways of joining that users of PuLID know by name, in place of a method's."""

REQUEST = (
    *("prompt", "id", "preset", "base", "method", "negative", "steps", "guidance", "size"),
    *("scale", "start", "end", "mask", "projection", "num_zero", "seed", "start_step", "true_cfg"),
    *("control", "control_picture", "control_scale"),
)
"""What an image carries, and `--from` makes it again by."""

app = typer.Typer(
    name="pulid",
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
        app()
    except PulidError as error:
        print(f"pulid: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


@app.command()
def demo(
    out: Folder = Path("demo"),
    people_seed: Annotated[int, typer.Option(min=0, help="Which of the people nobody trained on.")] = 0,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """A person nobody trained on, from one picture into several new ones."""
    from openpulid.mini import demo as show

    outcome = show.run(folder(out), people_seed=people_seed, device=device, say=silent if as_json else say)
    if not as_json:
        print(f"{outcome.picture}\n{outcome.page}")
    last_line(outcome.figures)


@app.command()
def identify(
    picture: Annotated[list[str], typer.Argument(help="One or several pictures of one person.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The identity file to write (.safetensors).")],
    face: Face = None,
    order: Order = "large-small",
    fusion: Annotated[str, typer.Option(help="Of several pictures: concat, mean, norm_id or max_norm.")] = "concat",
    show: Annotated[Path | None, typer.Option(help="A picture to write: boxes, landmarks, and what is read.")] = None,
    preset: Preset = "mini",
    method: Annotated[str | None, typer.Option(help="Another method than PuLID, which may read people differently.")] = None,
    device: Device = None,
) -> None:
    """Picture to identity: a file to use again and again. It is biometric data: only you can read it."""
    if out.suffix != ".safetensors":
        raise OptionError(f"{out}: an identity file ends with .safetensors, such as {out.stem}.safetensors.")
    for name in picture:
        _check_picture(name)
    shown = picture_file(show) if show else None
    studio = _studio(preset, device, method=_method(method)["method"])
    if shown:
        save_picture(studio.show(picture, face=face, order=order), shown)
    identity = studio.identify(picture, face=face, order=order, fusion=fusion)
    folder(out.parent)
    identity.save(out)
    print(out)


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to show.")] = None,
    who: Annotated[str | None, typer.Option("--id", help="Identity file or picture of the person.")] = None,
    preset: Preset = "mini",
    base: Base = None,
    out: Folder = Path("."),
    num: Annotated[int, typer.Option(min=1, help="How many images.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="The first image's seed; image k has seed + k.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps; the preset's by default.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="How strongly the prompt acts.")] = None,
    negative: Annotated[str | None, typer.Option(help="What not to show; the preset's by default.")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels.")] = None,
    scale: Annotated[float | None, typer.Option(min=0, help="How strongly the identity acts; 0 is not at all.")] = None,
    method: Annotated[
        str | None, typer.Option(help="instantid, faceid, ... instead of PuLID; or PuLID's fidelity, style, neutral.")
    ] = None,
    projection: Annotated[str | None, typer.Option(help="ortho_v2, ortho or none.")] = None,
    num_zero: Annotated[int | None, typer.Option(min=0, help="Zero tokens; more leave the prompt more room.")] = None,
    start: Annotated[float | None, typer.Option(min=0, max=1, help="Fraction of the steps where it begins.")] = None,
    end: Annotated[float | None, typer.Option(min=0, max=1, help="Fraction of the steps where it ends.")] = None,
    mask: Annotated[str | None, typer.Option(help="A picture, white where the identity may act.")] = None,
    start_step: Annotated[int | None, typer.Option(min=0, help="FLUX: the step from which the identity acts.")] = None,
    true_cfg: Annotated[float | None, typer.Option(min=1, help="FLUX: guidance by the negative prompt.")] = None,
    control: Annotated[
        str | None, typer.Option(help="A ControlNet beside: control-edges, control-depth, control-pose, or a folder.")
    ] = None,
    control_picture: Annotated[str | None, typer.Option(help="What it is shown; for edges any picture.")] = None,
    control_scale: Annotated[float | None, typer.Option(min=0, help="How strongly it acts; 1 by default.")] = None,
    memory: Annotated[str | None, typer.Option(help="FLUX: full, 24gb, 16gb or 12gb.")] = None,
    source: Annotated[str | None, typer.Option("--from", help="An image of this command: make it again.")] = None,
    device: Device = None,
) -> None:
    """Prompt and identity to images, as PNG with the full request inside."""
    request: dict[str, Any] = {"prompt": prompt, "id": who, "preset": preset, "base": base, "negative": negative}
    request |= {"steps": steps, "guidance": guidance, "size": size, "scale": scale, "start": start, "end": end, "mask": mask}
    request |= {"projection": projection, "num_zero": num_zero, **_method(method), "seed": seed}
    request |= {"start_step": start_step, "true_cfg": true_cfg}
    request |= {"control": control, "control_picture": control_picture, "control_scale": control_scale}
    if source is not None:
        request, num = _request(source), 1
    if not request["prompt"]:
        raise OptionError("say what to show: pulid generate PROMPT, or --from IMAGE that this command has made.")
    _generate(request, num, folder(out), device, memory)


def _generate(request: dict[str, Any], num: int, out: Path, device: str | None, memory: str | None) -> None:
    from openpulid.presets import find

    who, mask = request["id"], request["mask"]
    saved = _identity(who) if who and who.endswith(".safetensors") else None
    for name in (None if saved else who, mask, request["control_picture"]):
        if name:
            _check_picture(name)
    names = ("negative", "steps", "guidance", "scale", "start", "end", "projection", "num_zero", "start_step", "true_cfg")
    multiple = 16 if find(request["preset"]).family == "flux" else 8
    options = {"size": sides(request["size"], multiple), **{name: request[name] for name in names}}
    studio = _studio(request["preset"], device, request["base"], memory, request["method"])
    identity: Any = saved or (studio.identify(who) if who else None)
    if mask:
        from openpulid.images import open_picture

        if identity is None:
            raise OptionError("a mask says where an identity acts; give one with --id.")
        identity = [(identity, open_picture(mask))]
    with _controlled(studio, request):
        result = studio.generate(request["prompt"], identity, seed=request["seed"], num_images=num, **options)
    for image, seed in zip(result.images, result.seeds, strict=True):
        path = out / image_name(request["prompt"], seed)
        save_picture(image, path, {**request, "seed": seed})
        print(path)


def _controlled(studio: Studio, request: dict[str, Any]) -> AbstractContextManager[Any]:
    """A ControlNet in use on the studio's pipeline, where the request names one."""
    name, picture, scale = request["control"], request["control_picture"], request["control_scale"]
    if name is None and picture is None:
        return nullcontext()
    if name is None or picture is None:
        raise OptionError("a ControlNet and what it is shown go together: --control NAME --control-picture PICTURE.")
    if studio.preset.family != "sdxl":
        raise OptionError(f"{name} is for SDXL, and {studio.preset.name} is FLUX; leave --control out.")
    from openpulid.images import open_picture
    from openpulid.loading import found
    from openpulid.methods.control import ControlNet, edges

    shown = open_picture(picture)
    control = ControlNet.load(found(name))
    control.attach(studio.pipe)
    return control.use(edges(shown) if name == "control-edges" else shown, scale=1.0 if scale is None else scale)


def _method(name: str | None) -> dict[str, Any]:
    """What a name says: one of PuLID's ways, or another method."""
    from openpulid.methods.base import METHODS

    if name is None or name in WAYS:
        return {"method": None, **WAYS.get(name or "", {})}
    if name not in METHODS:
        raise OptionError(f"there is no method {name!r}; the known ones are {', '.join([*METHODS, *WAYS])}.")
    return {"method": name}


def _request(path: str) -> dict[str, Any]:
    """What an image of this command says of its making."""
    import json

    from PIL import Image

    _check_picture(path)
    with Image.open(path) as image:
        found = image.info.get("openpulid")
    try:
        request = json.loads(found or "")
    except json.JSONDecodeError:
        raise OptionError(f"{path} does not say how it was made; only images of `pulid generate` do.") from None
    return {**dict.fromkeys(REQUEST), **request}


def _studio(
    preset: str, device: str | None, base: str | None = None, memory: str | None = None, method: str | None = None
) -> Studio:
    from openpulid.studio import load

    return load(preset, device=device, base=base, memory=memory, method=method)


def _identity(path: str) -> Identity:
    from openpulid.identity.identity import Identity

    return Identity.load(path)


def _check_picture(path: str) -> None:
    """A file that is no picture is found out at once, before any model is loaded."""
    from openpulid.images import open_picture

    open_picture(path)


if __name__ == "__main__":
    main()
