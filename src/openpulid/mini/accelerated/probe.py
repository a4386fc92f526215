"""Try in separate processes to capture steps as CUDA graphs and to compile the U-Net.

Both can break a process. The probe runs while the main process renders. It writes which steps work,
and how fast they are, to a JSON file. The compiler's cache on disk holds what it has compiled.
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
from openpulid.mini.accelerated.rollouts import Rollouts
from openpulid.mini.accelerated.scenes import draw_people, draw_scenes
from openpulid.mini.accelerated.steps import DeviceMuon, RepeatedStep
from openpulid.mini.accelerated.train_set import CAPTIONS, TrainSet
from openpulid.mini.accelerated.world import World
from openpulid.mini.models import build_unet
from openpulid.mini.train.distill import STUDENT_TIMESTEPS

REPEATS = 40
CHANNELS = 20
SIZE = 12
LENGTH = 48
PARTS = ("autoencoder", "base")
MODULE = "openpulid.mini.accelerated.probe"


class Probe:
    """The probe's processes, one per part, as the main process sees them.

    Args:
        folder: of their status and output; None starts no process, and no step works.
        device: where they compute.
        widths: of the text embeddings and of the pooled embedding.
        batches: samples per step, for each of `PARTS`.
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
        """The results up to now, by the name of the step."""
        status: dict[str, Any] = {}
        for file in self.files:
            if file.exists():
                status |= json.loads(file.read_text())
        return status

    def works(self, name: str) -> bool:
        """Return whether a step was tried and worked."""
        return bool(self.status.get(name, {}).get("works"))

    def pays(self, name: str, baseline: str) -> bool:
        """Return whether a step works and is not clearly slower than another one."""
        if not self.works(name):
            return False
        speed = self.status[name].get("steps_per_second", 0.0)
        baseline_speed = self.status.get(baseline, {}).get("steps_per_second", 0.0)
        # the tolerance is large because other processes used the device as well
        return bool(speed > 0.8 * baseline_speed)

    def wait(self, seconds: float) -> None:
        """Wait until the processes have ended, at most `seconds`."""
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
    """Try a part's steps in order, until one fails.

    Args:
        part: one of `PARTS`.
        status_file: the JSON file, written after every step.
        device: where to compute.
        batch: samples per step.
        widths: of the text embeddings and of the pooled embedding.
    """
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    status: dict[str, Any] = {}

    def attempt(name: str, build: Callable[[], RepeatedStep | None]) -> bool:
        start = time.monotonic()
        try:
            step = build()
            result: dict[str, Any] = {"works": True, "ready": round(time.monotonic() - start, 1)}
            if step is not None:
                result["steps_per_second"] = round(measure_speed(step), 2)
        except Exception as error:
            result = {"works": False, "error": f"{type(error).__name__}: {str(error)[:1500]}"}
        status[name] = result
        unfinished = status_file.with_suffix(".part")
        unfinished.write_text(json.dumps(status))
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

    def compile_step() -> RepeatedStep:
        step = unet.base_step(network, optimizer, data, batch)
        step()
        return RepeatedStep(step, True)

    def build_student_step() -> RepeatedStep:
        rollouts = Rollouts(
            torch.randn(8, STUDENT_TIMESTEPS + 1, CHANNELS, SIZE, SIZE, device=device).half(),
            torch.arange(8, device=device),
            torch.zeros(8, dtype=torch.long, device=device),
        )
        return RepeatedStep(unet.student_step(network, optimizer, rollouts, data, batch), True)

    plain = unet.base_step(model, optimizer, data, batch)
    if attempt("captured", lambda: RepeatedStep(plain, True)) and attempt("compiled", compile_step):
        attempt("student", build_student_step)


def measure_speed(step: RepeatedStep) -> float:
    """Measure steps per second."""
    step()
    torch.cuda.synchronize()
    start = time.monotonic()
    for _ in range(REPEATS):
        step()
    torch.cuda.synchronize()
    return REPEATS / (time.monotonic() - start)


def try_autoencoder(device: torch.device, batch: int) -> None:
    """Train an autoencoder on noise for a few steps, with both phases captured."""
    generator = torch.Generator(device).manual_seed(0)
    world = World(
        images=torch.randint(256, (256, 3, 96, 96), dtype=torch.uint8, device=device),
        faces=torch.rand(256, 96, 96, device=device) > 0.5,
        landmarks=96 * torch.rand(256, 5, 2, device=device),
        people=draw_people(256, generator),
        scenes=draw_scenes(256, generator),
        per_person=1,
    )
    vae = autoencoder.create_autoencoder(world)
    autoencoder.fit(vae, world, 60.0, batch=batch, is_captured=True, max_steps=40)


def random_data(device: torch.device, width: int, pooled: int) -> TrainSet:
    """Create a `TrainSet` of noise with text embeddings of these widths."""
    return TrainSet(
        latents=torch.randn(64, CHANNELS, SIZE, SIZE, device=device).half(),
        faces=torch.rand(64, 1, SIZE, SIZE, device=device).half(),
        tokens=torch.zeros(64, CAPTIONS, LENGTH, dtype=torch.uint8, device=device),
        embeds=torch.randn(64, CAPTIONS, LENGTH, width, device=device).bfloat16(),
        pooled=torch.randn(64, CAPTIONS, pooled, device=device).bfloat16(),
        size=96,
    )


if __name__ == "__main__":
    part_name, file, device_name, *numbers = sys.argv[1:]
    batch_size, embed_width, pooled_width = map(int, numbers)
    main(
        part_name,
        Path(file),
        torch.device(device_name),
        batch_size,
        (embed_width, pooled_width),
    )
