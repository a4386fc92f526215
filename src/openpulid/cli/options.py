"""What the commands share: options, output paths, printing."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openpulid.errors import OptionError, escape_unprintable, is_out_of_memory, suggest
from openpulid.io.files import has_content, is_same_file, write_bytes

if TYPE_CHECKING:
    from PIL import Image

    from openpulid.io.xmp import DigitalSourceType

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

DEVICES = ("cpu", "cuda", "mps", "xpu")

MAX_PERSON = 2**63 - 1
"""The largest seed of a synthetic person; PyTorch's generators take 64 bits."""

MAX_PEOPLE = 10_000
"""The most people of an evaluation or a benchmark."""

OPTION_NAMES = {
    "prompt": "PROMPT",
    "negative_prompt": "--negative",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "true_cfg_scale": "--true-cfg",
    "timestep_to_start_cfg": "--start-cfg",
    "max_sequence_length": "--text-tokens",
    "seed": "--seed",
    "num_images": "--num",
    "identity.scale": "--scale",
    "identity.start": "--start",
    "identity.end": "--end",
    "identity.projection": "--projection",
    "identity.num_zero": "--num-zero",
    "identity.start_step": "--start-step",
    "identity.compiled": "--compile",
    "identity.pose_from_prompt": "--pose-from-prompt",
    "people.images": "--id",
    "people.identity": "--id",
    "people.face_index": "--face",
    "people.face_order": "--order",
    "people.mask": "--mask",
    "people.box": "--mask",
    "people.scale": "--scale",
    "init_image": "--init-image",
    "init_image.image": "--init-image",
    "init_image.strength": "--strength",
    "init_image.mask": "--inpaint-mask",
    "init_image.resize": "--resize",
    "controls": "--control",
    "controls.model": "--control",
    "controls.image": "--control-image",
    "controls.scale": "--control-scale",
    "controls.start": "--control-start",
    "controls.end": "--control-end",
    "controls.kind": "--control-kind",
    "controls.is_map": "--control-map",
    "loras": "--lora",
    "loras.model": "--lora",
    "loras.scale": "--lora-scale",
    "embeddings": "--embedding",
    "embeddings.file": "--embedding",
    "embeddings.token": "--embedding-token",
    "style_image": "--style",
    "style_image.image": "--style",
    "style_image.scale": "--style-scale",
    "style_image.model": "--style-model",
    "refine_faces": "--refine-faces",
    "refine_faces.strength": "--refine-strength",
    "refine_faces.max_size": "--refine-size",
    "model.preset": "--preset",
    "model.base": "--base",
    "model.method": "--method",
    "model.adapter": "--adapter",
    "model.face_pack": "--faces",
    "model.memory": "--memory",
}
"""Fields of a `GenerationRequest` and the options that set them, for error messages."""


def check_device(name: str | None) -> str | None:
    """Check that a device exists, before anything is loaded.

    Raises:
        OptionError: there is no such device.
    """
    if name is not None:
        import torch

        try:
            torch.zeros(1, device=name).item()  # the device "meta" computes nothing
        except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
            if is_out_of_memory(error):
                raise
            # a name such as cuda:7 may be right on another machine
            similar = "" if name.split(":")[0] in DEVICES else suggest(name, DEVICES)
            raise OptionError(
                f"there is no device {name!r} on this machine{similar}; leave out --device to use "
                "the best one."
            ) from None
    return name


OutputDirectory = Annotated[
    Path, typer.Option("--out", "-o", help="Output directory; created if missing.")
]
Preset = Annotated[str, typer.Option(help="Name of a preset (`pulid presets list`), or directory.")]
Device = Annotated[
    str | None,
    typer.Option(callback=check_device, help="Device, such as cpu; the best one by default."),
]
Base = Annotated[
    str | None, typer.Option(help="Another base checkpoint: a directory or a single file.")
]
FacePack = Annotated[
    Path | None,
    typer.Option(
        help="`open` for face models whose licenses allow commercial use, or the directory of "
        "another insightface pack; the adapter must be trained on it."
    ),
]
FaceOrder = Annotated[
    str,
    typer.Option(
        help="How faces are counted: large-small, left-right, top-bottom, or the reverse."
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(help="SDXL: full, 12gb, 8gb or 6gb; FLUX: full, 24gb, 16gb or 12gb."),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an output file that exists already.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Only print the last line, as JSON.")]


def command_group(text: str) -> typer.Typer:
    """Return a command that only groups others."""
    return typer.Typer(help=text, no_args_is_help=True)


@contextmanager
def name_options() -> Iterator[None]:
    """Name command-line options, not fields of the request, in error messages."""
    from openpulid.pipelines.request_fields import RequestError

    try:
        yield
    except RequestError as error:
        raise error.rename(OPTION_NAMES) from None


def find_set_options(ctx: Any) -> dict[str, str]:
    """Return the parameters that are set on the command line: their name and their option."""
    options = {}
    for parameter in ctx.command.params:
        name = parameter.name or ""
        if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE":
            options[name] = parameter.opts[0]
    return options


def make_directory(path: Path) -> Path:
    """Create an output directory if it is missing, and check that files can be written to it.

    Raises:
        OptionError: it cannot be created, or not be written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OptionError(
            f"{path}: cannot be used as a directory ({error.strerror}); choose another with -o."
        ) from None
    return path


def check_image_path(path: Path) -> Path:
    """Check the name of an output image, and create its directory.

    Raises:
        OptionError: the name has no suffix of an image.
    """
    make_directory(path.parent)
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise OptionError(f"{path}: use the name of an image, such as {path.stem or 'image'}.png.")
    return path


def check_output(path: Path, inputs: Iterable[str | Path] = ()) -> Path:
    """Check that an output file is none of the input files.

    Raises:
        OptionError: it is one of them, perhaps under another name.
    """
    for source in inputs:
        if is_same_file(path, source):
            raise OptionError(
                f"{path} is the same file as the input {source}; choose another name for the "
                "output."
            )
    return path


def check_new_output(path: Path, overwrite: bool) -> Path:
    """Check that an output file does not exist yet, before work that takes long.

    Raises:
        OptionError: it exists, and may not be replaced.
    """
    if not overwrite and os.path.lexists(path):
        raise OptionError(
            f"{path} exists already; choose another name, or replace it with --overwrite."
        )
    return path


def write_output(path: Path, data: bytes, overwrite: bool) -> None:
    """Write an output file that the user has named. A file with this content stays as it is.

    Raises:
        OptionError: a file with other content exists, and may not be replaced.
        OutputError: the file cannot be written.
    """
    if not has_content(path, data):
        write_bytes(check_new_output(path, overwrite), data)


def write_image(
    path: Path, image: Image.Image, overwrite: bool, source_type: DigitalSourceType | None
) -> None:
    """Write an output image that the user has named, see `write_output`.

    Args:
        path: the file.
        image: the image.
        overwrite: whether another file may be replaced.
        source_type: how the image was made, see `encode_image`.
    """
    from openpulid.io.metadata import encode_image

    content = encode_image(image, check_image_path(path).suffix, source_type=source_type)
    write_output(path, content, overwrite)


def print_path(path: Path) -> None:
    """Print the path of a result on stdout, also if it is not valid in the terminal's encoding."""
    sys.stdout.flush()
    sys.stdout.buffer.write(os.fsencode(path) + b"\n")
    sys.stdout.flush()


def print_progress(done: int, total: int) -> None:
    """Print progress on one line of a terminal, or line by line into a file or pipe."""
    if sys.stderr.isatty():
        print(f"\r{done}/{total}", end="" if done < total else "\n", file=sys.stderr, flush=True)
    else:
        print(f"{done}/{total}", file=sys.stderr, flush=True)


def print_table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Print a table in a terminal, or lines with tabs into a file or pipe. No cell is cut.

    Args:
        columns: the titles.
        rows: their cells; the first one is a name to type.
    """
    if not sys.stdout.isatty():
        for cells in (columns, *rows):
            print(*cells, sep="\t")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for index, title in enumerate(columns):
        table.add_column(title, no_wrap=index == 0, overflow="fold")
    for cells in rows:
        table.add_row(*cells)
    Console(markup=False).print(table)


def print_json(figures: Mapping[str, Any]) -> None:
    """Print the last line of a command, for programs."""
    print(json.dumps(figures), flush=True)


def print_status(text: str) -> None:
    """Print a status line on stderr."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    console.print(escape_unprintable(text))


def print_nothing(text: str) -> None:
    """Ignore a status line, for `--json`."""
