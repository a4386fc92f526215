"""What an identity costs at inference, with random weights of full size: a step of the base alone, with PuLID as built
here, and with keys and values computed afresh in every step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from openpulid.bench.perf.timing import (
    interleave,
    medians,
    peak,
    ratios,
    reset_peak,
    seconds_in,
    timed,
)
from openpulid.bench.perf.training import RandomSDXL, default_dtype, dtype_of, random_base
from openpulid.errors import OptionError
from openpulid.methods.pulid.encoders import IDFormer
from openpulid.methods.pulid.flux import PuLIDFlux
from openpulid.methods.pulid.flux_attention import FluxInjection
from openpulid.methods.pulid.sdxl import PuLID
from openpulid.methods.pulid.sdxl_attention import IdentityAttention
from openpulid.pipelines import flux_memory as memory
from openpulid.training.pulid.models import TextConditioning

TOKENS = 32
"""Of an identity: v1.1's and FLUX's."""


@dataclass(frozen=True)
class Step:
    """One call of the network.

    Attributes:
        seconds: median of the rounds; ratio: to the base's, median of the rounds' own.
        memory: peak, GiB.
        within: the whole step to what is left of it without the seconds in which the identity joins, on a processor: both from
            the same call, so that a machine that is slower for a while does not move it. What joining does to the caches of the
            rest is not in it.
    """

    name: str
    seconds: float
    ratio: float
    memory: float | None
    within: float | None = None


class SpeedTarget(Protocol):
    """A base and an adapter on it.

    Attributes:
        joins: the class and its method in which the identity joins.
        apart: a guided step in two calls, as PuLID's original code makes it; None without guidance.
    """

    device: torch.device
    joins: tuple[type, str]
    apart: Callable[[], object] | None

    def step(self) -> Tensor:
        """One call of the network."""

    def opened(self) -> AbstractContextManager[Any]:
        """An identity in use."""


class SDXLTarget:
    """SDXL's U-Net with v1.1's identity layers, 32 tokens, 20 zeros, ortho v2.

    Args:
        guided: whether the batch is doubled for guidance.
    """

    joins: tuple[type, str] = (IdentityAttention, "joined")

    def __init__(
        self, base: RandomSDXL, pixels: int = 1024, batch: int = 1, guided: bool = False
    ) -> None:
        self.base, self.device, self.guided = base, base.device, guided
        like: dict[str, Any] = {"device": base.device, "dtype": base.unet.dtype}
        width, rows = base.unet.config.cross_attention_dim, batch * (1 + guided)
        self.adapter = (
            PuLID.for_unet(base.unet, _small_former(width)).to(**like).requires_grad_(False)
        )
        for layer in self.adapter.id_adapter_attn_layers.values():
            nn.init.normal_(layer.id_to_v.weight, std=0.02)  # type: ignore[union-attr,arg-type]
        self.adapter.attach(base.pipe)
        self.text = base.encode_text(["portrait"] * batch, pixels=pixels, guided=guided)
        self.x, self.t = (
            torch.randn(rows, *base.shape(pixels), **like),
            torch.full((rows,), 500, device=base.device),
        )
        self.tokens, self.nobody = (torch.randn(1, TOKENS, width, **like) for _ in range(2))
        self.apart: Callable[[], object] | None = self._apart if guided else None

    def step(self) -> Tensor:
        return self.base.predict(self.x, self.t, self.text)

    def opened(self) -> AbstractContextManager[Any]:
        return self.adapter.use_tokens(
            self.tokens, 0.8, num_zero=20, negative=self.nobody, guided=self.guided
        )

    def _apart(self) -> None:
        half = len(self.x) // 2
        for rows, tokens in ((slice(half, None), self.tokens), (slice(half), self.nobody)):
            ids = None if self.text.time_ids is None else self.text.time_ids[rows]
            with self.adapter.use_tokens(tokens, 0.8, num_zero=20):
                self.base.predict(
                    self.x[rows],
                    self.t[rows],
                    TextConditioning(self.text.embeds[rows], self.text.pooled[rows], ids),
                )


class FluxTarget:
    """FLUX.1's transformer at full width with the identity after every 2nd double and every 4th single block.

    Args:
        depth: share of the 19 double and 38 single blocks that there are.
        text_tokens: length of the prompt.
        level: of `memory.LEVELS`. The peak is that of the steps; "full" has text encoders and autoencoder beside it, which are
            not here.
    """

    joins: tuple[type, str] = (FluxInjection, "_with_identity")
    apart: Callable[[], object] | None = None  # it always makes two calls

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
        blocks = {
            "num_layers": max(1, round(19 * depth)),
            "num_single_layers": max(1, round(38 * depth)),
        }
        with default_dtype(dtype), device if level == "full" else torch.device("cpu"):
            self.transformer = FluxTransformer2DModel(
                **{**blocks, "guidance_embeds": True, **sizes}
            )
            self.adapter = PuLIDFlux.for_transformer(self.transformer, _small_former(2048)).to(
                device
            )
        self.transformer.eval().requires_grad_(False)
        self.pipe = None if level == "full" else _placed(self.transformer, level, device)
        self.adapter.requires_grad_(False).attach(self.transformer)
        for layer in self.adapter._layers():
            nn.init.normal_(layer.to_out.weight, std=0.02)
        self.device, side, config = device, pixels // 16, self.transformer.config
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        grid = torch.meshgrid(torch.zeros(1), *[torch.arange(float(side))] * 2, indexing="ij")
        self.call = {
            "hidden_states": torch.randn(batch, side * side, config.in_channels, **like),
            "encoder_hidden_states": torch.randn(
                batch, text_tokens, config.joint_attention_dim, **like
            ),
            "pooled_projections": torch.randn(batch, config.pooled_projection_dim, **like),
            "timestep": torch.full((batch,), 0.5, **like),
            "img_ids": torch.stack(grid, -1).reshape(-1, 3).to(device),
            "txt_ids": torch.zeros(text_tokens, 3, device=device),
            "guidance": torch.full((batch,), 4.0, device=device),
        }
        self.tokens = torch.randn(1, TOKENS, 2048, **like)

    def step(self) -> Tensor:
        return self.transformer(**self.call, return_dict=False)[0]

    def opened(self) -> AbstractContextManager[Any]:
        return self.adapter.use_tokens(self.tokens)


def speed_target(
    name: str,
    device: torch.device,
    pixels: int = 1024,
    batch: int = 1,
    guided: bool = False,
    depth: float = 1.0,
    level: str = "full",
) -> SpeedTarget:
    """ "mini", "sdxl" or "flux" at full size with random weights.

    Raises:
        OptionError: another name, or an option that it does not have.
    """
    memory.find_level(level)
    if name == "flux":
        if guided:
            raise OptionError(
                "FLUX takes a negative prompt in calls of its own; measure it without --guided."
            )
        return FluxTarget(device, dtype_of(name, device), pixels, batch, depth, level=level)
    if depth != 1 or level != "full":
        raise OptionError("only FLUX can be measured with fewer blocks or at another memory level.")
    base = random_base(name, device, dtype_of(name, device))
    return SDXLTarget(base, pixels, batch, guided)


@torch.inference_mode()
def measure(
    it: SpeedTarget, rounds: int = 5, on_progress: Callable[[int, int], None] | None = None
) -> list[Step]:
    """base, pulid and afresh by turns; with guidance also pulid in two passes."""
    peaks: dict[str, float | None] = {}
    within: list[float] = []

    def noted(name: str, run: Callable[[], float]) -> Callable[[], float]:
        def once() -> float:
            reset_peak(it.device)
            seconds = run()
            peaks[name] = peak(it.device)
            return seconds

        return once

    def pulid() -> float:
        with it.opened(), seconds_in(*it.joins) as joining:
            whole = timed(it.step, it.device)
        within.append(whole / (whole - sum(joining)))
        return whole

    def afresh() -> float:
        def whole() -> None:
            with it.opened():
                it.step()

        return timed(whole, it.device)

    runs: dict[str, Callable[[], float]] = {
        "base": lambda: timed(it.step, it.device),
        "pulid": pulid,
        "afresh": afresh,
    }
    if (apart := it.apart) is not None:
        runs["two passes"] = lambda: timed(apart, it.device)
    seconds = interleave(
        {name: noted(name, run) for name, run in runs.items()}, rounds, on_progress
    )
    times, ratio = medians(seconds), ratios(seconds)
    inner = {"pulid": round(median(within[1:]), 4)} if it.device.type == "cpu" else {}
    return [
        Step(name, round(times[name], 4), round(ratio[name], 4), peaks[name], inner.get(name))
        for name in runs
    ]


def _placed(transformer: FluxTransformer2DModel, level: str, device: torch.device) -> FluxPipeline:
    """A pipeline around it by a level of memory; its other parts are too small to count."""
    clip = CLIPTextConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    t5 = T5Config(vocab_size=8, d_model=8, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4)
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = FluxPipeline(
        scheduler, vae, CLIPTextModel(clip), None, T5EncoderModel(t5), None, transformer
    )
    memory.place_pipeline(pipe, level, device)
    return pipe


def _small_former(width: int) -> IDFormer:
    """An encoder too small to count: its work is done before the first step."""
    return IDFormer(
        dim=64,
        depth=5,
        heads=1,
        num_queries=TOKENS,
        output_dim=width,
        width=16,
        vit_dim=16,
        hidden_dim=16,
    )
