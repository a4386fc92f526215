"""The blocks of the transformers in which PuLID acts."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TransformerBlocks:
    """What a transformer offers to an adapter and its patches.

    Attributes:
        kind: of the model, for messages.
        num_double, num_single: blocks of each kind, as in FLUX.
        width: of the image tokens.
        are_replaceable: whether a patch can take the place of a block. Otherwise ComfyUI calls
            patches after every block.
    """

    kind: str
    num_double: int
    num_single: int
    width: int
    are_replaceable: bool


def find_blocks(transformer: Any) -> TransformerBlocks:
    """Return the blocks of a FLUX, Chroma, Qwen-Image, Lumina 2 or Z-Image transformer.

    Raises:
        OptionError: The model is of another kind, or this version of ComfyUI calls no patches
            after its blocks.
    """
    from comfy.ldm.chroma.model import Chroma
    from comfy.ldm.flux.model import Flux
    from comfy.ldm.lumina.model import NextDiT
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

    from openpulid.errors import OptionError

    if isinstance(transformer, (Flux, Chroma)):
        return TransformerBlocks(
            "FLUX" if isinstance(transformer, Flux) else "Chroma",
            len(transformer.double_blocks),
            len(transformer.single_blocks),
            transformer.hidden_size,
            are_replaceable=True,
        )
    if isinstance(transformer, QwenImageTransformer2DModel):
        num_blocks = len(transformer.transformer_blocks)
        return TransformerBlocks("Qwen-Image", num_blocks, 0, transformer.inner_dim, False)
    if isinstance(transformer, NextDiT):
        # ComfyUI has Lumina 2 since February 2025, and calls patches in it since December
        if "double_block" not in inspect.getsource(sys.modules[NextDiT.__module__]):
            raise OptionError(
                "this version of ComfyUI calls no patches in Lumina 2 and Z-Image models; update "
                "ComfyUI."
            )
        return TransformerBlocks(
            "Lumina 2 or Z-Image", len(transformer.layers), 0, transformer.dim, False
        )
    raise OptionError(
        "PuLID acts in SDXL, FLUX.1, Chroma, Qwen-Image, Lumina 2 and Z-Image models; this one is "
        f"{type(transformer).__name__}."
    )
