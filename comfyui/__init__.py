"""PuLID for ComfyUI: keep a person's identity in SDXL, FLUX and Chroma workflows.

The nodes are thin: the arithmetic is that of the package `openpulid`, which they import when they
run.
"""

from __future__ import annotations

from .extension import OpenPulidExtension


async def comfy_entrypoint() -> OpenPulidExtension:
    """Return the extension to ComfyUI."""
    return OpenPulidExtension()
