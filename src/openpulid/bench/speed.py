"""What an identity costs at inference, with random weights of full size: a step of the base alone, with PuLID as built
here, and with keys and values computed afresh in every step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from openpulid.bench.training import RandomSDXL
from openpulid.bench.turns import by_turns, peak, reset_peak, timed
from openpulid.methods.pulid.adapter import PuLID
from openpulid.methods.pulid.encoders import IDFormer
from openpulid.methods.pulid.projection import Projection


@dataclass(frozen=True)
class Step:
    """Median seconds of one call of the U-Net, the ratio to the base's, peak memory in GiB."""

    name: str
    seconds: float
    ratio: float
    memory: float | None


def random_adapter(base: RandomSDXL, tokens: int = 32) -> PuLID:
    """v1.1's identity layers for the base, and an encoder too small to count: its work is done before the first step."""
    width = base.unet.config.cross_attention_dim
    former = IDFormer(dim=64, depth=5, heads=1, num_queries=tokens, output_dim=width, width=16, vit_dim=16, hidden_dim=16)
    adapter = PuLID.for_unet(base.unet, former).to(base.device, base.unet.dtype)
    for layer in adapter.id_adapter_attn_layers.values():
        torch.nn.init.normal_(layer.id_to_v.weight, std=0.02)  # type: ignore[union-attr,arg-type]
    adapter.attach(base.pipe)
    return adapter.requires_grad_(False)


@torch.inference_mode()
def measure(
    base: RandomSDXL,
    adapter: PuLID,
    pixels: int = 1024,
    batch: int = 1,
    guided: bool = False,
    num_zero: int = 20,
    projection: Projection = "ortho_v2",
    rounds: int = 5,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Step]:
    """base, pulid and afresh by turns.

    Args:
        guided: whether the batch is doubled for guidance.
    """
    rows = batch * (1 + guided)
    text = base.encode_text(["portrait"] * batch, pixels=pixels, guided=guided)
    x = torch.randn(rows, *base.shape(pixels), device=base.device, dtype=base.unet.dtype)
    t = torch.full((rows,), 500, device=base.device)
    tokens, nobody = (_tokens(adapter, base) for _ in range(2))
    memory: dict[str, float | None] = {}

    def step() -> Tensor:
        return base.predict(x, t, text)

    def opened() -> object:
        options = {"scale": 0.8, "num_zero": num_zero, "negative": nobody, "guided": guided, "projection": projection}
        return adapter.use_tokens(tokens, **options)  # type: ignore[arg-type]

    def noted(name: str, run: Callable[[], float]) -> Callable[[], float]:
        def once() -> float:
            reset_peak(base.device)
            seconds = run()
            memory[name] = peak(base.device)
            return seconds

        return once

    def pulid() -> float:
        with opened():  # type: ignore[attr-defined]
            return timed(step, base.device)

    def afresh() -> float:
        def whole() -> None:
            with opened():  # type: ignore[attr-defined]
                step()

        return timed(whole, base.device)

    runs = {"base": lambda: timed(step, base.device), "pulid": pulid, "afresh": afresh}
    medians = by_turns({name: noted(name, run) for name, run in runs.items()}, rounds, on_progress)
    first = medians["base"]
    return [Step(name, round(s, 4), round(s / first, 4), memory[name]) for name, s in medians.items()]


def _tokens(adapter: PuLID, base: RandomSDXL) -> Tensor:
    config = adapter.id_adapter.config
    return torch.randn(1, config["num_queries"], config["output_dim"], device=base.device, dtype=base.unet.dtype)
