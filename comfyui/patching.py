"""Where the patches are set in a model: ComfyUI's own patch functions, on a clone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from .calls import KEY, watch_calls
from .patches import (
    AttentionPatch,
    BlockOutputPatch,
    BlockPatch,
    ScheduledIdentity,
    set_identity,
)

if TYPE_CHECKING:
    from openpulid.methods.ip_adapter.host import IPAdapterHostIdentity
    from openpulid.methods.pulid.host_flux import FluxHostIdentity
    from openpulid.methods.pulid.host_sdxl import SDXLHostIdentity

    HostIdentity = SDXLHostIdentity | FluxHostIdentity | IPAdapterHostIdentity

Place = tuple[str, int, int]
"""Kind of the U-Net's block, its number, and the index of the transformer block in it."""

UNET_BLOCKS = (("input", "input_blocks"), ("output", "output_blocks"), ("middle", "middle_block"))
"""ComfyUI's names of the U-Net's blocks, in the order of the published keys."""

ON_CLONE = "on_clone"
"""The value of `comfy.patcher_extension.CallbacksMP.ON_CLONE`."""

EPSILON = 1e-6
"""Relative tolerance of a noise level: a sampler has it in float32."""


def find_cross_attentions(unet: Any) -> dict[str, tuple[Place, Any]]:
    """Return the cross-attentions of a U-Net by their published key ("1", "3", ...)."""
    layers = {}
    for place, block in transformer_blocks(unet):
        layers[str(2 * len(layers) + 1)] = (place, block.attn2)
    return layers


def transformer_blocks(unet: Any) -> Iterator[tuple[Place, Any]]:
    """Yield the transformer blocks of a U-Net in the order of the published keys."""
    for kind, name in UNET_BLOCKS:
        blocks = getattr(unet, name)
        for number, block in enumerate([blocks] if kind == "middle" else blocks):
            for part in block:
                for index, transformer in enumerate(getattr(part, "transformer_blocks", ())):
                    yield (kind, number, index), transformer


def find_layer_widths(unet: Any) -> dict[str, tuple[int, int]]:
    """Return the widths of the queries and of the text tokens, by published key."""
    return {
        key: (attention.heads * attention.dim_head, attention.to_k.in_features)
        for key, (_, attention) in find_cross_attentions(unet).items()
    }


def schedule(model: Any, identity: HostIdentity, start: float, end: float) -> ScheduledIdentity:
    """Convert fractions of the schedule to noise levels of a model."""
    sampling = model.get_model_object("model_sampling")
    start_sigma, end_sigma = (
        float(sampling.percent_to_sigma(fraction)) * (1 + EPSILON) for fraction in (start, end)
    )
    return ScheduledIdentity(identity, start_sigma, end_sigma)


def patch_unet(model: Any, identity: ScheduledIdentity) -> Any:
    """Return a clone of an SDXL model with an identity."""
    clone = model.clone()
    watch_calls(clone)
    if not clone.get_callbacks(ON_CLONE, KEY):
        clone.add_callback_with_key(ON_CLONE, KEY, copy_attention_patches)
    existing = _existing(clone, "attn2")
    unet = clone.get_model_object("diffusion_model")
    for key, ((kind, number, index), _) in find_cross_attentions(unet).items():
        place = (kind, number, index)
        # a patch for all of a block acts where there is none for the transformer block
        current = existing.get(place, existing.get(place[:2]))
        patch = set_identity(current, identity, partial(AttentionPatch, key=key))
        clone.set_model_attn2_replace(patch, *place)
    return clone


def copy_attention_patches(model: Any, clone: Any) -> None:
    """Give a clone its own attention patches, so that other packs do not change those of the model.

    Args:
        model: a `ModelPatcher` with an identity.
        clone: its new clone, which shares the patches since ComfyUI 0.14.
    """
    existing = _existing(clone, "attn2")
    for place, patch in existing.items():
        if isinstance(patch, AttentionPatch):
            existing[place] = replace(patch)


def patch_transformer(model: Any, identity: ScheduledIdentity) -> Any:
    """Return a clone of a FLUX or Chroma model with an identity."""
    clone = model.clone()
    watch_calls(clone)
    existing = _existing(clone, "dit")
    for block in identity.identity.blocks:
        kind, index = block
        name = f"{kind}_block"
        patch = set_identity(
            existing.get((name, index)), identity, partial(BlockPatch, block=block)
        )
        clone.set_model_patch_replace(patch, "dit", name, index)
    return clone


def patch_after_blocks(model: Any, identity: ScheduledIdentity) -> Any:
    """Return a clone of a Qwen-Image or Z-Image model with an identity."""
    clone = model.clone()
    watch_calls(clone)
    # the list is the clone's own; patches of other packs keep their order
    patches = clone.model_options["transformer_options"].get("patches", {}).get("double_block", [])
    for place, patch in enumerate(patches):
        if isinstance(patch, BlockOutputPatch):
            patches[place] = patch.with_identity(identity)
            return clone
    clone.set_model_double_block_patch(BlockOutputPatch((identity,)))
    return clone


def _existing(model: Any, name: str) -> dict[Any, Any]:
    """Return the patches of a kind that a model already has."""
    replaced = model.model_options["transformer_options"].get("patches_replace", {})
    patches: dict[Any, Any] = replaced.get(name, {})
    return patches
