"""Which presets are complete, and the command that completes each of the others."""

from __future__ import annotations

from openpulid.doctor.report import Section
from openpulid.doctor.storage import measure_free_space
from openpulid.io.hub import WEIGHTS, find_download_folder
from openpulid.pipelines.presets import PRESETS, Preset
from openpulid.pipelines.weights import find_installed_methods, find_next_command, missing_weights


def check() -> Section:
    """List the presets; a note names those that do not fit on the disk."""
    rows = []
    notes = []
    for name, build in PRESETS.items():
        preset = build()
        command = find_next_command(preset)
        if command is None:
            rows.append((name, f"complete: {', '.join(find_installed_methods(preset))}", "", ""))
            continue
        missing = missing_weights(preset)
        megabytes = sum(WEIGHTS[source].megabytes or 0 for source in missing if source in WEIGHTS)
        lacking = ", ".join(missing) or "an adapter, which nobody has published"
        rows.append((name, f"lacks {lacking}", f"about {megabytes} MB", command))
        notes += find_lack_of_space(preset, missing)
    columns = ("preset", "state", "download", "command")
    return Section(columns, tuple(rows), notes=tuple(notes))


def find_lack_of_space(preset: Preset, missing: list[str]) -> list[str]:
    """Return a sentence on each folder that has no space for a preset's missing weights.

    Args:
        preset: the preset.
        missing: names of its published weights that are not installed.
    """
    needed: dict[str, int] = {}
    for source in missing:
        if source in WEIGHTS:
            folder = str(find_download_folder(source))
            needed[folder] = needed.get(folder, 0) + (WEIGHTS[source].megabytes or 0)
    sentences = []
    for folder, megabytes in needed.items():
        free = measure_free_space(folder) // 10**6
        if megabytes > free:
            sentences.append(
                f"{preset.label} does not fit: it needs about {megabytes} MB in {folder}, which "
                f"has {free} MB; free some space, or use `pulid weights get {preset.name} "
                "--folder FOLDER`."
            )
    return sentences
