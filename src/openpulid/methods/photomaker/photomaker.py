"""PhotoMaker v1 and v2 (arXiv 2312.04461) in any SDXL pipeline.

The class word of the prompt ("a photo of a *person*") is repeated once per identity token, and each
repetition is fused with one token. `prompt_fusion` does that with hooks; the pipeline is not
modified.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import CLIPVisionConfig

from openpulid.errors import OptionError, WeightsError
from openpulid.identity.clip_extractor import ClipExtractor, FaceRecognition
from openpulid.identity.detection import FaceDetection
from openpulid.identity.identity import Identity
from openpulid.io.checkpoint_kinds import PHOTOMAKER, CheckpointKind
from openpulid.io.checkpoints import explain_bad_weights, parse_config, read_metadata
from openpulid.methods.adapter import Adapter, exclusive_use
from openpulid.methods.hooks import PipelineState, Span, check_scale, find_unet
from openpulid.methods.ip_adapter import read_parts
from openpulid.methods.lora import check_low_rank, parse_lora
from openpulid.methods.photomaker.encoders import PhotoMakerEncoder
from openpulid.methods.photomaker.prompt_fusion import PromptFusion


class PhotoMaker(Adapter):
    """Identity encoder, prompt fusion and a low-rank change of the U-Net.

    Identities come from the extractor that `create_extractor` returns.

    Args:
        encoder: from `PhotoMakerEncoder.from_tensors`.
        lora: the file's low-rank change of the U-Net, by the names of diffusers or peft.

    Attributes:
        start: default start. The authors use the plain prompt for this fraction of the steps, which
            fixes the layout.
    """

    slot: ClassVar[str] = "prompt"
    kinds: ClassVar[tuple[CheckpointKind, ...]] = (PHOTOMAKER,)
    start: ClassVar[float] = 0.2

    def __init__(self, encoder: PhotoMakerEncoder, lora: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.encoder = encoder
        self.lora = parse_lora(lora)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PhotoMaker:
        """Load `photomaker-v1.bin` or `photomaker-v2.bin`.

        A safetensors file with another vision encoder has its configuration as metadata (`tower`).

        Raises:
            WeightsError: The file does not exist, or is another kind of adapter.
        """
        cls.check_file(path)
        parts = read_parts(path)
        if set(parts) != {"id_encoder", "lora_weights"}:
            raise WeightsError(
                "a PhotoMaker file has the parts id_encoder and lora_weights; "
                f"{path} has {', '.join(parts) or 'none'}."
            )
        message = f"{path} is damaged; download it again"
        config = None
        if Path(path).suffix == ".safetensors":
            metadata = read_metadata(path)
            if "tower" in metadata:
                sizes = parse_config(metadata["tower"], message)
                with explain_bad_weights(message):
                    config = CLIPVisionConfig(**sizes)
        with explain_bad_weights(message):
            encoder = PhotoMakerEncoder.from_tensors(parts["id_encoder"], config)
            return cls(encoder, parts["lora_weights"])

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> PhotoMaker:
        """Move the encoder and the low-rank matrices to a device and dtype."""
        self.encoder.to(device, dtype)
        for name, (down, up) in self.lora.items():
            self.lora[name] = (down.to(device, dtype), up.to(device, dtype))
        return self

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

    def check(self, target: Any) -> None:
        """Raise an error if the target is no SDXL pipeline with two text encoders.

        Raises:
            OptionError: it is another pipeline.
            WeightsError: the low-rank change was trained for another U-Net.
        """
        unet = find_unet(target)
        if getattr(target, "text_encoder_2", None) is None:
            raise OptionError(
                f"{type(target).__name__} does not have SDXL's two text encoders; "
                "attach PhotoMaker to a StableDiffusionXL pipeline."
            )
        for name, (down, up) in self.lora.items():
            with explain_bad_weights("this adapter was trained for another base model"):
                layer = unet.get_submodule(name)
            check_low_rank(layer, down, up)

    @contextmanager
    def use(
        self,
        people: Identity | Sequence[Identity],
        scale: float = 1.0,
        start: float | None = None,
        end: float = 1.0,
        pipe: Any = None,
    ) -> Iterator[PhotoMaker]:
        """Show an identity with the attached pipelines while the context is open.

        Args:
            people: an identity, or one per prompt.
            scale: weight of the low-rank change; 0 disables the method.
            start: fraction of the schedule after which the fused prompt is used. The step that
                begins at `start` still has the plain prompt, as the authors count, unless start
                is 0.
            end: fraction of the schedule at which it stops; 1 includes the last step.
            pipe: one of the attached pipelines; all of them by default.

        Raises:
            OptionError: Nothing is attached, or an argument is out of range.
            IdentityError: The features of an identity are not finite.
        """
        identities = [people] if isinstance(people, Identity) else list(people)
        if not identities:
            raise OptionError("pass an identity, or one per prompt.")
        check_scale(scale)
        for identity in identities:
            identity.check_values()
        states = self.select_pipelines(pipe)
        first = self.start if start is None else start
        with Span(first, end, after_start=True).watch("the identity") as span:
            if not scale or span.is_empty:
                yield self
                return
            with self.activate(states, lambda state: self._open(state, identities, scale, span)):
                yield self

    @contextmanager
    def _open(
        self, state: PipelineState, people: Sequence[Identity], scale: float, span: Span
    ) -> Iterator[None]:
        tokens = [encode_identity(self.encoder, identity) for identity in people]
        fusion = PromptFusion(state, self.encoder.fuse_module, tokens, span)
        with exclusive_use(state.network, self.slot), fusion.register(self.lora, scale):
            yield


def encode_identity(encoder: PhotoMakerEncoder, identity: Identity) -> Tensor:
    """Compute the tokens of all reference images of an identity.

    Returns:
        (n * k, D).

    Raises:
        OptionError: The identity was created by another extractor.
    """
    width = encoder.config.hidden_size
    if len(identity.hidden) != 2 or identity.hidden[0].shape[-1] != width:
        raise OptionError(
            "this identity has no features of PhotoMaker's vision encoder; "
            "create it again with `pulid identify --method photomaker`."
        )
    states = identity.hidden[0][0].unflatten(0, (identity.photos, -1))
    states = states.to(encoder.device, encoder.dtype)
    embeddings = None
    if encoder.face_dim:
        embeddings = identity.id_cond[0, :, : encoder.face_dim].to(states)
    return encoder.encode(states, embeddings).flatten(0, 1)
