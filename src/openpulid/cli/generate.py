"""The command `pulid generate`: options to a request, and the request to images."""

from __future__ import annotations

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
)
from openpulid.errors import OptionError

if TYPE_CHECKING:
    from openpulid.pipelines.request import GenerationRequest

DEFAULT_ORDER = "large-small"
ALLOWED_WITH_FROM = ("source", "out", "device", "memory")


def generate(
    ctx: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="Prompt.")] = None,
    person: Annotated[
        str | None, typer.Option("--id", help="Identity file or image of the person.")
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
        float | None, typer.Option(min=0, help="Identity scale (0 disables it).")
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
        str | None, typer.Option(help="Image that is white where the identity may act.")
    ] = None,
    start_step: Annotated[
        int | None, typer.Option(min=0, help="FLUX: step from which the identity acts.")
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
        typer.Option("--from", help="Regenerate an image from the parameters stored in its PNG."),
    ] = None,
    device: Device = None,
) -> None:
    """Generate images of a prompt and a person. Each PNG stores its parameters."""
    with name_options():
        check_quoted(prompt, ctx.args)
        if source is not None:
            check_alone(ctx)
            run_request(read_stored_request(source, memory), out, device)
            return
        if prompt is None:
            raise OptionError("PROMPT is missing; pass a prompt, or --from IMAGE.")
        from openpulid.pipelines.presets import find_preset
        from openpulid.pipelines.request import GenerationRequest, parse_size

        mode, other_method = parse_method(method, find_preset(preset))
        width, height = (None, None) if size is None else parse_size(size)
        identity = {
            "scale": scale,
            "start": start,
            "end": end,
            "projection": mode.projection if projection is None else projection,
            "num_zero": mode.num_zero if num_zero is None else num_zero,
            "start_step": start_step,
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
                "people": describe_person(person, face, order, mask),
                "controls": describe_control(control, control_image, control_scale),
                "identity": identity,
                "model": models,
            }
        )
        run_request(request, out, device)


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


def describe_person(
    path: str | None, face: int | None, order: str, mask: str | None
) -> list[dict[str, Any]]:
    """Return the person of a request, for validation; none if no option names one."""
    if path is None and face is None and mask is None and order == DEFAULT_ORDER:
        return []
    person: dict[str, Any] = {"face_index": face, "face_order": order, "mask": mask}
    if path is not None and path.endswith(".safetensors"):
        person["identity"] = path
    elif path is not None:
        person["images"] = [path]
    return [person]


def describe_control(
    model: str | None, image: str | None, scale: float | None
) -> list[dict[str, Any]]:
    """Return the ControlNet of a request, for validation; none if no option names one."""
    control = {"model": model, "image": image, "scale": scale}
    given = {name: value for name, value in control.items() if value is not None}
    return [given] if given else []


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


def read_stored_request(image: str, memory: str | None) -> GenerationRequest:
    """Read the request of an image, and check its input files.

    Args:
        image: an image of `pulid generate` or `pulid web`.
        memory: memory level instead of the stored one.

    Raises:
        OptionError: the image has no parameters, or an input file is missing or has changed.
    """
    from openpulid.pipelines.provenance import Provenance

    provenance = Provenance.read(image)
    provenance.verify_inputs(image)
    return provenance.request.with_memory(memory) if memory else provenance.request


def check_alone(ctx: typer.Context) -> None:
    """Refuse options next to `--from`, which would have no effect.

    Raises:
        OptionError: there are other options.
    """
    options = find_set_options(ctx)
    refused = [option for name, option in options.items() if name not in ALLOWED_WITH_FROM]
    if refused:
        raise OptionError(
            "--from regenerates an image as it was; it cannot be combined with: "
            f"{', '.join(refused)}."
        )


def run_request(request: GenerationRequest, out: Path, device: str | None) -> None:
    """Generate the images of a request and write them with their parameters.

    Raises:
        PulidError: see `Studio.generate`. What does not need the models is checked before they
            are loaded.
    """
    from openpulid import resolve_preset
    from openpulid.io.metadata import hash_files, image_name, save_image
    from openpulid.pipelines import prompts
    from openpulid.pipelines import studio as studios
    from openpulid.pipelines.inputs import open_inputs
    from openpulid.pipelines.provenance import Provenance

    make_directory(out)
    assert request.model is not None
    preset = resolve_preset(request.model)
    prompts.check_words(preset, preset.resolve(request))
    inputs = open_inputs(request)
    hashes = hash_files(request.input_files())
    studio = studios.load(preset, device)
    result = studio.generate(request, inputs=inputs)
    for image, resolved in zip(result.images, result.requests, strict=True):
        path = out / image_name(resolved.prompt, resolved.seed)
        provenance = Provenance(request=resolved, input_hashes=hashes)
        save_image(image, path, provenance.to_metadata())
        print(path)
