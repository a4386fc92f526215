"""The objects that ComfyUI calls in place of an attention or a block, or after blocks.

ComfyUI copies them with the model up to version 0.13 and shares them since. So they are never
changed after they are set: a node that adds an identity sets a new object. Only other packs change
them, by `add`; for these, `copy_attention_patches` gives every clone its own objects.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from .calls import NetworkCall, count_images, find_negative_rows

if TYPE_CHECKING:
    from openpulid.methods.host import HostIdentity
    from openpulid.methods.pulid.host_flux import FluxHostIdentity

Options = Mapping[str, Any]
Replacement = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class ScheduledIdentity:
    """An identity, and the noise levels at which it acts.

    Attributes:
        identity: prepared for the network.
        start_sigma: highest noise level at which it acts.
        end_sigma: noise level below `start_sigma` from which it no longer acts.
    """

    identity: HostIdentity
    start_sigma: float
    end_sigma: float

    def is_active(self, sigma: float) -> bool:
        """Return whether the identity acts at a noise level."""
        return self.end_sigma < sigma <= self.start_sigma


@dataclass(eq=False)
class Patch:
    """What ComfyUI needs from every patch object.

    Attributes:
        identities: they act together, on what the network itself computed.
    """

    identities: tuple[ScheduledIdentity, ...]

    def with_identity(self, identity: ScheduledIdentity) -> Any:
        """Return a new patch with one identity more."""
        return replace(self, identities=(*self.identities, identity))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return a new patch with the same identities: copies of the model share their tensors."""
        return replace(self)

    def to(self, device_or_dtype: Any) -> Any:
        """Follow the model to a device or dtype; the identity's tensors follow at the next call."""
        for scheduled in self.identities:
            scheduled.identity.release()
        return self

    def active_identities(self, call: NetworkCall) -> list[Any]:
        """Return the identities that act in a call."""
        return [x.identity for x in self.identities if x.is_active(call.sigma)]


@dataclass(eq=False)
class ReplacementPatch(Patch):
    """A patch in place of a part of the network.

    Attributes:
        previous: patch of another pack at the same place; it is called instead of the network's
            own attention or block.
    """

    previous: Replacement | None = None

    def models(self) -> list[Any]:
        """Return the models of the other pack's patch, for ComfyUI to load."""
        return self.previous.models() if hasattr(self.previous, "models") else []

    def to(self, device_or_dtype: Any) -> Any:
        """Follow the model, with the other pack's patch."""
        if hasattr(self.previous, "to"):
            self.previous = self.previous.to(device_or_dtype)
        return super().to(device_or_dtype)


@dataclass(eq=False)
class AttentionPatch(ReplacementPatch):
    """Cross-attention of an SDXL U-Net with identities.

    Other packs (IP-Adapter, InstantID) add themselves to the patch that is there, by `add`.

    Attributes:
        key: published key of the layer.
        added: callbacks of other packs and their arguments.
    """

    key: str = ""
    added: list[tuple[Replacement, dict[str, Any]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.added = list(self.added)  # `add` on a copy leaves the original as it is

    def add(self, callback: Replacement, **kwargs: Any) -> None:
        """Add what another pack computes.

        Args:
            callback: called with the output so far, the query, key, value and options; returns
                what is added.
            kwargs: further arguments of the callback, with its `sigma_start` and `sigma_end`.
        """
        self.added.append((callback, kwargs))

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: Options
    ) -> torch.Tensor:
        """Compute the attention to the text, and add the identities.

        Args:
            query: (rows, positions, width).
            key: (rows, tokens, width).
            value: (rows, tokens, width).
            options: ComfyUI's transformer options.
        """
        attend = self.previous or attend_to_text
        text = attend(query, key, value, options)
        call = NetworkCall.of(options)
        is_negative = find_negative_rows(options, len(query))
        num_images = count_images(options, len(query))
        grid = tuple(options["activations_shape"][-2:])
        output = text
        for identity in self.active_identities(call):
            output = output + identity.contribution(
                self.key, query, text, options["n_heads"], is_negative, grid, num_images
            )
        for callback, kwargs in self.added:
            if kwargs.get("sigma_end", -1.0) <= call.sigma <= kwargs.get("sigma_start", 1e10):
                output = output + callback(output, query, key, value, options, **kwargs)
        return output.to(query.dtype)


def attend_to_text(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: Options
) -> torch.Tensor:
    """Compute the attention as ComfyUI does without a patch."""
    from comfy.ldm.modules.attention import optimized_attention

    attended: torch.Tensor = optimized_attention(
        query, key, value, options["n_heads"], attn_precision=options.get("attn_precision")
    )
    return attended


@dataclass(eq=False)
class BlockPatch(ReplacementPatch):
    """A block of a FLUX or Chroma transformer with identities after it.

    Attributes:
        block: ("double" | "single", index).
    """

    block: tuple[str, int] = ("double", 0)

    def __call__(self, args: Options, extra: Options) -> dict[str, Any]:
        """Call the block, and add the identities to the generated image tokens.

        Args:
            args: of the block: img (rows, tokens, width), in single blocks with the text first;
                txt in double blocks; transformer_options.
            extra: the block itself.
        """
        options = args["transformer_options"]
        call = NetworkCall.of(options)
        is_double = self.block[0] == "double"
        if is_double:
            call.num_text_tokens = args["txt"].shape[1]
        output = self.previous(args, extra) if self.previous else extra["original_block"](args)
        identities = self.active_identities(call)
        if not identities:
            return output
        first = 0 if is_double else find_first_image_token(options, call)
        image = add_to_generated(output["img"], identities, self.block, options, first)
        return {**output, "img": image}


@dataclass(eq=False)
class BlockOutputPatch(Patch):
    """Identities after the blocks of a Qwen-Image or Z-Image transformer.

    ComfyUI calls it after every block, in a row with the patches of other packs.
    """

    def __call__(self, args: Options) -> dict[str, Any]:
        """Add the identities to the generated image tokens.

        Args:
            args: after a block: img (rows, tokens, width) with the generated tokens first; txt;
                block_index; transformer_options.
        """
        options = args["transformer_options"]
        block = ("double", args["block_index"])
        active = self.active_identities(NetworkCall.of(options))
        identities = [identity for identity in active if block in identity.blocks]
        image = args["img"]
        if identities:
            image = add_to_generated(image, identities, block, options)
        return {"img": image, "txt": args["txt"]}


def add_to_generated(
    image: torch.Tensor,
    identities: Sequence[FluxHostIdentity],
    block: tuple[str, int],
    options: Options,
    first: int = 0,
) -> torch.Tensor:
    """Add identities to the generated tokens. Text, reference images and padding stay as they are.

    Args:
        image: (rows, tokens, width), not changed.
        identities: that act in this call.
        block: that computed the tokens.
        options: ComfyUI's transformer options.
        first: index of the first generated token.
    """
    call = NetworkCall.of(options)
    is_negative = find_negative_rows(options, len(image))
    num_images = count_images(options, len(image))
    rows, columns = call.token_grid
    num_tokens = rows * columns
    end = first + call.num_frames * num_tokens
    parts = [image[:, :first]]
    for start in range(first, end, num_tokens):
        frame = image[:, start : start + num_tokens]
        total = frame
        for identity in identities:
            total = total + identity.contribution(
                block, frame, is_negative, call.token_grid, num_images
            )
        parts.append(total)
    return torch.cat([*parts, image[:, end:]], dim=1)


def find_first_image_token(options: Options, call: NetworkCall) -> int:
    """Return the index of the first image token in a single block."""
    image_slice: Sequence[int] | None = options.get("img_slice")
    return call.num_text_tokens if image_slice is None else image_slice[0]


def set_identity(
    existing: Replacement | None,
    identity: ScheduledIdentity,
    create: Callable[..., ReplacementPatch],
) -> Patch:
    """Return the patch for a place: a new one, or that of an earlier node with one identity more.

    Args:
        existing: patch at this place.
        identity: to add.
        create: called with identities and the patch of another pack.
    """
    if isinstance(existing, Patch):
        return existing.with_identity(identity)
    return create((identity,), existing)
