"""Measurements as self-describing JSON files: command, date, revision, hardware, versions, figures.

`benchmarks/` has one such file per measured claim.
"""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from openpulid.bench.files import read_json
from openpulid.device import hardware_name
from openpulid.errors import OptionError
from openpulid.io.files import write_json
from openpulid.training.code_revision import revision

LIBRARIES = ("torch", "diffusers", "transformers", "timm", "accelerate")


def describe_measurement(
    configuration: Mapping[str, Any],
    figures: Any,
    device: torch.device,
    command: str | None = None,
) -> dict[str, Any]:
    """Describe a measurement completely, as JSON data.

    Args:
        configuration: the settings of what was measured.
        figures: the measured values.
        device: where it was measured.
        command: the command that repeats it; that of this process by default.
    """
    return {
        "command": command or shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "revision": revision(),
        "hardware": hardware_name(device),
        "versions": library_versions(),
        "configuration": dict(configuration),
        "figures": figures,
    }


def write_measurement(
    path: Path, configuration: Mapping[str, Any], figures: Any, device: torch.device
) -> None:
    """Write a measurement of this process into a JSON file."""
    write_json(path, describe_measurement(configuration, figures, device))


def append_measurement(path: Path, name: str, measurement: Mapping[str, Any]) -> None:
    """Add a named measurement to a JSON file with a list of them; create the file if needed.

    Raises:
        OptionError: the file holds something else, or cannot be written.
    """
    data = read_measurements(path)
    data["measurements"].append({"name": name, **measurement})
    write_json(path, data)


def replace_measurement(path: Path, about: str, name: str, measurement: Mapping[str, Any]) -> None:
    """Write a named measurement into a JSON file with a list of them, in place of an earlier one.

    Args:
        path: the file, which is created if needed.
        about: what the file is about, for a new one.
        name: of the measurement.
        measurement: see `describe_measurement`.

    Raises:
        OptionError: the file holds something else, or cannot be written.
    """
    data = {"about": about, **read_measurements(path)}
    data["measurements"] = [
        *(entry for entry in data["measurements"] if entry["name"] != name),
        {"name": name, **measurement},
    ]
    write_json(path, data)


def read_measurements(path: Path) -> dict[str, Any]:
    """Read a JSON file with a list of measurements; an empty list without the file.

    Raises:
        OptionError: the file holds something else.
    """
    if not path.is_file():
        return {"measurements": []}
    data = read_json(dict[str, Any], path, "move it away, or repair it.")
    if not isinstance(data.get("measurements"), list):
        raise OptionError(f"{path} has no list of measurements; move it away, or repair it.")
    return data


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that affect measurements."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
