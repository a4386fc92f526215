"""Measure how long a cold `pulid generate` takes, next to the imports that it cannot avoid.

    python benchmarks/measure_startup.py -o benchmarks/startup.json

Every command runs in a process of its own, in turns. "libraries" imports the classes of torch,
transformers and diffusers that an SDXL pipeline consists of, and nothing of openpulid.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import distributions
from pathlib import Path
from statistics import median

import torch

from openpulid.bench.measurement import describe_measurement
from openpulid.io.files import write_json

ABOUT = "Seconds of cold processes: a generation with the miniature, and imports alone"
LIBRARIES = """
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerFast
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
"""
PULID = [sys.executable, "-m", "openpulid.cli.main"]
GENERATE = [*PULID, "generate", "portrait, photo", "--preset", "mini-lightning"]


def commands(folder: Path) -> dict[str, list[str]]:
    """Return the commands by name; images are written into the folder."""
    return {
        "pulid --help": [*PULID, "--help"],
        "import torch": [sys.executable, "-c", "import torch"],
        "libraries": [sys.executable, "-c", LIBRARIES],
        "pulid generate": [*GENERATE, "-o", str(folder)],
        "pulid generate --id": [*GENERATE, "-o", str(folder), "--id", str(folder / "person.png")],
    }


def measure(command: list[str]) -> tuple[float, float]:
    """Run a command; return seconds of wall time, and of processor time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, sum(after[:2]) - sum(before[:2])


def main() -> None:
    """Measure all commands, and print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-o", "--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        subprocess.run(
            [*PULID, "world", "person", "--seed", "1000000", "-o", str(folder / "person.png")],
            check=True,
        )
        all_commands = commands(folder)
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in all_commands}
        for _ in range(options.rounds):
            for name, command in all_commands.items():
                runs[name].append(measure(command))
    rows = {}
    for name, values in runs.items():
        wall, processor = (median(column) for column in zip(*values, strict=True))
        rows[name] = {"seconds": round(wall, 2), "processor_seconds": round(processor, 2)}
        print(f"{name:24} {wall:6.2f} s  {processor:6.2f} s of processor time")
    if options.out is not None:
        configuration = {
            "rounds": options.rounds,
            "installed_packages": len(list(distributions())),
        }
        measurement = describe_measurement(configuration, {"rows": rows}, torch.device("cpu"))
        write_json(
            options.out, {"about": ABOUT, "measurements": [{"name": "startup", **measurement}]}
        )


if __name__ == "__main__":
    main()
