"""Cost of an identity at inference, at full size with random weights.

One step of the base alone is compared with a step with PuLID, and with a step that computes the
identity's keys and values again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from openpulid.bench.perf.random_models import (
    RandomSDXL,
    default_dtype,
    dtype_of,
    place_flux,
    place_sdxl,
    random_base,
)
from openpulid.bench.perf.timing import interleave, medians, ratios, time_hooks, timed
from openpulid.device import peak_memory, reset_peak_memory
from openpulid.errors import OptionError
from openpulid.methods.pulid import IDFormer, PuLID, PuLIDFlux, cross_attentions, identity_blocks
from openpulid.pipelines.memory_levels import find_level
from openpulid.training.pulid import TextConditioning

NUM_TOKENS = 32
"""Identity tokens of PuLID v1.1 and of PuLID for FLUX."""


@dataclass(frozen=True)
class Step:
    """Cost of one call of the network.

    Attributes:
        name: the candidate.
        seconds: median of the rounds.
        ratio: to the base's seconds, median of the ratios of the rounds.
        memory: peak GiB, or None.
        within: whole step / (whole step without the identity's own work), or None. Both times are
            from the same call, so a machine that is slow for a while does not change it. The
            effect of the identity's work on the caches of the rest is not included.
    """

    name: str
    seconds: float
    ratio: float
    memory: float | None
    within: float | None = None


class SpeedTarget(Protocol):
    """A base model and an adapter on it.

    Attributes:
        device: where it runs.
        two_passes: the guided step in two calls of the network; None without guidance.
    """

    device: torch.device
    two_passes: TwoPasses | None

    def step(self) -> Tensor:
        """Call the network once."""

    def use_identity(self) -> AbstractContextManager[Any]:
        """Open a context in which an identity is in use."""

    def time_identity(self) -> AbstractContextManager[list[float]]:
        """Open a context that measures the seconds of the identity's own work."""


class TwoPasses(Protocol):
    """A guided step in two calls of half the batch."""

    def step(self) -> object:
        """Call the network for each half of the batch."""

    def use_identity(self) -> AbstractContextManager[Any]:
        """Open a context in which both calls show an identity."""

    def step_recomputed(self) -> object:
        """Call it with an identity whose keys and values each call computes again."""


class SDXLTarget:
    """SDXL's U-Net with PuLID v1.1: 32 tokens, 20 zero tokens, ortho_v2.

    Args:
        base: the base model.
        pixels: width and height of the image.
        batch: number of images.
        guided: double the batch for classifier-free guidance.
        level: one of `memory_levels.SDXL_LEVELS`; below "full", the base is on the CPU.
        compiled: compile identity attention now, see `PuLID.use`.
        device: where it runs; that of the base by default.
    """

    def __init__(
        self,
        base: RandomSDXL,
        pixels: int = 1024,
        batch: int = 1,
        guided: bool = False,
        level: str = "full",
        compiled: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self.base = base
        self.device = device or base.device
        self.guided = guided
        self.compiled = compiled
        like: dict[str, Any] = {"device": base.device, "dtype": base.unet.dtype}
        width = base.unet.config.cross_attention_dim
        with base.device:
            adapter = PuLID.for_unet(base.unet, _tiny_encoder(width))
        self.adapter = adapter.to(**like).requires_grad_(False)
        for layer in self.adapter.id_adapter_attn_layers.values():
            nn.init.normal_(layer.id_to_v.weight, std=0.02)  # type: ignore[union-attr,arg-type]
        self.adapter.attach(base.pipe)
        rows = batch * (1 + guided)
        self.text = base.encode_text(["portrait"] * batch, pixels=pixels, guided=guided)
        self.x = torch.randn(rows, *base.latent_shape(pixels), **like)
        self.t = torch.full((rows,), 500, device=base.device)
        self.tokens = torch.randn(1, NUM_TOKENS, width, **like)
        self.unconditional = torch.randn(1, NUM_TOKENS, width, **like)
        self.two_passes: TwoPasses | None = SDXLTwoPasses(self) if guided else None
        if level != "full":
            self._place(level)
        if compiled:
            with torch.inference_mode(), self.use_identity():
                self.step()

    def _place(self, level: str) -> None:
        """Keep the U-Net as a memory level says, and its inputs on the device."""
        self.pipe = place_sdxl(self.base, level, self.device)
        if not find_level("sdxl", level).faces_on_cpu:
            self.adapter.to(self.device)
            self.tokens = self.tokens.to(self.device)
            self.unconditional = self.unconditional.to(self.device)
        self.x, self.t = self.x.to(self.device), self.t.to(self.device)
        embeds, pooled = self.text.embeds.to(self.device), self.text.pooled.to(self.device)
        ids = None if self.text.time_ids is None else self.text.time_ids.to(self.device)
        self.text = TextConditioning(embeds, pooled, ids)

    def step(self) -> Tensor:
        """Call the U-Net once."""
        return self.base.predict(self.x, self.t, self.text)

    def use_identity(self) -> AbstractContextManager[Any]:
        """Open a context in which an identity is in use."""
        return self.adapter.use_tokens(
            self.tokens,
            0.8,
            num_zero=20,
            negative=self.unconditional,
            guided=self.guided,
            compiled=self.compiled,
        )

    def time_identity(self) -> AbstractContextManager[list[float]]:
        """Open a context that measures the seconds of identity attention."""
        # the adapter adds the identity in a pre-hook of each output projection
        projections = [layer.to_out[0] for layer in cross_attentions(self.base.unet).values()]
        return time_hooks(projections, self.device, pre=True)

    def blocks(self) -> Iterable[nn.Module]:
        """Return what is compiled of the repeated blocks: all but the cross-attention.

        The identity acts inside of it: compiled, each block would be a graph of its own, and
        PyTorch keeps 8.
        """
        for module in self.base.unet.modules():
            if isinstance(module, BasicTransformerBlock):
                yield from (module.attn1, module.ff)


class SDXLTwoPasses:
    """`TwoPasses` of SDXL.

    Args:
        target: a guided one.
    """

    def __init__(self, target: SDXLTarget) -> None:
        self.target = target

    def step(self) -> None:
        """Call the U-Net for the conditional half, then for the unconditional one."""
        for rows in self._halves():
            self._predict(rows)

    def use_identity(self) -> AbstractContextManager[Any]:
        """Open a context in which both halves show the identity: none takes as long as one."""
        target = self.target
        return target.adapter.use_tokens(
            target.tokens, 0.8, num_zero=20, compiled=target.compiled, guided=False
        )

    def step_recomputed(self) -> None:
        """Do what PuLID's original code does."""
        target = self.target
        tokens = (target.tokens, target.unconditional)
        for rows, identity in zip(self._halves(), tokens, strict=True):
            with target.adapter.use_tokens(identity, 0.8, num_zero=20):
                self._predict(rows)

    def _halves(self) -> tuple[slice, slice]:
        half = len(self.target.x) // 2
        return slice(half, None), slice(half)

    def _predict(self, rows: slice) -> None:
        target = self.target
        ids = None if target.text.time_ids is None else target.text.time_ids[rows]
        text = TextConditioning(target.text.embeds[rows], target.text.pooled[rows], ids)
        target.base.predict(target.x[rows], target.t[rows], text)


class FluxTarget:
    """FLUX.1's transformer at full width with PuLID after every 2nd double and 4th single block.

    Args:
        device: where it runs.
        dtype: of weights and activations.
        pixels: width and height of the image.
        batch: number of images.
        depth: share of the 19 double and 38 single blocks that is built.
        text_tokens: length of the prompt.
        level: one of `memory_levels.FLUX_LEVELS`. The peak memory is that of the steps: "full" also
            keeps text encoders and autoencoder on the device, which are not built here.
        sizes: options of the transformer that replace FLUX's.
    """

    two_passes: TwoPasses | None = None  # FLUX always guides in two calls

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        pixels: int = 1024,
        batch: int = 1,
        depth: float = 1.0,
        text_tokens: int = 128,
        level: str = "full",
        **sizes: Any,
    ) -> None:
        self.device = device
        options = {
            "num_layers": max(1, round(19 * depth)),
            "num_single_layers": max(1, round(38 * depth)),
            "guidance_embeds": True,
            **sizes,
        }
        with default_dtype(dtype), device if level == "full" else torch.device("cpu"):
            self.transformer = FluxTransformer2DModel(**options)
            adapter = PuLIDFlux.for_transformer(self.transformer, _tiny_encoder(2048))
        self.adapter = adapter.to(device).requires_grad_(False)
        self.transformer.eval().requires_grad_(False)
        self.pipe = None if level == "full" else place_flux(self.transformer, level, device)
        self.adapter.attach(self.transformer)
        for layer in self.adapter.layers:
            nn.init.normal_(layer.to_out.weight, std=0.02)
        config = self.transformer.config
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        side = pixels // 16
        grid = torch.meshgrid(torch.zeros(1), *[torch.arange(float(side))] * 2, indexing="ij")
        self.call: dict[str, Any] = {
            "hidden_states": torch.randn(batch, side * side, config.in_channels, **like),
            "encoder_hidden_states": torch.randn(
                batch, text_tokens, config.joint_attention_dim, **like
            ),
            "pooled_projections": torch.randn(batch, config.pooled_projection_dim, **like),
            "img_ids": torch.stack(grid, -1).reshape(-1, 3).to(device),
            "txt_ids": torch.zeros(text_tokens, 3, device=device),
            "guidance": torch.full((batch,), 4.0, device=device),
        }
        self.timesteps = [torch.full((batch,), time, **like) for time in (0.6, 0.5)]
        self.tokens = torch.randn(1, NUM_TOKENS, 2048, **like)

    def step(self) -> Tensor:
        """Call the transformer once, at another timestep than the last call.

        A second call at the same timestep would be that of the negative prompt.
        """
        self.timesteps.reverse()
        return self.predict()

    def predict(self) -> Tensor:
        """Call the transformer at the timestep of the last step."""
        return self.transformer(**self.call, timestep=self.timesteps[0], return_dict=False)[0]

    def use_identity(self) -> AbstractContextManager[Any]:
        """Open a context in which an identity is in use."""
        return self.adapter.use_tokens(self.tokens)

    def time_identity(self) -> AbstractContextManager[list[float]]:
        """Open a context that measures the seconds of identity attention."""
        blocks = {
            "double": self.transformer.transformer_blocks,
            "single": self.transformer.single_transformer_blocks,
        }
        # the adapter adds the identity in a forward hook of each of these blocks
        hooked = [blocks[kind][index] for kind, index in identity_blocks(self.transformer)]
        return time_hooks(hooked, self.device)

    def blocks(self) -> Iterable[nn.Module]:
        """Return the repeated blocks; the identity is added between them."""
        yield from self.transformer.transformer_blocks
        yield from self.transformer.single_transformer_blocks


@contextmanager
def compile_blocks(target: SDXLTarget | FluxTarget, backend: str = "inductor") -> Iterator[None]:
    """Compile the repeated blocks of a base while the context is open.

    They are compiled in the first round, which is not counted.

    Args:
        target: names its `blocks`.
        backend: of `torch.compile`.
    """
    blocks = list(target.blocks())
    for block in blocks:
        block.compile(backend=backend, dynamic=False)
    try:
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None
        torch.compiler.reset()


def speed_target(
    name: str,
    device: torch.device,
    pixels: int = 1024,
    batch: int = 1,
    guided: bool = False,
    depth: float = 1.0,
    level: str = "full",
    compiled: bool = False,
) -> SDXLTarget | FluxTarget:
    """Build "mini", "sdxl" or "flux" at full size with random weights.

    Args:
        name: the base model.
        device: where it runs.
        pixels: width and height of the image.
        batch: number of images.
        guided: use classifier-free guidance; SDXL and the miniature only.
        depth: share of FLUX's blocks.
        level: memory level; SDXL and FLUX only.
        compiled: compile identity attention; SDXL and the miniature only.

    Raises:
        OptionError: an unknown name, or an option that the base does not have.
    """
    dtype = dtype_of(name, device)
    if name == "flux":
        find_level("flux", level)
        if guided:
            raise OptionError(
                "--guided is not available for flux, which calls the network separately for a "
                "negative prompt."
            )
        if compiled:
            raise OptionError("--compile is only available for sdxl and mini.")
        return FluxTarget(device, dtype, pixels, batch, depth, level=level)
    if depth != 1:
        raise OptionError("--depth-scale is only available for flux.")
    if level != "full":
        if name != "sdxl":
            raise OptionError("--memory is only available for sdxl and flux.")
        find_level("sdxl", level)
    kept = device if level == "full" else torch.device("cpu")
    base = random_base(name, kept, dtype)
    return SDXLTarget(base, pixels, batch, guided, level, compiled, device)


@torch.inference_mode()
def measure(
    target: SpeedTarget,
    rounds: int = 5,
    on_progress: Callable[[int, int], None] | None = None,
    primed: bool = False,
) -> list[Step]:
    """Measure base, pulid and recomputed, interleaved; with guidance also all three in two passes.

    Args:
        target: what is measured.
        rounds: number of rounds.
        on_progress: called after each run with the number of runs done and in total.
        primed: measure pulid's second step with an identity. The first one expands keys and values
            for the following steps: negligible on a CPU, hundreds of small kernels on a GPU.
    """
    device = target.device
    peaks: dict[str, float | None] = {}
    within: list[float] = []

    def with_peak(name: str, run: Callable[[], float]) -> Callable[[], float]:
        def run_with_peak() -> float:
            reset_peak_memory(device)
            seconds = run()
            peaks[name] = peak_memory(device)
            return seconds

        return run_with_peak

    def run_pulid() -> float:
        with target.use_identity():
            if primed:
                target.step()
            # an accelerator's events take time themselves, so the timed step has none of them
            untimed = None if device.type == "cpu" else timed(target.step, device)
            with target.time_identity() as identity_seconds:
                seconds = timed(target.step, device)
        within.append(seconds / (seconds - sum(identity_seconds)))
        return seconds if untimed is None else untimed

    def run_recomputed() -> float:
        def step() -> None:
            with target.use_identity():
                target.step()

        return timed(step, device)

    candidates: dict[str, Callable[[], float]] = {
        "base": lambda: timed(target.step, device),
        "pulid": run_pulid,
        "recomputed": run_recomputed,
    }
    if (passes := target.two_passes) is not None:

        def run_two_passes() -> float:
            with passes.use_identity():
                if primed:
                    passes.step()
                return timed(passes.step, device)

        candidates["base, two passes"] = lambda: timed(passes.step, device)
        candidates["pulid, two passes"] = run_two_passes
        candidates["recomputed, two passes"] = lambda: timed(passes.step_recomputed, device)
    seconds = interleave(
        {name: with_peak(name, run) for name, run in candidates.items()}, rounds, on_progress
    )
    times = medians(seconds)
    ratio = ratios(seconds)
    within_median = round(median(within[1:]), 4)
    return [
        Step(
            name,
            round(times[name], 5),
            round(ratio[name], 4),
            peaks[name],
            within_median if name == "pulid" else None,
        )
        for name in candidates
    ]


def _tiny_encoder(width: int) -> IDFormer:
    """Build an encoder of negligible size: it has finished before the first step."""
    return IDFormer(
        dim=64,
        depth=5,
        heads=1,
        num_queries=NUM_TOKENS,
        output_dim=width,
        width=16,
        vit_dim=16,
        hidden_dim=16,
    )
