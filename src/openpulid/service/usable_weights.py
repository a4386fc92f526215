"""The installed weights that a request can name."""

from __future__ import annotations

from openpulid.pipelines.presets import Preset
from openpulid.pipelines.published_controls import PUBLISHED_CONTROLS
from openpulid.pipelines.request_inputs import PUBLISHED_STYLES
from openpulid.pipelines.weights import find_installed


def find_usable_weights(preset: Preset) -> tuple[str, ...]:
    """Return the installed ControlNets and IP-Adapters for the base model of a preset."""
    family = preset.models.family
    names = [name for name, control in PUBLISHED_CONTROLS.items() if control.family == family]
    names += [name for name, base in PUBLISHED_STYLES.items() if base == family]
    return () if preset.models.is_miniature else tuple(find_installed(names))
