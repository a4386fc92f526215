"""PuLID's stages on tiny random FLUX.1 and its relatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from openpulid.training.pulid.flux2_model import Flux2Model
from openpulid.training.pulid.flux_model import FluxModel
from openpulid.training.pulid.qwen_image_model import QwenImageModel
from openpulid.training.pulid.recipe import Recipe
from openpulid.training.pulid.task import PuLIDTask, Validation
from openpulid.training.pulid.train import build_adapter
from openpulid.training.pulid.z_image_model import ZImageModel
from openpulid.training.rng import StepRNG
from tests.support import tiny_sdxl
from tests.support.tiny_bases import flux2_with_text, qwen_image_with_text, z_image_with_text
from tests.support.tiny_flux import SMALL, tiny_pipe

SIDE = 16
SIZES = {**SMALL, "output_dim": 16}
"""Of the identity encoder."""

BASES = ("flux", "flux2-klein", "z-image", "qwen-image")
STAGES: dict[str, dict[str, Any]] = {
    "stage1": {},
    "naive": {"id_loss": "naive", "few_step_batch": 2},
    "stage2": {"id_loss": "accurate", "few_step_batch": 2, "grad_steps": 2},
    "stage3": {
        "id_loss": "accurate",
        "few_step_batch": 2,
        "grad_steps": 2,
        "semantic_weight": 0.6,
        "layout_weight": 0.1,
    },
}


def recipe(base: str = "flux", **changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        "steps": 12,
        "lr": 1e-2,
        "warmup": 2,
        "drop_identity": 0.0,
        "attention_head_dim": 8,
        "attention_heads": 2,
        "encoder_width": 16,
        "bf16": False,
    }
    return Recipe("tiny", base=base, encoder="IDFormer", **{**settings, **changes})


def models(base: str = "flux") -> list[FluxModel]:
    """Create a base, and a few-step model; FLUX.1's has no guidance embedding."""
    if base == "flux":
        pipes = [tiny_pipe(), tiny_pipe(guidance_embeds=False)]
        return [FluxModel(pipe, SIDE, guidance=3.5, max_sequence_length=12) for pipe in pipes]
    if base == "z-image":
        return [ZImageModel(z_image_with_text(), SIDE, max_sequence_length=12) for _ in range(2)]
    if base == "qwen-image":
        return [QwenImageModel(qwen_image_with_text(), SIDE, max_sequence_length=12)] * 2
    return [
        Flux2Model(flux2_with_text(), SIDE, num_steps=steps, max_sequence_length=12)
        for steps in (50, 4)
    ]


def create_task(base: str = "flux", batch: int = 4, **changes: Any) -> PuLIDTask:
    settings = recipe(base, **changes)
    model, few_step = models(base)
    adapter = build_adapter(settings, model, SIZES)
    for layer in adapter.layers:  # untrained, they add nothing
        torch.nn.init.normal_(layer.to_out.weight, std=0.3)
    return PuLIDTask(
        settings,
        model,
        adapter,
        tiny_sdxl.People(batch),
        validation=Validation(tiny_sdxl.People(batch)),
        few_step_models=[few_step] if settings.few_step_batch else [],
        face_embedder=tiny_sdxl.faces() if settings.few_step_batch else None,
    )


def gradients(task: PuLIDTask) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the adapter's gradients and the losses of one step."""
    losses: dict[str, float] = {}

    def backward(terms: dict[str, Tensor], metrics: Any = None) -> None:
        losses.update({name: float(loss) for name, loss in terms.items()})
        total = torch.stack([loss.float() for loss in terms.values()]).sum()
        with torch.autocast(total.device.type, enabled=False):
            total.backward()

    task.backward_losses(StepRNG(0, 0), backward)
    found = {name: x.grad for name, x in task.adapter.named_parameters()}
    assert all(grad is not None for grad in found.values()), found
    return found, losses  # type: ignore[return-value]
