"""What knowing a person costs, with random weights of full size: seconds per photo by stage, as built here and as the
reference does it.

The reference looks for the face twice, with SCRFD and with RetinaFace at 1024 pixels, and keeps its tower in float32. Neither
antelopev2's detector nor its recogniser can be had with random weights: facexlib's RetinaFace at 320 pixels (a tenth of its
work at 1024, 13 GFLOP, as much as SCRFD-10GF takes at 640) and its 100-layer ArcFace stand in for them, in both columns alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from openpulid.bench.perf.timing import interleave, medians, timed
from openpulid.device import compute_dtype
from openpulid.identity.eva_clip import VisionEncoder
from openpulid.methods.pulid.encoders import IDFormer


@dataclass(frozen=True)
class Stage:
    """Median seconds per photo of one stage; None where a column does not have it."""

    name: str
    here: float | None
    reference: float | None


@torch.inference_mode()
def measure(
    device: torch.device,
    rounds: int = 5,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Stage]:
    """Every stage by turns in one process; the last line is the sum."""
    from facexlib.detection.retinaface import RetinaFace
    from facexlib.parsing.bisenet import BiSeNet
    from facexlib.recognition.arcface_arch import Backbone

    torch.manual_seed(0)
    quick = compute_dtype(device)
    finder = _on(RetinaFace(network_name="resnet50", device=device), device)
    arcface = _on(Backbone(num_layers=100, drop_ratio=0.6, mode="ir"), device)
    parser = _on(BiSeNet(num_class=19), device)
    tower, former = _on(VisionEncoder(), device), _on(IDFormer(), device)
    towers = {
        torch.float32: (tower, former),
        quick: (_on(VisionEncoder(), device, quick), _on(IDFormer(), device, quick)),
    }

    def picture(size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.rand(1, 3, size, size, device=device).to(dtype)

    def look(dtype: torch.dtype) -> Callable[[], Any]:
        return lambda: towers[dtype][0](picture(336, dtype))

    def encode(dtype: torch.dtype) -> Callable[[], Any]:
        features = [torch.randn(1, 577, 1024, device=device).to(dtype) for _ in range(5)]
        return lambda: towers[dtype][1](torch.randn(1, 1280, device=device).to(dtype), features)

    work: dict[str, Callable[[], Any]] = {
        "detect": lambda: finder(picture(320)),
        "detect again": lambda: finder(picture(1024)),
        "recognise": lambda: arcface(picture(112)),
        "parse": lambda: parser(picture(512)),
        "tower": look(quick),
        "tower, float32": look(torch.float32),
        "encode": encode(quick),
        "encode, float32": encode(torch.float32),
    }
    found = medians(
        interleave(
            {name: partial(timed, stage, device) for name, stage in work.items()},
            rounds,
            on_progress,
        )
    )
    pairs = {
        name: (found[name], found.get(f"{name}, float32", found[name]))
        for name in ("detect", "recognise", "parse")
    }
    stages = [Stage(name, *pair) for name, pair in pairs.items()]
    stages.append(Stage("detect again", None, found["detect again"]))
    stages += [Stage(name, found[name], found[f"{name}, float32"]) for name in ("tower", "encode")]
    return [
        *stages,
        Stage("sum", sum(s.here or 0 for s in stages), sum(s.reference or 0 for s in stages)),
    ]


def _on(module: nn.Module, device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
    return module.to(device, dtype).eval()
