"""What hooks read from a pipeline: schedule position, guidance, arguments of a call."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from openpulid.errors import OptionError

logger = logging.getLogger(__name__)

HookResult = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments, as a forward pre-hook returns them."""

RATIO_TOLERANCE = 0.05
"""Relative difference of two images' width over height from which one is visibly stretched."""

MIN_RATIO_SIDE = 8
"""Side in pixels below which a mask has no exact ratio, as one of 1 x 2 pixels for two halves."""

EPSILON = 1e-6
"""Tolerance of a schedule position: step 3 of 9 must not fall short of a start of 1 / 3."""


def warn_if_other_ratio(
    name: str, size: Sequence[int], target: Sequence[int], change: str = "stretched"
) -> None:
    """Log a warning if an image has another ratio of its sides than the generated one.

    Args:
        name: what the image is, such as "mask".
        size: its height and width in pixels.
        target: height and width to which it is resized, in any unit.
        change: what happens to it, "stretched" or "cropped".
    """
    if is_other_ratio(size, target):
        height, width = size
        logger.warning(
            "the %s has %d x %d pixels (width over height %.2f) and is %s to the ratio %.2f of "
            "the image; use one of the same ratio.",
            name,
            width,
            height,
            width / height,
            change,
            target[1] / target[0],
        )


def is_other_ratio(size: Sequence[int], target: Sequence[int]) -> bool:
    """Return whether an image is visibly distorted when it is resized.

    Args:
        size: its height and width in pixels.
        target: height and width to which it is resized, in any unit.
    """
    if min(size) < MIN_RATIO_SIDE:
        return False
    ratios = (size[1] / size[0], target[1] / target[0])
    return max(ratios) > (1 + RATIO_TOLERANCE) * min(ratios)


def crop_to_ratio(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Crop masks evenly to the ratio of the generated image, with a note.

    Masks with a side of fewer than `MIN_RATIO_SIDE` pixels stay as they are.

    Args:
        masks: (..., H, W).
        grid: height and width of the image, in any unit.
    """
    height, width = masks.shape[-2:]
    if min(height, width) < MIN_RATIO_SIDE:
        return masks
    warn_if_other_ratio("mask", (height, width), grid, "cropped")
    scale = min(height / grid[0], width / grid[1])
    rows, columns = (max(1, round(side * scale)) for side in grid)
    top, left = (height - rows) // 2, (width - columns) // 2
    return masks[..., top : top + rows, left : left + columns]


@dataclass(frozen=True)
class SchedulePosition:
    """Position of one call of the network in the sampling schedule.

    Attributes:
        fraction: completed part of the run; step i of n is at i / n. None if n is unknown.
        step: index of the step in the run. None if it is unknown.
        num_steps: n. None if it is unknown.
    """

    fraction: float | None
    step: int | None = None
    num_steps: int | None = None


@dataclass(frozen=True)
class Span:
    """Part of the schedule in which a method is active, [start, end).

    An end of 1 includes the last step.

    Attributes:
        start, end: fractions of the schedule.
        start_step: first active step.
        whole_steps: A step is active only if it ends by `end`, as in diffusers' ControlNet
            pipelines. By default it is active if it begins before `end`.
        after_start: The step that begins at `start` is not active yet, unless start is 0.

    Raises:
        OptionError: A value is out of range.
    """

    start: float = 0.0
    end: float = 1.0
    start_step: int = 0
    whole_steps: bool = False
    after_start: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.start <= 1 or not 0 <= self.end <= 1:
            raise OptionError(
                "start and end must be fractions of the schedule, from 0 to 1; "
                f"got start={self.start}, end={self.end}."
            )
        if self.start_step < 0:
            raise OptionError(f"start_step must be 0 or more; got {self.start_step}.")

    @property
    def is_empty(self) -> bool:
        """Whether no step is active."""
        return self.start >= self.end

    @property
    def covers_schedule(self) -> bool:
        """Whether the fractions exclude no step; then the position does not matter."""
        return self.start <= 0 and self.end >= 1

    def contains(self, position: SchedulePosition) -> bool:
        """Return whether the method is active at a position.

        Raises:
            OptionError: The span needs a fraction, and the position has none.
        """
        if position.step is not None and position.step < self.start_step:
            return False
        if self.covers_schedule:
            return True
        if position.fraction is None:
            raise OptionError(
                "start and end are fractions of a pipeline's schedule; "
                "use start_step with a bare transformer."
            )
        fraction = position.fraction + EPSILON
        if self.whole_steps and position.num_steps is not None:
            is_before_end = position.fraction + 1 / position.num_steps <= self.end + EPSILON
        else:
            is_before_end = fraction < self.end or self.end >= 1
        if self.after_start and self.start > 0:
            return position.fraction - EPSILON > self.start and is_before_end
        return self.start <= fraction and is_before_end

    @contextmanager
    def watch(self, subject: str) -> Iterator[WatchedSpan]:
        """Log a warning if no step is active while the context is open.

        Args:
            subject: what has no effect then.
        """
        if self.is_empty:
            logger.warning(
                "start %g is not before end %g; %s has no effect", self.start, self.end, subject
            )
        watched = WatchedSpan(
            self.start, self.end, self.start_step, self.whole_steps, self.after_start
        )
        yield watched
        if watched.answers == {False}:
            logger.warning(
                "no step was between start %g and end %g, from step %d on; %s had no effect",
                self.start,
                self.end,
                self.start_step,
                subject,
            )


@dataclass(frozen=True)
class WatchedSpan(Span):
    """A span that records its answers.

    Attributes:
        answers: what `contains` has returned.
    """

    answers: set[bool] = field(default_factory=set, compare=False, repr=False)

    def contains(self, position: SchedulePosition) -> bool:
        """Return whether the method is active at a position. Raises as `Span.contains`."""
        answer = super().contains(position)
        self.answers.add(answer)
        return answer


def check_scale(scale: float) -> None:
    """Refuse a weight that is negative, infinite or not a number.

    Raises:
        OptionError: The weight is not a finite number of 0 or more.
    """
    try:
        is_valid = math.isfinite(scale) and scale >= 0
    except TypeError:
        is_valid = False
    if not is_valid:
        raise OptionError(f"scale must be a number of 0 or more; got {scale!r}.")


@dataclass(eq=False)
class PipelineState:
    """State of one attached diffusers pipeline: network, guidance and schedule.

    A bare U-Net or transformer is its own network. It has no schedule, and no guidance unless
    `use(..., guided=True)` declares it.
    """

    target: Any

    @property
    def network(self) -> Any:
        """The current U-Net or transformer. A pipeline's network may be exchanged at any time."""
        for name in ("unet", "transformer"):
            network = getattr(self.target, name, None)
            if network is not None:
                return network
        return self.target

    @property
    def pixels_per_latent(self) -> int:
        """Side of an image in pixels over the side of its latents."""
        return int(getattr(self.target, "vae_scale_factor", 8))

    def is_guided(self) -> bool:
        """Return whether the U-Net's batch holds a negative and a positive half.

        Read during a call instead of guessed from the batch size: a guidance scale of exactly 1 has
        no negative half.

        Raises:
            OptionError: Perturbed attention guidance adds a third part to the batch.
        """
        if getattr(self.target, "do_perturbed_attention_guidance", False):
            raise OptionError(
                "identities do not support perturbed attention guidance; "
                "load the pipeline without it."
            )
        # the property is missing before the first run
        return bool(getattr(self.target, "do_classifier_free_guidance", False))

    def position(self, timestep: Any) -> SchedulePosition:
        """Determine the position of a timestep of the U-Net in the schedule.

        The fraction counts the steps that the run takes: image-to-image starts inside its
        scheduler's steps. Without a scheduler, or with a timestep that it does not have, the
        fraction is that of the noise, 1 - t / T.
        """
        scheduler = getattr(self.target, "scheduler", None)
        value = float(torch.as_tensor(timestep).flatten()[0])
        timesteps = getattr(scheduler, "timesteps", None)
        indices: list[int] = []
        if timesteps is not None:
            matches = torch.as_tensor(timesteps).float().cpu() == value
            indices = matches.nonzero().flatten().tolist()
        if not indices:
            config = getattr(scheduler, "config", None)
            return SchedulePosition(1 - value / getattr(config, "num_train_timesteps", 1000))
        assert timesteps is not None
        first = getattr(scheduler, "begin_index", None)
        if first is None:  # DDIM and others have none
            first = self._num_skipped_steps(timesteps)
        # second-order schedulers visit a timestep twice: their own index tells which visit this is
        current = getattr(scheduler, "step_index", None)
        index = current if current in indices else indices[0]
        step = max((index or 0) - first, 0)
        num_steps = max(len(timesteps) - first, 1)
        return SchedulePosition(step / num_steps, step, num_steps)

    def _num_skipped_steps(self, timesteps: Sequence[Any]) -> int:
        """Count the steps of the scheduler before the first that the pipeline takes.

        `denoising_end` skips steps at the end, which do not count.
        """
        num_taken = getattr(self.target, "num_timesteps", None)  # missing before the first run
        if num_taken is None:
            return 0
        denoising_end = getattr(self.target, "denoising_end", None)
        num_after = 0
        if denoising_end and 0 < denoising_end < 1:
            num_train = self.target.scheduler.config.num_train_timesteps
            cutoff = round(num_train - denoising_end * num_train)
            num_after = sum(t < cutoff for t in timesteps)
        return max(len(timesteps) - int(num_taken) - num_after, 0)


class StepTracker:
    """Counts the steps of a run by the calls of a transformer.

    A FLUX pipeline rounds the time that it passes to half precision, and it calls the transformer
    again in the same step for a negative prompt. So the step cannot be looked up by the time.

    Args:
        state: the pipeline whose schedule is read; None for a bare transformer.
    """

    def __init__(self, state: PipelineState | None = None) -> None:
        self.state = state
        self.step = -1
        self.calls_in_step = 0
        self.num_steps: int | None = None
        self._time: float | None = None
        self._timesteps: Any = None
        self._index: int | None = None

    def count(self, time: float) -> None:
        """Count a call of the transformer.

        Args:
            time: falls from 1 to 0 in a run.
        """
        scheduler = getattr(self.state.target, "scheduler", None) if self.state else None
        timesteps = getattr(scheduler, "timesteps", None)
        self.num_steps = None
        if timesteps is not None:
            # image-to-image starts inside its scheduler's steps
            self.num_steps = len(timesteps) - (getattr(scheduler, "begin_index", None) or 0)
        self.update(time, timesteps, getattr(scheduler, "step_index", None))

    def update(self, time: float, timesteps: Any = None, index: int | None = None) -> None:
        """Count one call.

        A rising time or a new schedule begins a new run. A second call in the same step is that of
        the negative prompt. Two steps may have the same rounded time: then the scheduler's index
        tells them apart.

        Args:
            time: falls from 1 to 0 in a run.
            timesteps: the scheduler's; another object is another run.
            index: the scheduler's own count of its steps, None before the first.
        """
        if self._time is None or time > self._time or timesteps is not self._timesteps:
            self.step = 0
            self.calls_in_step = 0
        elif time < self._time or index != self._index:
            self.step += 1
            self.calls_in_step = 0
        else:
            self.calls_in_step += 1
        self._time = time
        self._timesteps = timesteps
        self._index = index

    @property
    def is_negative(self) -> bool:
        """Whether this is the call of the negative prompt."""
        return self.calls_in_step % 2 == 1

    @property
    def position(self) -> SchedulePosition:
        """Position of this call; without a scheduler only its step is known."""
        if self.num_steps is None:
            return SchedulePosition(None, self.step)
        num_steps = max(self.num_steps, 1)
        return SchedulePosition(self.step / num_steps, self.step, num_steps)


@dataclass(frozen=True)
class UNetCall:
    """Arguments of one call of the U-Net.

    Attributes:
        sample: (B, c, h, w).
        timestep: of the scheduler.
        text: (B, T, D), `encoder_hidden_states`.
        kwargs: the keyword arguments as they were passed.
    """

    sample: Tensor
    timestep: Any
    text: Tensor
    kwargs: Mapping[str, Any]

    @classmethod
    def parse(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> UNetCall:
        """Read the arguments from what a forward pre-hook receives."""
        names = ("sample", "timestep", "encoder_hidden_states")
        # without `strict`, which torch.compile cannot trace in every supported version
        named = {**dict(zip(names, args)), **kwargs}  # noqa: B905
        return cls(named["sample"], named["timestep"], named["encoder_hidden_states"], kwargs)


def refuse_guider(target: Any) -> None:
    """Raise OptionError for a modular pipeline with a guider.

    A guider calls the network once per condition, and which call is the negative one only the
    guider knows: the identity would be shown in both.
    """
    guider = getattr(target, "guider", None)
    if guider is not None:
        raise OptionError(
            f"{type(target).__name__} guides with {type(guider).__name__}, which calls the network "
            "once per condition, and identities need both in one batch; attach to a plain "
            "pipeline of diffusers, such as StableDiffusionXLPipeline."
        )


def find_unet(target: Any) -> Any:
    """Return the U-Net of a pipeline, or the target itself if it is one.

    Raises:
        OptionError: The target has no U-Net, or its batch has rows that identities do not support.
    """
    kind = type(target).__name__
    if "InstructPix2Pix" in kind:
        raise OptionError(
            f"{kind} has three rows per image, which identities do not support; "
            "use image-to-image or inpainting instead."
        )
    unet = getattr(target, "unet", target)
    if not hasattr(unet, "attn_processors") or not hasattr(unet, "up_blocks"):
        raise OptionError(
            f"{kind} has no U-Net; attach to a StableDiffusionXL pipeline or its U-Net, "
            "or use an adapter for FLUX."
        )
    return unet


def expand_per_image(
    values: Tensor, batch_size: int, is_guided: bool, negative: Tensor | None = None
) -> Tensor:
    """Repeat one value per prompt for the batch of the U-Net.

    Args:
        values: (P, ...), one per prompt; each prompt has the same number of images, in order.
        batch_size: B.
        is_guided: whether a negative half precedes the positive one.
        negative: (P, ...) of the negative half; zeros by default.

    Returns:
        (B, ...).

    Raises:
        OptionError: The images cannot be divided among the prompts.
    """
    num_images = batch_size // 2 if is_guided else batch_size
    if num_images % len(values):
        raise identity_count_error(len(values), num_images)
    repeats = num_images // len(values)
    positive = values.repeat_interleave(repeats, 0)
    if not is_guided:
        return positive
    if negative is None:
        return torch.cat([torch.zeros_like(positive), positive])
    return torch.cat([negative.repeat_interleave(repeats, 0), positive])


def identity_count_error(num_identities: int, num_images: int) -> OptionError:
    """Create the error for identities that cannot be divided among the images of a batch."""
    return OptionError(
        f"{num_identities} identities do not fit {num_images} images; "
        "pass one identity, or one per prompt."
    )


def move_to(modules: Iterable[Any], device: torch.device, dtype: torch.dtype) -> None:
    """Move modules to the U-Net's device and dtype.

    Done in each call, because an offloaded U-Net has no device before it runs.
    """
    for module in modules:
        if isinstance(module, nn.Module):
            parameter = next(module.parameters())
            if (parameter.device, parameter.dtype) != (device, dtype):
                module.to(device, dtype)
