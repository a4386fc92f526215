"""Where the weights of a preset are stored, and what is installed."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from openpulid.errors import OptionError, WeightsError
from openpulid.io.hub import WEIGHTS, locate
from openpulid.methods.registry import METHODS
from openpulid.pipelines.model_set import WeightSource
from openpulid.pipelines.presets import PRESETS, Preset, with_method


def resolve_path(source: WeightSource) -> Path:
    """Return the local path of a source of weights; nothing is downloaded.

    Args:
        source: a path, the name of a published weight, or OWNER/NAME of a pipeline in the hub's
            cache. A directory that has the name of a published weight is written `./NAME`.

    Raises:
        WeightsError: the weights are not installed.
    """
    if isinstance(source, Path) or (source not in WEIGHTS and Path(source).exists()):
        return Path(source)
    return locate(source)


def resolve_optional(source: WeightSource | None) -> Path | None:
    """Return the local path of a source of weights, or None. Raises as `resolve_path`."""
    return None if source is None else resolve_path(source)


def missing_weights(preset: Preset) -> list[str]:
    """Return what a preset needs and is not installed: published names, then files."""
    missing = []
    for name in preset.published:
        try:
            locate(name)
        except WeightsError:
            missing.append(name)
    paths = [source for source in preset.models.sources if isinstance(source, Path)]
    return missing + [str(path) for path in paths if not path.exists()]


def find_installed_methods(preset: Preset) -> list[str]:
    """Return the methods for a preset's base whose files are all installed, PuLID first."""
    methods = []
    for name in sorted(METHODS, key=lambda name: (name != "pulid", name)):
        try:
            missing = missing_weights(with_method(preset, name))
        except OptionError:  # the method does not support this base
            continue
        if not missing:
            methods.append(name)
    return methods


def find_installed_presets() -> list[str]:
    """Return the names of the presets whose files are all installed."""
    return [name for name, preset in PRESETS.items() if not missing_weights(preset())]


def find_installed_controls() -> list[str]:
    """Return the names of the published ControlNets that are installed."""
    controls = []
    for name in WEIGHTS:
        if name.startswith("control-"):
            with suppress(WeightsError):
                locate(name)
                controls.append(name)
    return controls
