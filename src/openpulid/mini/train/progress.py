"""Progress of long computations as occasional lines on the terminal."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console


def make_progress_printer(name: str) -> Callable[[int, int], None]:
    """Build a callback (done, total) that prints a line at every 5 % of progress.

    Args:
        name: what is computed; starts each line.
    """
    console = Console(stderr=True)
    printed_step = -1

    def print_progress(done: int, total: int) -> None:
        nonlocal printed_step
        step = done * 20 // total
        if step > printed_step:
            printed_step = step
            console.print(f"{name}  {done}/{total}", highlight=False)

    return print_progress
