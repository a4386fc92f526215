"""What a preset knows, in Markdown for the page."""

from __future__ import annotations

from openpulid.io.hub import WEIGHTS
from openpulid.pipelines.memory_levels import LEVELS
from openpulid.pipelines.memory_prediction import GIB, predict_memory
from openpulid.pipelines.presets import Preset
from openpulid.pipelines.request import GenerationRequest


def describe_preset(preset: Preset) -> str:
    """Describe what a preset can do, its sizes, memory and licenses."""
    parts = [
        f"## {preset.description}",
        _describe_knowledge(preset),
        _describe_sizes(preset),
        _describe_memory(preset),
        _describe_licenses(preset),
        PRIVACY,
    ]
    return "\n\n".join(part for part in parts if part)


PRIVACY = """### Privacy

Everything is computed on the machine that serves this page, and nothing is sent anywhere else.
Uploads are deleted after an hour, and all images when the page stops. An identity file is
biometric data: keep it like a photo of the person."""


def _describe_knowledge(preset: Preset) -> str:
    if not preset.models.is_miniature:
        return (
            "### What it knows\n\nPhotos of real people, and any prompt in English. "
            "Use it only with the consent of the people shown."
        )
    from openpulid.world import VOCABULARY

    words = " ".join(word for word in VOCABULARY if word.isalpha())
    return (
        "### What it knows\n\nThe miniature is a complete small model for trying things out: "
        "it draws synthetic people at 96 pixels and reads only their faces, not photos. "
        f"It knows {len(VOCABULARY) - 1} words:\n\n> {words}"
    )


def _describe_sizes(preset: Preset) -> str:
    models, defaults = preset.models, preset.defaults
    steps = f"{defaults.num_inference_steps} steps"
    if defaults.guidance_scale is not None:
        steps += f", guidance {defaults.guidance_scale:g}"
    return (
        f"### Sizes and steps\n\nTrained at about {models.native_side} x {models.native_side} "
        f"pixels. Sides are multiples of {models.size_multiple}, from {models.min_side} to "
        f"{models.max_side}. By default {steps}."
    )


def _describe_memory(preset: Preset) -> str:
    if "memory" not in preset.options:
        return ""
    request = preset.resolve(GenerationRequest(prompt="any prompt"))
    size = (request.width or 0, request.height or 0, request.max_sequence_length or 0)
    rows = []
    for name in LEVELS[preset.models.family]:
        phases = predict_memory(name, *size, preset.models.family, preset.models.method)
        rows.append(f"| {name} | {max(phase.total for phase in phases) / GIB:.1f} GiB |")
    return (
        f"### Memory\n\nLevel in use: {preset.models.memory} (`pulid web --memory`). "
        "Predicted peaks on the device:\n\n| level | memory |\n|---|---|\n" + "\n".join(rows)
    )


def _describe_licenses(preset: Preset) -> str:
    rows = [
        f"| {WEIGHTS[name].name} | {WEIGHTS[name].license} | "
        f"{ {True: 'yes', False: 'no', None: 'unknown'}[WEIGHTS[name].commercial] } |"
        for name in preset.published
    ]
    if not rows:
        return (
            "### Licenses\n\nApache-2.0, like the package. The weights were trained on synthetic "
            "people alone."
            if preset.models.is_miniature
            else ""
        )
    return (
        "### Licenses of the weights\n\n| weights | license | commercial use |\n|---|---|---|\n"
        + "\n".join(rows)
    )
