"""openpulid: generate images of a person from one photo, without fine-tuning.

The names below are imported when they are first used, so `import openpulid` stays cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from openpulid.errors import PulidError as PulidError
    from openpulid.identity.identity import Identity as Identity
    from openpulid.methods.pulid import PuLID as PuLID
    from openpulid.pipelines.factory import load_extractor as load_extractor
    from openpulid.pipelines.loading import load as load
    from openpulid.pipelines.request import GenerationRequest as GenerationRequest
    from openpulid.pipelines.request import IdentityOptions as IdentityOptions
    from openpulid.pipelines.request import ModelSelection as ModelSelection
    from openpulid.pipelines.request_inputs import Control as Control
    from openpulid.pipelines.request_inputs import Embedding as Embedding
    from openpulid.pipelines.request_inputs import InitImage as InitImage
    from openpulid.pipelines.request_inputs import Lora as Lora
    from openpulid.pipelines.request_inputs import Person as Person
    from openpulid.pipelines.request_inputs import StyleImage as StyleImage
    from openpulid.pipelines.result import GenerationResult as GenerationResult
    from openpulid.pipelines.selection import resolve_preset as resolve_preset
    from openpulid.pipelines.studio import Studio as Studio

__version__ = "0.2.0"

_MODULES = {
    "Control": "openpulid.pipelines.request_inputs",
    "Embedding": "openpulid.pipelines.request_inputs",
    "GenerationRequest": "openpulid.pipelines.request",
    "GenerationResult": "openpulid.pipelines.result",
    "Identity": "openpulid.identity.identity",
    "IdentityOptions": "openpulid.pipelines.request",
    "InitImage": "openpulid.pipelines.request_inputs",
    "Lora": "openpulid.pipelines.request_inputs",
    "ModelSelection": "openpulid.pipelines.request",
    "Person": "openpulid.pipelines.request_inputs",
    "PuLID": "openpulid.methods.pulid.sdxl",
    "PulidError": "openpulid.errors",
    "Studio": "openpulid.pipelines.studio",
    "StyleImage": "openpulid.pipelines.request_inputs",
    "load": "openpulid.pipelines.loading",
    "load_extractor": "openpulid.pipelines.factory",
    "resolve_preset": "openpulid.pipelines.selection",
}

__all__ = [
    "Control",
    "Embedding",
    "GenerationRequest",
    "GenerationResult",
    "Identity",
    "IdentityOptions",
    "InitImage",
    "Lora",
    "ModelSelection",
    "Person",
    "PuLID",
    "PulidError",
    "Studio",
    "StyleImage",
    "__version__",
    "load",
    "load_extractor",
    "resolve_preset",
]


def __getattr__(name: str) -> object:
    """Import a public name from the module that defines it (PEP 562)."""
    from importlib import import_module

    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
