"""Cost of extracting an identity from a photo, by stage, at full size with random weights.

The reference implementation detects the face twice, with SCRFD and with RetinaFace at 1024 pixels,
runs its vision encoder in float32, and runs all heads of its parser, with channels first.
antelopev2's detector and face recognition model cannot be built with random weights. facexlib's
RetinaFace at 320 pixels (13 GFLOP, a tenth of its work at 1024 and as much as SCRFD-10GF at 640)
and its 100-layer ArcFace replace them in both columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from openpulid.bench.perf.timing import interleave, medians, timed
from openpulid.device import training_dtype
from openpulid.faces.bisenet import FaceParser, MainHead
from openpulid.identity.eva_clip import VisionEncoder
from openpulid.methods.pulid import IDFormer


@dataclass(frozen=True)
class Stage:
    """Median time of one stage.

    Attributes:
        name: the stage.
        seconds: seconds per photo; None if the stage does not exist here.
        reference: seconds per photo as the reference implementation does it.
    """

    name: str
    seconds: float | None
    reference: float | None


@torch.inference_mode()
def measure(
    device: torch.device,
    rounds: int = 5,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Stage]:
    """Measure every stage, interleaved in one process; the last row is the total."""
    seconds = medians(
        interleave(
            {name: partial(timed, run, device) for name, run in build_stages(device).items()},
            rounds,
            on_progress,
        )
    )
    stages = [
        Stage(name, seconds[name], seconds.get(f"{name}, reference", seconds[name]))
        for name in ("detection", "recognition", "parsing", "vision encoder", "identity encoder")
    ]
    stages.append(Stage("second detection", None, seconds["second detection"]))
    total = sum(stage.seconds or 0 for stage in stages)
    reference_total = sum(stage.reference or 0 for stage in stages)
    return [*stages, Stage("total", total, reference_total)]


def build_stages(device: torch.device) -> dict[str, Callable[[], Any]]:
    """Build the networks; map the name of each stage to a function that runs it once."""
    from facexlib.detection.retinaface import RetinaFace
    from facexlib.parsing.bisenet import BiSeNet
    from facexlib.recognition.arcface_arch import Backbone

    torch.manual_seed(0)
    detector = _prepare(RetinaFace(network_name="resnet50", device=device), device)
    recognition = _prepare(Backbone(num_layers=100, drop_ratio=0.6, mode="ir"), device)
    parser = FaceParser(_prepare(MainHead(BiSeNet(num_class=19)), device))
    reference_parser = _prepare(BiSeNet(num_class=19), device)

    def random_image(size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.rand(1, 3, size, size, device=device).to(dtype)

    def encode_image(dtype: torch.dtype) -> Callable[[], Any]:
        network = _prepare(VisionEncoder(), device, dtype)
        return lambda: network(random_image(336, dtype))

    def encode_identity(dtype: torch.dtype) -> Callable[[], Any]:
        network = _prepare(IDFormer(), device, dtype)
        embedding = torch.randn(1, 1280, device=device).to(dtype)
        features = [torch.randn(1, 577, 1024, device=device).to(dtype) for _ in range(5)]
        return lambda: network(embedding, features)

    dtype = training_dtype(device)
    return {
        "detection": lambda: detector(random_image(320)),
        "second detection": lambda: detector(random_image(1024)),
        "recognition": lambda: recognition(random_image(112)),
        "parsing": lambda: parser(random_image(512)),
        "parsing, reference": lambda: reference_parser(random_image(512)),
        "vision encoder": encode_image(dtype),
        "vision encoder, reference": encode_image(torch.float32),
        "identity encoder": encode_identity(dtype),
        "identity encoder, reference": encode_identity(torch.float32),
    }


def _prepare(
    module: nn.Module, device: torch.device, dtype: torch.dtype = torch.float32
) -> nn.Module:
    return module.to(device, dtype).eval()
