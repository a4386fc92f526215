"""ELITE (arXiv 2302.13848) in any SDXL pipeline: a word that means an image.

The published files are for Stable Diffusion 1.4. This is the same method with the sizes of SDXL:
a word has one embedding for each text encoder, which are stored as one vector.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from openpulid.errors import OptionError, WeightsError
from openpulid.io.checkpoint_kinds import ELITE_MAPPERS, CheckpointKind
from openpulid.io.checkpoints import group_tensors, read_tensors
from openpulid.methods.elite.attention import find_layers, hook_attention
from openpulid.methods.elite.encoders import Mapper, Mappers
from openpulid.methods.elite.fusion import ImageWordFusion
from openpulid.methods.hooks import check_scale
from openpulid.methods.prompt_adapter import PromptAdapter
from openpulid.methods.word_fusion import embedding_widths

GLOBAL = "global_mapper"
LOCAL = "local_mapper"
LOCAL_SCALE = 0.8
"""Default weight of the local attention, the authors' lambda."""


class ELITE(PromptAdapter):
    """Global and local mapper.

    `use` has two more options:

    - `local_scale`: weight of the local attention, which `scale` multiplies.
    - `masks`: per identity (H, W) or (n, H, W), 1 where the person is in the n reference images;
      None for everywhere.

    Args:
        encoder: the mappers.
    """

    kinds: ClassVar[tuple[CheckpointKind, ...]] = (ELITE_MAPPERS,)
    fusion = ImageWordFusion

    encoder: Mappers

    def __init__(self, encoder: Mappers) -> None:
        super().__init__(encoder, {})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ELITE:
        """Load a file with both mappers, or the authors' `global_mapper.pt`.

        `local_mapper.pt` is read as well if it is in the same folder. In a single file the names of
        the mappers precede those of the tensors.

        Raises:
            WeightsError: The file does not exist, is damaged, or is another kind of adapter.
        """
        cls.check_file(path)
        tensors = read_tensors(path)
        if not any(name.startswith(f"{GLOBAL}.") for name in tensors):
            if LOCAL in Path(path).name:
                raise WeightsError(f"{path} is the local mapper; pass {GLOBAL}.pt next to it.")
            parts = {GLOBAL: tensors}
            local = Path(path).with_name(Path(path).name.replace(GLOBAL, LOCAL))
            if local != Path(path) and local.is_file():
                parts[LOCAL] = read_tensors(local)
        else:
            parts = group_tensors(tensors)
        unknown = sorted(set(parts) - {GLOBAL, LOCAL})
        if unknown or GLOBAL not in parts:
            problem = f"it has {unknown[0]}" if unknown else f"it has no {GLOBAL}"
            raise WeightsError(f"{path} is no ELITE file: {problem}.")
        mappers = {part: Mapper.from_tensors(parts[part]) for part in parts}
        return cls(Mappers(mappers[GLOBAL], mappers.get(LOCAL)))

    def check(self, target: Any) -> None:
        """Raise an error if the mappers do not fit a pipeline.

        Raises:
            OptionError: the target is no SDXL pipeline.
            WeightsError: they are for another base model, as the published ones are.
        """
        super().check(target)
        width = sum(embedding_widths(target))
        shapes = {
            name: (layer.to_k.out_features, layer.to_k.in_features)
            for name, layer in find_layers(target.unet).items()
        }
        for mapper in filter(None, (self.encoder.global_mapper, self.encoder.local_mapper)):
            layers = {name: (out, mapper.width) for name, out in mapper.layers.items()}
            if mapper.width != width or layers != shapes:
                raise WeightsError(
                    f"these mappers are for text of width {mapper.width} and {len(layers)} "
                    "cross-attentions (the published ones: 768 and 16, Stable Diffusion 1.4), and "
                    f"this pipeline has {width} and {len(shapes)}; use a file that was trained on "
                    "this base model."
                )

    @contextmanager
    def hook_unet(
        self,
        fusion: Any,
        scale: float,
        local_scale: float = LOCAL_SCALE,
        masks: Sequence[Tensor | None] | None = None,
    ) -> Iterator[None]:
        """Register the hooks of text and attention, see `PromptAdapter.hook_unet`.

        Raises:
            OptionError: the masks are not one per identity, or the weight is out of range.
        """
        check_scale(local_scale)
        masks = [None] * len(fusion.people) if masks is None else masks
        if len(masks) != len(fusion.people):
            raise OptionError(f"pass {len(fusion.people)} masks, one per identity.")
        tokens = self.encoder.encode_patches(fusion.people, masks)
        layers = find_layers(fusion.state.network)
        with (
            fusion.register(),
            hook_attention(
                layers,
                self.encoder,
                tokens,
                lambda: fusion.rows,
                scale,
                scale * local_scale,
            ),
        ):
            yield
