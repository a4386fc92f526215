"""What the commands share: options, files, and how things are said."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openpulid import __version__
from openpulid.errors import OptionError

if TYPE_CHECKING:
    from PIL import Image

    from openpulid.studio import Result, Studio


def known_device(name: str | None) -> str | None:
    """Found out before anything is loaded."""
    if name is not None:
        import torch

        try:
            torch.empty(1, device=name)
        except (RuntimeError, AssertionError, NotImplementedError):
            raise OptionError(f"there is no device {name!r} here; without --device the best is taken.") from None
    return name


Folder = Annotated[Path, typer.Option("--out", "-o", help="Where the results go; made when missing.")]
Device = Annotated[str | None, typer.Option(callback=known_device, help="Where to compute, such as cpu; the best by default.")]
Base = Annotated[str | None, typer.Option(help="Another checkpoint for the preset: a folder or a single file.")]
Faces = Annotated[Path | None, typer.Option(help="Folder of another insightface pack; the adapter must have learned with it.")]
AsJson = Annotated[bool, typer.Option("--json", help="Nothing but the last line, as JSON.")]


def group(text: str) -> typer.Typer:
    """A command that only has others under it."""
    return typer.Typer(help=text, no_args_is_help=True)


def folder(path: Path) -> Path:
    """A folder to write into, made when missing."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"{path}: cannot be used as a folder ({error.strerror}); choose another with -o.") from None
    return path


def picture_file(path: Path) -> Path:
    """A place for a picture."""
    folder(path.parent)
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise OptionError(f"{path}: name a picture, such as {path.stem or 'picture'}.png.")
    return path


def image_name(prompt: str, seed: int) -> str:
    """What an image's file is called: the prompt's first words and the seed."""
    words = "-".join(re.findall(r"[a-z0-9]+", prompt.lower()))[:48].strip("-") or "image"
    return f"{words}-{seed}.png"


def request_of(request: Mapping[str, Any], result: Result, image: Image.Image, seed: int) -> dict[str, Any]:
    """A request with all that one of its images was made with, for `save_picture`: a preset's defaults may change."""
    from openpulid.presets import options_of

    preset = result.preset
    made = {**options_of(preset), "size": "{}x{}".format(*image.size), "seed": seed, "version": __version__}
    return {**request, **made, "memory": preset.memory if preset.family == "flux" else None}


def save_picture(image: Image.Image, path: Path, request: Mapping[str, Any] | None = None) -> None:
    """Writes a picture; a PNG carries the request that made it under "openpulid", as JSON."""
    from PIL.PngImagePlugin import PngInfo

    extra: dict[str, Any] = {"quality": 90}  # of what is not kept exactly
    if request is not None:
        extra["pnginfo"] = PngInfo()
        extra["pnginfo"].add_itxt("openpulid", json.dumps(request, ensure_ascii=False))
    try:
        image.save(path, **extra)
    except OSError as error:
        raise OptionError(f"{path}: cannot be written ({error.strerror or error}).") from None


def controlled(studio: Studio, name: str | None, picture: str | None, scale: float | None) -> AbstractContextManager[Any]:
    """A ControlNet in use on a studio's pipeline, where one is named.

    Args:
        name: of published weights, or a folder. picture: what it is shown; edges are drawn of any.
        scale: 1 by default.
    """
    if name is None and picture is None and scale is None:
        return nullcontext()
    if name is None or picture is None:
        raise OptionError("a ControlNet and what it is shown go together; give both, --control NAME --control-picture PICTURE.")
    if studio.preset.family != "sdxl":
        raise OptionError(f"{name} is for SDXL, and {studio.preset.name} is FLUX; leave --control out.")
    from openpulid.images import open_picture
    from openpulid.loading import found
    from openpulid.methods.control import ControlNet, edges

    shown = open_picture(picture)
    control = ControlNet.load(found(name))
    control.attach(studio.pipe)
    return control.use(edges(shown) if name == "control-edges" else shown, scale=1.0 if scale is None else scale)


@contextmanager
def memory_told() -> Iterator[None]:
    """A device whose memory does not suffice, in one sentence."""
    try:
        yield
    except RuntimeError as error:  # torch's own class of it is one, but not every device raises that
        if not any(said in str(error) for said in ("out of memory", "can't allocate memory")):
            raise
        raise OptionError(
            "the device has too little memory for this; take a smaller --size, for FLUX --memory 12gb, or another --device."
        ) from None


def counted(done: int, total: int) -> None:
    """How far something has come, in one line."""
    print(f"\r{done}/{total}", end="" if done < total else "\n", file=sys.stderr, flush=True)


def last_line(figures: Mapping[str, Any]) -> None:
    """What programs read."""
    print(json.dumps(figures), flush=True)


def say(text: str) -> None:
    """For those who watch."""
    from rich.console import Console

    Console(stderr=True, highlight=False).print(text)


def silent(text: str) -> None:
    """For those who asked for JSON alone."""


def sides(text: str | None, multiple: int = 8) -> tuple[int, int] | None:
    """WIDTHxHEIGHT as two numbers, each a multiple: of 16 for FLUX."""
    if text is None:
        return None
    if not (match := re.fullmatch(r"(\d+)[x×](\d+)", text)) or min(found := tuple(map(int, match.groups()))) < multiple:
        raise OptionError(f"{text!r} is no size; write WIDTHxHEIGHT, such as 832x1216.")
    width, height = found
    if width % multiple or height % multiple:
        near = f"{width // multiple * multiple}x{height // multiple * multiple}"
        raise OptionError(f"{text}: width and height are multiples of {multiple}, such as {near}.")
    return width, height
