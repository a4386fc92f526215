"""Try in a process of its own what may break a process: capturing steps as CUDA graphs, and compiling the U-Net.

The probe runs while the main process renders. What works, and how fast, is in a JSON file; what it has compiled
is in the compiler's cache on disk.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from openpulid.mini.accelerated import autoencoder, unet
from openpulid.mini.accelerated.scenes import draw_people, draw_scenes
from openpulid.mini.accelerated.steps import DeviceMuon, RepeatedStep
from openpulid.mini.accelerated.world import World
from openpulid.mini.models.pipeline import build_unet
from openpulid.mini.train.distill import STUDENT_TIMESTEPS

REPEATS = 40
CHANNELS, SIZE, LENGTH = 20, 12, 48


PARTS = ("autoencoder", "base")
MODULE = "openpulid.mini.accelerated.probe"


class Probe:
    """The probe's processes, one per part, as the main process sees them.

    Args:
        folder: of their status and output; None starts nothing, and nothing works.
        widths: of the text's embeddings and pooled embedding; batches: of the two parts.
    """

    def __init__(
        self,
        folder: Path | None,
        device: torch.device,
        widths: tuple[int, int] = (0, 0),
        batches: tuple[int, int] = (0, 0),
    ) -> None:
        self.files: list[Path] = []
        self.processes: list[Any] = []
        if folder is None:
            return
        for part, batch in zip(PARTS, batches, strict=True):
            self.files.append(folder / f"probe-{part}.json")
            numbers = [str(number) for number in (batch, *widths)]
            command = [
                sys.executable,
                "-m",
                MODULE,
                part,
                str(self.files[-1]),
                str(device),
                *numbers,
            ]
            with (folder / f"probe-{part}.log").open("w") as log:
                process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            self.processes.append(process)

    @property
    def status(self) -> dict[str, Any]:
        """What is known by now."""
        found: dict[str, Any] = {}
        for file in self.files:
            if file.exists():
                found |= json.loads(file.read_text())
        return found

    def works(self, name: str) -> bool:
        """Whether something was tried and worked."""
        return bool(self.status.get(name, {}).get("works"))

    def pays(self, one: str, two: str) -> bool:
        """Whether the first works and is not clearly slower than the second."""
        speeds = [self.status.get(name, {}).get("steps_per_second", 0.0) for name in (one, two)]
        return bool(self.works(one) and speeds[0] > 0.8 * speeds[1])  # both shared the device

    def wait(self, seconds: float) -> None:
        """Wait for the processes' end, for so many seconds at most."""
        end = time.monotonic() + seconds
        for process in self.processes:
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                continue

    def stop(self) -> None:
        """End the processes."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()


def main(
    part: str, status_file: Path, device: torch.device, batch: int, widths: tuple[int, int]
) -> None:
    """Try a part's steps in order, until one fails."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    found: dict[str, Any] = {}

    def attempt(name: str, make: Callable[[], RepeatedStep | None]) -> bool:
        begin = time.monotonic()
        try:
            step = make()
            result: dict[str, Any] = {"works": True, "ready": round(time.monotonic() - begin, 1)}
            if step is not None:
                result["steps_per_second"] = round(speed(step), 2)
        except Exception as error:
            result = {"works": False, "error": f"{type(error).__name__}: {str(error)[:1500]}"}
        found[name] = result
        unfinished = status_file.with_suffix(".part")
        unfinished.write_text(json.dumps(found))
        os.replace(unfinished, status_file)
        print(name, result, flush=True)
        return bool(result["works"])

    if part == "autoencoder":
        attempt("autoencoder", lambda: try_autoencoder(device, batch))
        return
    data = random_data(device, *widths)
    model = build_unet(CHANNELS, widths[0], widths[1], unet.WIDTHS, size=SIZE)
    model = model.to(device, memory_format=torch.channels_last).train()
    network = torch.compile(model, dynamic=False)
    optimizer = DeviceMuon(model.parameters())

    def compiled() -> RepeatedStep:
        step = unet.base_step(network, optimizer, data, batch)
        step()
        return RepeatedStep(step, True)

    def student() -> RepeatedStep:
        rollouts = unet.Rollouts(
            torch.randn(8, STUDENT_TIMESTEPS + 1, CHANNELS, SIZE, SIZE, device=device).half(),
            torch.arange(8, device=device),
            torch.zeros(8, dtype=torch.long, device=device),
        )
        return RepeatedStep(unet.student_step(network, optimizer, rollouts, data, batch), True)

    plain = unet.base_step(model, optimizer, data, batch)
    if attempt("captured", lambda: RepeatedStep(plain, True)) and attempt("compiled", compiled):
        attempt("student", student)


def speed(step: RepeatedStep) -> float:
    """Measure steps per second."""
    step()
    torch.cuda.synchronize()
    begin = time.monotonic()
    for _ in range(REPEATS):
        step()
    torch.cuda.synchronize()
    return REPEATS / (time.monotonic() - begin)


def try_autoencoder(device: torch.device, batch: int) -> None:
    """Train an autoencoder on noise for a moment, both phases captured."""
    generator = torch.Generator(device).manual_seed(0)
    world = World(
        images=torch.randint(256, (256, 3, 96, 96), dtype=torch.uint8, device=device),
        faces=torch.rand(256, 96, 96, device=device) > 0.5,
        landmarks=96 * torch.rand(256, 5, 2, device=device),
        people=draw_people(256, generator),
        scenes=draw_scenes(256, generator),
        per_person=1,
    )
    autoencoder.fit(autoencoder.build(world), world, 60.0, batch=batch, captured=True, most=40)


def random_data(device: torch.device, width: int, pooled: int) -> unet.TrainSet:
    """Make a `TrainSet` of noise, for text of these widths."""
    return unet.TrainSet(
        latents=torch.randn(64, CHANNELS, SIZE, SIZE, device=device).half(),
        faces=torch.rand(64, 1, SIZE, SIZE, device=device).half(),
        tokens=torch.zeros(64, unet.CAPTIONS, LENGTH, dtype=torch.uint8, device=device),
        embeds=torch.randn(64, unet.CAPTIONS, LENGTH, width, device=device).bfloat16(),
        pooled=torch.randn(64, unet.CAPTIONS, pooled, device=device).bfloat16(),
        size=96,
    )


if __name__ == "__main__":
    first, file, name, *numbers = sys.argv[1:]
    size, width, pooled = map(int, numbers)
    main(first, Path(file), torch.device(name), size, (width, pooled))
