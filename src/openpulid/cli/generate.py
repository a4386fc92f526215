"""The command `pulid generate`: options to a request, and the request to images."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
    print_path,
)
from openpulid.errors import OptionError

if TYPE_CHECKING:
    from PIL.Image import Image

    from openpulid.pipelines.request import GenerationRequest

logger = logging.getLogger(__name__)

DEFAULT_ORDER = "large-small"
ALLOWED_WITH_FROM = ("source", "out", "device", "memory", "no_metadata")
FILE_OPTIONS = {
    "init_image": "init_image.image",
    "inpaint_mask": "init_image.mask",
    "control": "controls.0.model",
    "control_image": "controls.0.image",
    "preset": "model.preset",
    "base": "model.base",
    "adapter": "model.adapter",
    "faces": "model.face_pack",
}
"""Parameters that name one file, and the fields of the request."""

BOX = re.compile(r"[0-9.]+(,[0-9.]+){3}")


def generate(
    ctx: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="Prompt.")] = None,
    person: Annotated[
        list[str] | None,
        typer.Option(
            "--id",
            help="Identity file or image of the person; repeat it for more images of the person, "
            "or, with a --mask each, for several people.",
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
        int, typer.Option(help="Seed of the first image; image k uses seed + k. -1 draws one.")
    ] = 0,
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
            help="instantid, faceid, ... instead of PuLID; or its mode fidelity, style, neutral."
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
        typer.Option(help="Image that is white where the initial image is painted anew."),
    ] = None,
    resize: Annotated[
        str | None,
        typer.Option(help="crop, pad or stretch an initial image of another ratio than --size."),
    ] = None,
    control: Annotated[
        str | None,
        typer.Option(
            help="ControlNet: control-edges, control-depth, control-pose, or a directory."
        ),
    ] = None,
    control_image: Annotated[
        str | None, typer.Option(help="Image for the ControlNet; any image for control-edges.")
    ] = None,
    control_scale: Annotated[
        float | None, typer.Option(min=0, help="ControlNet scale; 1 by default.")
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
    no_metadata: Annotated[
        bool, typer.Option("--no-metadata", help="Do not store the parameters in the PNG.")
    ] = False,
    device: Device = None,
) -> None:
    """Generate images of a prompt and a person. Each PNG stores its parameters.

    A file is named after the prompt and the seed. No existing file is replaced: a number is added.
    """
    with name_options():
        check_quoted(prompt, ctx.args)
        if source is not None:
            files = collect_files(ctx)
            request = read_stored_request(source, person or (), mask or (), files, memory)
            run_request(request, out, device, not no_metadata)
            return
        if prompt is None:
            raise OptionError("PROMPT is missing; pass a prompt, or --from IMAGE.")
        from openpulid.pipelines.presets import find_preset
        from openpulid.pipelines.request import GenerationRequest, parse_size

        mode, other_method = parse_method(method, find_preset(preset))
        width, height = (None, None) if size is None else parse_size(size)
        people = describe_people(person or (), mask or (), scale or (), face, order)
        identity = {
            "scale": scale[0] if scale and len(people) < 2 else None,
            "start": start,
            "end": end,
            "projection": mode.projection if projection is None else projection,
            "num_zero": mode.num_zero if num_zero is None else num_zero,
            "start_step": start_step,
            "pose_from_prompt": pose_from_prompt,
        }
        models = {
            "preset": preset,
            "base": base,
            "method": other_method,
            "adapter": adapter,
            "face_pack": faces,
            "memory": memory,
        }
        request = GenerationRequest.model_validate(
            {
                "prompt": prompt,
                "negative_prompt": negative,
                "seed": seed,
                "num_images": num,
                "width": width,
                "height": height,
                "num_inference_steps": steps,
                "guidance_scale": guidance,
                "true_cfg_scale": true_cfg,
                "timestep_to_start_cfg": start_cfg,
                "max_sequence_length": text_tokens,
                "people": people,
                "init_image": describe_init_image(init_image, strength, inpaint_mask, resize),
                "controls": describe_control(control, control_image, control_scale),
                "refine_faces": describe_refinement(refine_faces, refine_strength, refine_size),
                "identity": identity,
                "model": models,
            }
        )
        note = "no --id: the images show no particular person; pass --id IMAGE."
        run_request(request, out, device, not no_metadata, None if person else note)


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


def describe_people(
    paths: Sequence[str],
    masks: Sequence[str],
    scales: Sequence[float],
    face: int | None,
    order: str,
) -> list[dict[str, Any]]:
    """Return the people of a request, for validation; none if no option names one.

    Several masks stand for several people. With at most one mask, all paths are of one person.

    Args:
        paths: images, or identity files.
        masks: images or boxes.
        scales: of all people, or one of each.
        face: which face of an image with several.
        order: how faces are counted.

    Raises:
        OptionError: the numbers of people, masks and scales do not fit, or there is an identity
            file among several paths of one person.
    """
    if not paths and face is None and not masks and order == DEFAULT_ORDER:
        return []
    groups = [[path] for path in paths] if len(masks) > 1 else [list(paths)]
    if len(masks) > 1 and len(masks) != len(paths):
        raise OptionError(
            f"{len(paths)} --id and {len(masks)} --mask: several people need one --mask for each "
            "--id, in the same order; combine images of one person with `pulid identify`."
        )
    if len(scales) > 1 and len(scales) != len(groups):
        raise OptionError(
            f"{len(scales)} --scale and {len(groups)} people: pass one --scale for all, or one "
            "for each."
        )
    own_scales = list(scales) if len(groups) > 1 else []
    people = []
    for number, group in enumerate(groups):
        person = {"face_index": face, "face_order": order, **_describe_source(group)}
        if masks:
            person |= _describe_region(masks[number])
        if own_scales:
            person["scale"] = own_scales[number if len(own_scales) > 1 else 0]
        people.append(person)
    return people


def _describe_source(paths: Sequence[str]) -> dict[str, Any]:
    """Return the images or the identity file of a person."""
    identities = [path for path in paths if path.endswith(".safetensors")]
    if identities and len(paths) > 1:
        raise OptionError(
            "--id takes several images or one identity file of a person; for several people, pass "
            "a --mask for each; combine identity files with `pulid identify`."
        )
    return {"identity": identities[0]} if identities else {"images": paths}


def _describe_region(mask: str) -> dict[str, Any]:
    """Return the box or the mask file of a person."""
    if BOX.fullmatch(mask):
        return {"box": mask.split(",")}
    return {"mask": mask}


def describe_init_image(
    image: str | None, strength: float | None, mask: str | None, resize: str | None
) -> dict[str, Any] | None:
    """Return the initial image of a request, for validation; None if no option names one."""
    options = {"image": image, "strength": strength, "mask": mask, "resize": resize}
    given = {name: value for name, value in options.items() if value is not None}
    return given or None


def describe_control(
    model: str | None, image: str | None, scale: float | None
) -> list[dict[str, Any]]:
    """Return the ControlNet of a request, for validation; none if no option names one."""
    control = {"model": model, "image": image, "scale": scale}
    given = {name: value for name, value in control.items() if value is not None}
    return [given] if given else []


def describe_refinement(
    is_set: bool, strength: float | None, max_size: float | None
) -> dict[str, float] | bool:
    """Return the second pass on small faces, for validation; False if no option asks for one."""
    options = {"strength": strength, "max_size": max_size}
    given = {name: value for name, value in options.items() if value is not None}
    return given or is_set


def parse_method(name: str | None, preset: Any) -> tuple[Any, str | None]:
    """Return the options of a PuLID mode, and the name of another method.

    Raises:
        OptionError: the preset has no such mode.
    """
    from openpulid.pipelines.presets import PULID_MODES, find_mode
    from openpulid.pipelines.request import IdentityOptions

    if name in PULID_MODES:
        return find_mode(preset, name), None
    return IdentityOptions(), name


def read_stored_request(
    image: str,
    people: Sequence[str],
    masks: Sequence[str],
    files: Mapping[str, str],
    memory: str | None,
) -> GenerationRequest:
    """Read the request of an image, and name its input files again.

    Args:
        image: an image of `pulid generate` or `pulid web`.
        people: the images and identity files of its people, in order.
        masks: their masks, in order.
        files: path of a field -> file, of the other input files.
        memory: memory level instead of the stored one.

    Raises:
        OptionError: the image has no parameters, or an input file is not named or has changed.
    """
    from openpulid.pipelines.provenance import Provenance

    provenance = Provenance.read(image)
    required = [field for field in provenance.required_files() if field.startswith("people.")]
    is_mask = {field: field.endswith(".mask") for field in required}
    named = dict(files)
    for paths, fields, unused in (
        (people, [field for field in required if not is_mask[field]], "people.0.images"),
        (masks, [field for field in required if is_mask[field]], "people.0.mask"),
    ):
        extra = [f"{unused}.{number}" for number in range(len(fields), len(paths))]
        named |= dict(zip([*fields, *extra], paths, strict=False))
    request = provenance.restore(named, image)
    return request.with_memory(memory) if memory else request


def collect_files(ctx: typer.Context) -> dict[str, str]:
    """Collect the input files that are named next to `--from`, by their fields of the request.

    Raises:
        OptionError: there are options that are no files, which would have no effect.
    """
    options = find_set_options(ctx)
    files = {FILE_OPTIONS[name]: str(ctx.params[name]) for name in options if name in FILE_OPTIONS}
    accepted = (*ALLOWED_WITH_FROM, *FILE_OPTIONS, "person", "mask")
    refused = [option for name, option in options.items() if name not in accepted]
    if refused:
        raise OptionError(
            "--from regenerates an image as it was; it cannot be combined with: "
            f"{', '.join(refused)}."
        )
    return files


def run_request(
    request: GenerationRequest,
    out: Path,
    device: str | None,
    store_metadata: bool,
    note: str | None = None,
) -> None:
    """Generate the images of a request. Each is written, with its parameters, as soon as it exists.

    Args:
        request: the request.
        out: output directory.
        device: where to compute; the best device by default.
        store_metadata: whether to store the parameters in the images.
        note: logged as a warning before the images are generated, if there is no error.

    Raises:
        PulidError: see `Studio.generate`. What does not need the models is checked before they
            are loaded.
    """
    from openpulid import resolve_preset
    from openpulid.device import release_memory
    from openpulid.pipelines import factory
    from openpulid.pipelines import studio as studios
    from openpulid.pipelines.inputs import open_inputs
    from openpulid.pipelines.prompts import check_words
    from openpulid.pipelines.result import save_generated

    make_directory(out)
    assert request.model is not None
    preset = resolve_preset(request.model)
    check_words(preset, preset.resolve(request))
    inputs = open_inputs(request)
    if inputs.has_reference_images:
        # before the base model is loaded: without a face it is not needed, and with one the face
        # models are freed
        inputs = inputs.with_identities(request, factory.load_extractor(preset, device))
        release_memory()
    studio = studios.load(preset, device)
    if note is not None:
        logger.warning("%s", note)
    num_saved = 0

    def save(image: Image, resolved: GenerationRequest) -> None:
        nonlocal num_saved
        path = save_generated(image, resolved, out, inputs.fingerprints, metadata=store_metadata)
        num_saved += 1
        print_path(path)

    try:
        studio.generate(request, inputs=inputs, on_image=save)
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C, or SIGTERM
        print(
            f"pulid: stopped; {num_saved} of {request.num_images} images are written.",
            file=sys.stderr,
        )
        raise
