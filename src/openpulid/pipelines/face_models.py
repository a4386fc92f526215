"""Which face models a preset's identities and adapter are of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openpulid.identity.identity import hash_models
from openpulid.io.checkpoints import fingerprint
from openpulid.io.hub import AURAFACE
from openpulid.methods.pulid import PuLID, PuLIDFlux
from openpulid.pipelines.model_set import ModelSet
from openpulid.pipelines.request_fields import RequestError
from openpulid.pipelines.weights import resolve_path


def hash_adapter_models(models: ModelSet) -> dict[str, str]:
    """Return name -> hash of the models of a method that brings its own vision encoder."""
    hashes = {models.method: fingerprint(resolve_path(models.require_adapter()))}
    if models.recognition is not None:
        hashes |= hash_models([resolve_path(models.recognition)])
    return hashes


def check_published_adapter(models: ModelSet) -> None:
    """Refuse AuraFace for a published adapter, before anything is downloaded for it.

    Raises:
        RequestError: the adapter was trained with another face recognition model.
    """
    if models.recognition == AURAFACE and not isinstance(models.adapter, Path):
        raise RequestError(
            f"{models.adapter} was not trained with AuraFace, whose embeddings differ; leave out "
            "{0}, or pass an adapter that was trained with it.",
            "model.face_pack",
        )


def require_face_models(adapter: Any, models: Mapping[str, str]) -> None:
    """Raise OptionError if an adapter was trained with other face models.

    Args:
        adapter: of any method; None requires nothing.
        models: name -> hash of the face models.
    """
    if isinstance(adapter, (PuLID, PuLIDFlux)):
        adapter.require(models)
    elif adapter is not None and AURAFACE in models:
        raise RequestError(
            "only PuLID can be trained with AuraFace; the adapters of other methods read the "
            "embeddings of another model, so leave out {0}.",
            "model.face_pack",
        )
