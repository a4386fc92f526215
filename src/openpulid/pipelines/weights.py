"""Where the weights of a preset are stored, and what is installed."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from openpulid.errors import OptionError, PulidError, WeightsError
from openpulid.io.hub import FOLDER_VARIABLE, WEIGHTS, find_weight, locate
from openpulid.methods.registry import METHODS
from openpulid.pipelines.model_set import WeightSource
from openpulid.pipelines.presets import PRESETS, Preset
from openpulid.pipelines.selection import with_method


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
    files = [source for source in preset.models.sources if isinstance(source, Path)]
    return missing_sources([*preset.published, *files])


def missing_sources(sources: Iterable[WeightSource]) -> list[str]:
    """Return the sources of weights that are not installed: published names, then files."""
    names = []
    files = []
    for source in dict.fromkeys(sources):
        if isinstance(source, Path):
            if not source.exists():
                files.append(str(source))
            continue
        try:
            resolve_path(source)
        except WeightsError:
            names.append(source)
    return names + files


def find_next_command(preset: Preset) -> str | None:
    """Return the next command that a preset needs to be complete; None if it is.

    An adapter that nobody has published is trained, and then named by the user.
    """
    if missing_weights(preset):
        default = "mini build" if preset.models.is_miniature else f"weights get {preset.name}"
        return preset.models.build_command or f"pulid {default}"
    return None if preset.models.adapter is not None else f"pulid train {preset.models.recipe}"


def require_weights(preset: Preset, sources: Iterable[WeightSource] | None = None) -> None:
    """Check that published weights are installed, before the first file is opened.

    Files that do not exist are reported by what opens them.

    Args:
        preset: the preset that needs them.
        sources: the weights that are needed; by default all of the preset's.

    Raises:
        WeightsError: some are not installed; the message names all of them, and one command that
            downloads them.
    """
    needed = preset.models.sources if sources is None else sources
    entries = {}
    for name in missing_sources(source for source in needed if isinstance(source, str)):
        with suppress(PulidError):  # a file that does not exist
            entries[name] = find_weight(name)
    if not entries:
        return
    own = PRESETS[preset.name]().published if preset.name in PRESETS else ()
    is_own = len(entries) > 1 and entries.keys() == set(missing_sources(own))
    command = preset.name if is_own else " ".join(entries)
    described = [
        name if entry.name == name else f"{name} ({entry.name})" for name, entry in entries.items()
    ]
    size = sum(entry.megabytes or 0 for entry in entries.values())
    raise WeightsError(
        f"{preset.label} needs weights that are not installed: {', '.join(described)}; "
        f"`pulid weights get {command}` downloads them (about {size} MB), or put them into a "
        f"folder and set {FOLDER_VARIABLE} to it."
    )


def require_trained(preset: Preset) -> None:
    """Check that the weights which a preset's command trains exist.

    Raises:
        WeightsError: some do not; the message names the first, and the command.
    """
    command = preset.models.build_command
    missing = missing_weights(preset) if command else []
    if missing:
        if missing[0] in map(str, preset.models.baseline_files):
            command = f"pulid mini build --method {preset.models.method}"
        raise WeightsError(
            f"{preset.label} needs weights that are not trained yet ({missing[0]}); "
            f"`{command}` trains them."
        )


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
    return [name for name, preset in PRESETS.items() if find_next_command(preset()) is None]


def find_installed(names: Iterable[str]) -> list[str]:
    """Return those published weights that are installed."""
    installed = []
    for name in names:
        with suppress(WeightsError):
            locate(name)
            installed.append(name)
    return installed
