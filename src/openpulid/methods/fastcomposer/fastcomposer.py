"""FastComposer (arXiv 2305.10431) in any SDXL pipeline: several people by the words for them.

In "a man and a woman in the park", each word for a person is fused with the token of that person's
image. The published file is for Stable Diffusion 1.5; this is the same method with the sizes of
SDXL, and with a low-rank change of the U-Net where the authors train all of it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from openpulid.errors import WeightsError
from openpulid.identity.clip_extractor import ClipExtractor, FaceRecognition
from openpulid.identity.detection import FaceDetection
from openpulid.io.checkpoint_kinds import FASTCOMPOSER, CheckpointKind, read_header
from openpulid.io.checkpoints import read_tensors
from openpulid.methods.fastcomposer.encoders import PARTS, FastComposerEncoder
from openpulid.methods.fastcomposer.fusion import MarkedWordFusion
from openpulid.methods.prompt_adapter import PromptAdapter

BASE_PARTS = ("text_encoder.", "unet.", "vae.")
"""Parts of the published file that belong to its base model."""


class FastComposer(PromptAdapter):
    """Image encoder, prompt fusion and a low-rank change of the U-Net.

    Identities come from the extractor that `create_extractor` returns.

    Args:
        encoder: from `FastComposerEncoder.from_tensors`.
        lora: low-rank change of the U-Net, by the names of diffusers or peft.

    Attributes:
        start: default start, 10 of the 50 steps of the authors' script.
    """

    kinds: ClassVar[tuple[CheckpointKind, ...]] = (FASTCOMPOSER,)
    fusion = MarkedWordFusion
    start: ClassVar[float] = 0.2
    shows_several: ClassVar[bool] = True

    encoder: FastComposerEncoder

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FastComposer:
        """Load a file for SDXL, or the authors' `pytorch_model.bin`.

        The latter has a whole Stable Diffusion 1.5, which is not read: its encoder and its fusion
        module can be used on their own, but do not fit an SDXL pipeline. A file for SDXL has the
        same names, and a LoRA as `unet`. One with another image encoder than CLIP-L has its
        configuration as metadata (`tower`).

        Raises:
            WeightsError: The file does not exist, is damaged, or is another kind of adapter.
        """
        cls.check_file(path)
        names = read_header(path).shapes
        unknown = [name for name in names if not name.startswith((*PARTS, *BASE_PARTS))]
        if unknown:
            raise WeightsError(f"{path} is no FastComposer file: it has {min(unknown)}.")
        lora: dict[str, Tensor] = {}
        if any(name.startswith("unet.") and "lora" in name for name in names):
            lora = read_tensors(path, prefix="unet.")
        return cls(FastComposerEncoder.load(path), lora)

    def create_extractor(
        self,
        detection: FaceDetection,
        recognition: FaceRecognition | None = None,
        models: Mapping[str, str] | None = None,
    ) -> ClipExtractor:
        """Create the identity extractor for this file, whose image encoder reads whole images.

        Args:
            detection: face detection.
            recognition: unused; FastComposer has no face recognition model.
            models: name -> hash of the models; written into every identity.
        """
        encoder = self.encoder.image_encoder
        return ClipExtractor(detection, encoder, "padded image", -1, models=models)

    def check(self, target: Any) -> None:
        """Raise an error if the file does not fit a pipeline.

        Raises:
            OptionError: the target is no SDXL pipeline.
            WeightsError: the file is for text of another width, as the published one is.
        """
        super().check(target)
        width = target.unet.config.cross_attention_dim
        if self.encoder.width != width:
            raise WeightsError(
                f"this FastComposer file is for text of width {self.encoder.width} (the published "
                f"file: 768, Stable Diffusion 1.5), and this pipeline's has {width}; use a file "
                "that was trained on this base model."
            )
