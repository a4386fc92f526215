"""The command `pulid generate`: options to a request, and the request to images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from openpulid.cli.build_request import DEFAULT_ORDER, build_request
from openpulid.cli.grid import run_grid
from openpulid.cli.options import (
    Base,
    Device,
    FaceOrder,
    FacePack,
    Memory,
    OutputDirectory,
    Preset,
    find_set_options,
    make_directory,
    name_options,
)
from openpulid.cli.repeated_files import REPEATED_FILES, name_repeated_files
from openpulid.cli.run import ImageOutput, run_request
from openpulid.cli.signing import Certificate, Key, Sign, load_signer
from openpulid.errors import OptionError

if TYPE_CHECKING:
    from openpulid.pipelines.request import GenerationRequest


ALLOWED_WITH_FROM = (
    *("source", "out", "name", "device", "memory", "compiled", "no_metadata"),
    *("c2pa", "c2pa_cert", "c2pa_key"),
)
FILE_OPTIONS = {
    "init_image": "init_image.image",
    "inpaint_mask": "init_image.mask",
    "style": "style_image.image",
    "style_model": "style_image.model",
    "preset": "model.preset",
    "base": "model.base",
    "adapter": "model.adapter",
    "faces": "model.face_pack",
}
"""Parameters that name one file, and the fields of the request."""

NO_PERSON = "no --id: the images show no particular person; pass --id IMAGE."


def generate(
    ctx: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="Prompt.")] = None,
    person: Annotated[
        list[str] | None,
        typer.Option(
            "--id",
            help="Identity file or image of the person; repeat it for more images of the person, "
            "or, with a --mask each or with --method fastcomposer, for several people.",
        ),
    ] = None,
    face: Annotated[
        int | None, typer.Option(min=0, help="Which face of an image with several, from 0.")
    ] = None,
    order: FaceOrder = DEFAULT_ORDER,
    preset: Preset = "mini",
    base: Base = None,
    out: OutputDirectory = Path("."),
    num: Annotated[int, typer.Option(min=1, help="Number of images.")] = 1,
    seed: Annotated[
        str, typer.Option(help="Seed of the first image, or random; image k uses seed + k.")
    ] = "0",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Sampling steps; the preset's by default.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0, help="Classifier-free guidance scale.")
    ] = None,
    negative: Annotated[
        str | None, typer.Option(help="Negative prompt; the preset's by default.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels.")] = None,
    scale: Annotated[
        list[float] | None,
        typer.Option(min=0, help="Identity scale (0 disables it); repeat it for several people."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="instantid, infiniteyou, ... instead of PuLID; or its mode fidelity, style, "
            "neutral."
        ),
    ] = None,
    projection: Annotated[str | None, typer.Option(help="ortho_v2, ortho or none.")] = None,
    num_zero: Annotated[
        int | None, typer.Option(min=0, help="Zero tokens; more of them weaken the identity.")
    ] = None,
    start: Annotated[
        float | None, typer.Option(min=0, max=1, help="Identity start (fraction of the steps).")
    ] = None,
    end: Annotated[
        float | None, typer.Option(min=0, max=1, help="Identity end (fraction of the steps).")
    ] = None,
    mask: Annotated[
        list[str] | None,
        typer.Option(
            help="Image that is white where the person is, or a box LEFT,TOP,RIGHT,BOTTOM in "
            "fractions of the image; one per --id for several people."
        ),
    ] = None,
    start_step: Annotated[
        int | None, typer.Option(min=0, help="FLUX: step from which the identity acts.")
    ] = None,
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="PuLID on SDXL: compile identity attention; by default on NVIDIA GPUs for more "
            "than 16 images.",
        ),
    ] = None,
    pose_from_prompt: Annotated[
        bool,
        typer.Option("--pose-from-prompt", help="Let the prompt decide on the pose of the head."),
    ] = False,
    refine_faces: Annotated[
        bool,
        typer.Option("--refine-faces", help="Generate small faces again, enlarged."),
    ] = False,
    refine_strength: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Change of refined faces, 0 to 1; 0.5 by default."),
    ] = None,
    refine_size: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Refine faces below this fraction of the image; 0.3 by default."
        ),
    ] = None,
    true_cfg: Annotated[
        float | None, typer.Option(min=1, help="FLUX: guidance scale of the negative prompt.")
    ] = None,
    start_cfg: Annotated[
        int | None, typer.Option(min=0, help="FLUX: step from which that guidance acts.")
    ] = None,
    text_tokens: Annotated[
        int | None, typer.Option(min=1, max=512, help="FLUX: longest prompt in tokens.")
    ] = None,
    init_image: Annotated[
        str | None, typer.Option(help="Image to start from, instead of noise.")
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Change of the initial image, 0 to 1; 0.6 by default."),
    ] = None,
    inpaint_mask: Annotated[
        str | None,
        typer.Option(help="Image that is white where the initial image is repainted."),
    ] = None,
    resize: Annotated[
        str | None,
        typer.Option(help="crop, pad or stretch an initial image of another ratio than --size."),
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(
            help="ControlNet: control-edges, control-depth, control-pose, for FLUX "
            "control-flux-edges, -depth or -union, or a directory; repeat it for several."
        ),
    ] = None,
    control_image: Annotated[
        list[str] | None,
        typer.Option(
            help="Image for the ControlNet: a control image, or any image from which it is "
            "detected; one per --control."
        ),
    ] = None,
    control_scale: Annotated[
        list[float] | None,
        typer.Option(min=0, help="ControlNet scale, for all or one each; 1 by default."),
    ] = None,
    control_start: Annotated[
        list[float] | None,
        typer.Option(min=0, max=1, help="ControlNet start (fraction of the steps)."),
    ] = None,
    control_end: Annotated[
        list[float] | None,
        typer.Option(min=0, max=1, help="ControlNet end (fraction of the steps)."),
    ] = None,
    control_kind: Annotated[
        list[str] | None,
        typer.Option(help="edges, depth or pose, for a union of them or a directory."),
    ] = None,
    control_map: Annotated[
        list[str] | None,
        typer.Option(
            help="ready for a control image, detect for any other; recognized by default."
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(help="LoRA: a file, its folder, or OWNER/NAME; repeat it for several."),
    ] = None,
    lora_scale: Annotated[
        list[float] | None,
        typer.Option(help="LoRA scale, 1 by default: one for all, or one for each --lora."),
    ] = None,
    embedding: Annotated[
        list[str] | None,
        typer.Option(help="Textual inversion: a file; its name is a word for the prompt."),
    ] = None,
    embedding_token: Annotated[
        list[str] | None, typer.Option(help="Another word for it, one for each --embedding.")
    ] = None,
    style: Annotated[str | None, typer.Option(help="Image whose style the result takes.")] = None,
    style_scale: Annotated[
        float | None, typer.Option(min=0, help="Scale of that style; 0.5 by default.")
    ] = None,
    style_model: Annotated[
        str | None,
        typer.Option(help="ip-adapter, ip-adapter-plus, or a file; by default that of the preset."),
    ] = None,
    memory: Memory = None,
    faces: FacePack = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Another adapter file, such as one of `pulid train`.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="Regenerate an image from the parameters stored in its PNG; pass its input files "
            "again.",
        ),
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            help="OPTION=VALUE,VALUE: images of all values on one sheet; the first --grid gives "
            "the columns, the next ones the rows."
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            help="Names of the files, of prompt, seed, scale, steps, guidance, width, height, "
            "preset, method.",
        ),
    ] = None,
    no_metadata: Annotated[
        bool,
        typer.Option(
            "--no-metadata",
            help="Do not store the parameters in the PNG. It is still marked as generated.",
        ),
    ] = False,
    c2pa: Sign = False,
    c2pa_cert: Certificate = None,
    c2pa_key: Key = None,
    device: Device = None,
) -> None:
    """Generate images of a prompt and a person. Each PNG stores its parameters.

    No existing file is replaced: a number is added to the name.
    """
    with name_options():
        check_quoted(prompt, ctx.args)
        signer = load_signer(c2pa, c2pa_cert, c2pa_key)
        output = ImageOutput(make_directory(out), name, not no_metadata, signer)
        if source is not None:
            files = collect_files(ctx)
            repeated = {name: ctx.params[name] or () for name in REPEATED_FILES}
            request = read_stored_request(source, repeated, files, memory, compiled)
            run_request(request, output, device)
            return
        if prompt is None and not grid:
            raise OptionError("PROMPT is missing; pass a prompt, or --from IMAGE.")
        shows_person = person or any(axis.partition("=")[0].strip() == "id" for axis in grid or ())
        note = None if shows_person else NO_PERSON
        if grid:
            run_grid(grid, ctx, output, device, note)
            return
        run_request(build_request(ctx.params), output, device, note)


def check_quoted(prompt: str | None, words: list[str]) -> None:
    """Refuse a prompt that the shell has split into words.

    Args:
        prompt: the first word.
        words: the other ones.

    Raises:
        OptionError: there are other words.
    """
    if words:
        text = " ".join([prompt or "", *words]).strip()
        raise OptionError(f'quote the prompt: pulid generate "{text}".')


def read_stored_request(
    image: str,
    repeated: Mapping[str, Sequence[str]],
    files: Mapping[str, str],
    memory: str | None,
    compiled: bool | None,
) -> GenerationRequest:
    """Read the request of an image, and name its input files again.

    Args:
        image: an image of `pulid generate` or `pulid web`.
        repeated: the files of options that can be repeated, see `name_repeated_files`.
        files: path of a field -> file, of the other input files.
        memory: memory level instead of the stored one.
        compiled: whether identity attention is compiled, instead of the stored choice.

    Raises:
        OptionError: the image has no parameters, or an input file is not named or has changed.
    """
    from openpulid.pipelines.provenance import Provenance

    provenance = Provenance.read(image)
    named = {**files, **name_repeated_files(provenance.required_files(), repeated)}
    request = provenance.restore(named, image)
    request = request.with_memory(memory) if memory else request
    return request if compiled is None else request.with_compiled(compiled)


def collect_files(ctx: typer.Context) -> dict[str, str]:
    """Collect the input files that are named next to `--from`, by their fields of the request.

    Raises:
        OptionError: there are options that are no files, which would have no effect.
    """
    options = find_set_options(ctx)
    files = {FILE_OPTIONS[name]: str(ctx.params[name]) for name in options if name in FILE_OPTIONS}
    accepted = (*ALLOWED_WITH_FROM, *FILE_OPTIONS, *REPEATED_FILES)
    refused = [option for name, option in options.items() if name not in accepted]
    if refused:
        raise OptionError(
            "--from regenerates an image as it was; it cannot be combined with: "
            f"{', '.join(refused)}."
        )
    return files
