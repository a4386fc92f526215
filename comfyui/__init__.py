"""PuLID for ComfyUI: keep a person's identity in workflows of SDXL, FLUX and other models.

The nodes are thin: the arithmetic is that of the package `openpulid`, which they import when they
run.
"""

from __future__ import annotations

from .extension import OpenPulidExtension
from .folders import register_folders
from .replacements import register_replacements


async def comfy_entrypoint() -> OpenPulidExtension:
    """Register folders and replacements, and return the extension to ComfyUI."""
    register_folders()
    await register_replacements()
    return OpenPulidExtension()
