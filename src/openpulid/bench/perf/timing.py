"""Timing of alternatives side by side: interleaved rounds, medians, ratios and peak memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from openpulid.device import synchronize

Seconds = Mapping[str, list[float]]
"""Candidate -> its seconds in each round."""


def interleave(
    candidates: Mapping[str, Callable[[], float]],
    rounds: int = 5,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[float]]:
    """Run all candidates in every round and return their seconds.

    There is one more round, the first, which is not counted. Every round starts with another
    candidate.

    Args:
        candidates: each runs once per call and returns the seconds that count.
        rounds: number of rounds.
        on_progress: called after each run with the number of runs done and in total.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    total = (rounds + 1) * len(names)
    done = 0
    for round_index in range(rounds + 1):
        for offset in range(len(names)):
            name = names[(round_index + offset) % len(names)]
            elapsed = candidates[name]()
            if round_index > 0:
                seconds[name].append(elapsed)
            done += 1
            if on_progress:
                on_progress(done, total)
    return seconds


def medians(seconds: Seconds) -> dict[str, float]:
    """Compute the median seconds of each candidate."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def ratios(seconds: Seconds) -> dict[str, float]:
    """Compute the ratio of each candidate to the first.

    This is the median of the ratios of the rounds: a machine that is slow for a while does not
    change it.
    """
    first = next(iter(seconds.values()))
    return {
        name: statistics.median(a / b for a, b in zip(values, first, strict=True))
        for name, values in seconds.items()
    }


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Run `work` and return its seconds, including everything that it queued on the device."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


@contextmanager
def time_hooks(
    modules: Iterable[nn.Module], device: torch.device, *, pre: bool = False
) -> Iterator[list[float]]:
    """Time the forward hooks that modules have: one hook before them and one after them.

    Args:
        modules: modules whose hooks are timed.
        device: on a CPU a call that returns is complete; on an accelerator, events measure the
            time.
        pre: time the forward pre-hooks instead.

    Yields:
        A list that contains the seconds of every call, complete when the context is left.
    """
    seconds: list[float] = []
    marks: list[Any] = []

    def mark(*_: Any) -> None:
        if device.type == "cpu":
            marks.append(time.perf_counter())
            return
        event = torch.get_device_module(device).Event(enable_timing=True)
        event.record()
        marks.append(event)

    uncompiled_mark = torch.compiler.disable(mark)  # the module may be compiled
    with ExitStack() as hooks:
        for module in modules:
            register = module.register_forward_pre_hook if pre else module.register_forward_hook
            hooks.callback(register(uncompiled_mark, prepend=True).remove)
            hooks.callback(register(uncompiled_mark).remove)
        yield seconds
    synchronize(device)
    for start, end in zip(marks[::2], marks[1::2], strict=True):
        is_time = isinstance(start, float)
        seconds.append(end - start if is_time else start.elapsed_time(end) / 1000)
