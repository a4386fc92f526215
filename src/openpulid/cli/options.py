"""What the commands share: options, files, and how things are said."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openpulid.errors import OptionError

if TYPE_CHECKING:
    pass


def known_device(name: str | None) -> str | None:
    """Found out before anything is loaded."""
    if name is not None:
        import torch

        try:
            torch.empty(1, device=name)
        except (RuntimeError, AssertionError, NotImplementedError):
            raise OptionError(
                f"there is no device {name!r} here; without --device the best is taken."
            ) from None
    return name


Folder = Annotated[
    Path, typer.Option("--out", "-o", help="Where the results go; made when missing.")
]
Device = Annotated[
    str | None,
    typer.Option(callback=known_device, help="Where to compute, such as cpu; the best by default."),
]
Base = Annotated[
    str | None, typer.Option(help="Another checkpoint for the preset: a folder or a single file.")
]
Faces = Annotated[
    Path | None,
    typer.Option(help="Folder of another insightface pack; the adapter must have learned with it."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Nothing but the last line, as JSON.")]


def group(text: str) -> typer.Typer:
    """A command that only has others under it."""
    return typer.Typer(help=text, no_args_is_help=True)


def folder(path: Path) -> Path:
    """A folder to write into, made when missing."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(
            f"{path}: cannot be used as a folder ({error.strerror}); choose another with -o."
        ) from None
    return path


def picture_file(path: Path) -> Path:
    """A place for a picture."""
    folder(path.parent)
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise OptionError(f"{path}: name a picture, such as {path.stem or 'picture'}.png.")
    return path


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
