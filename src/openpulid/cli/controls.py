"""The ControlNets of `pulid generate`: repeated options to the controls of a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from openpulid.cli.options import OPTION_NAMES
from openpulid.errors import OptionError, suggest

MAP_WORDS = {"ready": True, "detect": False}
"""Words of --control-map, and whether the image is a control image already."""


def describe_controls(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the ControlNets of a request, for validation; none if no option names one.

    Args:
        options: the parameters of `generate`, by their names: values for all ControlNets, or one
            for each.

    Raises:
        OptionError: the numbers of values do not fit.
    """
    models = options["control"] or ()
    fields = {
        "image": options["control_image"],
        "scale": options["control_scale"],
        "start": options["control_start"],
        "end": options["control_end"],
        "kind": options["control_kind"],
        "is_map": _parse_maps(options["control_map"] or ()),
    }
    present = {name: values for name, values in fields.items() if values}
    if not models:  # the request says that a ControlNet is missing
        return [{name: values[0] for name, values in present.items()}] if present else []
    controls: list[dict[str, Any]] = [{"model": model} for model in models]
    for name, values in present.items():
        is_for_all = len(values) == 1 and name != "image"
        if len(values) != len(models) and not is_for_all:
            option = OPTION_NAMES[f"controls.{name}"]
            choice = "one for each" if name == "image" else "one for all, or one for each"
            raise OptionError(
                f"{len(models)} --control and {len(values)} {option}: pass {option} {choice}, in "
                "the same order."
            )
        for number, control in enumerate(controls):
            control[name] = values[0 if is_for_all else number]
    return controls


def _parse_maps(words: Sequence[str]) -> list[bool]:
    """Return whether each control image is ready.

    Raises:
        OptionError: a word is neither ready nor detect.
    """
    for word in words:
        if word not in MAP_WORDS:
            raise OptionError(
                f"--control-map must be ready or detect, got {word!r}{suggest(word, MAP_WORDS)}."
            )
    return [MAP_WORDS[word] for word in words]
