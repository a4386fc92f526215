"""What a running generation reports to the page: steps, previews, images, notes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from PIL import Image

from openpulid.errors import Stopped
from openpulid.pipelines.progress import Preview

PREVIEW_SECONDS = 1.0
"""Time between two previews, which cost time themselves."""


@dataclass(frozen=True)
class Step:
    """A step that is done.

    Attributes:
        done: number of steps of all images.
        total: number of all steps.
        preview: a small image of what the step gave, now and then.
    """

    done: int
    total: int
    preview: Image.Image | None = None


@dataclass(frozen=True)
class PageImage:
    """A finished image.

    Attributes:
        file: with the request in its metadata.
        seed: of this image.
        caption: shown below it.
        before: file of an image to compare it with: the edited one, or the one without identity.
    """

    file: str
    seed: int
    caption: str
    before: str | None = None


@dataclass(frozen=True)
class Note:
    """A warning, such as on an option without effect."""

    text: str


@dataclass(frozen=True)
class Finished:
    """The end of a generation, with all its images in the order of the page."""

    images: list[PageImage]


Update = Step | PageImage | Note | Finished


class StepWatch:
    """The callback of a generation: reports its steps, and ends it when it is stopped.

    Args:
        report: receives the steps.
        is_stopped: whether the generation is to end.
        num_runs: how many generations of equal length belong together.
    """

    def __init__(
        self, report: Callable[[Step], object], is_stopped: Callable[[], bool], num_runs: int = 1
    ) -> None:
        self.report = report
        self.is_stopped = is_stopped
        self.num_runs = num_runs
        self._run = 0
        self._last_preview = time.monotonic()

    def start_run(self) -> None:
        """Note that the next of several generations begins."""
        self._run += 1

    def __call__(self, step: int, total: int, preview: Preview) -> None:
        """Report a step. Raises Stopped."""
        if self.is_stopped():
            raise Stopped
        image = None
        if time.monotonic() - self._last_preview >= PREVIEW_SECONDS:
            image = preview()
            self._last_preview = time.monotonic()
        self.report(Step(self._run * total + step, self.num_runs * total, image))


def pair_images(shown: Sequence[PageImage], plain: Sequence[PageImage]) -> list[PageImage]:
    """Put each image next to the one without identity, and let them be compared.

    Args:
        shown: the images of the person.
        plain: the first of the same images without the person.
    """
    images = []
    for image, other in zip_longest(shown, plain):
        if other is None:
            images.append(image)
        else:
            images += [replace(image, before=image.before or other.file), other]
    return images
