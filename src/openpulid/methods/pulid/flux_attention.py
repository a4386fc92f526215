"""Identity attention inside diffusers' transformers: a cross-attention after every few blocks.

Forward hooks on the blocks add its output to the generated image tokens. Where blocks and tokens
are is told by `methods.transformer_kinds`. No `forward` is replaced, so LoRA, ControlNet, quantized
layers, caching, offloading and gradient checkpointing still work.

The state of one call of the transformer is a `FluxCall`, created in the transformer's pre-hook.

Shapes: B batch, P prompts, J people, N identity tokens, L image tokens (generated, and references),
h heads of width d.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from openpulid.errors import OptionError
from openpulid.methods.adapter import exclusive_use
from openpulid.methods.hooks import (
    Span,
    StepTracker,
    crop_to_ratio,
    identity_count_error,
)
from openpulid.methods.pulid.masks import resize_masks
from openpulid.methods.transformer_kinds import BlockKey, TransformerCall, TransformerKind

ProjectedKV = tuple[Tensor, Tensor]
"""q_proj (J, P, dim, h * N) and v_proj (J, P, h * N, dim), see `PerceiverCrossAttention`."""

CACHE_HOOKS = ("fbc_", "mag_cache_", "sea_cache_", "taylorseer_cache")
"""Names of diffusers' hooks that may replace the computation of a block. Applied by a function,
such as `apply_first_block_cache`, they do not show in `is_cache_enabled`."""


class PerceiverCrossAttention(nn.Module):
    """Cross-attention of image tokens to identity tokens; published names (PuLID for FLUX).

    Args:
        dim: width of the image tokens.
        dim_head, heads: of the attention.
        kv_dim: width of the identity tokens.
    """

    def __init__(
        self, dim: int = 3072, dim_head: int = 128, heads: int = 16, kv_dim: int = 2048
    ) -> None:
        super().__init__()
        inner = dim_head * heads
        self.heads = heads
        self.norm1 = nn.LayerNorm(kv_dim)
        self.norm2 = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(kv_dim, inner * 2, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def precompute_kv(self, tokens: Tensor) -> ProjectedKV:
        """Compute everything that does not change from step to step.

        An identity has fewer tokens (32) than a head has channels (128). So the keys are multiplied
        with the projection of the queries once, and the values with that of the output. An image
        token is then multiplied with h * N columns and rows instead of h * d: the same sums in
        another order, with a quarter of the work.

        Args:
            tokens: (..., N, kv_dim).

        Returns:
            q_proj (..., dim, h * N) and v_proj (..., h * N, dim).
        """
        key, value = self.to_kv(self.norm1(tokens)).chunk(2, dim=-1)
        key = key.unflatten(-1, (self.heads, -1))
        value = value.unflatten(-1, (self.heads, -1))
        scale = key.shape[-1] ** -0.5
        # weights may be stored in less precision than the tokens
        q_weight = self.to_q.weight.to(key).unflatten(0, (self.heads, -1))
        out_weight = self.to_out.weight.to(key).unflatten(1, (self.heads, -1))
        q_proj = torch.einsum("...nhd,hdc->...chn", key * scale, q_weight)
        v_proj = torch.einsum("...nhd,chd->...hnc", value, out_weight)
        return q_proj.flatten(-2), v_proj.flatten(-3, -2)

    def attend(self, image: Tensor, q_proj: Tensor, v_proj: Tensor) -> Tensor:
        """Compute the attention of image tokens (B, L, dim) to the result of `precompute_kv`."""
        return attend_projected(self.norm2(image), q_proj, v_proj, self.heads)

    def forward(self, tokens: Tensor, image: Tensor) -> Tensor:
        """Compute the attention of image tokens (B, L, dim) to identity tokens (B, N, kv_dim)."""
        return self.attend(image, *self.precompute_kv(tokens))


def attend_projected(image: Tensor, q_proj: Tensor, v_proj: Tensor, num_heads: int) -> Tensor:
    """Compute the attention of normalized image tokens to the result of `precompute_kv`.

    Args:
        image: (B, L, dim).
        q_proj: (..., dim, h * N).
        v_proj: (..., h * N, dim).
        num_heads: h.

    Returns:
        (B, L, dim).
    """
    scores = (image @ q_proj).unflatten(-1, (num_heads, -1))
    return scores.softmax(-1).flatten(-2) @ v_proj


class BlockCacheGuard:
    """Tells in one call which blocks run and which are answered by diffusers' block caching.

    A step that a cache skips repeats what the blocks added in the last full step, the identity
    included. The first block may return all of it at once; the other blocks then pass it on. The
    identity that was added after the first block must then not be added again.

    Attributes:
        block_ran: whether the block that is being called computed anything itself.
        pre_identity_output: output of the last hooked block of this call, before the identity was
            added.
    """

    def __init__(self) -> None:
        self.block_ran = False
        self.pre_identity_output: Any = None

    def record(self, output: Any) -> None:
        """Store the output of a block that ran, and wait for the next block."""
        self.block_ran = False
        self.pre_identity_output = output


@dataclass(frozen=True)
class FluxCall:
    """State of one call of the transformer.

    Attributes:
        is_active: whether the identity acts in this call.
        projected: block -> keys and values: of the identity, or of no identity in the call of a
            negative prompt.
        negative_projected: those of the second half of the batch, if it is that of the negative
            prompts; otherwise None.
        generated: first and end of the generated ones among the image tokens, which may have
            references; None if all are generated.
        num_leading: tokens before those of the image in a block's sequence.
        regions: (J, B, L, 1) in [0, 1]; None for everywhere.
        cache: None without block caching.
    """

    is_active: bool
    projected: Mapping[BlockKey, ProjectedKV] = field(default_factory=dict)
    negative_projected: Mapping[BlockKey, ProjectedKV] | None = None
    generated: tuple[int, int] | None = None
    num_leading: int = 0
    regions: Tensor | None = None
    cache: BlockCacheGuard | None = None


@dataclass
class FluxIdentity:
    """An identity prepared for the blocks of one transformer.

    Attributes:
        layers: block -> cross-attention.
        projected: block -> keys and values.
        negative: computes the same for no identity, P = J = 1.
        scale: weight of the identity.
        masks: (P, J, H, W) in [0, 1]; None for everywhere.
    """

    layers: Mapping[BlockKey, PerceiverCrossAttention]
    projected: Mapping[BlockKey, ProjectedKV]
    negative: Callable[[], Mapping[BlockKey, ProjectedKV]]
    scale: float = 1.0
    masks: Tensor | None = None
    _negative_projected: Mapping[BlockKey, ProjectedKV] | None = None
    _cropped: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def keys_values(self, is_negative: bool) -> Mapping[BlockKey, ProjectedKV]:
        """Return the keys and values of a call; compute the negative ones when first needed."""
        if not is_negative:
            return self.projected
        if self._negative_projected is None:
            self._negative_projected = self.negative()
        return self._negative_projected

    def resize_masks(self, grid: tuple[int, int], batch_size: int) -> Tensor | None:
        """Resize the masks to the grid of latent tokens.

        Args:
            grid: rows and columns of the generated tokens.
            batch_size: B.

        Returns:
            (J, B, L, 1), or None without masks.
        """
        if self.masks is None:
            return None
        if grid not in self._cropped:
            self._cropped[grid] = crop_to_ratio(self.masks, grid)
        return resize_masks(self._cropped[grid], grid, batch_size)

    def add_to(self, tokens: Tensor, block: BlockKey, call: FluxCall, first: int = 0) -> Tensor:
        """Add the identity to the generated tokens after a block.

        Args:
            tokens: (B, L or more, dim).
            block: key of the block.
            call: state of the call.
            first: number of tokens before those of the image.
        """
        start, stop = first, tokens.shape[1]
        if call.generated is not None:
            start, stop = (first + index for index in call.generated)
        generated = tokens[:, start:stop]
        weight = self.layers[block].to_q.weight
        query = generated.to(weight.device, weight.dtype)
        if call.negative_projected is None:
            added = self._attend(query, block, call.projected[block], call.regions)
        else:
            regions = (None, None) if call.regions is None else call.regions.chunk(2, dim=1)
            halves = zip(
                query.chunk(2), (call.projected, call.negative_projected), regions, strict=True
            )
            added = torch.cat(
                [self._attend(half, block, side[block], region) for half, side, region in halves]
            )
        generated = generated + (self.scale * added).to(generated)
        if generated.shape[1] == tokens.shape[1]:
            return generated
        return torch.cat([tokens[:, :start], generated, tokens[:, stop:]], dim=1)

    def _attend(
        self, query: Tensor, block: BlockKey, projected: ProjectedKV, regions: Tensor | None
    ) -> Tensor:
        """Compute the attention of image tokens (B, L, dim) to all people, each in its region."""
        total = None
        q_projs, v_projs = projected
        for person, (q_proj, v_proj) in enumerate(zip(q_projs, v_projs, strict=True)):
            q_proj = repeat_prompts(q_proj, len(query)).to(query)
            v_proj = repeat_prompts(v_proj, len(query)).to(query)
            added = self.layers[block].attend(query, q_proj, v_proj)
            if regions is not None:
                # without identity, J = 1: it acts in the regions of all people
                has_own_region = len(q_projs) == len(regions)
                region = regions[person] if has_own_region else regions.sum(0)
                if region.shape[1] != added.shape[1]:
                    raise OptionError(
                        "masks need the transformer's own image tokens, and a patch has changed "
                        "their number (token merging); use the pipeline without the patch, or no "
                        "masks."
                    )
                added = added * region.to(added)
            total = added if total is None else total + added
        assert total is not None, "there is at least one identity"
        return total


@dataclass
class CallReader:
    """Reads each call of a transformer before its blocks run.

    Attributes:
        kind: of the transformer.
        tracker: counts the steps.
        call: the last one.
    """

    kind: TransformerKind
    tracker: StepTracker
    call: TransformerCall | None = None

    def before_call(self, transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read a call, and count it (forward pre-hook of the transformer)."""
        state = self.tracker.state
        self.call = self.kind.read_call(state.target if state else transformer, args, kwargs)
        self.tracker.count(self.call.time)


@dataclass
class FluxInjection:
    """One identity in use on one transformer.

    Attributes:
        identity: prepared for its blocks.
        reader: reads the calls.
        span: of the schedule in which the identity acts.
        call: state of the last call. Blocks that run again during backward (gradient checkpointing)
            read it.
    """

    identity: FluxIdentity
    reader: CallReader
    span: Span
    call: FluxCall = FluxCall(is_active=False)
    _has_recomputed_call: bool = False

    def before_call(self, has_cache: bool, transformer: Any, args: Any) -> None:
        """Create the state of this call (forward pre-hook of the transformer).

        Args:
            has_cache: whether diffusers' caching may answer for a block.
            transformer: that is called.
            args: positional arguments of the call.
        """
        tracker, call = self.reader.tracker, self.reader.call
        assert call is not None, "the reader's hook runs before"
        if not self.span.contains(tracker.position):
            self.call = FluxCall(is_active=False)
            return
        self._check_checkpointing(transformer)
        negative = self.identity.keys_values(True) if call.has_negative_rows else None
        regions = self.identity.resize_masks(
            call.grid, call.batch_size // 2 if call.has_negative_rows else call.batch_size
        )
        if regions is not None and call.has_negative_rows:
            regions = regions.repeat(1, 2, 1, 1)
        self.call = FluxCall(
            is_active=True,
            projected=self.identity.keys_values(tracker.is_negative),
            negative_projected=negative,
            generated=call.generated,
            num_leading=call.num_leading,
            regions=regions,
            cache=BlockCacheGuard() if has_cache else None,
        )

    def _check_checkpointing(self, transformer: Any) -> None:
        """Raise OptionError for a negative call while blocks may run again during backward.

        They read the state of the last call: after a negative one, that without identity.
        """
        if torch.is_grad_enabled() and getattr(transformer, "is_gradient_checkpointing", False):
            self._has_recomputed_call = True
        if self.reader.tracker.is_negative and self._has_recomputed_call:
            raise OptionError(
                "a negative prompt cannot be combined with gradient checkpointing; leave it out, "
                "or call transformer.disable_gradient_checkpointing()."
            )

    def before_block_part(self, module: Any, args: Any) -> None:
        """Record that a block runs (forward pre-hook of its first part)."""
        if self.call.cache is not None:
            self.call.cache.block_ran = True

    def after_block(self, key: BlockKey, block: Any, args: Any, output: Any) -> Any:
        """Add the identity to the image tokens of a block (forward hook)."""
        call = self.call
        if not call.is_active:
            return None
        if call.cache is not None:
            if not call.cache.block_ran:
                return call.cache.pre_identity_output
            call.cache.record(output)
        if self.reader.kind.groups[key[0]].output == "sequence":
            return self.identity.add_to(output, key, call, call.num_leading)
        text, image = output
        return text, self.identity.add_to(image, key, call)


@dataclass
class GuidanceDelay:
    """Disables true guidance before a step, by returning the positive output for the negative one.

    Attributes:
        reader: reads the calls.
        start_step: first guided step.
    """

    reader: CallReader
    start_step: int = 0
    _positive_output: Any = None

    def after_call(self, transformer: Any, args: Any, output: Any) -> Any:
        """Replace the negative output before the first guided step (forward hook)."""
        tracker, call = self.reader.tracker, self.reader.call
        is_delayed = tracker.step < self.start_step
        if is_delayed and call is not None and call.has_negative_rows:
            (samples,) = output  # pipelines ask for a tuple
            positive = samples[: call.batch_size // 2]
            return ([*positive, *positive],)
        if not tracker.is_negative:
            self._positive_output = output if is_delayed else None
            return None
        return self._positive_output if is_delayed else None


def repeat_prompts(x: Tensor, batch_size: int) -> Tensor:
    """Repeat (P, ...) to (B, ...), the images of each prompt in sequence. P = 1 is broadcast."""
    if batch_size % len(x):
        raise identity_count_error(len(x), batch_size)
    return x if len(x) == 1 else x.repeat_interleave(batch_size // len(x), dim=0)


@contextmanager
def inject_identity(
    transformer: Any,
    slot: str,
    reader: CallReader,
    cfg_start_step: int = 0,
    injection: FluxInjection | None = None,
) -> Iterator[None]:
    """Register the hooks of an identity on a transformer, and remove them on exit.

    Args:
        transformer: of the reader's kind.
        slot: see `Adapter.slot`.
        reader: reads the calls.
        cfg_start_step: first step with true guidance.
        injection: the identity; None to only delay guidance.

    Raises:
        OptionError: Another identity is in use on the transformer, or it is compiled as a whole.
    """
    # the hooks read Python values that change from call to call: compiled, each would be recompiled
    uncompiled = torch.compiler.disable
    delay = GuidanceDelay(reader, cfg_start_step)
    keys = injection.identity.layers if injection else ()
    blocks = [(key, reader.kind.blocks(transformer, key)) for key in keys]
    has_cache = getattr(transformer, "is_cache_enabled", False)
    has_cache = has_cache or any(_has_cache_hook(block) for _, block in blocks)
    hooked = [transformer]
    if has_cache:
        hooked += [block for _, block in blocks]
    with exclusive_use(transformer, slot, hooked), ExitStack() as hooks:
        read = uncompiled(reader.before_call)
        handles = [transformer.register_forward_pre_hook(read, with_kwargs=True)]
        if injection is not None:
            prepare = uncompiled(partial(injection.before_call, has_cache))
            handles.append(transformer.register_forward_pre_hook(prepare))
        handles.append(transformer.register_forward_hook(uncompiled(delay.after_call)))
        for key, block in blocks:
            assert injection is not None
            after_block = uncompiled(partial(injection.after_block, key))
            handles.append(block.register_forward_hook(after_block))
            if has_cache:
                first_part = next(block.children())  # it runs whenever the block does
                pre_hook = uncompiled(injection.before_block_part)
                handles.append(first_part.register_forward_pre_hook(pre_hook))
        for handle in handles:
            hooks.callback(handle.remove)
        yield


def _has_cache_hook(block: nn.Module) -> bool:
    """Return whether one of diffusers' hooks may replace the computation of a block."""
    registry = getattr(block, "_diffusers_hook", None)
    return registry is not None and any(name.startswith(CACHE_HOOKS) for name in registry.hooks)
