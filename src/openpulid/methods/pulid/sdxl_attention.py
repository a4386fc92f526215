"""Identity attention inside any SDXL-family U-Net of diffusers.

Every cross-attention layer gets a second attention with the same queries and the identity's own
keys and values. Its output is added to that of the text before the output projection.

Shapes: P prompts with an identity, J people in each, B batch of the U-Net, h heads, N tokens, d
width of a head, D = h * d, L image positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, linear

from openpulid.errors import OptionError, suggest
from openpulid.methods.adapter import exclusive_use
from openpulid.methods.hooks import (
    PipelineState,
    SchedulePosition,
    Span,
    UNetCall,
    crop_to_ratio,
    identity_count_error,
)
from openpulid.methods.pulid.projection import (
    PROJECTIONS,
    Projection,
    append_zero_row,
    zero_token_bias,
)
from openpulid.methods.pulid.sdxl_layer import add_identities, run_compiled

KeyValue = tuple[Tensor, Tensor]

ROWS = 64
"""Rows of a matrix that are converted at a time, 512 kB in float32."""


class IdentityLayer(nn.Module):
    """The weights of one layer's identity attention, under their published names.

    Args:
        hidden_size: width of the layer's queries.
        cross_attention_dim: width of the identity tokens.
    """

    def __init__(self, hidden_size: int, cross_attention_dim: int) -> None:
        super().__init__()
        self.id_to_k = nn.Linear(cross_attention_dim, hidden_size, bias=False)
        self.id_to_v = nn.Linear(cross_attention_dim, hidden_size, bias=False)

    def forward(self, tokens: Tensor) -> KeyValue:
        """Map tokens (..., N, cross_attention_dim) to keys and values (..., N, hidden_size).

        Weights in less precision than the tokens are only stored in it.
        """
        if self.id_to_k.weight.itemsize < tokens.itemsize:
            return _project(tokens, self.id_to_k.weight), _project(tokens, self.id_to_v.weight)
        return self.id_to_k(tokens), self.id_to_v(tokens)


def _project(tokens: Tensor, weight: Tensor) -> Tensor:
    """Multiply tokens by weights that are stored in less precision.

    They are converted a few rows at a time: the allocator would keep the memory of whole matrices.
    """
    rows = weight.split(ROWS)
    return torch.cat([linear(tokens, part.to(tokens.dtype)) for part in rows], dim=-1)


def cross_attentions(unet: Any) -> dict[str, Any]:
    """Return the U-Net's cross-attention layers by their published key.

    The key is the layer's index in `unet.attn_processors`, where self- and cross-attention
    alternate: "1", "3", ...
    """
    layers = {}
    for index, name in enumerate(unet.attn_processors):
        if name.endswith("attn2.processor"):
            layers[str(index)] = unet.get_submodule(name.removesuffix(".processor"))
    return layers


def create_identity_layers(unet: nn.Module) -> nn.ModuleDict:
    """Create new layers for every cross-attention of a U-Net.

    Keys start as the text's (as in IP-Adapter) and values at zero: an untrained adapter changes
    nothing.
    """
    layers = nn.ModuleDict()
    for key, attention in cross_attentions(unet).items():
        layer = IdentityLayer(attention.inner_dim, attention.cross_attention_dim)
        weight = getattr(attention.to_k, "weight", None)
        with torch.no_grad():
            nn.init.zeros_(layer.id_to_v.weight)
            if weight is not None and _is_copyable(weight, layer.id_to_k.weight):
                layer.id_to_k.weight.copy_(weight)
        layers[key] = layer
    return layers


def _is_copyable(source: Tensor, target: Tensor) -> bool:
    """Return whether weights can be copied; quantized ones have another shape or type."""
    return source.shape == target.shape and source.is_floating_point()


@dataclass(frozen=True)
class AttentionOptions:
    """How an identity acts in the U-Net; see `PuLID.use`.

    Raises:
        OptionError: A value is out of range.
    """

    scale: float = 1.0
    span: Span = field(default_factory=Span)
    projection: Projection = "ortho_v2"
    num_zero: int = 0
    compiled: bool = False

    def __post_init__(self) -> None:
        if self.projection not in PROJECTIONS:
            raise OptionError(
                f"projection must be one of {', '.join(PROJECTIONS)}; got {self.projection!r}"
                f"{suggest(self.projection, PROJECTIONS)}."
            )
        if not isinstance(self.num_zero, int) or self.num_zero < 0:
            raise OptionError(
                f"num_zero must be an integer number of tokens, 0 or more; got {self.num_zero!r}."
            )


@dataclass(frozen=True)
class SDXLCall:
    """State of one call of the U-Net, created in its pre-hook and expanded to its batch.

    Attributes:
        is_active: whether the identity acts in this call.
        keys_values: layer key -> keys and values (J, B, h, N, d), zero tokens included.
        bias: (N,), of the zero tokens.
        regions: number of positions L -> (J, B, L, 1) in [0, 1], or None for all positions.
        scale: of the identities, as a scalar on the device.
    """

    is_active: bool
    keys_values: Mapping[str, KeyValue] = field(default_factory=dict)
    bias: Tensor | None = None
    regions: Callable[[int], Tensor | None] = lambda num_positions: None
    scale: Tensor | None = None


@dataclass
class SDXLInjection:
    """One identity in use on one U-Net.

    Attributes:
        keys_values: layer key -> keys and values (P, J, N, D).
        negative: computes the same (1, 1, N, D) for no identity, called when guidance first needs
            it.
        is_guided: returns whether the first half of the batch is the negative one.
        position: timestep -> position in the schedule.
        options: how the identity acts.
        masks: (P, J, H, W) in [0, 1]; None for everywhere.
        calls: state of the last call by batch size. A block that runs again during backward
            (gradient checkpointing) finds the state of its forward.
        can_compile: whether compiling has not failed.
    """

    keys_values: Mapping[str, KeyValue]
    negative: Callable[[], Mapping[str, KeyValue]]
    is_guided: Callable[[], bool]
    position: Callable[[Any], SchedulePosition]
    options: AttentionOptions
    masks: Tensor | None = None
    calls: dict[int, SDXLCall] = field(default_factory=dict)
    can_compile: bool = True
    _prepared: dict[Any, SDXLCall] = field(default_factory=dict)

    @property
    def is_compiled(self) -> bool:
        """Whether the layers run compiled now: not with gradient, nor inside of compiled code."""
        is_wanted = self.options.compiled and self.can_compile
        return is_wanted and not (torch.is_grad_enabled() or torch.compiler.is_compiling())

    def before_call(self, unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Prepare this call (forward pre-hook of the U-Net)."""
        call = UNetCall.parse(args, kwargs)
        sample = call.sample
        batch_size = len(sample)
        if not self._is_active(unet, call.timestep):
            self.calls[batch_size] = SDXLCall(is_active=False)
            return
        is_guided = self.is_guided()
        # under autocast the layers' products already have their dtype
        dtype = None if torch.is_autocast_enabled(sample.device.type) else sample.dtype
        # the first calls of a rollout may run without gradient: what they prepare has none
        has_gradient = torch.is_grad_enabled()
        key = (batch_size, is_guided, sample.device, dtype, sample.shape[-2:], has_gradient)
        if key not in self._prepared:
            self._prepared[key] = self._prepare(unet, sample, is_guided, dtype)
        self.calls[batch_size] = self._prepared[key]

    def _is_active(self, unet: Any, timestep: Any) -> bool:
        """Return whether the identity acts at a timestep."""
        if self.options.span.covers_schedule:
            return True
        if torch.is_grad_enabled() and getattr(unet, "is_gradient_checkpointing", False):
            raise OptionError(
                "start and end cannot be combined with gradient checkpointing; "
                "train on the whole schedule."
            )
        return self.options.span.contains(self.position(timestep))

    def _prepare(
        self, unet: Any, sample: Tensor, is_guided: bool, dtype: torch.dtype | None
    ) -> SDXLCall:
        """Repeat keys, values and masks for the batch of a call."""
        num_prompts = len(next(iter(self.keys_values.values()))[0])
        num_images = len(sample) // (1 + is_guided)
        if num_images * (1 + is_guided) != len(sample) or num_images % num_prompts:
            raise identity_count_error(num_prompts, num_images)
        negative = self.negative() if is_guided else None
        heads = {key: attention.heads for key, attention in cross_attentions(unet).items()}
        expanded = {}
        for key, (positive_k, positive_v) in self.keys_values.items():
            negative_k, negative_v = negative[key] if negative is not None else (None, None)
            expand_options = (num_images, heads[key], sample.device, dtype)
            k = self.expand(positive_k, negative_k, *expand_options)
            v = self.expand(positive_v, negative_v, *expand_options)
            expanded[key] = (k, v)
        bias = zero_token_bias(next(iter(expanded.values()))[0], self.options.num_zero)
        scale = torch.full((), self.options.scale, device=sample.device)
        return SDXLCall(True, expanded, bias, self._regions(num_images, is_guided, sample), scale)

    def expand(
        self,
        x: Tensor,
        negative: Tensor | None,
        num_images: int,
        num_heads: int,
        device: torch.device,
        dtype: torch.dtype | None,
    ) -> Tensor:
        """Repeat keys or values for the batch.

        The negative half comes first, as in diffusers. Zero tokens come last.

        Args:
            x: (P, J, N, D).
            negative: (1, 1, N, D), or None without guidance.
            num_images: of the positive half.
            num_heads: h.
            device: of the result.
            dtype: of the result; None keeps it.

        Returns:
            (J, B, h, N, d).
        """
        x = x.to(device, dtype).repeat_interleave(num_images // len(x), dim=0)
        if negative is not None:
            x = torch.cat([negative.to(x).expand(x.shape), x])
        return split_heads(x, num_heads, self.options.num_zero)

    def _regions(
        self, num_images: int, is_guided: bool, sample: Tensor
    ) -> Callable[[int], Tensor | None]:
        """Return a function from a number of positions L to the masks (J, B, L, 1)."""
        if self.masks is None:
            return lambda num_positions: None
        # resized on the CPU: not every device averages to sizes that do not divide the mask's
        masks = self.masks.cpu().repeat_interleave(num_images // len(self.masks), dim=0)
        masks = torch.cat([masks] * (1 + is_guided)).float()  # (B, J, H, W)
        height, width = sample.shape[-2:]
        masks = crop_to_ratio(masks, (height, width))
        cache: dict[int, Tensor] = {}

        @torch.no_grad()
        def regions(num_positions: int) -> Tensor:
            if num_positions not in cache:
                # each position gets the mean of its own area, so no position sees across an edge
                size = grid_size(height, width, num_positions)
                resized = interpolate(masks, size, mode="area")
                cache[num_positions] = (
                    resized.flatten(2).transpose(0, 1)[..., None].to(sample.device)
                )
            return cache[num_positions]

        return regions


def split_heads(x: Tensor, num_heads: int, num_zero: int) -> Tensor:
    """Split keys or values (B, J, N, D) into heads (J, B, h, N, d), zero tokens included."""
    heads = x.unflatten(-1, (num_heads, -1)).permute(1, 0, 3, 2, 4).contiguous()
    return append_zero_row(heads, num_zero)


def grid_size(height: int, width: int, num_positions: int) -> tuple[int, int]:
    """Return the height and width at which a U-Net has this number of positions.

    Each level halves the latents' size, rounded up.

    Raises:
        OptionError: no level has this number, because a patch merges or drops positions.
    """
    side = max(height, width)
    while height * width > num_positions and side > 1:
        height = (height + 1) // 2
        width = (width + 1) // 2
        side = max(height, width)
    if height * width != num_positions:
        raise OptionError(
            "masks need the U-Net's own grid of positions, and a patch of its cross-attention has "
            "changed it (token merging, tiles); use the pipeline without the patch, or no masks."
        )
    return height, width


@dataclass
class IdentityAttention:
    """Identity attention in one cross-attention layer.

    Two hooks: one captures the queries that the layer's processor computes, the other adds the
    identity's output to the input of the output projection. The processor itself is not replaced,
    so whatever it does (LoRA, IP-Adapter, another attention kernel) still works.

    Attributes:
        key: the layer's published key.
        num_heads: of the layer.
        injection: the identity in use.
        query: (B, L, D) between the two hooks of a call.
    """

    key: str
    num_heads: int
    injection: SDXLInjection
    query: Tensor | None = None

    def register(self, attention: Any) -> Iterator[Any]:
        """Register both hooks on a layer and return their handles."""
        yield attention.to_q.register_forward_hook(self._capture_query)
        yield attention.to_out[0].register_forward_pre_hook(self._before_output)

    def _capture_query(self, layer: Any, args: Any, query: Tensor) -> None:
        self.query = query

    def _before_output(self, layer: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        text = args[0]
        query = self.query
        self.query = None  # do not keep it longer than a processor does
        call = self.injection.calls.get(len(text))
        if call is None:
            raise OptionError(
                "a patch of the U-Net's cross-attention has changed its batch (tiles), so "
                "identities cannot be assigned to images; use the pipeline without the patch."
            )
        if not call.is_active:
            return None
        assert query is not None, "a processor computes its queries with the layer's to_q"
        return (self.add_identity(query, text, call), *args[1:])

    def add_identity(self, query: Tensor, text: Tensor, call: SDXLCall) -> Tensor:
        """Add every identity's output to that of the text.

        Args:
            query: (B, L, D).
            text: output of the text's attention, (B, L, D).
            call: state of the call.

        Returns:
            (B, L, D).
        """
        injection = self.injection
        options = injection.options
        tensors = (
            query,
            text,
            call.keys_values[self.key],
            call.bias,
            call.regions(query.shape[1]),
        )
        layer = (self.num_heads, options.projection)
        if injection.is_compiled:
            added = run_compiled(*tensors, call.scale, *layer)
            if added is not None:
                return added
            injection.can_compile = False
        return add_identities(*tensors, options.scale, *layer)


def find_hooked(unet: nn.Module) -> list[nn.Module]:
    """Return the layers of a U-Net that are hooked, and every module that contains one."""
    hooked = {id(unet): unet}
    for layer in cross_attentions(unet).values():
        for part in (layer.to_q, layer.to_out[0]):
            hooked[id(part)] = part
    # a module comes before those that it contains
    for module in reversed(list(unet.modules())):
        if any(id(child) in hooked for child in module.children()):
            hooked[id(module)] = module
    return list(hooked.values())


@contextmanager
def inject_sdxl(state: PipelineState, slot: str, injection: SDXLInjection) -> Iterator[None]:
    """Register the hooks of an identity on a U-Net, and remove them on exit.

    Args:
        state: of the pipeline.
        slot: see `Adapter.slot`.
        injection: the identity.

    Raises:
        OptionError: Another identity is in use on this U-Net, or it is compiled as a whole, or
            a part of it that contains a cross-attention.
    """
    unet = state.network
    with exclusive_use(unet, slot, find_hooked(unet)), ExitStack() as hooks:
        handle = unet.register_forward_pre_hook(injection.before_call, with_kwargs=True)
        hooks.callback(handle.remove)
        for key, layer in cross_attentions(unet).items():
            attention = IdentityAttention(key, layer.heads, injection)
            for handle in attention.register(layer):
                hooks.callback(handle.remove)
        yield
