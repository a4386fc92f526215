"""What ComfyUI loads: the list of nodes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .nodes_adapter import ApplyPulid, ApplyPulidToImages, LoadPulid
from .nodes_identity import (
    FacePreview,
    IdentityFromImages,
    IdentitySimilarity,
    LoadFaceModels,
    LoadIdentity,
    SaveIdentity,
)
from .nodes_methods import (
    ApplyIdentityNet,
    ApplyMethod,
    LoadMethod,
    LoadMethodFaceModels,
    PhotoMakerPrompt,
)
from .nodes_people import ApplyPulidToPeople, DescribePerson


class OpenPulidExtension(ComfyExtension):
    """The nodes of this pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the node classes."""
        nodes: list[type[io.ComfyNode]] = [
            LoadPulid,
            LoadFaceModels,
            IdentityFromImages,
            LoadIdentity,
            SaveIdentity,
            ApplyPulid,
            ApplyPulidToImages,
            IdentitySimilarity,
            FacePreview,
            LoadMethod,
            LoadMethodFaceModels,
            ApplyMethod,
            ApplyIdentityNet,
            PhotoMakerPrompt,
        ]
        if hasattr(io, "Autogrow"):  # since December 2025
            nodes += [DescribePerson, ApplyPulidToPeople]
        return nodes
