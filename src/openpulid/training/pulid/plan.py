"""What a training of PuLID on FLUX needs at full size, predicted from shapes.

Products are counted, and tensors measured, on the meta device: nothing is allocated. Only the
transformer's products and the decoder's are counted; text encoders, face models and the adapter
are a few percent of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from openpulid.errors import OptionError
from openpulid.methods.pulid import IDFormer, PuLIDFlux
from openpulid.pipelines.flux_memory import FLUX_VAE, weight_sizes
from openpulid.training.pulid.flux_model import PATCH, position_ids
from openpulid.training.pulid.losses import rms_distance, semantic_response
from openpulid.training.pulid.models import AttentionQK
from openpulid.training.pulid.recipes import Recipe

GB = 10**9
PIXELS_PER_TOKEN = 16
DEFAULT_PIXELS = 1024
ADAPTER_COPIES = {"adamw": 5, "muon": 4}
"""Copies of the adapter in float32: weights, gradients, their average (EMA), and one or two moments
of the optimizer."""

H100_FLOPS = 989e12
"""Dense bfloat16 products and sums per second of an H100 or H200 (NVIDIA's data sheet)."""

UTILIZATION = 0.4
"""Share of them that a training step reaches, an assumption. The eager transformer reached 0.42 in
inference on an H200 (benchmarks/gpu-h200.md)."""


@dataclass(frozen=True)
class Setup:
    """GPUs of a training.

    Attributes:
        name: as a table shows it.
        gpus: number of GPUs.
        is_sharded: whether each keeps only its share of the frozen transformers.
    """

    name: str
    gpus: int
    is_sharded: bool = False


SETUPS = (
    Setup("1 GPU", 1),
    Setup("8 GPUs", 8),
    Setup("8 GPUs with --shard", 8, is_sharded=True),
)


@dataclass(frozen=True)
class Plan:
    """A prediction for one setup.

    Attributes:
        setup: the GPUs.
        accumulate: micro-batches per step and GPU.
        images: images of a micro-batch in the diffusion branch.
        few_step_images: images of a micro-batch in a rollout.
        memory: part -> bytes on each GPU at the peak.
        flops: of a step, over all GPUs.
    """

    setup: Setup
    accumulate: int
    images: int
    few_step_images: int
    memory: dict[str, int]
    flops: float

    @property
    def peak(self) -> int:
        """Bytes on each GPU at the peak."""
        return sum(self.memory.values())

    @property
    def seconds(self) -> float:
        """Seconds per step on H100 GPUs."""
        return self.flops / self.setup.gpus / (H100_FLOPS * UTILIZATION)


def plan_training(recipe: Recipe, memory_limit: int = 80 * GB) -> list[Plan]:
    """Predict memory and time of a recipe for FLUX on one GPU, eight, and eight with sharding.

    A recipe that accumulates keeps its micro-batches; another one gets the largest that fit.

    Args:
        recipe: of FLUX, with gradient checkpointing.
        memory_limit: bytes of a GPU.

    Raises:
        OptionError: the recipe is for another base, or has no gradient checkpointing.
    """
    if recipe.base != "flux" or not recipe.gradient_checkpointing:
        raise OptionError(
            f"a plan is made for FLUX.1 with gradient checkpointing, and not for {recipe.name}."
        )
    costs = measure_costs(recipe)
    weights = weight_sizes()
    plans = []
    for setup in SETUPS:
        candidates = [
            _plan(recipe, setup, costs, weights, accumulate)
            for accumulate in _find_accumulations(recipe, setup)
        ]
        fitting = [plan for plan in candidates if plan.peak <= memory_limit]
        plans.append(fitting[0] if fitting else candidates[-1])
    return plans


@dataclass(frozen=True)
class Costs:
    """Products and bytes of one image.

    Attributes:
        call_flops: of a call of the transformer.
        decode_flops: of the decoder.
        block_inputs: bytes that a call keeps for the backward pass.
        block: bytes while the largest block is recomputed.
        projections: bytes of the identity's keys and values, and of their gradients.
        decoder: bytes while the decoder is recomputed.
        alignment: bytes of the alignment losses of one step.
        adapter: number of weights.
        largest_block: bytes of its weights.
    """

    call_flops: int
    decode_flops: int
    block_inputs: int
    block: int
    projections: int
    decoder: int
    alignment: int
    adapter: int
    largest_block: int


def measure_costs(recipe: Recipe) -> Costs:
    """Measure products and bytes of one image on the meta device."""
    side = (recipe.pixels or DEFAULT_PIXELS) // PIXELS_PER_TOKEN
    new = partial(torch.empty, dtype=torch.bfloat16, device="meta")
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True).bfloat16()
        vae = AutoencoderKL(**FLUX_VAE).bfloat16()
        adapter = PuLIDFlux.for_transformer(
            transformer,
            IDFormer(hidden_dim=recipe.encoder_width),
            dim_head=recipe.attention_head_dim,
            heads=recipe.attention_heads,
            double_interval=recipe.double_interval,
            single_interval=recipe.single_interval,
        )
        tokens = torch.empty(1, adapter.encoder.num_queries, adapter.layers[0].norm1.weight.numel())
        projections = [x for layer in adapter.layers for x in layer.precompute_kv(tokens)]
    config = transformer.config
    width = transformer.inner_dim
    image = new(1, side**2, width, requires_grad=True)
    text = new(1, recipe.text_tokens, width, requires_grad=True)
    latents = new(1, 16, PATCH * side, PATCH * side, requires_grad=True)
    ids = {
        "txt_ids": torch.zeros(recipe.text_tokens, 3, device="meta"),
        "img_ids": position_ids(side, side).to("meta"),
    }
    call = {
        "hidden_states": new(1, side**2, config.in_channels),
        "timestep": new(1),
        "guidance": new(1),
        "encoder_hidden_states": new(1, recipe.text_tokens, config.joint_attention_dim),
        "pooled_projections": new(1, config.pooled_projection_dim),
        **ids,
    }
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    kinds = (blocks[0], blocks[-1])
    block_call = (image, text, new(1, width), transformer.pos_embed(torch.cat([*ids.values()])))
    # queries of the image and keys of the text, with and without an identity
    captured = 2 * (_bytes(image) + _bytes(text))
    pair = AttentionQK(
        *(x.unflatten(-1, (config.num_attention_heads, -1)).transpose(1, 2) for x in (image, text))
    )
    return Costs(
        call_flops=_count_flops(partial(transformer, **call)),
        decode_flops=_count_flops(partial(vae.decode, latents)),
        block_inputs=len(blocks) * (_bytes(image) + _bytes(text)),
        block=max(_saved_bytes(partial(block, *block_call)) for block in kinds),
        projections=2 * sum(map(_bytes, projections)),
        decoder=_saved_bytes(partial(vae.decode, latents)),
        alignment=len(blocks) * (captured + _saved_bytes(partial(_align, pair))),
        adapter=sum(x.numel() for x in adapter.parameters()),
        largest_block=max(sum(map(_bytes, block.parameters())) for block in kinds),
    )


def _align(pair: AttentionQK) -> tuple[Tensor, Tensor]:
    """Compute both alignment losses of one layer."""
    target = pair.query.detach().float()
    semantic = rms_distance(semantic_response(pair), target[:, :, : pair.key.shape[2]])
    return semantic, rms_distance(pair.query.float(), target)


def _count_flops(run: Callable[[], Any]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def _saved_bytes(run: Callable[[], Any]) -> int:
    """Return the bytes of all tensors that the backward pass needs, without the weights."""
    saved: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        if not isinstance(x, torch.nn.Parameter):
            saved[x.untyped_storage()._cdata] = x
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        run()
    return sum(x.untyped_storage().nbytes() for x in saved.values())


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _find_accumulations(recipe: Recipe, setup: Setup) -> list[int]:
    """List the numbers of micro-batches by which the recipe's batches can be divided."""
    if recipe.accumulate > 1:
        return [recipe.accumulate]
    share = recipe.batch // setup.gpus
    few_step = recipe.few_step_batch // setup.gpus
    return [n for n in range(1, share + 1) if share % n == 0 and few_step % n == 0]


def _plan(
    recipe: Recipe, setup: Setup, costs: Costs, weights: Mapping[str, int], accumulate: int
) -> Plan:
    parts = setup.gpus * accumulate
    images = recipe.batch // parts
    few_step_images = recipe.few_step_batch // parts
    has_rollout = recipe.id_loss == "accurate" or recipe.has_alignment
    k = recipe.grad_steps

    # bytes of each pass; the largest is the peak
    common = costs.projections + costs.block
    passes = {"diffusion branch": images * (costs.block_inputs + common)}
    if recipe.id_loss == "naive":
        passes["diffusion branch"] += few_step_images * costs.decoder
    if recipe.id_loss == "accurate":
        per_image = k * costs.block_inputs + costs.projections + max(costs.block, costs.decoder)
        passes["ID loss"] = few_step_images * per_image
    if recipe.has_alignment:
        per_image = k * (costs.block_inputs + costs.alignment) + common
        passes["alignment"] = few_step_images * per_image
    largest = max(passes, key=lambda name: passes[name])

    transformers = weights["transformer"] * (2 if has_rollout else 1)
    if setup.is_sharded:
        transformers = transformers // setup.gpus + 2 * costs.largest_block
    memory = {
        "transformers": transformers,
        "text encoders": weights["text"],
        "autoencoder": weights["vae"],
        "face models": weights["faces"],
        "adapter and optimizer": 4 * costs.adapter * ADAPTER_COPIES[recipe.optimizer],
        largest: passes[largest],
    }

    # a step of a rollout without gradient is one call; with it, three: forward, again, backward
    rollout_calls = recipe.rollout_steps - k + 3 * k
    calls = 3 * recipe.batch
    decodes = 0
    if recipe.id_loss == "accurate":
        calls += recipe.few_step_batch * rollout_calls
    if recipe.id_loss != "none":
        decodes = 3 * recipe.few_step_batch
    if recipe.has_alignment:
        calls += recipe.few_step_batch * (recipe.rollout_steps + rollout_calls)
    flops = calls * costs.call_flops + decodes * costs.decode_flops
    return Plan(setup, accumulate, images, few_step_images, memory, flops)
