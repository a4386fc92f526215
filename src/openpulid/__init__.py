"""openpulid: put a person into any image a diffusion model can make, from one photo, without tuning.

The names below are looked up when they are first used, so that `import openpulid` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openpulid.identity.identity import Identity as Identity
    from openpulid.methods.pulid.sdxl import PuLID as PuLID
    from openpulid.pipelines.studio import Studio as Studio
    from openpulid.pipelines.studio import load as load

__version__ = "0.2.0"

_HOME = {
    "load": "openpulid.pipelines.studio",
    "Studio": "openpulid.pipelines.studio",
    "Identity": "openpulid.identity.identity",
    "PuLID": "openpulid.methods.pulid.sdxl",
}

__all__ = ["Identity", "PuLID", "Studio", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """Import a public name from the module that defines it (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
