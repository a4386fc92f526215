"""How far a long reading is, as a line on the terminal now and then."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.console import Console


def progress(name: str) -> Any:
    """A callable (done, total) that prints a line now and then."""
    console, shown = Console(stderr=True), np.full(1, -1)

    def show(done: int, total: int) -> None:
        if done * 20 // total > shown[0]:
            shown[0] = done * 20 // total
            console.print(f"{name}  {done}/{total}", highlight=False)

    return show
