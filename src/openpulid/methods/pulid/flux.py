"""PuLID for FLUX and its relatives: load the adapter, attach it to a pipeline, use it.

The relatives are those of `methods.transformer_kinds`. FLUX.1's published weights also fit Chroma.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from openpulid.errors import OptionError, WeightsError
from openpulid.io.checkpoint_kinds import PULID_FLUX, CheckpointKind
from openpulid.methods.hooks import PipelineState, Span, StepTracker, check_scale
from openpulid.methods.pulid.base import AdapterMetadata, PuLIDBase
from openpulid.methods.pulid.encoders import IDFormer
from openpulid.methods.pulid.flux_attention import (
    CallReader,
    FluxIdentity,
    FluxInjection,
    PerceiverCrossAttention,
    ProjectedKV,
    inject_identity,
)
from openpulid.methods.pulid.masks import People, normalize_people, stack_masks
from openpulid.methods.transformer_kinds import (
    BlockKey,
    find_transformer,
    identity_blocks,
)


class PuLIDFlux(PuLIDBase):
    """Identity encoder and perceiver cross-attentions.

    `state_dict` has the published names (v0.9.0 and v0.9.1).

    Args:
        encoder: an `IDFormer`.
        layers: one per hooked block; 20 in FLUX.
        double_interval, single_interval: identity attention follows every n-th block of each kind.
    """

    kinds: ClassVar[tuple[CheckpointKind, ...]] = (PULID_FLUX,)

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
        self.double_interval = double_interval
        self.single_interval = single_interval

    @property
    def encoder(self) -> IDFormer:
        """Identity features -> tokens."""
        return self.pulid_encoder

    @property
    def layers(self) -> list[PerceiverCrossAttention]:
        """The cross-attentions in the order of the hooked blocks."""
        return list(self.pulid_ca)  # type: ignore[arg-type]

    # --- create, load

    @classmethod
    def for_transformer(cls, transformer: Any, encoder: IDFormer, **sizes: Any) -> PuLIDFlux:
        """Create an untrained adapter for a transformer; its outputs are zero.

        Args:
            transformer: of FLUX.1 or a relative.
            encoder: an `IDFormer`.
            sizes: dim_head and heads of `PerceiverCrossAttention`, and the two intervals; by
                default the published ones, and the kind's intervals.

        Raises:
            OptionError: The transformer is of an unknown kind.
        """
        transformer, kind = find_transformer(transformer)
        intervals = {name: sizes.pop(name, n) for name, n in kind.intervals().items()}
        width = getattr(transformer, kind.width)
        layers = nn.ModuleList()
        for _ in identity_blocks(transformer, **intervals):
            layer = PerceiverCrossAttention(width, kv_dim=encoder.config["output_dim"], **sizes)
            layers.append(layer)
        adapter = cls(encoder, layers, **intervals)
        for layer in adapter.layers:
            nn.init.zeros_(layer.to_out.weight)
        return adapter

    @classmethod
    def load(cls, path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> PuLIDFlux:
        """Load a published file, or one written by `save`.

        Args:
            path: the file.
            dtype: of the weights; they are cast on reading, one at a time.

        Returns:
            The adapter in eval mode.

        Raises:
            WeightsError: The file does not exist, or names are missing or unexpected.
        """
        cls.check_file(path)
        state = cls.read(path, dtype)
        message = f"{path} is no adapter of PuLID for FLUX, or is damaged"
        metadata = AdapterMetadata.read(path, message)
        with metadata.explain():
            with init_empty_weights(include_buffers=False):
                encoder = IDFormer(**metadata.sizes("config"))
            adapter = cls.from_state_dict(state, encoder, **metadata.sizes("layers"))
        adapter.models = metadata.models()
        return adapter

    def layer_sizes(self) -> dict[str, int]:
        """Return the width of a head, and the two intervals."""
        layer = self.layers[0]
        return {
            "dim_head": layer.to_q.out_features // layer.heads,
            "double_interval": self.double_interval,
            "single_interval": self.single_interval,
        }

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Tensor], encoder: IDFormer, dim_head: int = 128, **intervals: int
    ) -> PuLIDFlux:
        """Create an adapter from weights under their published names.

        Args:
            state: name -> tensor; the sizes of the layers are theirs.
            encoder: an `IDFormer`.
            dim_head: width of a head.
            intervals: those of the constructor.

        Raises:
            WeightsError: A name is missing or unexpected, or a shape differs.
        """
        num_layers = len({name.split(".")[1] for name in state if name.startswith("pulid_ca.")})
        layers = nn.ModuleList()
        with init_empty_weights(include_buffers=False):
            # replaces missing tensors here; `load_weights` reports them
            default = PerceiverCrossAttention()
            for k in range(num_layers):
                to_q = state.get(f"pulid_ca.{k}.to_q.weight", default.to_q.weight)
                to_kv = state.get(f"pulid_ca.{k}.to_kv.weight", default.to_kv.weight)
                heads = len(to_q) // dim_head
                layer = PerceiverCrossAttention(
                    to_q.shape[1], dim_head, heads, kv_dim=to_kv.shape[1]
                )
                layers.append(layer)
        return cls(encoder, layers, **intervals).load_weights(state)

    def check(self, target: Any) -> None:
        """Raise an error if the adapter does not fit a pipeline or transformer.

        Raises:
            OptionError: The target has no transformer of a known kind.
            WeightsError: The adapter was trained for another transformer.
        """
        transformer, kind = find_transformer(target)
        fix = "use the adapter for this base model."
        if kind.training is not None:
            fix = f"no adapter for {kind.name} is published: {kind.training}"
        self.check_blocks(self._blocks(transformer), getattr(transformer, kind.width), fix)

    def check_blocks(
        self,
        blocks: Sequence[BlockKey],
        width: int,
        fix: str = "use the adapter for this base model.",
    ) -> None:
        """Raise an error if the adapter does not have one layer per block.

        Args:
            blocks: the transformer's blocks that are followed by identity attention.
            width: of its image tokens.
            fix: what the message advises.

        Raises:
            WeightsError: The adapter was trained for another transformer.
        """
        widths = {layer.to_q.in_features for layer in self.layers}
        if len(blocks) != len(self.layers) or widths != {width}:
            raise WeightsError(
                "this adapter was trained for another transformer: it has "
                f"{len(self.layers)} layers of width {sorted(widths)}, this transformer needs "
                f"{len(blocks)} of width {width}; {fix}"
            )

    def _blocks(self, transformer: Any) -> list[BlockKey]:
        return identity_blocks(
            transformer,
            double_interval=self.double_interval,
            single_interval=self.single_interval,
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
        """Show an identity with the attached pipelines while the context is open.

        Of two calls at the same noise level, the second is taken for that of the negative prompt,
        also if a transformer is called without its pipeline.

        Args:
            people: see `PuLID.use`; masks refer to the generated image.
            scale: weight of the identity; 0 disables it at no cost.
            start: fraction of the schedule at which it begins to act.
            end: fraction of the schedule at which it stops acting; 1 includes the last step.
            start_step: first step in which it acts, instead of `start`: 4 for fidelity in photos,
                0 or 1 for styles.
            timestep_to_start_cfg: first step in which a negative prompt counts, for any scale.
            pipe: one of the attached pipelines; all of them by default.

        Raises:
            OptionError: An argument is out of range, nothing is attached, or another identity is
                in use.
            IdentityError: The identity has other sizes than the encoder reads.
        """
        prompts = normalize_people(people)
        first_identity, _ = prompts[0][0]

        @torch.no_grad()
        def positive() -> Tensor:
            return self.encode_people(prompts)

        @torch.no_grad()
        def negative() -> Tensor:
            return self.unconditional(first_identity.id_cond, first_identity.hidden)[:, None]

        check_scale(scale)
        span = Span(start, end) if start_step is None else Span(0.0, end, start_step)
        masks = stack_masks(prompts)
        with (
            span.watch("the identity") as watched,
            self._open(positive, negative, scale, watched, timestep_to_start_cfg, masks, pipe),
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
        """Use tokens with gradient.

        Args:
            tokens: (B, N, kv_dim), one per image of the batch, or one per group of consecutive
                images.
            scale: see `use`, as the following.
            start_step: see `use`.
            negative: (1, N, kv_dim) for calls of a negative prompt.
            timestep_to_start_cfg: see `use`.
            pipe: see `use`.

        Raises:
            OptionError: See `use`; or there is a negative prompt and `negative` is missing.
        """

        def negative_tokens() -> Tensor:
            if negative is None:
                raise OptionError(
                    "a negative prompt needs negative tokens; "
                    "pass negative=adapter.unconditional(...)."
                )
            return negative[:, None]

        span = Span(start_step=start_step)
        with self._open(
            lambda: tokens[:, None], negative_tokens, scale, span, timestep_to_start_cfg, None, pipe
        ):
            yield self

    @contextmanager
    def _open(
        self,
        positive: Callable[[], Tensor],
        negative: Callable[[], Tensor],
        scale: float,
        span: Span,
        cfg_start_step: int,
        masks: Tensor | None,
        pipe: Any,
    ) -> Iterator[None]:
        """Inject tokens (P, J, N, kv_dim) into each transformer."""
        states = self.select_pipelines(pipe)
        if scale == 0:
            with self.activate(states, lambda state: delay_guidance(state.target, cfg_start_step)):
                yield
            return
        blocks = self._blocks(states[0].network)
        layers = dict(zip(blocks, self.layers, strict=True))
        projected = precompute_projections(layers, positive())

        def inject(state: PipelineState) -> AbstractContextManager[None]:
            identity = FluxIdentity(
                layers, projected, lambda: precompute_projections(layers, negative()), scale, masks
            )
            reader = read_calls(state)
            injection = FluxInjection(identity, reader, span)
            return inject_identity(state.network, self.slot, reader, cfg_start_step, injection)

        with self.activate(states, inject):
            yield


def read_calls(state: PipelineState) -> CallReader:
    """Create a reader of the calls of a pipeline's transformer."""
    _, kind = find_transformer(state.network)
    return CallReader(kind, StepTracker(state))


@contextmanager
def delay_guidance(target: Any, start_step: int) -> Iterator[None]:
    """Disable true guidance before a step, without an identity.

    Args:
        target: a pipeline or transformer of FLUX.1 or a relative.
        start_step: first step with true guidance; with 0 nothing changes.
    """
    if start_step <= 0:
        yield
        return
    state = PipelineState(target)
    with inject_identity(state.network, "guidance", read_calls(state), start_step):
        yield


def precompute_projections(
    layers: Mapping[BlockKey, PerceiverCrossAttention], tokens: Tensor
) -> dict[BlockKey, ProjectedKV]:
    """Compute the keys and values of tokens (P, J, N, kv_dim) for each block, people first."""
    projected = {}
    for key, layer in layers.items():
        q_proj, v_proj = layer.precompute_kv(tokens)
        projected[key] = (q_proj.transpose(0, 1), v_proj.transpose(0, 1))
    return projected
