"""An adapter as ComfyUI manages its memory, and its application to a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from torch import nn

from .blocks import TransformerBlocks, find_blocks
from .patching import (
    find_layer_widths,
    patch_after_blocks,
    patch_transformer,
    patch_unet,
    schedule,
)


@dataclass(frozen=True)
class LoadedAdapter:
    """The output of *Load PuLID*.

    Attributes:
        patcher: the adapter, which ComfyUI loads and unloads.
        name: of its file.
    """

    patcher: comfy.model_patcher.ModelPatcher
    name: str

    def load(self) -> Any:
        """Load the adapter onto ComfyUI's device and return it."""
        comfy.model_management.load_models_gpu([self.patcher], force_full_load=True)
        return self.patcher.model


@dataclass(frozen=True)
class ApplyOptions:
    """How an identity acts in a model; see the inputs of *Apply PuLID*.

    Attributes:
        mask: (H, W), or (M, H, W) with one mask for all images of the batch or one per image.
    """

    scale: float
    start: float = 0.0
    end: float = 1.0
    projection: str = "ortho_v2"
    num_zero: int = 20
    mask: torch.Tensor | None = None


@dataclass(frozen=True)
class Person:
    """One of several people in an image; see `ApplyOptions`."""

    identity: Any
    scale: float
    mask: torch.Tensor | None = None


def load_adapter(path: str, name: str) -> LoadedAdapter:
    """Load an adapter of PuLID for SDXL or FLUX.

    Raises:
        WeightsError: The file is not such an adapter, or is damaged.
    """
    from openpulid.io.checkpoint_kinds import PULID_FLUX, read_header
    from openpulid.methods.pulid import PuLID, PuLIDFlux

    device = comfy.model_management.get_torch_device()
    is_cpu = comfy.model_management.is_device_cpu(device)
    adapter: Any
    if PULID_FLUX.matches(read_header(path).shapes):
        has_bfloat16 = comfy.model_management.should_use_bf16(device)
        reduced = torch.bfloat16 if has_bfloat16 else torch.float16
        adapter = PuLIDFlux.load(path, torch.float32 if is_cpu else reduced)
    else:
        adapter = PuLID.load(path)
        if not is_cpu:  # the encoder computes in float32; the layers are published in float16
            adapter.id_adapter_attn_layers.to(dtype=torch.float16)
    return LoadedAdapter(wrap_adapter(adapter), name)


def wrap_adapter(adapter: nn.Module) -> comfy.model_patcher.ModelPatcher:
    """Give an adapter ComfyUI's operations and memory management."""
    use_operations(adapter, comfy.ops.manual_cast)
    return comfy.model_patcher.ModelPatcher(
        adapter.requires_grad_(False),
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def use_operations(module: nn.Module, operations: Any) -> None:
    """Exchange linear layers and LayerNorms for those of ComfyUI, with the same weights."""
    for name, child in module.named_children():
        use_operations(child, operations)
        new: Any
        if type(child) is nn.Linear:
            has_bias = child.bias is not None
            new = operations.Linear(
                child.in_features, child.out_features, bias=has_bias, device="meta"
            )
        elif type(child) is nn.LayerNorm:
            new = operations.LayerNorm(list(child.normalized_shape), child.eps, device="meta")
        else:
            continue
        new.weight = child.weight
        new.bias = child.bias
        setattr(module, name, new)


def check_options(options: ApplyOptions) -> Any:
    """Check the options, which ComfyUI does not validate if they come from another node.

    Returns:
        The `Span` of the schedule.

    Raises:
        OptionError: A value is out of range, or the span has no step.
    """
    from openpulid.errors import OptionError
    from openpulid.methods.hooks import Span, check_scale

    check_scale(options.scale)
    span = Span(options.start, options.end)
    if span.is_empty:
        raise OptionError(
            f"start {span.start:g} is not before end {span.end:g}, so the identity would have no "
            "effect."
        )
    return span


def apply_adapter(model: Any, loaded: LoadedAdapter, identity: Any, options: ApplyOptions) -> Any:
    """Return a clone of a model in which an identity acts.

    Raises:
        OptionError: A value is out of range, the model is of a kind in which PuLID cannot act, or
            the identity is of other face models than the adapter.
        WeightsError: The adapter was trained for another base model.
    """
    span = check_options(options)
    if options.scale == 0:
        return model.clone()
    network = model.get_model_object("diffusion_model")
    if hasattr(network, "input_blocks"):
        prepared = _prepare_unet(network, loaded, identity, options)
        return patch_unet(model, schedule(model, prepared, span.start, span.end))
    blocks = find_blocks(network)
    prepared = _prepare_transformer(blocks, loaded, identity, options)
    patch = patch_transformer if blocks.are_replaceable else patch_after_blocks
    return patch(model, schedule(model, prepared, span.start, span.end))


def apply_people(
    model: Any, loaded: LoadedAdapter, people: Iterable[Person], options: ApplyOptions
) -> Any:
    """Return a clone of a model in which several people act, as if they were applied in a row.

    Args:
        model: a `ModelPatcher`.
        loaded: the adapter.
        people: their scales and masks are used instead of those in the options.
        options: how they act.

    Raises:
        OptionError, WeightsError: See `apply_adapter`.
    """
    for person in people:
        person_options = replace(options, scale=person.scale, mask=person.mask)
        model = apply_adapter(model, loaded, person.identity, person_options)
    return model


def _prepare_unet(unet: Any, loaded: LoadedAdapter, identity: Any, options: ApplyOptions) -> Any:
    from openpulid.errors import WeightsError
    from openpulid.methods.pulid import PuLID
    from openpulid.methods.pulid.host_sdxl import SDXLHostIdentity
    from openpulid.methods.pulid.sdxl_attention import AttentionOptions

    if not isinstance(loaded.patcher.model, PuLID):
        raise WeightsError(
            f"{loaded.name} is an adapter for transformers such as FLUX; load one for SDXL."
        )
    loaded.patcher.model.check_layers(find_layer_widths(unet))
    _check_face_models(loaded, identity)
    attention_options = AttentionOptions(
        options.scale, projection=options.projection, num_zero=options.num_zero
    )
    masks = convert_mask(options.mask)
    return SDXLHostIdentity.prepare(loaded.load(), identity, attention_options, masks)


def _check_face_models(loaded: LoadedAdapter, identity: Any) -> None:
    from openpulid.errors import OptionError

    try:
        loaded.patcher.model.require(identity.models)
    except OptionError:
        raise OptionError(
            f"{loaded.name} was trained with other face models than those of the identity; choose "
            "the pack of its training in Load face models (antelopev2 for published files, "
            "open for those of pulid train --faces open), or another adapter."
        ) from None


def _prepare_transformer(
    blocks: TransformerBlocks, loaded: LoadedAdapter, identity: Any, options: ApplyOptions
) -> Any:
    from openpulid.errors import WeightsError
    from openpulid.methods.pulid import PuLIDFlux
    from openpulid.methods.pulid.host_flux import FluxHostIdentity
    from openpulid.methods.transformer_kinds import select_block_keys

    adapter = loaded.patcher.model
    if not isinstance(adapter, PuLIDFlux):
        raise WeightsError(f"{loaded.name} is an adapter for SDXL; load one for {blocks.kind}.")
    keys = select_block_keys(
        blocks.num_double, blocks.num_single, adapter.double_interval, adapter.single_interval
    )
    adapter.check_blocks(keys, blocks.width)
    _check_face_models(loaded, identity)
    masks = convert_mask(options.mask)
    return FluxHostIdentity.prepare(loaded.load(), keys, identity, options.scale, masks)


def convert_mask(mask: torch.Tensor | None) -> torch.Tensor | None:
    """Convert ComfyUI's mask (H, W) or (M, H, W) to (M, H, W) in [0, 1].

    Nodes that add or sharpen masks leave values outside.
    """
    if mask is None:
        return None
    return (mask if mask.ndim == 3 else mask[None]).clamp(0, 1)
