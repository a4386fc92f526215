"""Measuring side by side: candidates by turns in one process, medians, and ratios to the first."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

Seconds = Mapping[str, list[float]]

CPU = torch.device("cpu")


def interleave(
    candidates: Mapping[str, Callable[[], float]],
    rounds: int = 5,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each candidate in each round, after a round that does not count; every round begins with another one.

    Args:
        candidates: run once when called, and say how many seconds of it count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for turn in range(rounds + 1):
        for k in range(len(names)):
            name = names[(turn + k) % len(names)]
            spent = candidates[name]()
            if turn:
                seconds[name].append(spent)
            if on_progress:
                on_progress(turn * len(names) + k + 1, (rounds + 1) * len(names))
    return seconds


def medians(seconds: Seconds) -> dict[str, float]:
    """Of each candidate."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def ratios(seconds: Seconds) -> dict[str, float]:
    """Of each candidate to the first: the median of the rounds' own ratios, which a machine that is slower for a while
    does not change."""
    first = next(iter(seconds.values()))
    return {
        name: statistics.median(a / b for a, b in zip(values, first, strict=True))
        for name, values in seconds.items()
    }


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of `work`, with everything done that it has asked of the device."""
    wait(device)
    begun = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - begun


@contextmanager
def seconds_in(owner: type, method: str, device: torch.device = CPU) -> Iterator[list[float]]:
    """While open, seconds of every call of a class's method are noted.

    On a CPU a call that returns is done. On an accelerator events before and after each call tell its time there; the list
    is complete when the block has been left.
    """
    plain: Callable[..., Any] = getattr(owner, method)
    noted: list[float] = []
    events: list[tuple[Any, Any]] = []

    def clocked(*args: Any, **named: Any) -> Any:
        begun = time.perf_counter()
        try:
            return plain(*args, **named)
        finally:
            noted.append(time.perf_counter() - begun)

    def marked(*args: Any, **named: Any) -> Any:
        library = torch.get_device_module(device)
        pair = library.Event(enable_timing=True), library.Event(enable_timing=True)
        pair[0].record()
        try:
            return plain(*args, **named)
        finally:
            pair[1].record()
            events.append(pair)

    setattr(owner, method, clocked if device.type == "cpu" else marked)
    try:
        yield noted
    finally:
        setattr(owner, method, plain)
        if events:
            wait(device)
            noted.extend(begun.elapsed_time(ended) / 1000 for begun, ended in events)


def wait(device: torch.device) -> None:
    """Until an accelerator has done what it was asked for."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """From here on `peak` counts."""
    if device.type != "cpu":
        reset = getattr(torch.get_device_module(device), "reset_peak_memory_stats", None)
        if reset is not None:  # Apple's counts none
            reset(device)
        return
    with suppress(OSError):  # Linux: the process's own high-water mark
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> float | None:
    """GiB at most since `reset_peak`; None where nobody knows.

    On a CPU it is the process's high-water mark, which freed but kept blocks blur: trust it on an accelerator only.
    """
    if device.type != "cpu":
        most = getattr(torch.get_device_module(device), "max_memory_allocated", None)
        return None if most is None else round(most(device) / 2**30, 2)
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return round(int(found[1]) / 2**20, 2) if found else None
