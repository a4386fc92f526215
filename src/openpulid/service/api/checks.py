"""Check a request completely before it is accepted."""

from __future__ import annotations

from collections.abc import Mapping

from openpulid.pipelines.batching import batch_key
from openpulid.pipelines.prompts import check_words
from openpulid.pipelines.request import GenerationRequest
from openpulid.pipelines.request_fields import RequestError
from openpulid.service.api.file_checks import FileChecker
from openpulid.service.api.files import Content
from openpulid.service.catalog import Offer
from openpulid.service.config import Limits


def check_request(
    request: GenerationRequest, files: Mapping[str, Content], offer: Offer, limits: Limits
) -> str | None:
    """Check everything that can be checked without a network.

    Args:
        request: with the models of the offer; its files are paths of fields.
        files: path of a field -> its file.
        offer: the preset and method that run the request.
        limits: what a request may ask for.

    Returns:
        The request's `batch_key`.

    Raises:
        RequestError: the request is over a limit, or the preset does not support it.
        PromptError: the model does not know a word.
        PulidError: a file is of another kind, damaged, or too large. The message names its field.
    """
    resolved = offer.preset.resolve(request)
    _check_limits(resolved, limits)
    offer.check_names(resolved)
    check_words(offer.preset, resolved)
    inputs = FileChecker(files, offer, limits).open(request)
    resolved = offer.preset.resolve(inputs.fit(request, offer.preset.models))
    _check_limits(resolved, limits)
    return None if request.controls else batch_key(resolved, inputs)


def _check_limits(request: GenerationRequest, limits: Limits) -> None:
    values = {
        "num_images": (request.num_images, limits.images),
        "num_inference_steps": (request.num_inference_steps or 0, limits.steps),
        "width": (request.width or 0, limits.side),
        "height": (request.height or 0, limits.side),
    }
    for field, (value, limit) in values.items():
        if value > limit:
            raise RequestError(f"{{0}} must be at most {limit} on this server, got {value}.", field)
