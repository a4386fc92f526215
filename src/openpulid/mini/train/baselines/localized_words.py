"""FastComposer in training: words fused with tokens of CLIP, and localized cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

from openpulid.methods.fastcomposer.encoders import FastComposerEncoder
from openpulid.mini.train.baselines.base import Attention, Baseline
from openpulid.mini.train.baselines.clip import ClipBaseline, copy_vision_encoder, vision_config
from openpulid.mini.train.baselines.marked_words import DroppableFastComposer, find_words
from openpulid.mini.train.baselines.tensors import (
    create_lora,
    lora_tensors,
    save_half,
    train_lora,
)
from openpulid.training import StepRNG
from openpulid.training.pulid import Batch, DiffusionStep, drop_captions, drop_identity
from openpulid.training.pulid.localization import LocalizationLoss, MaskedDiffusionLoss

LOCALIZATION_WEIGHT = 1e-3


class FastComposerBaseline(ClipBaseline):
    """FastComposer, with its authors' losses (arXiv 2305.10431, section 4.2).

    Half of the steps restrict the loss to the person, and the localization loss acts in all steps.
    The person's mask is that of the face. A dropped identity also has no caption; the authors drop
    a tenth, as PuLID does.
    """

    masks_loss = True
    reads_attention = True
    method: DroppableFastComposer

    @property
    def vision_encoder(self) -> CLIPVisionModelWithProjection:
        """The image encoder."""
        return self.method.encoder.image_encoder

    def drop(self, batch: Batch, dropped: Tensor, rng: StepRNG) -> Batch:
        """Drop identities and captions where `dropped` (B,) is true."""
        return drop_captions(drop_identity(batch, dropped), dropped)

    def masked_loss(self, step: DiffusionStep, batch: Batch) -> Tensor:
        """Compute the authors' loss of the people's region, a scalar."""
        masks, is_shown = _masks(batch)
        return MaskedDiffusionLoss()(step, masks * is_shown[..., None, None])

    def extra_losses(self, batch: Batch, pipe: Any, attention: Attention) -> Mapping[str, Tensor]:
        """Compute the localization loss with the authors' weight."""
        masks, is_shown = _masks(batch)
        positions = torch.tensor(find_words(batch.prompts, pipe.tokenizer_2))[:, None]
        loss = LocalizationLoss()(attention, masks, positions.to(masks.device), is_shown)
        return {"localization": LOCALIZATION_WEIGHT * loss}

    def save(self, path: Path, pipe: Any) -> Path:
        """Save the image encoder, the fusion module and the LoRA."""
        tensors = self.method.encoder.state_dict() | lora_tensors(self.method)
        return save_half(tensors, path, self.describe_vision_encoder())


def fastcomposer(pipe: Any, clip: CLIPVisionModelWithProjection) -> Baseline:
    """Create FastComposer on a CLIP whose last two layers train, as in the paper.

    The authors train all of the U-Net; here it is a LoRA of all attention layers.

    Args:
        pipe: the miniature's pipeline.
        clip: the vision encoder.
    """
    encoder = FastComposerEncoder(vision_config(clip, pipe.unet.config.cross_attention_dim))
    last_layers = copy_vision_encoder(encoder.image_encoder, clip)
    method = DroppableFastComposer(encoder, create_lora(pipe.unet))
    trained = nn.ModuleList(
        [
            encoder.image_encoder.visual_projection,
            encoder.postfuse_module,
            train_lora(method),
        ]
    )
    return FastComposerBaseline(method, trained, last_layers)


def _masks(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the face masks (B, 1, h, w), and (B, 1) whether an identity is not dropped."""
    assert batch.masks is not None
    return batch.masks, batch.id_cond.any(1, keepdim=True)
