"""What a request adds to the base model, in the form: ControlNets, a style, LoRAs, words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from openpulid.methods.control_maps.recognition import ControlKind
from openpulid.pipelines.presets import Preset
from openpulid.pipelines.published_controls import PUBLISHED_CONTROLS
from openpulid.pipelines.request import GenerationRequest
from openpulid.pipelines.request_fields import RequestError, quote
from openpulid.pipelines.request_inputs import PUBLISHED_STYLES
from openpulid.pipelines.weights import find_installed
from openpulid.web.file_lines import check_name, is_hub_name, read_lines

CONTROL_PREFIXES = ("", "second_", "third_", "fourth_")
"""Of the names of the components of each ControlNet. A request can have more."""

CONTROL_SCALES = (0.0, 2.0)
STYLE_SCALES = (0.0, 1.0)
"""Smallest and largest values on the page."""

KIND_CHOICES = [("known from its name", ""), *((kind, kind) for kind in get_args(ControlKind))]
"""Label and value of what a ControlNet follows."""

MAP_CHOICES = [
    ("recognize", ""),
    ("a control image", "ready"),
    ("any image: detect", "detect"),
]
"""Label and value of whether an image is a control image already."""

MAP_WORDS = {"ready": True, "detect": False}


def has_controls(preset: Preset) -> bool:
    """Whether a preset takes ControlNets."""
    return "controls" in preset.options


def control_choices(preset: Preset) -> list[tuple[str, str]]:
    """Return label and value of the installed ControlNets for a preset's base model."""
    names = [
        name
        for name in find_installed(PUBLISHED_CONTROLS)
        if PUBLISHED_CONTROLS[name].family == preset.models.family
    ]
    return [("none", ""), *((name, name) for name in names)]


def style_choices(preset: Preset) -> list[tuple[str, str]]:
    """Return label and value of the installed IP-Adapters for a preset."""
    if "style_image" not in preset.options:
        return []
    if preset.models.style_files is not None:
        is_trained = preset.models.style_files.adapter.is_file()
        return [("the miniature's own", "")] if is_trained else []
    names = find_installed(PUBLISHED_STYLES)
    return [(name, name) for name in names if PUBLISHED_STYLES[name] == preset.models.family]


def has_loras(preset: Preset) -> bool:
    """Whether a preset takes LoRAs and textual inversion."""
    return "loras" in preset.options


def describe_add_ons(
    values: Mapping[str, Any], preset: Preset, allow_paths: bool = False
) -> dict[str, Any]:
    """Return the parts of a request that the components describe.

    Args:
        values: name of a component -> its value.
        preset: hides components that have no effect.
        allow_paths: whether text fields may name files of the server.

    Raises:
        RequestError: a text field names no weights, or no upload.
    """
    data: dict[str, Any] = {}
    if has_controls(preset):
        data["controls"] = _describe_controls(values, allow_paths)
    if (styles := style_choices(preset)) and values.get("style_image"):
        data["style_image"] = {
            "image": values["style_image"],
            "scale": values.get("style_scale", 0.5),
        }
        if model := values.get("style_model") or styles[0][1]:
            data["style_image"]["model"] = check_name(
                model, "style_image.model", PUBLISHED_STYLES, "one of the list", allow_paths
            )
    if has_loras(preset):
        data["loras"] = _describe_loras(values, allow_paths)
        data["embeddings"] = _describe_embeddings(values)
    return data


def used_controls(values: Mapping[str, Any]) -> list[str]:
    """Return the prefixes of the ControlNets of a form that have a model or an image."""
    return [
        prefix
        for prefix in CONTROL_PREFIXES
        if values.get(prefix + "control") or values.get(prefix + "control_image")
    ]


def _describe_controls(values: Mapping[str, Any], allow_paths: bool) -> list[dict[str, Any]]:
    controls = []
    for number, prefix in enumerate(used_controls(values)):
        control: dict[str, Any] = {"scale": values.get(prefix + "control_scale", 1.0)}
        if model := (values.get(prefix + "control") or "").strip():
            field = f"controls.{number}.model"
            control["model"] = check_name(
                model, field, PUBLISHED_CONTROLS, "one of the list", allow_paths
            )
        for name in ("image", "kind"):
            if value := values.get(f"{prefix}control_{name}"):
                control[name] = value
        if word := values.get(prefix + "control_map"):
            control["is_map"] = MAP_WORDS[word]
        for name in ("start", "end"):
            if (value := values.get(f"{prefix}control_{name}")) is not None:
                control[name] = value
        controls.append(control)
    return controls


def _describe_loras(values: Mapping[str, Any], allow_paths: bool) -> list[dict[str, Any]]:
    loras = []
    for number, line in enumerate(read_lines(values.get("lora_lines"), values.get("loras"))):
        model = line.name
        if not line.is_upload:
            field = f"loras.{number}.model"
            check_name(model, field, (), "one of the files above", allow_paths)
        loras.append({"model": model, **({"scale": line.value} if line.value else {})})
    return loras


def _describe_embeddings(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    embeddings = []
    lines = read_lines(values.get("embedding_lines"), values.get("embeddings"))
    for number, line in enumerate(lines):
        if not line.is_upload:
            raise RequestError(
                f"{{0}}: no file above has the name in {quote(line.name)}; add the file, or remove "
                "the line.",
                f"embeddings.{number}.file",
            )
        embeddings.append({"file": line.name, "token": line.value or None})
    return embeddings


def read_add_ons(request: GenerationRequest) -> dict[str, Any]:
    """Return name of a component -> its value, for all values that need no file.

    Names of the hub are shown; files and folders are added again by the user.

    Args:
        request: the resolved request of an image.
    """
    words = {is_map: word for word, is_map in MAP_WORDS.items()}
    values: dict[str, Any] = {}
    for prefix, control in zip(CONTROL_PREFIXES, request.controls, strict=False):
        is_name = control.model in PUBLISHED_CONTROLS or is_hub_name(control.model)
        values[prefix + "control"] = control.model if is_name else ""
        values[prefix + "control_scale"] = control.scale
        values[prefix + "control_start"] = control.start
        values[prefix + "control_end"] = control.end
        values[prefix + "control_kind"] = control.kind or ""
        values[prefix + "control_map"] = "" if control.is_map is None else words[control.is_map]
    if request.style_image is not None:
        values["style_scale"] = request.style_image.scale
        if request.style_image.model in PUBLISHED_STYLES:
            values["style_model"] = request.style_image.model
    values["lora_lines"] = "\n".join(f"{lora.model}:{lora.scale}" for lora in request.loras)
    values["embedding_lines"] = "\n".join(
        f"{embedding.file}:{embedding.word}" for embedding in request.embeddings
    )
    return values


def find_unknown(request: GenerationRequest) -> list[str]:
    """Return what a request has that no component can show."""
    unknown = []
    if len(request.controls) > len(CONTROL_PREFIXES):
        unknown.append(f"more than {len(CONTROL_PREFIXES)} ControlNets")
    scales = [(control.scale, "a ControlNet", CONTROL_SCALES[1]) for control in request.controls]
    if request.style_image is not None:
        scales.append((request.style_image.scale, "a style", STYLE_SCALES[1]))
    unknown += [f"{kind} of scale {scale:g}" for scale, kind, most in scales if scale > most]
    return list(dict.fromkeys(unknown))
