"""How Gradio calls functions of the page."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

# one studio, one request at a time
STUDIO: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "studio"}
PRIVATE: dict[str, Any] = {"api_visibility": "private"}


def named_handler(
    function: Callable[[dict[str, Any]], Any], names: Sequence[str], *, progress: bool = False
) -> Callable[..., Any]:
    """Wrap a function of named values for Gradio, which passes values in order.

    Args:
        function: receives name -> value, and Gradio's progress if wanted.
        names: of the components, and so of the parameters in the page's API.
        progress: whether the function shows progress.
    """
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in names]
    if progress:
        parameters.append(inspect.Parameter("progress", kind, default=gr.Progress()))

    def handle(*values: Any) -> Any:
        named = dict(zip(names, values, strict=False))
        yield from function(named, *values[len(names) :])

    def handle_once(*values: Any) -> Any:
        return function(dict(zip(names, values, strict=True)))

    chosen = handle if progress else handle_once
    chosen.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return chosen
