"""What a request adds to the base model, in the form: ControlNets, a style, LoRAs, words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openpulid.pipelines.presets import Preset
from openpulid.pipelines.published_controls import PUBLISHED_CONTROLS
from openpulid.pipelines.request import GenerationRequest
from openpulid.pipelines.request_inputs import PUBLISHED_STYLES, Control
from openpulid.pipelines.weights import find_installed

CONTROL_PREFIXES = ("", "second_")
"""Of the names of the components of each ControlNet. A request can have more."""

MAP_CHOICES = [
    ("recognize", ""),
    ("a control image", "ready"),
    ("any image: detect edges", "edges"),
    ("any image: detect depth", "depth"),
    ("any image: detect poses", "pose"),
]
"""Label and value of what the image of a ControlNet shows."""


def control_choices(preset: Preset) -> list[tuple[str, str]]:
    """Return label and value of the installed ControlNets for a preset's base model."""
    names = [
        name
        for name in find_installed(PUBLISHED_CONTROLS)
        if PUBLISHED_CONTROLS[name].family == preset.models.family
    ]
    return [("none", ""), *((name, name) for name in names)]


def style_choices(preset: Preset) -> list[str]:
    """Return the installed IP-Adapters for a preset."""
    if "style_image" not in preset.options or preset.models.is_miniature:
        return []
    names = find_installed(PUBLISHED_STYLES)
    return [name for name in names if PUBLISHED_STYLES[name] == preset.models.family]


def has_loras(preset: Preset) -> bool:
    """Whether a preset takes LoRAs and textual inversion."""
    return "loras" in preset.options


def describe_add_ons(values: Mapping[str, Any], preset: Preset) -> dict[str, Any]:
    """Return the parts of a request that the components describe.

    Args:
        values: name of a component -> its value.
        preset: hides components that have no effect.
    """
    data: dict[str, Any] = {"controls": _describe_controls(values)}
    if style_choices(preset) and values.get("style_image"):
        data["style_image"] = {
            "image": values["style_image"],
            "scale": values.get("style_scale", 0.5),
            "model": values.get("style_model") or style_choices(preset)[0],
        }
    if has_loras(preset):
        scale = values.get("lora_scale", 1.0)
        data["loras"] = [{"model": path, "scale": scale} for path in values.get("loras") or ()]
        data["embeddings"] = [{"file": path} for path in values.get("embeddings") or ()]
    return data


def _describe_controls(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    controls = []
    for prefix in CONTROL_PREFIXES:
        model, image = values.get(prefix + "control"), values.get(prefix + "control_image")
        if not model and not image:
            continue
        control: dict[str, Any] = {"scale": values.get(prefix + "control_scale", 1.0)}
        if model:
            control["model"] = model
        if image:
            control["image"] = image
        kind = values.get(prefix + "control_map")
        if kind == "ready":
            control["is_map"] = True
        elif kind:
            control |= {"kind": kind, "is_map": False}
        for name in ("start", "end"):
            if (value := values.get(f"{prefix}control_{name}")) is not None:
                control[name] = value
        controls.append(control)
    return controls


def read_add_ons(request: GenerationRequest) -> dict[str, Any]:
    """Return name of a component -> its value, for all values that need no file.

    Args:
        request: the resolved request of an image.
    """
    values: dict[str, Any] = {}
    for prefix, control in zip(CONTROL_PREFIXES, request.controls, strict=False):
        values[prefix + "control"] = control.model
        values[prefix + "control_scale"] = control.scale
        values[prefix + "control_start"] = control.start
        values[prefix + "control_end"] = control.end
        values[prefix + "control_map"] = _read_map(control)
    if request.style_image is not None:
        values["style_scale"] = request.style_image.scale
        values["style_model"] = request.style_image.model
    if request.loras:
        values["lora_scale"] = request.loras[0].scale
    return values


def _read_map(control: Control) -> str:
    if control.is_map is None:
        return ""
    if control.is_map:
        return "ready"
    published = PUBLISHED_CONTROLS.get(control.model)
    return control.kind or (published and published.kind) or ""


def find_unknown(request: GenerationRequest) -> list[str]:
    """Return what a request has that no component can show."""
    unknown = []
    if len(request.controls) > len(CONTROL_PREFIXES):
        unknown.append(f"more than {len(CONTROL_PREFIXES)} ControlNets")
    if any(control.model not in PUBLISHED_CONTROLS for control in request.controls):
        unknown.append("a ControlNet of its own")
    if len({lora.scale for lora in request.loras}) > 1:
        unknown.append("LoRAs of different scales")
    if any(embedding.token != Path(embedding.file).stem for embedding in request.embeddings):
        unknown.append("a word of another name than its file")
    if request.style_image is not None and request.style_image.model not in PUBLISHED_STYLES:
        unknown.append("an IP-Adapter of its own")
    return unknown
