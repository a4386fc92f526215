"""Progress of a generation, for a callback that shows it or stops it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from PIL import Image
from torch import Tensor

from openpulid.pipelines.checks import count_steps
from openpulid.pipelines.preview import NoisyLatents, decode_preview
from openpulid.pipelines.request import GenerationRequest

Preview = Callable[[], Image.Image]
"""Decodes a small image of what the step gave. It costs nothing unless it is called."""

Callback = Callable[[int, int, Preview], object]
"""Receives the number of steps that are done, the number of all steps, and a preview."""


class Progress:
    """Counts the steps of all images of a request, and reports each to a callback.

    Args:
        callback: see `Callback`.
        request: the resolved request.
    """

    def __init__(self, callback: Callback | None, request: GenerationRequest) -> None:
        self._callback = callback
        self.total = 0
        self._num_steps = 0
        self._num_done = 0
        self._steps_of_run = 0
        self._previous: NoisyLatents | None = None
        self.extend(request)

    def extend(self, request: GenerationRequest) -> None:
        """Add the steps of a resolved request to the total."""
        self.total += request.num_images * count_steps(request)

    def start_run(self, request: GenerationRequest) -> None:
        """Note that the next images of a request begin."""
        self._num_steps = count_steps(request)
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
            preview = partial(_decode, pipe, noisy, self._previous, size)
            self._callback(self._num_done, self.total, preview)
        self._previous = noisy


def _decode(
    pipe: Any, noisy: NoisyLatents, previous: NoisyLatents | None, size: tuple[int, int]
) -> Image.Image:
    return decode_preview(pipe, noisy.estimate_clean(previous), size)
