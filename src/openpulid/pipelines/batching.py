"""Which requests can be generated in one batch."""

from __future__ import annotations

import json
from collections.abc import Sequence

from openpulid.errors import OptionError
from openpulid.identity.identity import Identity
from openpulid.pipelines.inputs import PersonInput, RequestInputs
from openpulid.pipelines.request import GenerationRequest

ROW_FIELDS = {"prompt", "negative_prompt", "seed", "num_images", "people"}
"""Fields in which the requests of a batch can differ."""


def batch_key(request: GenerationRequest, inputs: RequestInputs) -> str | None:
    """Return what a request has in common with those that can share a batch with it.

    Prompts, seeds and people differ from row to row. Models, size, steps, guidance and the options
    of the identity are those of the whole batch, and so are the number of reference images and
    whether people have a place in the image.

    Args:
        request: a resolved request.
        inputs: its files.

    Returns:
        The key; None for a request that is generated on its own, because it has an initial image,
        add-ons to the base model, ControlNets, or refined faces.
    """
    is_alone = (
        inputs.init_image or inputs.controls or request.style_image or request.refine_faces
    ) or (request.loras or request.embeddings)
    if is_alone:
        return None
    shared = request.model_dump(mode="json", exclude=ROW_FIELDS)
    shared["has_negative_prompt"] = request.negative_prompt is not None
    if request.people:
        # a person without a place has its scale in the adapter, one for the whole batch
        shared["scale"] = max(request.identity_scales)
        shared["reference_images"] = [_count_images(person) for person in inputs.people]
        shared["placed"] = any(person.has_region for person in request.people)
    return json.dumps(shared, sort_keys=True)


def check_batch(requests: Sequence[tuple[GenerationRequest, RequestInputs]]) -> None:
    """Check that resolved requests, each with its files, can share a batch.

    Raises:
        OptionError: they cannot.
    """
    if not requests:
        raise OptionError("a batch needs one request or more.")
    keys = {batch_key(request, files) for request, files in requests}
    if any(request.num_images != 1 for request, _ in requests):
        raise OptionError("the requests of a batch have one image each; set num_images to 1.")
    if len(keys) > 1 or None in keys:
        raise OptionError(
            "these requests cannot share a batch: only prompts, seeds and people can differ, and "
            "initial images, ControlNets, LoRAs, embeddings, style images and refined faces are "
            "not possible; generate them one by one."
        )


def _count_images(person: PersonInput) -> int:
    if isinstance(person.identity, Identity):
        return person.identity.photos
    return len(person.identity)
