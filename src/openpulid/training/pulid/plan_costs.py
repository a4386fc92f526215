"""What one image of a training costs at full size: products and bytes, counted on the meta device.

Nothing is allocated. Only the products of the network and of the decoder are counted; text
encoders, face models and the adapter are a few percent of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from openpulid.methods.level_mapper import NUM_LEVELS
from openpulid.methods.pulid import PuLID, PuLIDFlux
from openpulid.pipelines.memory_prediction import weight_bytes, weight_sizes
from openpulid.training.pulid.losses import rms_distance, semantic_response
from openpulid.training.pulid.models import AttentionQK
from openpulid.training.pulid.plan_bases import BASES
from openpulid.training.pulid.recipe import Recipe
from openpulid.training.pulid.train import create_adapter


@dataclass(frozen=True)
class Costs:
    """Products and bytes of one image, and bytes of the frozen networks.

    Attributes:
        weights: bytes of "network", "text", "vae" and "faces".
        checkpoints_blocks: whether a rollout is recomputed block by block, see `BaseModel`.
        call_flops: products and sums of a call of the network.
        decode_flops: of the decoder.
        block_inputs: bytes that a call keeps for the backward pass, with gradient checkpointing.
        block: bytes while the largest block is recomputed.
        call: bytes that a call keeps without gradient checkpointing.
        projections: bytes of the identity's keys and values, and of their gradients.
        decoder: bytes while the decoder is recomputed.
        alignment: bytes of the alignment losses of one step.
        adapter: number of weights.
        largest_block: bytes of its weights.
    """

    weights: dict[str, int]
    checkpoints_blocks: bool
    call_flops: int
    decode_flops: int
    block_inputs: int
    block: int
    call: int
    projections: int
    decoder: int
    alignment: int
    adapter: int
    largest_block: int


def measure_costs(recipe: Recipe) -> Costs:
    """Measure products and bytes of one image on the meta device."""
    with torch.device("meta"):
        base = BASES[recipe.base](recipe)
        adapter = create_adapter(recipe, base.model, {})
        projections = _project_tokens(adapter)
    model = base.model
    latents = torch.empty(1, *model.latent_shape(recipe.pixels), device="meta", requires_grad=True)
    call = partial(model.predict, latents, torch.zeros(1, device="meta"), base.text)
    with torch.no_grad(), model.capture_attention() as attention:
        call()
    kept, block = _measure_checkpointing(model.network, call)
    return Costs(
        weights={
            "network": weight_bytes(model.network),
            "text": base.text_bytes,
            "vae": weight_bytes(model.pipe.vae),
            "faces": weight_sizes()["faces"],
        },
        checkpoints_blocks=model.checkpoints_blocks,
        call_flops=_count_flops(call),
        decode_flops=_count_flops(partial(model.decode, latents)),
        block_inputs=kept,
        block=block,
        call=_saved_bytes(call),
        projections=2 * sum(x.nbytes for x in projections),
        decoder=_saved_bytes(partial(model.decode, latents)),
        alignment=sum(map(_alignment_bytes, attention)),
        adapter=sum(x.numel() for x in adapter.parameters()),
        largest_block=max(weight_bytes(block) for block in model.blocks),
    )


def _project_tokens(adapter: PuLID | PuLIDFlux) -> list[Tensor]:
    """Compute the keys and values of one identity in all layers."""
    config = adapter.encoder.config
    id_cond = torch.empty(1, 1, config["width"])
    tokens = adapter.encoder(id_cond, [torch.empty(1, 577, config["vit_dim"])] * NUM_LEVELS)
    if isinstance(adapter, PuLIDFlux):
        return [x for layer in adapter.layers for x in layer.precompute_kv(tokens)]
    return [x for pair in adapter.keys_values(tokens).values() for x in pair]


def _measure_checkpointing(network: Any, call: Callable[[], Any]) -> tuple[int, int]:
    """Measure a call with gradient checkpointing.

    Returns:
        Bytes that are kept from the forward to the backward pass, and bytes while the block that
        needs most is computed again.
    """
    inputs: dict[int, Tensor] = {}
    peaks = [0]

    def checkpoint(block: Callable[..., Any], *arguments: Any) -> Any:
        for value in arguments:
            if isinstance(value, Tensor):
                inputs[value.untyped_storage()._cdata] = value
        outputs: list[Any] = []
        peaks.append(_saved_bytes(lambda: outputs.append(block(*arguments))))
        return outputs[0]

    network.enable_gradient_checkpointing(checkpoint)
    try:
        rest = _saved_bytes(call)
    finally:
        network.disable_gradient_checkpointing()
    return rest + sum(x.untyped_storage().nbytes() for x in inputs.values()), max(peaks)


def _alignment_bytes(pair: AttentionQK) -> int:
    """Return the bytes that the alignment losses of one layer keep.

    Queries of the image and keys of the text are captured with and without an identity.
    """
    query, key = (x.detach().requires_grad_() for x in (pair.query, pair.key))
    captured = 2 * (query.nbytes + key.nbytes)
    return captured + _saved_bytes(partial(_align, AttentionQK(query, key)))


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
        if not isinstance(x, nn.Parameter):
            saved[x.untyped_storage()._cdata] = x
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        run()
    return sum(x.untyped_storage().nbytes() for x in saved.values())
