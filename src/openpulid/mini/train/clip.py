"""What compares words and pictures in the miniature, trained in one run on pictures and their sentences.

A small `transformers.CLIPModel`, whose text tower is also SDXL's second text encoder; and SDXL's first text encoder, a
smaller `CLIPTextModel`, against the same picture embeddings.
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

from openpulid.identity.eva_clip import CLIP_MEAN, CLIP_STD
from openpulid.io.image_grid import captioned_grid, to_pil
from openpulid.mini.data.augment import augment
from openpulid.mini.data.captions import Captions, token_ids
from openpulid.mini.train.attribute_classifier import AttributeHeads, attribute_loss
from openpulid.mini.train.recognition import faces_of
from openpulid.training.rng import StepRNG, generator_for
from openpulid.world.dataset import WorldDataset

EMBEDDING = 128
"""Width of what pictures and sentences are compared in, and SDXL's pooled text."""
WORD, PLACE = 1.0, 0.5
"""Standard deviations of a text tower's first embeddings. CLIP's own 0.02 is a tenth of what the first block adds at its start:
in a short training words that matter little to the contrast (sad, bearded) stay too quiet for a U-Net to hear."""


def text_config(tokenizer: Tokenizer, width: int, layers: int = 3) -> CLIPTextConfig:
    """A text tower over the closed vocabulary; heads of 32."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer), max_position_embeddings=tokenizer.model_max_length,
        hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, num_attention_heads=width // 32,
        projection_dim=EMBEDDING, hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def build_clip(
    tokenizer: Tokenizer, size: int = 96, patch: int = 12, width: int = 128, layers: int = 4
) -> CLIPModel:
    """CLIP for `size` px pictures with random weights."""
    vision = CLIPVisionConfig(
        image_size=size, patch_size=patch, hidden_size=width, intermediate_size=3 * width,
        num_hidden_layers=layers, num_attention_heads=width // 32, projection_dim=EMBEDDING, hidden_act="gelu",
    )  # fmt: skip
    text = text_config(tokenizer, width=128)
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=EMBEDDING
    )
    clip = CLIPModel(config)
    _speak_up(clip.text_model)
    return clip


def build_first_text(tokenizer: Tokenizer, width: int = 64) -> CLIPTextModelWithProjection:
    """SDXL's first text encoder, with a projection that serves its training alone."""
    text = CLIPTextModelWithProjection(text_config(tokenizer, width))
    _speak_up(text.text_model)
    return text


def _speak_up(tower: Any) -> None:
    nn.init.normal_(tower.embeddings.token_embedding.weight, std=WORD)
    nn.init.normal_(tower.embeddings.position_embedding.weight, std=PLACE)


class ClipTask:
    """Trains CLIP and the first text encoder; a `training.loop.Task`.

    Args:
        clip, text: from `build_clip` and `build_first_text`.
        tokenizer: the sentences'.
        data, captions: training pictures and their sentences.
        held_out: pictures of others.
        batch: pictures per step; each is among so many others.
        locked: only the picture tower trains, towards sentences that stay as they are (LiT, Zhai et al. 2022).
    """

    def __init__(
        self,
        clip: CLIPModel,
        text: CLIPTextModelWithProjection,
        tokenizer: Tokenizer,
        data: WorldDataset,
        captions: Captions,
        held_out: WorldDataset | None = None,
        batch: int = 96,
        locked: bool = False,
    ) -> None:
        self.clip, self.text, self.tokenizer, self.locked = clip, text, tokenizer, locked
        for tower in (clip.text_model, clip.text_projection, text):
            tower.requires_grad_(not locked)
        self.data, self.captions, self.held_out, self.batch = data, captions, held_out, batch
        self.heads = nn.ModuleDict(
            {name: AttributeHeads(EMBEDDING) for name in ("seen", "said", "said_first")}
        )

    def modules(self) -> Mapping[str, nn.Module]:
        return {
            "clip": self.clip,
            **({} if self.locked else {"text": self.text}),
            "heads": self.heads,
        }

    def losses(self, draw: StepRNG) -> Mapping[str, Tensor]:
        """CLIP's loss for both text towers. Attributes are read out of the three embeddings, too: so the picture tower looks at
        small things, and the text towers say everything they were told, not only what tells 96 pictures apart."""
        rows = draw.indices(len(self.data), self.batch)
        variants = draw.randint(self.captions.tokens.shape[1], rows.shape, "variants")
        tokens = self.captions.rows(rows, variants).to(self.clip.device)
        with torch.no_grad(), torch.autocast(self.clip.device.type, enabled=False):
            images, _, _ = faces_of(self.data, rows.numpy(), self.clip.device)
            images = augment(images, generator_for(draw.seed, draw.step, draw.rank))
        attributes = torch.from_numpy(self.data.attributes[rows.numpy()].astype(np.int64)).to(
            self.clip.device
        )
        both = self.clip(input_ids=tokens, pixel_values=clip_pixels(images))
        scale = self.clip.logit_scale.clamp(max=4.6).exp()
        losses = {
            "clip": contrast(both.image_embeds, both.text_embeds, scale),
            "seen": self._read("seen", both.image_embeds, attributes),
        }
        if not self.locked:
            first = self.text(input_ids=tokens).text_embeds
            losses["text"] = contrast(both.image_embeds.detach(), first, scale.detach())
            losses["said"] = self._read("said", both.text_embeds, attributes)
            losses["said_first"] = self._read("said_first", first, attributes)
        return losses

    def _read(self, head: str, embedding: Tensor, attributes: Tensor) -> Tensor:
        return 0.5 * attribute_loss(
            self.heads[head](normalize(embedding.float(), dim=-1) * EMBEDDING**0.5), attributes
        )

    def validate(self) -> Mapping[str, float]:
        return figures(self.clip, self.text, self.tokenizer, self.held_out) if self.held_out else {}

    def sheet(self) -> Image.Image | None:
        return chosen_sentences(self.clip, self.tokenizer, self.held_out) if self.held_out else None


def contrast(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """CLIP's loss (Radford et al. 2021): each of B pictures (B, D) among the B sentences (B, D), and the reverse."""
    with torch.autocast(images.device.type, enabled=False):
        logits = (
            scale.float().to(images.device) * normalize(images.float()) @ normalize(texts.float()).T
        )
        right = torch.arange(len(logits), device=logits.device)
        return (cross_entropy(logits, right) + cross_entropy(logits.T, right)) / 2


def clip_pixels(images: Tensor) -> Tensor:
    """(B, 3, S, S) in [0, 1] -> as CLIP's towers see them."""
    mean, std = (images.new_tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (images - mean) / std


@torch.no_grad()
def loudened(text: Any, projection: nn.Linear, tokens: Tensor) -> None:
    """Scales a text tower, in place, so that what SDXL reads of it (penultimate hidden states, pooled) has mean square 1.

    CLIP's embeddings stay in their directions: its blocks normalise what they read, so all that is added up along the way can
    be scaled together. A U-Net learns faster from numbers of usual size than from CLIP's small initial ones.

    Args:
        text: a CLIP text transformer; tokens: (B, L) sentences to measure on.
    """
    said = text(input_ids=tokens, output_hidden_states=True)
    loudness = 1 / said.hidden_states[-2].float().square().mean().sqrt()
    embeddings = text.embeddings
    added = [embeddings.token_embedding.weight, embeddings.position_embedding.weight]
    for layer in text.encoder.layers:
        for linear in (layer.self_attn.out_proj, layer.mlp.fc2):
            added += [linear.weight, linear.bias]
    for weight in added:
        weight *= loudness
    projection.weight /= projection(said.pooler_output).float().square().mean().sqrt()


@torch.no_grad()
def embed_images(clip: CLIPModel | CLIPVisionModelWithProjection, images: Tensor) -> Tensor:
    """(B, 3, S, S) in [0, 1] -> (B, D) of length 1."""
    pooled = clip.vision_model(pixel_values=clip_pixels(images.to(clip.device))).pooler_output
    return normalize(clip.visual_projection(pooled).float(), dim=-1)


@torch.no_grad()
def embed_texts(clip: CLIPModel | CLIPTextModelWithProjection, tokens: Tensor) -> Tensor:
    """(B, L) tokens -> (B, D) of length 1."""
    pooled = clip.text_model(input_ids=tokens.to(clip.device)).pooler_output
    return normalize(clip.text_projection(pooled).float(), dim=-1)


@torch.no_grad()
def figures(
    clip: CLIPModel,
    text: CLIPTextModelWithProjection,
    tokenizer: Tokenizer,
    data: WorldDataset,
    most: int = 512,
    among: int = 64,
) -> dict[str, float]:
    """On people nobody trained on, how often a picture's own sentence is found among 64: `top1` by CLIP, `top1_text` by the
    first text encoder."""
    generator = generator_for("clip figures")
    rows = torch.randperm(len(data), generator=generator)[: most // among * among]
    tokens = token_ids(tokenizer, [data.prompt(row, generator) for row in rows.tolist()]).to(
        clip.device
    )
    hits: dict[str, list[Tensor]] = {"top1": [], "top1_text": []}
    for part in range(0, len(rows), among):
        images, _, _ = faces_of(data, rows[part : part + among].numpy(), clip.device)
        said, seen = tokens[part : part + among], embed_images(clip, images)
        for name, words in (
            ("top1", embed_texts(clip, said)),
            ("top1_text", text(input_ids=said).text_embeds),
        ):
            best = (seen @ normalize(words.float(), dim=-1).T).argmax(1)
            hits[name].append((best == torch.arange(len(best), device=best.device)).float())
    return {name: torch.cat(values).mean().item() for name, values in hits.items()}


@torch.no_grad()
def chosen_sentences(
    clip: CLIPModel, tokenizer: Tokenizer, data: WorldDataset, among: int = 64, shown: int = 18
) -> Image.Image:
    """Held-out pictures, each with the sentence CLIP finds nearest among 64, and its own where that is another."""
    generator = generator_for("clip sheet")
    rows = torch.randperm(len(data), generator=generator)[:among].tolist()
    sentences = [data.prompt(row, generator) for row in rows]
    images, _, _ = faces_of(data, np.array(rows), clip.device)
    cosines = (
        embed_images(clip, images)
        @ embed_texts(clip, token_ids(tokenizer, sentences).to(clip.device)).T
    )
    nearest = cosines.argmax(1).tolist()
    words = [
        sentences[best] if best == own else f"WRONG: {sentences[best]} | is: {sentences[own]}"
        for own, best in enumerate(nearest)
    ]
    return captioned_grid(list(zip(to_pil(images[:shown]), words[:shown], strict=True)), side=220)
