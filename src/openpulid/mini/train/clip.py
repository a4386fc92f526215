"""Training and evaluation of the miniature's CLIP and text encoders on images and their captions.

One run trains a small `transformers.CLIPModel`, whose text encoder is also SDXL's second text
encoder, and SDXL's first text encoder, a smaller `CLIPTextModel`, on the same image embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from openpulid.faces.augment import degrade
from openpulid.identity.eva_clip import normalize_for_clip
from openpulid.io.image_grid import captioned_grid, to_pil
from openpulid.mini.data import Captions, load_faces, token_ids
from openpulid.mini.train.attribute_classifier import AttributeHeads, attribute_loss
from openpulid.training import StepRNG, generator_for
from openpulid.world import WorldDataset

EMBEDDING_DIM = 128
"""Dimension of the shared embedding of images and captions, and of SDXL's pooled text."""
TOKEN_STD = 1.0
"""Standard deviation of initial token embeddings.

CLIP's own 0.02 is a tenth of what the first block initially adds. In a short training, words that
matter little to the contrastive loss (sad, bearded) would stay too weak for a U-Net to use."""
POSITION_STD = 0.5
"""Standard deviation of initial position embeddings."""


def build_text_config(tokenizer: Tokenizer, width: int, layers: int = 3) -> CLIPTextConfig:
    """Build the configuration of a text encoder for the tokenizer's closed vocabulary.

    Args:
        tokenizer: defines vocabulary, length and special tokens.
        width: hidden size, a multiple of 32, the size of an attention head.
        layers: number of transformer blocks.
    """
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        projection_dim=EMBEDDING_DIM,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_clip(
    tokenizer: Tokenizer, size: int = 96, patch: int = 12, width: int = 128, layers: int = 4
) -> CLIPModel:
    """Build CLIP with random weights.

    Args:
        tokenizer: defines the vocabulary of the text encoder.
        size: image size in pixels.
        patch: patch size in pixels.
        width: hidden size of the vision encoder, a multiple of 32.
        layers: transformer blocks of the vision encoder.
    """
    vision = CLIPVisionConfig(
        image_size=size,
        patch_size=patch,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        projection_dim=EMBEDDING_DIM,
        hidden_act="gelu",
    )
    text = build_text_config(tokenizer, width=128)
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=EMBEDDING_DIM
    )
    clip = CLIPModel(config)
    _init_embeddings(clip.text_model)
    return clip


def build_first_text_encoder(tokenizer: Tokenizer, width: int = 64) -> CLIPTextModelWithProjection:
    """Build SDXL's first text encoder, with a projection that only its training uses."""
    text_encoder = CLIPTextModelWithProjection(build_text_config(tokenizer, width))
    _init_embeddings(text_encoder.text_model)
    return text_encoder


def _init_embeddings(text_transformer: Any) -> None:
    """Initialize token and position embeddings with `TOKEN_STD` and `POSITION_STD`."""
    embeddings = text_transformer.embeddings
    nn.init.normal_(embeddings.token_embedding.weight, std=TOKEN_STD)
    nn.init.normal_(embeddings.position_embedding.weight, std=POSITION_STD)


class ClipTask:
    """Trains CLIP and the first text encoder; a `training.trainer.Task`.

    Args:
        clip: from `build_clip`.
        text_encoder: from `build_first_text_encoder`.
        tokenizer: of the captions.
        data: training images.
        captions: captions of `data`.
        held_out: images of held-out people; None disables validation.
        batch: images per step; each caption is contrasted with all of them.
        locked: train only the vision encoder, on fixed text embeddings (LiT, Zhai et al. 2022).
    """

    def __init__(
        self,
        clip: CLIPModel,
        text_encoder: CLIPTextModelWithProjection,
        tokenizer: Tokenizer,
        data: WorldDataset,
        captions: Captions,
        held_out: WorldDataset | None = None,
        batch: int = 96,
        locked: bool = False,
    ) -> None:
        self.clip = clip
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.locked = locked
        for module in (clip.text_model, clip.text_projection, text_encoder):
            module.requires_grad_(not locked)
        self.data = data
        self.captions = captions
        self.held_out = held_out
        self.batch = batch
        names = ("image_attributes", "text_attributes", "first_text_attributes")
        self.heads = nn.ModuleDict({name: AttributeHeads(EMBEDDING_DIM) for name in names})

    def modules(self) -> Mapping[str, nn.Module]:
        """Return CLIP, the first text encoder unless it is locked, and the attribute heads."""
        return {
            "clip": self.clip,
            **({} if self.locked else {"text": self.text_encoder}),
            "heads": self.heads,
        }

    def losses(self, rng: StepRNG) -> Mapping[str, Tensor]:
        """Compute the contrastive and attribute losses of all trained encoders.

        Attributes are predicted from each embedding. They make the vision encoder represent small
        details, and the text encoders represent all words, not only those that distinguish the
        images of a batch.
        """
        rows = rng.indices(len(self.data), self.batch)
        variants = rng.randint(self.captions.tokens.shape[1], rows.shape, "variants")
        tokens = self.captions.rows(rows, variants).to(self.clip.device)
        with torch.no_grad(), torch.autocast(self.clip.device.type, enabled=False):
            images, _, _ = load_faces(self.data, rows.numpy(), self.clip.device)
            images = degrade(images, generator_for(rng.seed, rng.step, rng.rank))
        attributes = torch.from_numpy(self.data.attributes[rows.numpy()].astype(np.int64))
        attributes = attributes.to(self.clip.device)
        output = self.clip(input_ids=tokens, pixel_values=normalize_for_clip(images))
        image_embeds = output.image_embeds
        text_embeds = output.text_embeds
        scale = self.clip.logit_scale.clamp(max=4.6).exp()
        losses = {
            "clip": contrastive_loss(image_embeds, text_embeds, scale),
            "image_attributes": self._attribute_loss("image_attributes", image_embeds, attributes),
        }
        if not self.locked:
            first_embeds = self.text_encoder(input_ids=tokens).text_embeds
            losses["text"] = contrastive_loss(image_embeds.detach(), first_embeds, scale.detach())
            for name, embeds in (
                ("text_attributes", text_embeds),
                ("first_text_attributes", first_embeds),
            ):
                losses[name] = self._attribute_loss(name, embeds, attributes)
        return losses

    def _attribute_loss(self, head: str, embedding: Tensor, attributes: Tensor) -> Tensor:
        """Compute the weighted attribute loss of a head on normalized embeddings (B, D)."""
        scaled = normalize(embedding.float(), dim=-1) * EMBEDDING_DIM**0.5
        return 0.5 * attribute_loss(self.heads[head](scaled), attributes)

    def validate(self) -> Mapping[str, float]:
        """Measure retrieval on held-out people."""
        if self.held_out is None:
            return {}
        return evaluate_clip(self.clip, self.text_encoder, self.tokenizer, self.held_out)

    def sheet(self) -> Image.Image | None:
        """Draw held-out images with the captions that CLIP retrieves."""
        if self.held_out is None:
            return None
        return draw_retrievals(self.clip, self.tokenizer, self.held_out)


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """Compute CLIP's loss (Radford et al. 2021).

    Args:
        images: (B, D) image embeddings.
        texts: (B, D) embeddings of their captions.
        scale: factor of the cosines, a scalar.

    Returns:
        The mean of the cross-entropies of captions per image and of images per caption.
    """
    with torch.autocast(images.device.type, enabled=False):
        scale = scale.float().to(images.device)
        logits = scale * normalize(images.float()) @ normalize(texts.float()).T
        targets = torch.arange(len(logits), device=logits.device)
        return (cross_entropy(logits, targets) + cross_entropy(logits.T, targets)) / 2


@torch.no_grad()
def rescale_text_encoder(text_transformer: Any, projection: nn.Linear, tokens: Tensor) -> None:
    """Scale a text encoder in place so that the outputs that SDXL uses have mean square 1.

    These are the penultimate hidden states and the pooled text. The directions of the embeddings do
    not change: blocks normalize their input, so all that is added to the residual stream can be
    scaled together. A U-Net learns faster from values of the usual size than from CLIP's small
    ones.

    Args:
        text_transformer: a CLIP text transformer.
        projection: its projection to the pooled text.
        tokens: (B, L) captions to measure on.
    """
    output = text_transformer(input_ids=tokens, output_hidden_states=True)
    scale = 1 / output.hidden_states[-2].float().square().mean().sqrt()
    embeddings = text_transformer.embeddings
    residual_weights = [embeddings.token_embedding.weight, embeddings.position_embedding.weight]
    for layer in text_transformer.encoder.layers:
        for linear in (layer.self_attn.out_proj, layer.mlp.fc2):
            residual_weights += [linear.weight, linear.bias]
    for weight in residual_weights:
        weight *= scale
    projection.weight /= projection(output.pooler_output).float().square().mean().sqrt()


@torch.no_grad()
def embed_images(clip: CLIPModel | CLIPVisionModelWithProjection, images: Tensor) -> Tensor:
    """Compute normalized embeddings (B, D) of images (B, 3, S, S) in [0, 1]."""
    pixels = normalize_for_clip(images.to(clip.device))
    pooled = clip.vision_model(pixel_values=pixels).pooler_output
    return normalize(clip.visual_projection(pooled).float(), dim=-1)


@torch.no_grad()
def embed_texts(clip: CLIPModel | CLIPTextModelWithProjection, tokens: Tensor) -> Tensor:
    """Compute normalized embeddings (B, D) of token ids (B, L)."""
    pooled = clip.text_model(input_ids=tokens.to(clip.device)).pooler_output
    return normalize(clip.text_projection(pooled).float(), dim=-1)


@torch.no_grad()
def evaluate_clip(
    clip: CLIPModel,
    text_encoder: CLIPTextModelWithProjection,
    tokenizer: Tokenizer,
    data: WorldDataset,
    limit: int = 512,
    candidates: int = 64,
) -> dict[str, float]:
    """Measure how often the caption of an image is retrieved among candidates.

    Args:
        clip: the trained CLIP.
        text_encoder: the first text encoder.
        tokenizer: of the captions.
        data: images of held-out people.
        limit: maximum number of images, rounded down to a multiple of `candidates`.
        candidates: captions to choose from.

    Returns:
        The top-1 accuracy of CLIP (`top1`) and of the first text encoder (`top1_text`).
    """
    generator = generator_for("clip figures")
    rows = torch.randperm(len(data), generator=generator)[: limit // candidates * candidates]
    prompts = [data.prompt(row, generator) for row in rows.tolist()]
    tokens = token_ids(tokenizer, prompts).to(clip.device)
    hits: dict[str, list[Tensor]] = {"top1": [], "top1_text": []}
    for start in range(0, len(rows), candidates):
        images, _, _ = load_faces(data, rows[start : start + candidates].numpy(), clip.device)
        image_embeds = embed_images(clip, images)
        chunk = tokens[start : start + candidates]
        for name, text_embeds in (
            ("top1", embed_texts(clip, chunk)),
            ("top1_text", text_encoder(input_ids=chunk).text_embeds),
        ):
            best = (image_embeds @ normalize(text_embeds.float(), dim=-1).T).argmax(1)
            hits[name].append((best == torch.arange(len(best), device=best.device)).float())
    return {name: torch.cat(values).mean().item() for name, values in hits.items()}


@torch.no_grad()
def draw_retrievals(
    clip: CLIPModel,
    tokenizer: Tokenizer,
    data: WorldDataset,
    candidates: int = 64,
    limit: int = 18,
) -> Image.Image:
    """Draw images with the captions that CLIP retrieves for them.

    Args:
        clip: the trained CLIP.
        tokenizer: of the captions.
        data: images of held-out people.
        candidates: captions to choose from. A wrong one is marked and followed by the correct one.
        limit: number of images to draw.
    """
    generator = generator_for("clip sheet")
    rows = torch.randperm(len(data), generator=generator)[:candidates].tolist()
    prompts = [data.prompt(row, generator) for row in rows]
    images, _, _ = load_faces(data, np.array(rows), clip.device)
    text_embeds = embed_texts(clip, token_ids(tokenizer, prompts).to(clip.device))
    retrieved = (embed_images(clip, images) @ text_embeds.T).argmax(1).tolist()
    labels = [
        prompts[best] if best == correct else f"WRONG: {prompts[best]} | is: {prompts[correct]}"
        for correct, best in enumerate(retrieved)
    ]
    return captioned_grid(list(zip(to_pil(images[:limit]), labels[:limit], strict=True)), side=220)
