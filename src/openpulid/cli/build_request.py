"""From the options of `pulid generate` to a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from openpulid.cli.add_ons import describe_embeddings, describe_loras, describe_style
from openpulid.cli.controls import describe_controls
from openpulid.errors import OptionError

if TYPE_CHECKING:
    from openpulid.pipelines.request import GenerationRequest

DEFAULT_ORDER = "large-small"


def build_request(options: Mapping[str, Any]) -> GenerationRequest:
    """Build the request of a command line.

    Args:
        options: the parameters of `generate`, by their names.

    Raises:
        OptionError: options are out of range or do not go together.
    """
    from openpulid.pipelines.model_set import WORD_METHODS
    from openpulid.pipelines.presets import find_preset
    from openpulid.pipelines.request import GenerationRequest, parse_size

    size = options["size"]
    width, height = (None, None) if size is None else parse_size(size)
    mode, method = parse_method(options["method"], find_preset(options["preset"]))
    scale = options["scale"] or ()
    people = describe_people(
        options["person"] or (),
        options["mask"] or (),
        scale,
        options["face"],
        options["order"],
        has_words=method in WORD_METHODS,
    )
    identity = {
        "scale": scale[0] if scale and len(people) < 2 else None,
        "start": options["start"],
        "end": options["end"],
        "projection": options["projection"] or mode.projection,
        "num_zero": mode.num_zero if options["num_zero"] is None else options["num_zero"],
        "start_step": options["start_step"],
        "compiled": options["compiled"],
        "pose_from_prompt": options["pose_from_prompt"],
    }
    models = {
        "preset": options["preset"],
        "base": options["base"],
        "method": method,
        "adapter": options["adapter"],
        "face_pack": options["faces"],
        "memory": options["memory"],
    }
    return GenerationRequest.model_validate(
        {
            "prompt": options["prompt"],
            "negative_prompt": options["negative"],
            "seed": options["seed"],
            "num_images": options["num"],
            "width": width,
            "height": height,
            "num_inference_steps": options["steps"],
            "guidance_scale": options["guidance"],
            "true_cfg_scale": options["true_cfg"],
            "timestep_to_start_cfg": options["start_cfg"],
            "max_sequence_length": options["text_tokens"],
            "people": people,
            "init_image": describe_init_image(
                options["init_image"],
                options["strength"],
                options["inpaint_mask"],
                options["resize"],
            ),
            "controls": describe_controls(options),
            "loras": describe_loras(options["lora"] or (), options["lora_scale"] or ()),
            "embeddings": describe_embeddings(
                options["embedding"] or (), options["embedding_token"] or ()
            ),
            "style_image": describe_style(
                options["style"], options["style_scale"], options["style_model"]
            ),
            "refine_faces": describe_refinement(
                options["refine_faces"], options["refine_strength"], options["refine_size"]
            ),
            "identity": identity,
            "model": models,
        }
    )


def describe_people(
    paths: Sequence[str],
    masks: Sequence[str],
    scales: Sequence[float],
    face: int | None,
    order: str,
    has_words: bool = False,
) -> list[dict[str, Any]]:
    """Return the people of a request, for validation; none if no option names one.

    Several masks stand for several people. With at most one mask, all paths are of one person.
    With a method that shows people by their words, each path is a person.

    Args:
        paths: images, or identity files.
        masks: images or boxes.
        scales: of all people, or one of each.
        face: which face of an image with several.
        order: how faces are counted.
        has_words: whether the method is one of `WORD_METHODS`.

    Raises:
        OptionError: the numbers of people, masks and scales do not fit, or there is an identity
            file among several paths of one person.
    """
    if not paths and face is None and not masks and order == DEFAULT_ORDER:
        return []
    is_several = len(paths) > 1 if has_words else len(masks) > 1
    groups = [[path] for path in paths] if is_several else [list(paths)]
    if len(masks) > 1 and len(masks) != len(paths) and not has_words:
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
        if number < len(masks):
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
    from openpulid.pipelines.request_fields import split_box

    box = split_box(mask)
    return {"mask": mask} if box is None else {"box": box}


def describe_init_image(
    image: str | None, strength: float | None, mask: str | None, resize: str | None
) -> dict[str, Any] | None:
    """Return the initial image of a request, for validation; None if no option names one."""
    options = {"image": image, "strength": strength, "mask": mask, "resize": resize}
    present = {name: value for name, value in options.items() if value is not None}
    return present or None


def describe_refinement(
    is_set: bool, strength: float | None, max_size: float | None
) -> dict[str, float] | bool:
    """Return the second pass on small faces, for validation; False if no option asks for one."""
    options = {"strength": strength, "max_size": max_size}
    present = {name: value for name, value in options.items() if value is not None}
    return present or is_set


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
