"""PuLID on FLUX: the adapter that is loaded, attached to a pipeline, and opened around a generation."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from openpulid.errors import OptionError, WeightsError
from openpulid.methods.pulid.base import PuLIDBase
from openpulid.methods.pulid.encoders import IDFormer
from openpulid.methods.pulid.flux_attention import (
    FluxInjection,
    Folded,
    PerceiverCrossAttention,
    injected_flux,
    places,
)
from openpulid.methods.pulid.masks import People, normalize_people, stack_masks


class PuLIDFlux(PuLIDBase):
    """Identity encoder and perceiver cross-attentions; `state_dict` has the published names (v0.9.0 and v0.9.1).

    Args:
        encoder: an `IDFormer`.
        layers: as many as there are blocks to join after; 20 in FLUX.
        double_interval, single_interval: after how many blocks of each kind the identity joins.
    """

    def __init__(
        self,
        encoder: IDFormer,
        layers: nn.ModuleList,
        double_interval: int = 2,
        single_interval: int = 4,
    ) -> None:
        super().__init__()
        self.pulid_encoder = encoder
        self.pulid_ca = layers
        self.double_interval, self.single_interval = double_interval, single_interval

    @property
    def encoder(self) -> IDFormer:
        return self.pulid_encoder

    @staticmethod
    def network(target: Any) -> Any:
        from diffusers import FluxTransformer2DModel

        transformer = getattr(target, "transformer", target)
        if not hasattr(transformer, "single_transformer_blocks"):
            raise OptionError(
                f"{type(target).__name__} has no FLUX transformer; attach to a FLUX pipeline or its transformer, or take an "
                "adapter for SDXL."
            )
        # where it is compiled, or wrapped for training, it lies further inside
        if not any(isinstance(part, FluxTransformer2DModel) for part in transformer.modules()):
            raise OptionError(
                f"{type(transformer).__name__} is not FLUX.1's transformer: Chroma and others with blocks of the same name are "
                "other models; attach to FLUX.1 or a finetune of it."
            )
        return transformer

    @classmethod
    def for_transformer(cls, transformer: Any, encoder: IDFormer, **sizes: Any) -> PuLIDFlux:
        """A fresh adapter for a transformer's blocks: until it is trained it changes nothing (outputs start at zero).

        Args:
            sizes: dim_head and heads of `PerceiverCrossAttention`, and the two intervals.
        """
        intervals = {
            name: sizes.pop(name)
            for name in ("double_interval", "single_interval")
            if name in sizes
        }
        known = {"dim": transformer.inner_dim, "kv_dim": encoder.config["output_dim"], **sizes}
        layers = nn.ModuleList(
            PerceiverCrossAttention(**known) for _ in places(transformer, **intervals)
        )
        adapter = cls(encoder, layers, **intervals)
        for layer in adapter._layers():
            nn.init.zeros_(layer.to_out.weight)
        return adapter

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PuLIDFlux:
        """Reads a published file: float32, in eval mode.

        Raises:
            WeightsError: no such file, or names that are missing or too many; it lists them.
        """
        state = cls.read(path)
        with init_empty_weights(include_buffers=False):
            encoder = IDFormer()
        return cls.from_state_dict(state, encoder)

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Tensor], encoder: IDFormer, dim_head: int = 128
    ) -> PuLIDFlux:
        """An adapter with these weights under their published names; the layers' sizes are the tensors'.

        Raises:
            WeightsError: a name is missing or too many, or a shape differs; it names the first of them.
        """
        count = len({name.split(".")[1] for name in state if name.startswith("pulid_ca.")})
        layers = nn.ModuleList()
        with init_empty_weights(include_buffers=False):
            usual = (
                PerceiverCrossAttention()
            )  # in place of what is missing, which `filled` then names
            for k in range(count):
                query = state.get(f"pulid_ca.{k}.to_q.weight", usual.to_q.weight)
                pair = state.get(f"pulid_ca.{k}.to_kv.weight", usual.to_kv.weight)
                layers.append(
                    PerceiverCrossAttention(
                        query.shape[1], dim_head, len(query) // dim_head, kv_dim=pair.shape[1]
                    )
                )
        return cls(encoder, layers).filled(state)

    def check(self, network: Any) -> None:
        expected = len(places(network, self.double_interval, self.single_interval))
        widths = {layer.to_q.in_features for layer in self._layers()}
        if expected != len(self.pulid_ca) or widths != {network.inner_dim}:
            raise WeightsError(
                f"this adapter was made for another transformer: {len(self.pulid_ca)} layers of width {sorted(widths)}, "
                f"this one wants {expected} of width {network.inner_dim}; take the adapter of this base model."
            )

    # --- use

    @contextmanager
    def use(
        self,
        people: People,
        scale: float = 1.0,
        start: float = 0.0,
        end: float = 1.0,
        start_step: int | None = None,
        timestep_to_start_cfg: int = 0,
        pipe: Any = None,
    ) -> Iterator[PuLIDFlux]:
        """The attached pipelines show an identity while this is open.

        Args:
            people: as `PuLID.use` takes them; masks lie over the picture that is being made.
            scale: weight of the identity; 0 shows nobody and costs nothing.
            start, end: fractions of the schedule between which it acts, [start, end).
            start_step: the step from which it acts, instead of `start`: 4 for likeness in photographs, 0 or 1 for styles.
            timestep_to_start_cfg: the step from which a negative prompt counts, whatever the scale.
            pipe: only this one of the attached pipelines.

        Raises:
            OptionError: an argument outside its range, nothing attached, or another identity is still in use.
        """
        prompts = normalize_people(people)
        first = prompts[0][0][0]

        @torch.no_grad()
        def positive() -> Tensor:
            return self.tokens(prompts)

        @torch.no_grad()
        def nobody() -> Tensor:
            return self.unconditional(first.id_cond, first.hidden)[:, None]

        if not 0 <= start <= 1 or not 0 <= end <= 1 or (start_step or 0) < 0:
            raise OptionError(
                "start and end are fractions of the schedule, from 0 to 1, and start_step counts from 0."
            )
        acts = _acts(start, end, start_step)
        with self._opened(
            positive, nobody, acts, scale, timestep_to_start_cfg, stack_masks(prompts), pipe
        ):
            yield self

    @contextmanager
    def use_tokens(
        self,
        tokens: Tensor,
        scale: float = 1.0,
        start_step: int = 0,
        negative: Tensor | None = None,
        timestep_to_start_cfg: int = 0,
        pipe: Any = None,
    ) -> Iterator[PuLIDFlux]:
        """As `use`, from tokens (B, N, kv_dim) and with gradient; `negative` (1, N, kv_dim) for calls of a negative prompt."""

        def nobody() -> Tensor:
            if negative is None:
                raise OptionError(
                    "a negative prompt needs negative tokens; give negative=adapter.unconditional(...)."
                )
            return negative[:, None]

        acts = _acts(0.0, 1.0, start_step)
        with self._opened(
            lambda: tokens[:, None], nobody, acts, scale, timestep_to_start_cfg, None, pipe
        ):
            yield self

    @contextmanager
    def _opened(
        self,
        positive: Callable[[], Tensor],
        nobody: Callable[[], Tensor],
        acts: Callable[[int, int | None], bool],
        scale: float,
        cfg_from: int,
        masks: Tensor | None,
        pipe: Any,
    ) -> Iterator[None]:
        targets = self.serving(pipe)
        with ExitStack() as stack:
            pairs: dict[tuple[str, int], Folded] | None = None
            for target in targets:
                if scale == 0:
                    stack.enter_context(guided_from(target, cfg_from))
                    continue
                transformer = self.network(target)
                where = places(transformer, self.double_interval, self.single_interval)
                layers = dict(zip(where, self._layers(), strict=True))
                pairs = pairs or _folded(layers, positive())
                nothing = partial(_later, layers, nobody)
                schedule = partial(_schedule, target)
                injection = FluxInjection(
                    layers, pairs, nothing, acts, scale, cfg_from, masks, schedule
                )
                stack.enter_context(injected_flux(transformer, injection))
            yield

    def _layers(self) -> list[PerceiverCrossAttention]:
        return list(self.pulid_ca)  # type: ignore[arg-type]


@contextmanager
def guided_from(target: Any, step: int) -> Iterator[None]:
    """Nobody is shown, and a negative prompt counts from a step on, as it does beside an identity.

    Args:
        target: a FLUX pipeline or its transformer; with a step of 0 nothing of it changes.
    """
    if step <= 0:
        yield
        return
    injection = FluxInjection(
        {}, {}, dict, lambda step, steps: False, cfg_from=step, schedule=partial(_schedule, target)
    )
    with injected_flux(PuLIDFlux.network(target), injection):
        yield


def _folded(
    layers: Mapping[tuple[str, int], PerceiverCrossAttention], tokens: Tensor
) -> dict[tuple[str, int], Folded]:
    """Tokens (P, J, N, kv_dim) -> of each layer what its image tokens are multiplied with, J first."""
    pairs = {place: layer.fold(tokens) for place, layer in layers.items()}
    return {
        place: (asked.transpose(0, 1), given.transpose(0, 1))
        for place, (asked, given) in pairs.items()
    }


def _later(
    layers: Mapping[tuple[str, int], PerceiverCrossAttention], tokens: Callable[[], Tensor]
) -> dict[Any, Folded]:
    return _folded(layers, tokens())


def _schedule(target: Any) -> tuple[Any, int | None, int | None]:
    """What a pipeline's run can be known by, how many steps it takes (it may begin inside its scheduler's), and the scheduler's
    count of them, which is None before its first."""
    scheduler = getattr(target, "scheduler", None)
    steps = getattr(scheduler, "timesteps", None)
    count = None if steps is None else len(steps) - (getattr(scheduler, "begin_index", None) or 0)
    return steps, count, getattr(scheduler, "step_index", None)


def _acts(start: float, end: float, start_step: int | None) -> Callable[[int, int | None], bool]:
    """Whether the identity acts in step i of n; a bare transformer does not know n, and there a fraction says nothing."""

    def decide(step: int, steps: int | None) -> bool:
        if start_step is not None and step < start_step:
            return False
        if (start_step is not None or start <= 0) and end >= 1:
            return True
        if steps is None:
            raise OptionError(
                "start and end are fractions of a pipeline's schedule; a bare transformer takes start_step."
            )
        progress = step / max(steps, 1) + 1e-6
        return (start_step is not None or start <= progress) and (progress < end or end >= 1)

    return decide
