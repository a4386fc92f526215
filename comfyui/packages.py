"""What a node says if a Python package is missing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

INSTALL = "pip install git+https://github.com/openpulid/openpulid"


def explain_missing_packages(execute: Callable[..., Any]) -> Callable[..., Any]:
    """Replace the import error of a node by a sentence with the command that helps."""

    @functools.wraps(execute)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return execute(*args, **kwargs)
        except ModuleNotFoundError as error:
            raise RuntimeError(
                f"this node needs the Python package {error.name}; install it in ComfyUI's "
                f"environment: {INSTALL}"
            ) from error

    return wrapper
