"""Identities for other programs."""

from __future__ import annotations

from pathlib import Path

import torch

from openpulid.errors import OptionError
from openpulid.identity.identity import Identity
from openpulid.io.gguf_files import import_gguf, write_gguf
from openpulid.methods.pulid import PuLIDFlux
from openpulid.pipelines.presets import Preset
from openpulid.pipelines.weights import require_weights, resolve_path


def check_gguf_export(preset: Preset) -> None:
    """Check that identities can be exported, before an image is read.

    Raises:
        OptionError: the preset is not for FLUX or a relative, has another method, or no adapter.
        WeightsError: the adapter or the package gguf is not installed.
    """
    if not preset.models.has_transformer or preset.models.method != "pulid":
        raise OptionError(
            f"{preset.label} has no encoder of PuLID for FLUX; choose --preset flux without "
            "--method, or leave out --for."
        )
    import_gguf()
    require_weights(preset, [preset.models.require_adapter()])


@torch.no_grad()
def export_gguf(preset: Preset, identity: Identity, path: Path) -> Path:
    """Write the identity tokens of PuLID for FLUX as stable-diffusion.cpp reads them.

    The file has one tensor `pulid_id`, (32, 2048) in float16, for the option --pulid-id-embedding
    (docs/pulid.md there). It fits the adapter of the preset alone. Only the owner can read it: it
    is biometric data.

    Args:
        preset: of FLUX or a relative; its adapter has the encoder.
        identity: extracted with its face models.
        path: of the file.

    Raises:
        WeightsError: the adapter or the package gguf is missing or damaged.
        IdentityError: the identity has other sizes than the encoder reads.
        OutputError: the file cannot be written.
    """
    adapter = PuLIDFlux.load(resolve_path(preset.models.require_adapter()))
    adapter.require(identity.models)
    identity.check_values()
    (tokens,) = adapter.encode(identity.id_cond, identity.hidden)
    arrays = {"pulid_id": tokens.half().cpu().numpy()}
    return write_gguf(path, "pulid", {"pulid.version": 1}, arrays, private=True)
