"""PhotoMaker v1 and v2 (arXiv 2312.04461) in any SDXL pipeline.

The class word of the prompt ("a photo of a *person*") is repeated once per identity token, and each
repetition is fused with one token. `prompt_fusion` does that with hooks; the pipeline is not
modified.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import ClassVar

from openpulid.errors import OptionError, WeightsError
from openpulid.identity.clip_extractor import ClipExtractor, FaceRecognition
from openpulid.identity.detection import FaceDetection
from openpulid.io.checkpoint_kinds import PHOTOMAKER, CheckpointKind
from openpulid.io.checkpoints import explain_bad_weights, group_tensors, read_tensors
from openpulid.methods.photomaker.encoders import PhotoMakerEncoder, read_vision_config
from openpulid.methods.photomaker.fusion import RepeatedWordFusion
from openpulid.methods.prompt_adapter import PromptAdapter


class PhotoMaker(PromptAdapter):
    """Identity encoder, prompt fusion and a low-rank change of the U-Net.

    Identities come from the extractor that `create_extractor` returns.

    Args:
        encoder: from `PhotoMakerEncoder.from_tensors`.
        lora: the file's low-rank change of the U-Net, by the names of diffusers or peft.

    Attributes:
        start: default start. The authors use the plain prompt for this fraction of the steps, which
            fixes the layout.
    """

    kinds: ClassVar[tuple[CheckpointKind, ...]] = (PHOTOMAKER,)
    fusion = RepeatedWordFusion
    start: ClassVar[float] = 0.2

    encoder: PhotoMakerEncoder

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PhotoMaker:
        """Load `photomaker-v1.bin` or `photomaker-v2.bin`.

        A safetensors file with another vision encoder has its configuration as metadata (`tower`).

        Raises:
            WeightsError: The file does not exist, or is another kind of adapter.
        """
        cls.check_file(path)
        parts = group_tensors(read_tensors(path))
        if set(parts) != {"id_encoder", "lora_weights"}:
            raise WeightsError(
                "a PhotoMaker file has the parts id_encoder and lora_weights; "
                f"{path} has {', '.join(parts) or 'none'}."
            )
        message = f"{path} is damaged; download it again"
        config = read_vision_config(path, message)
        with explain_bad_weights(message):
            encoder = PhotoMakerEncoder.from_tensors(parts["id_encoder"], config)
            return cls(encoder, parts["lora_weights"])

    def create_extractor(
        self,
        detection: FaceDetection,
        recognition: FaceRecognition | None = None,
        models: Mapping[str, str] | None = None,
    ) -> ClipExtractor:
        """Create the identity extractor for this file.

        The file's own vision encoder reads whole images; version 2 also needs a face embedding.

        Args:
            detection: face detection.
            recognition: buffalo_l's face recognition model, raw embeddings.
            models: name -> hash of the models; written into every identity.

        Raises:
            OptionError: Version 2 without a face recognition model.
        """
        if self.encoder.face_dim and recognition is None:
            raise OptionError(
                "PhotoMaker v2 needs a face recognition model; pass that of buffalo_l."
            )
        if not self.encoder.face_dim:
            recognition = None
        return ClipExtractor(detection, self.encoder, "image", -1, recognition, models)
