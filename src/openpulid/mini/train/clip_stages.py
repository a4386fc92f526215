"""Build stages of CLIP, the pipeline's text encoders and the identity encoder's vision encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
)

from openpulid.mini.models import build_tokenizer, save_folder
from openpulid.mini.train.build_context import BuildContext, stamp
from openpulid.mini.train.clip import (
    ClipTask,
    build_clip,
    build_first_text_encoder,
    evaluate_clip,
    rescale_text_encoder,
)
from openpulid.mini.train.clip_faces import ClipFacesTask
from openpulid.mini.train.vision_encoder import VisionEncoderTask, build_vision_encoder
from openpulid.training import TrainerConfig

CONFIG = TrainerConfig(
    steps=20_000,
    lr=3e-3,
    optimizer="muon",
    weight_decay=0.1,
    warmup=50,
    decay=0.6,
    ema=0.99,
    seed=3,
    validate_every=400,
)
CLIP_FACES = "clip-faces"
"""Name of the stage, and of its folder of weights, of a CLIP that knows faces."""
NUM_RESCALING_CAPTIONS = 512
"""Captions on which the text encoders' outputs are rescaled."""


def train_clip(context: BuildContext) -> dict[str, float]:
    """Train CLIP and both text encoders of the pipeline.

    The image encoder, which only the evaluation uses, trains longer than the text encoders.
    """
    config = CONFIG
    torch.manual_seed(config.seed)
    tokenizer = build_tokenizer()
    captions = context.load_captions(tokenizer=tokenizer)
    clip = build_clip(tokenizer)
    first_text_encoder = build_first_text_encoder(tokenizer)

    def make_task(locked: bool) -> ClipTask:
        return ClipTask(
            clip,
            first_text_encoder,
            tokenizer,
            context.data,
            captions,
            context.held_out,
            locked=locked,
        )

    context.train("clip", make_task(locked=False), config, 13 / 18)
    num_images = len(context.data)
    rows = torch.arange(0, num_images, max(1, num_images // NUM_RESCALING_CAPTIONS))
    tokens = captions.rows(rows, torch.zeros(1, dtype=torch.long)).to(context.device)
    for model in (clip, first_text_encoder):
        rescale_text_encoder(model.text_model, model.text_projection, tokens)
    context.train("clip/locked", make_task(locked=True), config, 5 / 18)
    _save_clip(
        context, clip, first_text_encoder, tokenizer, context.describe_training("clip", config)
    )
    return evaluate_clip(clip, first_text_encoder, tokenizer, context.held_out, limit=2048)


def _save_clip(
    context: BuildContext,
    clip: Any,
    first_text_encoder: Any,
    tokenizer: Any,
    facts: Mapping[str, object],
) -> None:
    """Save CLIP's image encoder for the evaluation, and both text encoders for the pipeline.

    CLIP's own text encoder is SDXL's second one.
    """
    image_encoder = CLIPVisionModelWithProjection(clip.config.vision_config)
    image_encoder.vision_model.load_state_dict(clip.vision_model.state_dict())
    image_encoder.visual_projection.load_state_dict(clip.visual_projection.state_dict())
    first = CLIPTextModel(first_text_encoder.config)
    first.load_state_dict(first_text_encoder.text_model.state_dict())
    second = CLIPTextModelWithProjection(clip.config.text_config)
    second.text_model.load_state_dict(clip.text_model.state_dict())
    second.text_projection.load_state_dict(clip.text_projection.state_dict())
    models = {
        "clip": image_encoder,
        "pipeline/text_encoder": first,
        "pipeline/text_encoder_2": second,
    }
    for name, model in models.items():
        save_folder(model, context.weights / name)
        stamp(context.weights / name, facts)
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer.save_pretrained(context.weights / "pipeline" / name)


def train_vision_encoder(context: BuildContext) -> dict[str, float]:
    """Train the identity encoder's vision encoder."""
    config = replace(CONFIG, steps=40_000, seed=6)
    torch.manual_seed(config.seed)
    text_encoder = context.load_model(CLIPTextModelWithProjection, "pipeline", "text_encoder_2")
    task = VisionEncoderTask(
        build_vision_encoder(),
        text_encoder,
        context.data,
        context.load_captions(),
        context.held_out,
    )
    context.train("vision", task, config)
    context.save_module(task.vision_encoder, "vision-encoder", config, training="vision")
    return dict(task.validate())


def train_clip_faces(context: BuildContext) -> dict[str, float]:
    """Train a copy of CLIP's vision encoder that knows faces, for the baselines that begin with it.

    It is not shipped: their files hold the encoder that they end with.
    """
    config = replace(CONFIG, seed=8)
    torch.manual_seed(config.seed)
    task = ClipFacesTask(
        context.load_model(CLIPVisionModelWithProjection, "clip"),
        context.load_model(CLIPTextModelWithProjection, "pipeline", "text_encoder_2"),
        context.data,
        context.load_captions(),
        context.held_out,
    )
    context.train(CLIP_FACES, task, config)
    save_folder(task.encoder, context.weights / CLIP_FACES)
    stamp(context.weights / CLIP_FACES, context.describe_training(CLIP_FACES, config))
    return dict(task.validate())
