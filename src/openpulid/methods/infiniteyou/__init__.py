"""InfiniteYou (arXiv 2503.16418): a ControlNet of FLUX that reads an identity, not the prompt."""

from openpulid.methods.infiniteyou.encoders import (
    FILES,
    INFUSENET,
    PREFIX,
    FaceProjection,
)
from openpulid.methods.infiniteyou.flux import InfiniteYou
from openpulid.methods.infiniteyou.infusenet import InfuseNet

__all__ = ["FILES", "INFUSENET", "PREFIX", "FaceProjection", "InfiniteYou", "InfuseNet"]
