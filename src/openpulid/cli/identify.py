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
MAX_DIGITS = 9


def identify(
    image: Annotated[list[str], typer.Argument(help="One or several images of one person.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Identity file to write (.safetensors).")
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
    preset: Preset = "mini",
    method: Annotated[
        str | None,
        typer.Option(help="Another method than PuLID; its identity features may differ."),
    ] = None,
    faces: FacePack = None,
    overwrite: Overwrite = False,
    device: Device = None,
) -> None:
    """Extract an identity from images. The file is biometric data that only you can read.

    An existing file is only replaced with --overwrite.
    """
    face_index = parse_face(face)
    if face != LIST_FACES and (out is None or out.suffix != ".safetensors"):
        raise OptionError(
            f"-o must name an identity file, such as {out.stem if out else 'anna'}.safetensors."
        )
    if face == LIST_FACES and out is not None:
        raise OptionError(f"--face {LIST_FACES} lists the faces; leave out -o, or name one face.")
    if len(image) == 1 and fusion != DEFAULT_FUSION:
        logger.warning("--fusion has no effect on a single image")
    from openpulid.faces.face import check_order
    from openpulid.identity.identity import check_fusion
    from openpulid.identity.reference import open_references

    check_order(order)
    check_fusion(fusion)
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
            preset, method=None if method in PULID_MODES else method, face_pack=faces
        )
    reference = ReferenceFaces.detect(load_extractor(resolved, device), references)
    identity = None
    if face != LIST_FACES and out is not None:
        identity = reference.identity(face_index, order, fusion)
        is_new = not is_saved(identity, out)
        if is_new:
            check_new_output(out, overwrite)
    if show is not None:
        # the user's photo: no model has generated it
        write_image(show, reference.draw(face_index, order), overwrite, source_type=None)
    if identity is None or out is None:
        for line in reference.describe(order):
            print(escape_unprintable(line))
        return
    if is_new:
        identity.save(out)
    print_path(out)


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
