"""Progress of a generation, for a callback that shows it or stops it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from PIL import Image
from torch import Tensor

from openpulid.pipelines.checks import count_steps
from openpulid.pipelines.model_set import ModelSet
from openpulid.pipelines.preview import NoisyLatents, decode_preview
from openpulid.pipelines.request import GenerationRequest

Preview = Callable[..., Image.Image]
"""Decodes a small image of what the step gave. It costs nothing unless it is called.

Of the requests of a batch, `preview(k)` decodes the image of request k, counted from 0. It raises
`IndexError` if that image is not computed in this step."""

Callback = Callable[[int, int, Preview], object]
"""Receives the number of steps that are done, the number of all steps, and a preview."""


class Progress:
    """Counts the steps of all images of requests, and reports each to a callback.

    Args:
        callback: see `Callback`.
        models: the models that run the requests.
        requests: the resolved requests.
    """

    def __init__(
        self, callback: Callback | None, models: ModelSet, *requests: GenerationRequest
    ) -> None:
        self._callback = callback
        self._models = models
        self.total = 0
        self._num_steps = 0
        self._num_done = 0
        self._steps_of_run = 0
        self._previous: NoisyLatents | None = None
        self._positions: Sequence[int] = (0,)
        for request in requests:
            self.extend(request)

    def extend(self, request: GenerationRequest) -> None:
        """Add the steps of a resolved request to the total."""
        self.total += request.num_images * count_steps(request, self._models)

    def start_run(self, request: GenerationRequest, positions: Sequence[int] = (0,)) -> None:
        """Note that the next images of a request begin.

        Args:
            request: the request, or the first one of a batch.
            positions: of the requests in a batch.
        """
        self._positions = positions
        self._num_steps = count_steps(request, self._models)
        self._steps_of_run = 0
        self._previous = None

    def report(self, pipe: Any, call: int, latents: Tensor, size: tuple[int, int]) -> None:
        """Report a call of the network.

        Args:
            pipe: the pipeline that runs.
            call: number of the call in this run, from 0.
            latents: of the images of the run.
            size: width and height of the images in pixels.
        """
        if self._callback is None:
            return
        noisy = NoisyLatents.read(pipe.scheduler, latents)
        # a second-order sampler calls the network twice per step
        done = (call + 1) * self._num_steps // pipe.num_timesteps
        if done > self._steps_of_run:
            self._num_done += (done - self._steps_of_run) * len(latents)
            self._steps_of_run = done
            preview = partial(_decode, pipe, noisy, self._previous, size, self._positions)
            self._callback(self._num_done, self.total, preview)
        self._previous = noisy


def _decode(
    pipe: Any,
    noisy: NoisyLatents,
    previous: NoisyLatents | None,
    size: tuple[int, int],
    positions: Sequence[int],
    position: int = 0,
) -> Image.Image:
    if position not in positions:
        raise IndexError(f"image {position} is not computed in this step.")
    row = positions.index(position)
    return decode_preview(pipe, noisy.estimate_clean(previous)[row : row + 1], size)
