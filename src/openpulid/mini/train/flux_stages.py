"""Build stages of the miniature with FLUX's architecture; its weights are in the folder `flux`."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig, get_peft_model_state_dict
from transformers import CLIPTextModel, T5EncoderModel

from openpulid.diffusion.patch_vae import PatchAutoencoderKL
from openpulid.io.checkpoints import read_metadata
from openpulid.mini.models import (
    LATENT_PATCHES,
    PACKING,
    FluxTextEncoders,
    build_flux_pipeline,
    build_t5,
    build_transformer,
    save_flux_pipeline,
    save_folder,
)
from openpulid.mini.train.adapter_stage import train_adapter
from openpulid.mini.train.base_stage import (
    base_config,
    can_compile,
    load_evaluator,
    load_training_images,
)
from openpulid.mini.train.base_task import BaseTask
from openpulid.mini.train.build_context import BuildContext, Stage, stamp
from openpulid.mini.train.networks import FluxNetwork
from openpulid.mini.train.student_stage import CONFIG, distill
from openpulid.mini.train.t5 import T5Task
from openpulid.training import TrainerConfig

T5_STAGE = "flux-t5"
LORA_FILE = "lightning-lora.safetensors"
FEW_STEP_LORA = LoraConfig(
    r=32,
    lora_alpha=32,
    init_lora_weights="gaussian",
    target_modules=r".*transformer_blocks\..*\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out"
    r"|net\.0\.proj|net\.2|proj_mlp|proj_out)",
)
"""The student's LoRA: all matrices of the blocks but those of the modulation."""
T5_CONFIG = TrainerConfig(
    steps=20_000,
    lr=3e-3,
    optimizer="muon",
    warmup=50,
    decay=0.6,
    ema=0.99,
    seed=9,
    validate_every=500,
)
STUDENT_CONFIG = replace(CONFIG, optimizer="adamw", lr=2e-3)


def train_t5(context: BuildContext) -> dict[str, float]:
    """Train T5 on captions alone, and write it into the pipeline's folder."""
    torch.manual_seed(T5_CONFIG.seed)
    tokenizer = context.load_tokenizer()
    task = T5Task(
        build_t5(tokenizer).to(context.device),
        context.load_text_encoders(),
        tokenizer,
        context.load_captions(),
        context.load_captions("world-held-out"),
    )
    result = context.train(T5_STAGE, task, T5_CONFIG)
    folder = context.weights / "flux" / "pipeline" / "text_encoder_2"
    save_folder(task.t5, folder)
    stamp(folder, context.describe_training(T5_STAGE, T5_CONFIG))
    return dict(result.metrics)


def train_flux_base(context: BuildContext) -> dict[str, float]:
    """Train FLUX's transformer, and write the pipeline.

    CLIP's pooled embedding is that of SDXL's second text encoder, which was trained with images.
    """
    config = base_config(seed=6)
    torch.manual_seed(config.seed)
    latent_patch = LATENT_PATCHES[context.tokens]
    images, pairs = load_training_images(context, latent_patch)
    tokenizer = context.load_tokenizer()
    clip = context.load_model(CLIPTextModel, "pipeline", "text_encoder_2")
    channels, _, side = images.latents.images.shape[1:]
    t5 = context.load_model(T5EncoderModel, "flux", "pipeline", "text_encoder_2")
    if context.begin is None:
        transformer = build_transformer(channels, t5.config.d_model, clip.config.hidden_size)
    else:
        transformer = context.load_first_model(FluxTransformer2DModel, "transformer")
    transformer = transformer.to(context.device).requires_grad_(True)
    text_encoders = FluxTextEncoders(clip, t5, tokenizer)
    network = FluxNetwork(transformer, text_encoders, side, can_compile(context.device))
    vae = context.load_vae().with_latent_patch(latent_patch)
    pipe = build_flux_pipeline(transformer, vae, text_encoders, tokenizer)
    evaluator = load_evaluator(context, pipe)
    (name,) = find_base_run(context)
    context.train(name, BaseTask(network, images, pairs, evaluator), config)
    folder = context.weights / "flux" / "pipeline"
    save_flux_pipeline(pipe, folder, without=["text_encoder_2"])
    stamp(folder / "transformer", context.describe_training(name, config))
    source = context.weights / "pipeline" / "text_encoder_2" / "model.safetensors"
    stamp(folder / "text_encoder", read_metadata(source))
    saved = context.load_model(FluxTransformer2DModel, "flux", "pipeline", "transformer")
    transformer.load_state_dict(saved.state_dict())  # the figures are those of 8 bits
    return evaluator.evaluate()


def find_base_run(context: BuildContext) -> list[str]:
    """Return the name of the base's run: both layouts can be trained in the same folder of runs."""
    return ["flux-base" if context.tokens == 36 else f"flux-base-{context.tokens}"]


def train_flux_student(context: BuildContext) -> dict[str, float]:
    """Compute trajectories of FLUX's base and train a LoRA on them that needs 4 steps.

    A LoRA is how FLUX.1-dev is accelerated as well. It has a tenth of the size of a transformer.
    """
    teacher, vae = load_teacher(context)
    torch.manual_seed(STUDENT_CONFIG.seed)
    student = deepcopy(teacher.transformer)
    student.add_adapter(FEW_STEP_LORA)
    text_encoders = teacher.text_encoders

    def save() -> Path:
        folder = context.weights / "flux"
        layers = {
            key: value.to(torch.bfloat16)
            for key, value in get_peft_model_state_dict(student).items()
        }
        FluxPipeline.save_lora_weights(folder, layers, weight_name=LORA_FILE)
        return folder / LORA_FILE

    return distill(
        context,
        "flux-lightning",
        teacher,
        FluxNetwork(student, text_encoders, teacher.latent_shape[-1], can_compile(context.device)),
        build_flux_pipeline(student, vae, text_encoders, context.load_tokenizer()),
        save,
        STUDENT_CONFIG,
    )


def load_teacher(
    context: BuildContext, compiled: bool = False
) -> tuple[FluxNetwork, PatchAutoencoderKL]:
    """Load the frozen base, and the autoencoder in the layout of its latents.

    Args:
        context: of the build.
        compiled: whether to compile the base's blocks.

    Raises:
        WeightsError: the base is not trained yet.
    """

    def load(cls: Any, part: str) -> Any:
        return context.load_model(cls, "flux", "pipeline", part)

    transformer = load(FluxTransformer2DModel, "transformer")
    text_encoders = FluxTextEncoders(
        load(CLIPTextModel, "text_encoder"),
        load(T5EncoderModel, "text_encoder_2"),
        context.load_tokenizer(),
    ).to(context.device)
    vae = context.load_vae()
    channels = transformer.config.in_channels // PACKING
    vae = vae.with_latent_patch(isqrt(vae.config.latent_channels // channels))
    side = vae.config.sample_size // 2 ** (len(vae.config.block_out_channels) - 1)
    return FluxNetwork(transformer, text_encoders, side, compiled), vae


FLUX_STAGES: list[Stage] = [
    Stage(T5_STAGE, 8, train_t5),
    Stage("flux-base", 90, train_flux_base, needs=(T5_STAGE,), find_folders=find_base_run),
    Stage("flux-lightning", 50, train_flux_student),
    *(
        Stage(name, minutes, partial(train_adapter, name=name))
        for name, minutes in (
            ("flux-stage1", 60),
            ("flux-naive", 25),
            ("flux-stage2", 90),
            ("flux-stage3", 25),
        )
    ),
]
"""FLUX's miniature; it uses the images, autoencoder, CLIP and face models of the other stages."""
