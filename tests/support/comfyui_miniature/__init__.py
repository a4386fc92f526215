"""A node pack for tests: small models in place of those that ComfyUI's loaders read from files."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .transformer import (
    LoadAutoencoder,
    LoadChroma,
    LoadFlux,
    LoadFluxPulid,
    LoadTextEncoder,
)
from .unet import LoadControlNet, LoadMiniature


class TestExtension(ComfyExtension):
    """The nodes of this pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the node classes."""
        return [
            LoadMiniature,
            LoadControlNet,
            LoadFlux,
            LoadChroma,
            LoadTextEncoder,
            LoadAutoencoder,
            LoadFluxPulid,
        ]


async def comfy_entrypoint() -> TestExtension:
    """Return the extension to ComfyUI."""
    return TestExtension()
