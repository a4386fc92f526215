"""The command `pulid identify`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from openpulid.cli.options import (
    Device,
    FaceOrder,
    FacePack,
    Overwrite,
    Preset,
    check_image_path,
    check_new_output,
    check_output,
    make_directory,
    name_options,
    print_path,
    write_image,
)
from openpulid.errors import IdentityError, OptionError, escape_unprintable

if TYPE_CHECKING:
    from openpulid.identity.identity import Identity

logger = logging.getLogger(__name__)

LIST_FACES = "all"
DEFAULT_FUSION = "concat"
DEFAULT_PRESET = "mini"
EXPORT = "flux"
"""The base whose tokens can be written for another program, and the name of its preset."""
MAX_DIGITS = 9


def identify(
    image: Annotated[list[str], typer.Argument(help="One or several images of one person.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Identity file to write: .safetensors, or see --for."),
    ] = None,
    face: Annotated[
        str | None,
        typer.Option(help="Which face of an image with several, from 0; `all` lists them."),
    ] = None,
    order: FaceOrder = "large-small",
    fusion: Annotated[
        str,
        typer.Option(help="How several images are combined: concat, mean, norm_id or max_norm."),
    ] = DEFAULT_FUSION,
    show: Annotated[
        Path | None,
        typer.Option(help="Image to write with the detected faces and the extractor's crops."),
    ] = None,
    preset: Preset = DEFAULT_PRESET,
    method: Annotated[
        str | None,
        typer.Option(help="Another method than PuLID; its identity features may differ."),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(help="Your own file of the method, for methods without a published one."),
    ] = None,
    faces: FacePack = None,
    program: Annotated[
        str | None,
        typer.Option("--for", help="flux: tokens for stable-diffusion.cpp, in a .gguf file."),
    ] = None,
    overwrite: Overwrite = False,
    device: Device = None,
) -> None:
    """Extract an identity from images. The file is biometric data that only you can read.

    An existing file is only replaced with --overwrite.
    """
    face_index = parse_face(face)
    suffix = find_suffix(program)
    if face != LIST_FACES and (out is None or out.suffix != suffix):
        raise OptionError(
            f"-o must name an identity file, such as {out.stem if out else 'anna'}{suffix}."
        )
    if program is not None and preset == DEFAULT_PRESET:
        preset = program  # the miniature has no encoder for it
    if face == LIST_FACES and out is not None:
        raise OptionError(f"--face {LIST_FACES} lists the faces; leave out -o, or name one face.")
    if len(image) == 1 and fusion != DEFAULT_FUSION:
        logger.warning("--fusion has no effect on a single image")
    from openpulid.identity.reference import check_options, open_references

    check_options(order, fusion)
    references = open_references(image)
    if show is not None:
        check_output(check_image_path(show), image)
    if out is not None:
        check_output(out, image)
        make_directory(out.parent)
    from openpulid.identity.reference import ReferenceFaces
    from openpulid.pipelines.factory import load_extractor
    from openpulid.pipelines.presets import PULID_MODES
    from openpulid.pipelines.selection import resolve_preset

    with name_options():
        resolved = resolve_preset(
            preset,
            method=None if method in PULID_MODES else method,
            adapter=adapter,
            face_pack=faces,
        )
    if program is not None:
        from openpulid.pipelines.identity_export import check_gguf_export

        check_gguf_export(resolved)
    reference = ReferenceFaces.detect(load_extractor(resolved, device), references)
    identity = None
    if face != LIST_FACES and out is not None:
        identity = reference.identity(face_index, order, fusion)
        is_new = program is not None or not is_saved(identity, out)
        if is_new:
            check_new_output(out, overwrite)
    if show is not None:
        # the user's photo: no model has generated it
        write_image(show, reference.draw(face_index, order), overwrite, source_type=None)
    if identity is None or out is None:
        for line in reference.describe(order):
            print(escape_unprintable(line))
        return
    if program is not None:
        from openpulid.pipelines.identity_export import export_gguf

        export_gguf(resolved, identity, out)
    elif is_new:
        identity.save(out)
    print_path(out)


def find_suffix(program: str | None) -> str:
    """Return the suffix of an identity file.

    Raises:
        OptionError: there is no such program's format.
    """
    if program not in (None, EXPORT):
        raise OptionError(f"--for must be {EXPORT}, got {program!r}.")
    return ".safetensors" if program is None else ".gguf"


def is_saved(identity: Identity, path: Path) -> bool:
    """Return whether a file holds this identity already: the same features of the same models."""
    from openpulid.identity.identity import Identity

    try:
        saved = Identity.load(path, identity.models)
    except IdentityError:
        return False
    return saved.fingerprint == identity.fingerprint


def parse_face(text: str | None) -> int | None:
    """Parse the number of a face; None for no number and for `all`.

    Raises:
        OptionError: it is neither.
    """
    if text is None or text == LIST_FACES:
        return None
    if not text.isdecimal() or len(text) > MAX_DIGITS:
        raise OptionError(f"--face must be a number from 0, or {LIST_FACES}, got {text!r}.")
    return int(text)
