"""PuLID (arXiv 2404.16022): an identity encoder and an identity attention next to the text's."""

from openpulid.methods.pulid.encoders import ENCODERS, IDEncoder, IDFormer
from openpulid.methods.pulid.flux import PuLIDFlux, delay_guidance
from openpulid.methods.pulid.flux_transfer import transfer_adapter
from openpulid.methods.pulid.masks import (
    Mask,
    People,
    convert_mask,
    encode_people,
    normalize_people,
    read_mask,
    stack_masks,
)
from openpulid.methods.pulid.projection import Projection
from openpulid.methods.pulid.sdxl import PuLID, compiling_pays
from openpulid.methods.pulid.sdxl_attention import cross_attentions
from openpulid.methods.transformer_kinds import identity_blocks

__all__ = [
    "ENCODERS",
    "IDEncoder",
    "IDFormer",
    "Mask",
    "People",
    "Projection",
    "PuLID",
    "PuLIDFlux",
    "compiling_pays",
    "convert_mask",
    "cross_attentions",
    "delay_guidance",
    "encode_people",
    "identity_blocks",
    "normalize_people",
    "read_mask",
    "stack_masks",
    "transfer_adapter",
]
