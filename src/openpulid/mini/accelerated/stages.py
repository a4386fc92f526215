"""Stages of the accelerated training, from rendering to the student; each writes its results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerFast

from openpulid.diffusion.patch_vae import PatchAutoencoderKL
from openpulid.mini.accelerated import autoencoder, unet
from openpulid.mini.accelerated.evaluation import Evaluation
from openpulid.mini.accelerated.output import draw_sheet
from openpulid.mini.accelerated.probe import Probe
from openpulid.mini.accelerated.scenes import CaptionWriter
from openpulid.mini.accelerated.state import RunState
from openpulid.mini.accelerated.steps import Average
from openpulid.mini.accelerated.train_set import build_train_set
from openpulid.mini.accelerated.world import plan_world, render_world
from openpulid.mini.models import TextEncoders
from openpulid.mini.train.distill import STUDENT_TIMESTEPS

SCENES = 4
"""Images per person in any scene."""
PORTRAITS = 2
"""Images per person in studio light with nothing on the head."""
CHECKPOINTS = (0.25, 0.5, 0.7, 0.85)
"""Fractions of the base's training at which it is evaluated."""
SAVED_CHECKPOINT = 0.7
"""The checkpoint that is also saved, in case that the run does not finish."""


def prepare(run: RunState) -> None:
    """Load the text encoders, start the probe, and render the world."""
    run.tokenizer = PreTrainedTokenizerFast.from_pretrained(
        run.weights / "pipeline" / "tokenizer", local_files_only=True
    )
    first = run.load_model(CLIPTextModel, "pipeline", "text_encoder")
    second = run.load_model(CLIPTextModelWithProjection, "pipeline", "text_encoder_2")
    run.text_encoders = TextEncoders(first, second).to(run.device)
    if run.device.type == "cuda" and run.is_compiled and {"autoencoder", "base"} & set(run.stages):
        widths = (run.text_encoders.width, second.config.projection_dim)
        batches = (run.sizes.autoencoder_batch, run.sizes.batch)
        run.probe = Probe(run.work_dir, run.device, widths, batches)
    run.writer = CaptionWriter(run.tokenizer, run.device)
    run.generator = torch.Generator(run.device).manual_seed(11)
    _render(run)
    run.evaluation = Evaluation(
        run.weights, run.text_encoders, run.tokenizer, run.held_out, run.sizes.prompts
    )
    vae = run.load_model(PatchAutoencoderKL, "pipeline", "vae")
    run.vae = vae.to(memory_format=torch.channels_last)


def _render(run: RunState) -> None:
    options: dict[str, Any] = {
        "batch": run.sizes.render_batch,
        "compiled": run.compile_renderer,
        "log": run.out.log,
    }
    people, scenes = plan_world(run.sizes.people, SCENES, PORTRAITS, run.generator)
    held_out_generator = torch.Generator(run.device).manual_seed(1_000_003)
    held_out = plan_world(run.sizes.held_out, 1, 0, held_out_generator, held_out=True)
    run.held_out = render_world(*held_out, 1, **options)
    seconds = 0.16 * run.main_seconds
    run.world = render_world(people, scenes, SCENES + PORTRAITS, seconds=seconds, **options)
    run.out.add_sheet("world", draw_sheet(run.world.images[:32].float() / 255))
    images = len(run.world)
    run.out.add_metrics("world", {"images": images, "people": images // run.world.per_person})


def evaluate_shipped(run: RunState) -> None:
    """Evaluate autoencoder and base of the weights for comparison, if there is a base."""
    if not (run.weights / "pipeline" / "unet" / "config.json").exists():
        return
    base = run.load_model(UNet2DConditionModel, "pipeline", "unet")
    base = base.to(memory_format=torch.channels_last)
    run.out.add_metrics("shipped autoencoder", autoencoder.evaluate(run.vae, run.held_out))
    images = run.evaluation.generate(base, run.vae, run.sizes.prompts)
    run.out.add_metrics("shipped base", run.evaluation.measure(images))
    run.base = base


def train_autoencoder(run: RunState) -> None:
    """Train a new autoencoder."""
    vae = autoencoder.create_autoencoder(run.world)
    steps = autoencoder.fit(
        vae,
        run.world,
        0.12 * run.main_seconds,
        batch=run.sizes.autoencoder_batch,
        max_steps=run.sizes.max_steps,
        is_captured=run.is_captured("autoencoder"),
        on_progress=run.progress_logger("autoencoder", 500),
    )
    autoencoder.standardize(vae, run.world)
    counts = {"steps": steps, "images": steps * run.sizes.autoencoder_batch}
    run.out.add_metrics("autoencoder", counts | autoencoder.evaluate(vae, run.held_out))
    run.vae = vae
    run.save_model("vae", vae, "pipeline/vae")
    images = run.held_out.images[:16].float() / 255
    decoded = autoencoder.decode(vae, autoencoder.encode(vae, images))
    title = "autoencoder: held-out images, then their reconstructions"
    run.out.add_sheet(title, draw_sheet(torch.cat([images, decoded])))


def encode(run: RunState) -> None:
    """Encode all images and captions."""
    run.data = build_train_set(
        run.vae,
        run.text_encoders,
        run.writer,
        run.world,
        run.generator,
        batch=run.sizes.encode_batch,
    )
    run.out.log(f"{len(run.data.latents)} latents")


def train_base(run: RunState) -> None:
    """Train a new base."""
    model = unet.create_unet(run.data, run.text_encoders)
    if run.probe.works("captured"):
        run.probe.wait(20.0)  # for the compiler
    run.out.log(f"probe: {run.probe.status}")
    compiled_unet = None
    if run.is_compiled and run.probe.pays("compiled", "captured"):
        compiled_unet = torch.compile(model, dynamic=False)
    student_fraction = 0.145 if "student" in run.stages else 0.0
    reserved = run.adapter_seconds + (student_fraction + 0.045) * run.main_seconds
    steps, network = unet.fit_base(
        model,
        run.data,
        max(1.0, run.seconds_left - reserved),
        compiled_unet=compiled_unet,
        is_captured=run.is_captured("captured"),
        batch=run.sizes.batch,
        max_steps=run.sizes.max_steps,
        on_progress=_base_logger(run, model),
        log=run.out.log,
    )
    run.unet = model
    run.compiled_unet = None if network is model else network
    run.base = unet.frozen_copy(model)
    run.save_model("base", model, "pipeline/unet")
    images = run.evaluation.generate(model, run.vae, run.sizes.prompts)
    counts = {
        "steps": steps,
        "samples": steps * run.sizes.batch,
        "parameters": model.num_parameters(),
    }
    run.out.add_metrics("base", counts | run.evaluation.measure(images))
    run.out.add_sheet("base", draw_sheet(images[:48]))


def _base_logger(
    run: RunState, model: Any
) -> Callable[[int, float, dict[str, float], Average], None]:
    """Return a callback that logs progress and evaluates the averaged weights at checkpoints."""
    log_progress = run.progress_logger("base", 100)
    checkpoints = list(CHECKPOINTS)

    def on_progress(step: int, fraction: float, losses: dict[str, float], average: Average) -> None:
        log_progress(step, fraction, losses)
        if not checkpoints or fraction < checkpoints[0]:
            return
        checkpoint = checkpoints.pop(0)
        with average.in_place():
            model.eval()
            run.out.attempt("checkpoint", lambda: _evaluate_base(run, model, step, fraction))
            if checkpoint == SAVED_CHECKPOINT:
                run.out.attempt(
                    "checkpoint", lambda: run.save_model("base", model, "pipeline/unet")
                )
        model.train()

    return on_progress


def _evaluate_base(run: RunState, model: Any, step: int, fraction: float) -> None:
    images = run.evaluation.generate(model, run.vae, min(256, run.sizes.prompts))
    metrics = run.evaluation.measure(images)
    by_attribute = metrics.pop("by_attribute")
    run.out.add_point("base checkpoints", step=step, share=fraction, **metrics)
    run.out.log(
        f"base at {fraction:.2f}: {metrics} expression {by_attribute['expression']} "
        f"pose {by_attribute['pose']}"
    )


def train_student(run: RunState) -> None:
    """Train the student from the base."""
    if run.unet is None:
        run.unet = unet.frozen_copy(run.base)
    part = "captured" if run.compiled_unet is None else "student"
    reserved = run.adapter_seconds + 0.02 * run.main_seconds
    steps = unet.fit_student(
        run.unet,
        run.data,
        max(1.0, run.seconds_left - reserved),
        compiled_unet=run.compiled_unet,
        is_captured=run.is_captured(part),
        count=run.sizes.rollouts,
        batch=run.sizes.batch,
        max_steps=run.sizes.max_steps,
        on_progress=run.progress_logger("student", 100),
        log=run.out.log,
    )
    run.save_model("student", run.unet, "lightning")
    prompts = run.sizes.prompts
    images = run.evaluation.generate(run.unet, run.vae, prompts, STUDENT_TIMESTEPS, 1.0, 1)
    counts = {"steps": steps, "samples": steps * run.sizes.batch}
    run.out.add_metrics("student", counts | run.evaluation.measure(images))
    run.out.add_sheet("student", draw_sheet(images[:48]))
    run.student = unet.frozen_copy(run.unet)
