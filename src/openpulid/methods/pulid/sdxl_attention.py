"""Identity attention inside any SDXL-family U-Net of diffusers.

Every cross-attention layer gets a second attention with the same queries and the identity's own keys and values; its
output is added to the text's before the output projection.

Shapes: P prompts with an identity, J people in each, B batch of the U-Net, h heads, N tokens, d width of a
head, L positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from openpulid.errors import OptionError
from openpulid.methods.hooks import exclusive_use
from openpulid.methods.pulid.projection import (
    Projection,
    attend,
    contribution,
    with_zeros,
    zeros_bias,
)

KeyValue = tuple[Tensor, Tensor]


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
        """(..., N, cross_attention_dim) -> keys and values (..., N, hidden_size)."""
        return self.id_to_k(tokens), self.id_to_v(tokens)


def cross_attentions(unet: Any) -> dict[str, Any]:
    """The U-Net's cross-attention layers by their published key.

    The key is the layer's place in `unet.attn_processors`, where self- and cross-attention alternate: "1", "3", ...
    """
    places = {name: str(index) for index, name in enumerate(unet.attn_processors)}
    return {
        place: unet.get_submodule(name.removesuffix(".processor"))
        for name, place in places.items()
        if name.endswith("attn2.processor")
    }


def identity_layers(unet: nn.Module) -> nn.ModuleDict:
    """Fresh layers for every cross-attention of a U-Net.

    Keys start as the text's (IP-Adapter does so too) and values at zero: an untrained adapter changes nothing.
    """
    layers = nn.ModuleDict()
    for place, attention in cross_attentions(unet).items():
        layer = IdentityLayer(attention.inner_dim, attention.cross_attention_dim)
        text = getattr(attention.to_k, "weight", None)
        with torch.no_grad():
            nn.init.zeros_(layer.id_to_v.weight)
            if (
                text is not None
                and text.shape == layer.id_to_k.weight.shape
                and text.is_floating_point()
            ):
                layer.id_to_k.weight.copy_(text)
        layers[place] = layer
    return layers


@dataclass
class Call:
    """What one call of the U-Net needs, expanded to its batch. Kept by batch size, so that a block that is run again
    during backward (gradient checkpointing) finds what its forward had."""

    active: bool
    keys_values: Mapping[str, KeyValue] = field(
        default_factory=dict
    )  # place -> (J, B, h, N, d) twice, zeros among them
    bias: Tensor | None = None  # (N,), of the zeros
    regions: Callable[[int], Tensor | None] = lambda positions: None  # L -> (J, B, L, 1)


@dataclass
class Injection:
    """One opened identity on one U-Net: everything that is active lives here and goes with it.

    Attributes:
        keys_values: per layer (P, J, N, hidden) twice.
        negative: computes the same for nobody, (1, 1, N, hidden), when classifier-free guidance first asks for it.
        guided: says whether the batch's first half is the negative one.
        progress: the fraction of the schedule that the call at a timestep stands at.
        masks: (P, J, H, W) in [0, 1], or None: everywhere.
        start, end: the identity acts while start <= progress < end (at 1.0: to the last step).
    """

    keys_values: Mapping[str, KeyValue]
    negative: Callable[[], Mapping[str, KeyValue]]
    guided: Callable[[], bool]
    progress: Callable[[Any], float]
    masks: Tensor | None = None
    scale: float = 1.0
    projection: Projection = "ortho_v2"
    num_zero: int = 0
    start: float = 0.0
    end: float = 1.0
    calls: dict[int, Call] = field(default_factory=dict)
    _expanded: dict[Any, Call] = field(default_factory=dict)

    def before(self, unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the U-Net: prepares this call. Outside [start, end) there is nothing to prepare."""
        sample = args[0] if args else kwargs["sample"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        batch = len(sample)
        if not self._due(unet, timestep):
            self.calls[batch] = Call(active=False)
            return
        guided = self.guided()
        # under autocast the layers' products already have their dtype
        dtype = None if torch.is_autocast_enabled(sample.device.type) else sample.dtype
        # a walk's first calls may run without gradient, and what they prepare has none
        made_for = (batch, guided, sample.device, dtype, sample.shape[-2:], torch.is_grad_enabled())
        if made_for not in self._expanded:
            self._expanded[made_for] = self._prepare(unet, sample, guided, dtype)
        self.calls[batch] = self._expanded[made_for]

    def _due(self, unet: Any, timestep: Any) -> bool:
        if self.start <= 0 and self.end >= 1:
            return True
        if torch.is_grad_enabled() and getattr(unet, "is_gradient_checkpointing", False):
            raise OptionError(
                "start and end cannot be combined with gradient checkpointing; train over the whole schedule."
            )
        progress = self.progress(timestep) + 1e-6
        return self.start <= progress and (progress < self.end or self.end >= 1)

    def _prepare(self, unet: Any, sample: Tensor, guided: bool, dtype: torch.dtype | None) -> Call:
        prompts = len(next(iter(self.keys_values.values()))[0])
        rows = len(sample) // (1 + guided)
        if rows * (1 + guided) != len(sample) or rows % prompts:
            half = " in each half of the guided batch" if guided else ""
            raise OptionError(
                f"{prompts} identities do not fit {rows} images{half}; give one identity, or one per prompt."
            )
        nobodies = self.negative() if guided else None
        heads = {place: attention.heads for place, attention in cross_attentions(unet).items()}
        expanded = {}
        for place, pair in self.keys_values.items():
            nobody = nobodies[place] if nobodies else (None, None)
            key, value = (
                self._expand(x, no, rows, heads[place], sample.device, dtype)
                for x, no in zip(pair, nobody, strict=True)
            )
            expanded[place] = key, value
        return Call(
            True, expanded, zeros_bias(key, self.num_zero), self._regions(rows, guided, sample)
        )

    def _expand(
        self,
        x: Tensor,
        nobody: Tensor | None,
        rows: int,
        heads: int,
        device: torch.device,
        dtype: torch.dtype | None,
    ) -> Tensor:
        """(P, J, N, hidden) -> (J, B, h, N, d), the negative half first, as diffusers lays the batch; zero tokens last."""
        x = x.to(device, dtype).repeat_interleave(rows // len(x), dim=0)
        if nobody is not None:
            x = torch.cat([nobody.to(x).expand(x.shape), x])
        return with_zeros(
            x.unflatten(-1, (heads, -1)).permute(1, 0, 3, 2, 4).contiguous(), self.num_zero
        )

    def _regions(self, rows: int, guided: bool, sample: Tensor) -> Callable[[int], Tensor | None]:
        if self.masks is None:
            return lambda positions: None
        # shrunk on the processor: not every device averages to sizes that do not divide the mask's
        masks = self.masks.cpu().repeat_interleave(rows // len(self.masks), dim=0)
        masks = torch.cat([masks] * (1 + guided)).float()  # (B, J, H, W)
        height, width = sample.shape[-2:]
        known: dict[int, Tensor] = {}

        def at(positions: int) -> Tensor:
            if positions not in known:
                with torch.no_grad():
                    # every position gets the mean of its own area: nothing leaks over an edge that lies between two
                    small = interpolate(masks, grid(height, width, positions), mode="area")
                    known[positions] = small.flatten(2).transpose(0, 1)[..., None].to(sample.device)
            return known[positions]

        return at


def grid(height: int, width: int, positions: int) -> tuple[int, int]:
    """The height and width at which a U-Net of this latent size has so many positions; each level halves,
    rounded up."""
    while height * width > positions:
        height, width = (height + 1) // 2, (width + 1) // 2
    assert height * width == positions, "the U-Net halves its latents at every level"
    return height, width


@dataclass
class IdentityAttention:
    """The identity's part of one cross-attention layer, between its two linear layers.

    Two hooks: one keeps the queries that the layer's processor computes, the other adds the identity's output to what is on
    its way into the output projection. The processor itself is left alone, so whatever it does (LoRA, IP-Adapter and its
    scales, another attention kernel) it goes on doing.

    Args:
        place: the layer's published key.
        heads: of the layer.
        injection: what is in use.
    """

    place: str
    heads: int
    injection: Injection
    query: Tensor | None = None

    def opened(self, attention: Any) -> Iterator[Any]:
        """Both hooks on a layer; each has a `remove`."""
        yield attention.to_q.register_forward_hook(self._keep)
        yield attention.to_out[0].register_forward_pre_hook(self._join)

    def _keep(self, layer: Any, args: Any, query: Tensor) -> None:
        self.query = query

    def _join(self, layer: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        text, query = args[0], self.query
        self.query = None  # not kept longer than a processor does
        call = self.injection.calls[len(text)]
        if not call.active:
            return None
        assert query is not None, "a processor computes its queries through the layer's to_q"
        return (self.joined(query, text, call), *args[1:])

    def joined(self, query: Tensor, text: Tensor, call: Call) -> Tensor:
        """Queries (B, L, D) and the text's output (B, L, D) -> the output with every identity's added."""
        query = query.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        keys, values = (x.to(query.dtype) for x in call.keys_values[self.place])
        bias = None if call.bias is None else call.bias.to(query.dtype)
        regions = call.regions(query.shape[2])
        projection = self.injection.projection
        added = None
        for person in range(len(keys)):
            attended, share = attend(query, keys[person], values[person], projection, bias)
            identity = attended.transpose(1, 2).flatten(2)
            region = None if regions is None else regions[person]
            one = contribution(text, identity, projection, share, region)
            added = one if added is None else added + one
        assert added is not None, "an open identity has at least one person"
        return torch.add(text, added.to(text.dtype), alpha=self.injection.scale)


@contextmanager
def injected(unet: nn.Module, injection: Injection) -> Iterator[None]:
    """The U-Net with an identity in use; nothing of it is left afterwards, whatever happens inside.

    Raises:
        OptionError: another identity is in use on this U-Net, or it is compiled.
    """
    with exclusive_use(unet, around=unet.modules()), ExitStack() as undo:
        undo.callback(unet.register_forward_pre_hook(injection.before, with_kwargs=True).remove)
        for place, attention in cross_attentions(unet).items():
            for hook in IdentityAttention(place, attention.heads, injection).opened(attention):
                undo.callback(hook.remove)
        yield
