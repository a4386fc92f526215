"""Identity attention inside diffusers' FLUX transformer: a cross-attention of the image tokens after every few blocks.

Forward hooks on the blocks, which return (text, image), add it to the image's tokens; no `forward` is replaced, so LoRA,
ControlNet, quantised layers, caching, offloading and gradient checkpointing go on as they were.

Shapes: B batch, P prompts, J people, N identity tokens, L image tokens (those being made, then references), h heads of width d.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from openpulid.errors import OptionError
from openpulid.methods.hooks import exclusive_use

Folded = tuple[
    Tensor, Tensor
]  # (J, P, dim, h * N) and (J, P, h * N, dim): what P prompts with J people are read by

CACHES = ("fbc_", "mag_cache_", "sea_cache_", "taylorseer_cache")
"""How those hooks of diffusers are called that may answer in a whole block's place; applied by a function of their own, as
`apply_first_block_cache`, they do not show in `is_cache_enabled`."""


class PerceiverCrossAttention(nn.Module):
    """Image tokens read identity tokens; published names (PuLID for FLUX).

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

    def fold(self, tokens: Tensor) -> Folded:
        """(..., N, kv_dim) -> (..., dim, h * N) and (..., h * N, dim): all that does not change from step to step.

        An identity has fewer tokens (32) than a head has channels (128). So the keys are multiplied with the queries'
        projection once, and the values with the output's, and an image token is multiplied with h * N columns and rows
        instead of h * d: the same sums in another order, at a quarter of the work.
        """
        key, value = (
            x.unflatten(-1, (self.heads, -1))
            for x in self.to_kv(self.norm1(tokens)).chunk(2, dim=-1)
        )
        scale = key.shape[-1] ** -0.5
        asked = torch.einsum(
            "...nhd,hdc->...chn", key * scale, self.to_q.weight.unflatten(0, (self.heads, -1))
        )
        given = torch.einsum(
            "...nhd,chd->...hnc", value, self.to_out.weight.unflatten(1, (self.heads, -1))
        )
        return asked.flatten(-2), given.flatten(-3, -2)

    def attend(self, image: Tensor, asked: Tensor, given: Tensor) -> Tensor:
        """(B, L, dim) and what `fold` gives, (B or 1, ...) -> (B, L, dim)."""
        shares = (self.norm2(image) @ asked).unflatten(-1, (self.heads, -1)).softmax(-1)
        return shares.flatten(-2) @ given

    def forward(self, tokens: Tensor, image: Tensor) -> Tensor:
        """(B, N, kv_dim), (B, L, dim) -> (B, L, dim)."""
        return self.attend(image, *self.fold(tokens))


@dataclass
class Turn:
    """Where a run of the transformer stands: which step this call belongs to, and whether it is the negative one."""

    step: int = -1
    calls: int = 0
    _time: float | None = None
    _schedule: Any = None
    _place: int | None = None

    def note(self, time: float, schedule: Any = None, place: int | None = None) -> None:
        """One more call at a time that falls from 1 to 0, and the scheduler's own count of its steps where there is one.

        A rising time, or a new schedule, begins a new run; a second call in the same step is that of the negative prompt. A
        pipeline in half precision rounds the time, so that two steps may have the same: then the scheduler's count tells.
        """
        if self._time is None or time > self._time or schedule is not self._schedule:
            self.step, self.calls = 0, 0
        elif time < self._time or place != self._place:
            self.step, self.calls = self.step + 1, 0
        else:
            self.calls += 1
        self._time, self._schedule, self._place = time, schedule, place

    @property
    def negative(self) -> bool:
        return self.calls % 2 == 1


@dataclass
class FluxInjection:
    """One opened identity on one transformer: everything that is active lives here and goes with it.

    Attributes:
        layers: the cross-attentions by block, ("double" | "single", index).
        folded: of each, what its image tokens are multiplied with.
        negative: computes the same for nobody, P = J = 1, when a negative prompt first asks for it.
        acts: whether the identity acts in step i of n (n is None for a bare transformer).
        cfg_from: the first step of true guidance; before it the negative call gives what the positive one gave.
        masks: (P, J, H, W) in [0, 1], or None: everywhere.
    """

    layers: Mapping[tuple[str, int], PerceiverCrossAttention]
    folded: Mapping[tuple[str, int], Folded]
    negative: Callable[[], Mapping[tuple[str, int], Folded]]
    acts: Callable[[int, int | None], bool]
    scale: float = 1.0
    cfg_from: int = 0
    masks: Tensor | None = None
    # an object of the run, how many steps it has, and the scheduler's own count of them
    schedule: Callable[[], tuple[Any, int | None, int | None]] = lambda: (None, None, None)
    turn: Turn = field(default_factory=Turn)
    active: bool = False
    cached: bool = False  # whether diffusers' caching may answer for a block
    computed: bool = True  # whether the block that is being called did anything itself
    recomputed: bool = (
        False  # whether the blocks of some call are called once more, for its gradient
    )
    unjoined: Any = None  # what the last joined block of this call gave, before the identity joined
    made: int | None = None  # image tokens that are being made; what follows them are references
    regions: Tensor | None = None  # (J, B, L, 1)
    _nobody: Mapping[tuple[str, int], Folded] | None = None
    _positive: Any = None

    def before(self, transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the transformer: finds out what this call is."""
        names = (
            "hidden_states",
            "encoder_hidden_states",
            "pooled_projections",
            "timestep",
            "img_ids",
        )
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        run, steps, place = self.schedule()
        self.turn.note(float(given["timestep"].flatten()[0]), run, place)
        self.active = self.acts(self.turn.step, steps)
        self.computed, self.unjoined = not self.cached, None
        if not self.active:
            return
        self._refuse_recomputing(transformer)
        ids = given["img_ids"][0] if given["img_ids"].ndim == 3 else given["img_ids"]
        own = ids[:, 0] == 0
        self.made = None if bool(own.all()) else int(own.sum())
        self.regions = self._regions(ids[own], len(given["hidden_states"]))
        if self.turn.negative and self._nobody is None:
            self._nobody = self.negative()

    def _refuse_recomputing(self, transformer: Any) -> None:
        """A block that is called once more is read by what the last call was: a positive one's, after a negative, by nobody."""
        self.recomputed |= torch.is_grad_enabled() and getattr(
            transformer, "is_gradient_checkpointing", False
        )
        if self.turn.negative and self.recomputed:
            raise OptionError(
                "a negative prompt cannot be combined with gradient checkpointing; leave it out, or call "
                "transformer.disable_gradient_checkpointing()."
            )

    def after(self, transformer: Any, args: Any, output: Any) -> Any:
        """Forward hook of the transformer: before true guidance begins, negative is positive, so that nothing is guided."""
        if not self.turn.negative:
            self._positive = output if self.turn.step < self.cfg_from else None
            return None
        return self._positive if self.turn.step < self.cfg_from else None

    def begins(self, part: Any, args: Any) -> None:
        """Forward pre-hook of a block's first part: the block computes, no cache answers for it."""
        self.computed = True

    def join(self, place: tuple[str, int]) -> Callable[..., Any]:
        """The forward hook of one block.

        A step that a cache skips repeats what the blocks added in the last whole one, the identity too. The first block may
        give all of it at once; the others then hand it on, and what had joined the first is taken back.
        """
        layer = self.layers[place]

        def hook(
            block: Any, args: Any, output: tuple[Tensor, Tensor]
        ) -> tuple[Tensor, Tensor] | None:
            if not self.active:
                return None
            computed, self.computed = self.computed, not self.cached
            if not computed:
                return self.unjoined
            self.unjoined = output if self.cached else None
            text, image = output
            known = self._nobody if self.turn.negative and self._nobody is not None else self.folded
            return text, self._with_identity(image, layer, known[place])

        return hook

    def _with_identity(self, image: Tensor, layer: PerceiverCrossAttention, pair: Folded) -> Tensor:
        made = image if self.made is None else image[:, : self.made]
        parameter = layer.to_q.weight
        seen = made.to(parameter.device, parameter.dtype)
        added = None
        for person in range(len(pair[0])):
            one = layer.attend(seen, *(self._rows(x[person], len(image)).to(seen) for x in pair))
            if self.regions is not None:  # nobody is in everybody's region
                region = (
                    self.regions[person]
                    if len(pair[0]) == len(self.regions)
                    else self.regions.sum(0)
                )
                one = one * region.to(one)
            added = one if added is None else added + one
        assert added is not None, "an open identity has at least one person"
        made = made + (self.scale * added).to(made)
        return made if self.made is None else torch.cat([made, image[:, self.made :]], dim=1)

    @staticmethod
    def _rows(x: Tensor, batch: int) -> Tensor:
        """(P, ...) -> (B, ...): each prompt's images follow one another."""
        if batch % len(x):
            raise OptionError(
                f"{len(x)} identities do not fit {batch} images; give one identity, or one per prompt."
            )
        return x if len(x) == 1 else x.repeat_interleave(batch // len(x), dim=0)

    def _regions(self, ids: Tensor, batch: int) -> Tensor | None:
        """Each person's region on the grid of latent tokens, (J, B, L, 1)."""
        if self.masks is None:
            return None
        height, width = (int(ids[:, axis].max()) + 1 for axis in (1, 2))
        small = interpolate(self.masks.float(), (height, width), mode="area")  # (P, J, h, w)
        return self._rows(small, batch).flatten(2).transpose(0, 1)[..., None]


def places(
    transformer: Any, double_interval: int = 2, single_interval: int = 4
) -> list[tuple[str, int]]:
    """The blocks that an identity joins after, in the order of the published `pulid_ca.K`."""
    doubles = range(0, len(transformer.transformer_blocks), double_interval)
    singles = range(0, len(transformer.single_transformer_blocks), single_interval)
    return [*(("double", i) for i in doubles), *(("single", i) for i in singles)]


@contextmanager
def injected_flux(transformer: Any, injection: FluxInjection) -> Iterator[None]:
    """The transformer with an identity in use; nothing of it is left afterwards, whatever happens inside.

    Raises:
        OptionError: another identity is in use on it, or it is compiled as a whole.
    """
    blocks: dict[str, Sequence[nn.Module]] = {
        "double": transformer.transformer_blocks,
        "single": transformer.single_transformer_blocks,
    }
    # the hooks read Python values that change from call to call: compiled, every place would be compiled of its own
    plain = torch.compiler.disable
    joined = [(place, blocks[place[0]][place[1]]) for place in injection.layers]
    injection.cached = getattr(transformer, "is_cache_enabled", False) or any(
        _cached(block) for _, block in joined
    )
    around = [transformer, *(block for _, block in joined if injection.cached)]
    with exclusive_use(transformer, around), ExitStack() as undo:
        undo.callback(
            transformer.register_forward_pre_hook(plain(injection.before), with_kwargs=True).remove
        )
        undo.callback(transformer.register_forward_hook(plain(injection.after)).remove)
        for place, block in joined:
            undo.callback(block.register_forward_hook(plain(injection.join(place))).remove)
            if injection.cached:
                undo.callback(
                    first_part(block).register_forward_pre_hook(plain(injection.begins)).remove
                )
        yield


def _cached(block: nn.Module) -> bool:
    registry = getattr(block, "_diffusers_hook", None)
    return registry is not None and any(name.startswith(CACHES) for name in registry.hooks)


def first_part(block: nn.Module) -> nn.Module:
    """What a block calls whenever it computes: its first norm."""
    return next(block.children())
