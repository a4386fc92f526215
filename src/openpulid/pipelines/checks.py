"""Check a request against the models that run it: options, sizes, and what would have no effect."""

from __future__ import annotations

import math

from openpulid.methods.hooks import SchedulePosition, Span
from openpulid.pipelines.model_set import PROMPT_METHODS, ModelSet
from openpulid.pipelines.prompt_weights import find_marks
from openpulid.pipelines.published_controls import PUBLISHED_CONTROLS
from openpulid.pipelines.request import IDENTITY_NAMES, GenerationRequest
from openpulid.pipelines.request_fields import RequestError, literal
from openpulid.pipelines.request_inputs import PUBLISHED_STYLES

INPUT_NAMES = ("controls", "loras", "embeddings", "style_image")
"""Inputs of a request that not every preset supports."""

MAX_MARKS = 5
"""How many weights of a prompt a message names."""


def check_supported(request: GenerationRequest, options: frozenset[str], label: str) -> None:
    """Refuse options that have no effect with the models.

    Args:
        request: the request, before defaults are filled in.
        options: names of the options that have an effect.
        label: how messages call the preset.

    Raises:
        RequestError: names all other options.
    """
    names = request.list_options() + [name for name in INPUT_NAMES if getattr(request, name)]
    unsupported = [name for name in names if name not in options]
    if unsupported:
        fields = [f"identity.{n}" if n in IDENTITY_NAMES else n for n in unsupported]
        placeholders = ", ".join(f"{{{k}}}" for k in range(len(fields)))
        raise RequestError(f"{label} does not support: {placeholders}.", *fields)


def check_resolved(request: GenerationRequest, models: ModelSet, label: str) -> None:
    """Refuse values of a resolved request that do not suit the models or one another.

    Args:
        request: the resolved request.
        models: the models that run it.
        label: how messages call the preset.

    Raises:
        RequestError: the size is not one of the models', the method does not show these people, the
            base starts from no image, a ControlNet is for another base, the text encoders read no
            weights, or options of FLUX's guidance are incomplete.
    """
    _check_size(request, models, label)
    _check_people(request, models)
    _check_edits(request, models)
    _check_strength(request, models)
    _check_controls(request, models, label)
    _check_add_ons(request, models)
    if not reads_weights(models):
        _check_weights(request, models)
    if models.family == "flux":
        _check_true_cfg(request, models)


def _check_size(request: GenerationRequest, models: ModelSet, label: str) -> None:
    multiple = models.size_multiple
    sides = request.image_size(models.native_side)
    if any(side % multiple for side in sides):
        nearest = "x".join(str(max(round(side / multiple), 1) * multiple) for side in sides)
        raise RequestError(
            f"{sides[0]}x{sides[1]}: {{0}} and {{1}} must be multiples of {multiple}, "
            f"for example {nearest}.",
            "width",
            "height",
        )
    low, high = models.min_side, models.max_side
    if any(not low <= side <= high for side in sides):
        native = models.native_side
        raise RequestError(
            f"{sides[0]}x{sides[1]}: {{0}} and {{1}} must be from {low} to {high} for {label}, "
            f"which was trained at about {native}x{native}.",
            "width",
            "height",
        )


def _check_people(request: GenerationRequest, models: ModelSet) -> None:
    people = request.people
    sources = [
        f"people.{number}.{'images' if person.identity is None else 'identity'}"
        for number, person in enumerate(people)
    ]
    regions = [
        None if not person.has_region else f"people.{number}.{'mask' if person.mask else 'box'}"
        for number, person in enumerate(people)
    ]
    if people and models.has_own_person:
        raise RequestError(
            f"{models.method} shows the person it was tuned on; leave {{0}} out.", sources[0]
        )
    if not models.supports_masks and any(regions):
        raise RequestError(
            f"{{0}} is only supported by PuLID and InfiniteYou, not by {models.method}; leave it "
            "out.",
            next(filter(None, regions)),
        )
    if len(people) < 2:
        return
    if models.shows_people_by_words:
        _check_people_without_regions(request, models)
    elif not models.supports_masks:
        raise RequestError(
            f"{models.method} shows one person in an image; leave {{0}} out, or use PuLID, "
            "InfiniteYou or FastComposer.",
            sources[1],
        )
    elif None in regions:
        number = regions.index(None)
        raise RequestError(
            "each of several people needs {0} or {1}, which say where in the image the person "
            f"is; person {number + 1} has none.",
            f"people.{number}.mask",
            f"people.{number}.box",
        )


def _check_people_without_regions(request: GenerationRequest, models: ModelSet) -> None:
    """Refuse what needs to know which part of the image belongs to which person."""
    scales = request.identity_scales
    for number, scale in enumerate(scales):
        if scale != scales[0]:
            raise RequestError(
                f"{{0}} {scale:g} is not that of the first person, {scales[0]:g}; use one for all, "
                f"because {models.method} has no scale for each person.",
                f"people.{number}.scale",
            )
    if request.refine_faces is not None:
        raise RequestError(
            f"{{0}} needs a region for each person, and {models.method} has no regions; leave it "
            "out.",
            "refine_faces",
        )


def _check_style(name: str | None, models: ModelSet) -> None:
    if models.style_files is not None:
        if name in PUBLISHED_STYLES:
            raise RequestError(
                f"{{0}} {name} is not for the miniature, which has an IP-Adapter of its own; leave "
                "it out.",
                "style_image.model",
            )
        if name is None and not models.style_files.adapter.is_file():
            raise RequestError(
                "{0} needs the miniature's IP-Adapter, which is not trained yet; "
                "`pulid mini build --method style` trains it.",
                "style_image",
            )
        return
    assert name is not None, "filled in"
    is_flux = models.family == "flux"
    family = PUBLISHED_STYLES.get(name, "sdxl")  # files are for SDXL
    if family != models.family:
        fitting = [style for style, base in PUBLISHED_STYLES.items() if base == models.family]
        raise RequestError(
            f"{{0}} {literal(name)} is not for {models.family.upper()} presets; use "
            f"{' or '.join(fitting)}.",
            "style_image.model",
        )
    if is_flux and models.memory != "full":
        # diffusers gives an IP-Adapter the 8-bit dtype of the transformer
        raise RequestError(
            f"on FLUX, {{0}} cannot be used with {{1}} {models.memory}; use full, or leave it out.",
            "style_image",
            "model.memory",
        )


def _check_add_ons(request: GenerationRequest, models: ModelSet) -> None:
    if request.style_image is not None:
        _check_style(request.style_image.model, models)
    if request.embeddings and models.memory != "full":
        # diffusers would offload to another device after it has loaded them
        raise RequestError(
            f"{{0}} cannot be used with {{1}} {models.memory}; use full, or leave it out.",
            "embeddings",
            "model.memory",
        )
    if request.embeddings and request.init_image is not None and models.family == "flux":
        # diffusers' image-to-image and inpainting pipelines for FLUX have no textual inversion
        raise RequestError(
            "on FLUX, {0} cannot be used with {1}; leave one out.", "embeddings", "init_image"
        )


def reads_weights(models: ModelSet) -> bool:
    """Return whether prompts can have weights, and more tokens than a text encoder reads.

    Methods that change the prompt look for words in its tokens.
    """
    return models.family == "sdxl" and models.method not in PROMPT_METHODS


def _check_weights(request: GenerationRequest, models: ModelSet) -> None:
    name = models.base_name if models.has_transformer else models.method
    for field in ("prompt", "negative_prompt"):
        if marks := find_marks(getattr(request, field) or ""):
            raise RequestError(
                f"{{0}} has weights, {literal(', '.join(marks[:MAX_MARKS]))}, which {name} does "
                "not support; leave them out, or write \\( and \\[ for brackets.",
                field,
            )


def count_steps(request: GenerationRequest, models: ModelSet) -> int:
    """Return how many steps a resolved request runs: an initial image leaves out the first ones."""
    steps = request.num_inference_steps or 1
    if request.init_image is None:
        return steps
    return _count_edit_steps(steps, request.init_image.strength, models)


def _count_edit_steps(steps: int, strength: float, models: ModelSet) -> int:
    """Round as diffusers' pipelines do, which differ."""
    if models.has_transformer:
        return steps - int(steps - steps * strength)
    return int(steps * strength)


def _check_edits(request: GenerationRequest, models: ModelSet) -> None:
    if models.edits_images:
        return
    for field in ("init_image", "refine_faces"):
        if getattr(request, field) is not None:
            raise RequestError(
                f"{{0}} is not supported on {models.base_name}; leave it out, or choose another "
                "preset.",
                field,
            )


def _check_strength(request: GenerationRequest, models: ModelSet) -> None:
    steps = request.num_inference_steps or 1
    if request.init_image is not None and count_steps(request, models) < 1:
        raise RequestError(
            f"{{0}} {request.init_image.strength:g} runs none of the {steps} steps, so that the "
            f"image would not change; use {math.ceil(100 / steps) / 100:g} or more.",
            "init_image.strength",
        )
    refinement = request.refine_faces
    if refinement is not None and _count_edit_steps(steps, refinement.strength, models) < 1:
        raise RequestError(
            f"{{0}} {refinement.strength:g} runs none of the {steps} steps, so that no face would "
            f"change; use {math.ceil(100 / steps) / 100:g} or more.",
            "refine_faces.strength",
        )


def _check_controls(request: GenerationRequest, models: ModelSet, label: str) -> None:
    for number, control in enumerate(request.controls):
        name = control.model
        published = PUBLISHED_CONTROLS.get(name)
        if published is None:  # a directory
            continue
        if published.family != models.family:
            names = [n for n, c in PUBLISHED_CONTROLS.items() if c.family == models.family]
            raise RequestError(
                f"{{0}} {name} is for {published.family.upper()} presets, not for {label}; use one "
                f"of {', '.join(names)}.",
                f"controls.{number}.model",
            )
        field = f"controls.{number}.kind"
        if control.kind is None and published.kind is None and not control.is_map:
            raise RequestError(
                f"{name} serves several kinds of control images; set {{0}} to edges, depth or "
                "pose.",
                field,
            )
        if control.kind is not None and published.kind not in (None, control.kind):
            raise RequestError(
                f"{name} follows {published.kind} alone; leave out {{0}} {control.kind}, or choose "
                "another ControlNet.",
                field,
            )


def check_active_steps(request: GenerationRequest, models: ModelSet) -> None:
    """Refuse a span of the schedule without a step: it would give the image of nobody.

    Args:
        request: a resolved request that shows a person.
        models: the models that run it.

    Raises:
        RequestError: no step is in the span.
    """
    identity = request.identity
    scale = max(request.identity_scales, default=identity.scale)
    if scale == 0 or find_active_steps(request, models):
        return
    steps = count_steps(request, models)
    if identity.start_step is not None and identity.start_step >= steps:
        raise RequestError(
            f"{{0}} {identity.start_step} is after the last step, {steps - 1}, so that the image "
            "would not show the person; use a smaller one.",
            "identity.start_step",
        )
    raise RequestError(
        f"none of the {steps} steps is between {{0}} {identity.start:g} and {{1}} "
        f"{identity.end:g}, so that the image would not show the person; widen the span, or leave "
        "out the person.",
        "identity.start",
        "identity.end",
    )


def find_active_steps(request: GenerationRequest, models: ModelSet) -> list[int]:
    """Return the steps in which the identity acts.

    Args:
        request: a resolved request.
        models: the first step of methods that change the prompt, and of W+ Adapter, is the one
            after `start`; InfiniteYou's last one ends by `end`.
    """
    identity = request.identity
    steps = count_steps(request, models)
    start, end = identity.start or 0.0, 1.0 if identity.end is None else identity.end
    is_after_start = models.method in (*PROMPT_METHODS, "w-plus")
    is_whole = models.method.startswith("infiniteyou")
    span = Span(start, end, whole_steps=is_whole, after_start=is_after_start)
    if identity.start_step is not None:
        span = Span(0.0, end, identity.start_step)
    positions = [SchedulePosition(step / steps, step, steps) for step in range(steps)]
    return [position.step or 0 for position in positions if span.contains(position)]


def _check_true_cfg(request: GenerationRequest, models: ModelSet) -> None:
    is_guided = (request.true_cfg_scale or 1) > 1
    has_negative_prompt = request.negative_prompt is not None
    if not is_guided and not request.negative_prompt:
        return
    if is_guided != has_negative_prompt:
        raise RequestError(
            "on FLUX, {0} above 1 and {1} only work together; set both or neither.",
            "true_cfg_scale",
            "negative_prompt",
        )
    first = request.timestep_to_start_cfg or 0
    steps = count_steps(request, models)
    if first >= steps:
        raise RequestError(
            f"{{0}} {first} is after the last step, {steps - 1}, so "
            "that {1} would have no effect; use a smaller one.",
            "timestep_to_start_cfg",
            "negative_prompt",
        )


def describe_ineffective(
    request: GenerationRequest, resolved: GenerationRequest, models: ModelSet, is_person_shown: bool
) -> list[str]:
    """Return a note on each option that has no effect, or on a size that is far from the training.

    Args:
        request: with the options that the user set.
        resolved: the same with all defaults.
        models: the models that run it.
        is_person_shown: whether an identity is used.
    """
    notes = [*_describe_guidance(request, resolved, models), *_describe_size(resolved, models)]
    identity = request.identity
    if not is_person_shown:
        names = [name for name in IDENTITY_NAMES if getattr(identity, name) is not None]
        model = request.model
        names += [name for name in ("method", "adapter", "face_pack") if getattr(model, name, None)]
        if names:
            notes.append(f"without a person these options have no effect: {', '.join(names)}")
    elif identity.start and identity.start_step is not None:
        notes.append("start has no effect next to start_step")
    return notes


def _describe_guidance(
    request: GenerationRequest, resolved: GenerationRequest, models: ModelSet
) -> list[str]:
    notes = []
    if models.family == "flux":
        if request.timestep_to_start_cfg is not None and (resolved.true_cfg_scale or 1) <= 1:
            notes.append("timestep_to_start_cfg has no effect, because true_cfg_scale is 1")
        return notes
    scale = resolved.guidance_scale or 0.0
    if 0 < scale < 1:
        notes.append(f"guidance_scale {scale:g} has the effect of 1: there is no guidance")
    if request.negative_prompt and scale <= 1:
        notes.append(
            "the negative prompt has no effect without guidance; use a guidance_scale above 1"
        )
    return notes


def _describe_size(resolved: GenerationRequest, models: ModelSet) -> list[str]:
    native = models.native_side
    width, height = resolved.image_size(native)
    ratio = width * height / native**2
    if models.min_area <= ratio <= 1 / models.min_area:
        return []
    return [
        f"the model was trained at about {native}x{native} pixels; images of {width}x{height} may "
        "be worse"
    ]
