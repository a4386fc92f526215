"""Measure `pulid data prepare`: seconds of each stage, nodes, memory, and killed programs.

    python benchmarks/measure_data.py stages -o benchmarks/data.json
    python benchmarks/measure_data.py nodes -o benchmarks/data.json
    python benchmarks/measure_data.py memory -o benchmarks/data.json
    python benchmarks/measure_data.py kills -o benchmarks/data.json

The images are of synthetic people, rendered into `runs/data-people` by the first command. Each
command adds its figures to the file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from facexlib.parsing.bisenet import BiSeNet
from facexlib.recognition.arcface_arch import Backbone
from PIL import Image, ImageFilter
from ray.cluster_utils import Cluster

from openpulid.bench.measurement import describe_measurement, replace_measurement
from openpulid.data.cropping import crop_image
from openpulid.data.decode import decode_image
from openpulid.data.face_analysis import FaceAnalyzer
from openpulid.data.index import read_index
from openpulid.data.models import load_face_models
from openpulid.data.options import MINI_OPTIONS, PrepareOptions
from openpulid.data.records import ImageRecord
from openpulid.data.shards import plan_shards, write_shard
from openpulid.data.sources import SourceImage, find_sources
from openpulid.data.work_folder import FACES, WorkFolder
from openpulid.identity.detection import LONGEST
from openpulid.io.images import limit_size
from openpulid.world.dataset import Plan, WorldDataset, build_dataset

ABOUT = "Data preparation: seconds of each stage, Ray nodes, memory, killed programs"

MAIN = "from openpulid.cli.main import main; main()"
SCENES = 5
PIXELS = {"2 MP": (1632, 1224), "12 MP": (4000, 3000)}
TARGET = 1_500_000
"""Images of PuLID's own training data."""


def write_people(folder: Path, count: int) -> Path:
    """Write images of unrelated people with captions, five of each, as PNG files."""
    target = folder / "images"
    plan = Plan(people=count // SCENES, scenes=SCENES, portraits=True)
    dataset: WorldDataset = build_dataset(folder / "rendered", plan)
    if len(list(target.glob("*"))) == plan.people:
        return target
    generator = torch.Generator().manual_seed(0)
    for index in range(len(dataset)):
        person = target / f"{index // SCENES:05d}"
        person.mkdir(parents=True, exist_ok=True)
        pixels = np.ascontiguousarray(dataset.images[index].transpose(1, 2, 0))
        Image.fromarray(pixels).save(person / f"{index % SCENES}.png")
        (person / f"{index % SCENES}.txt").write_text(dataset.prompt(index, generator))
    return target


def link_people(source: Path, target: Path, count: int) -> Path:
    """Link the first people of a folder, so that they have `count` images."""
    target.mkdir(parents=True)
    for person in sorted(source.iterdir())[: count // SCENES]:
        (target / person.name).symlink_to(person.resolve())
    return target


def prepare_command(source: Path, dataset: Path, batch: int, *options: str) -> list[str]:
    """Return the command that prepares a dataset of synthetic people."""
    words = ["data", "prepare", str(source), "-o", str(dataset), "--faces", "mini", "--json"]
    return [sys.executable, "-c", MAIN, *words, "--batch", str(batch), *options]


def run(command: list[str]) -> dict[str, Any]:
    """Run a command, and return the last line that it prints."""
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def measure_stages(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure each stage alone on one core: milliseconds per image."""
    torch.set_num_threads(1)
    figures = {"synthetic, 96 pixels": _time_stages(arguments)}
    figures |= {f"photo, {name}": _time_photo(size) for name, size in PIXELS.items()}
    figures["networks of full size"] = _time_networks()
    photo = sum(figures["photo, 12 MP"].values())
    networks = sum(figures["networks of full size"].values())
    hours = TARGET * (photo + networks) / 1000 / 3600
    figures["1.5 M photos of 12 MP on CPUs"] = {
        "core hours": round(hours),
        "core hours without networks": round(TARGET * photo / 1000 / 3600),
    }
    return figures


def _time_stages(arguments: argparse.Namespace) -> dict[str, float]:
    """Time the steps of `FacesStage`, and the writing of a shard, in milliseconds per image."""
    options = MINI_OPTIONS
    analyzer = FaceAnalyzer(load_face_models(options, "cpu"), options.filters)
    times: dict[str, list[float]] = {name: [] for name in ("decode", "faces", "crop and encode")}
    records, crops = [], []
    source = write_people(arguments.data, arguments.images)
    for image in find_sources([source])[: arguments.sample]:
        record = ImageRecord(image.name, image.key, split="train", person=image.key)
        with _timed(times["decode"]):
            pixels = decode_image(image, record, options)
        assert pixels is not None
        with _timed(times["faces"]):
            analyzer.analyze(record, pixels)
        if record.is_kept:
            with _timed(times["crop and encode"]):
                crops.append(crop_image(pixels, record, options))
            records.append(record)
    with tempfile.TemporaryDirectory() as folder:
        work = WorkFolder(Path(folder) / "work")
        work.create()
        (Path(folder) / "train").mkdir()
        store: list[float] = []
        with _timed(store):
            work.write_batch(FACES, records, crops)
            (shard,) = plan_shards(records, len(records), 0)
            write_shard(Path(folder), shard, work)
    figures = {name: statistics.median(values) for name, values in times.items()}
    figures["store and write"] = store[0] / len(records)
    return {name: round(1000 * value, 2) for name, value in figures.items()}


@contextmanager
def _timed(times: list[float]) -> Iterator[None]:
    before = time.perf_counter()
    yield
    times.append(time.perf_counter() - before)


def _time_photo(size: tuple[int, int]) -> dict[str, float]:
    """Time what happens to a JPEG file of a size, in milliseconds; no network sees it."""
    noise = Image.effect_noise((size[0] // 8, size[1] // 8), 90).convert("RGB")
    image = noise.resize(size, Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(1))
    width, height = size
    box = [width * 0.4, height * 0.3, width * 0.6, height * 0.3 + width * 0.2]
    options = PrepareOptions()
    times: dict[str, list[float]] = {name: [] for name in ("decode", "reduce", "crop and encode")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "photo.jpg"
        image.save(path, quality=92)
        source = SourceImage("photo.jpg", str(path))
        for _ in range(7):
            record = ImageRecord("a", "a", box=list(box), landmarks=[0.0] * 10)
            with _timed(times["decode"]):
                pixels = decode_image(source, record, options)
            assert pixels is not None
            with _timed(times["reduce"]):
                limit_size(pixels, LONGEST)
            with _timed(times["crop and encode"]):
                crop_image(pixels, record, options)
    return {name: round(1000 * statistics.median(values), 1) for name, values in times.items()}


@torch.no_grad()
def _time_networks() -> dict[str, float]:
    """Time networks of full size with random weights, in milliseconds of one core."""
    networks: dict[str, tuple[torch.nn.Module, tuple[int, ...]]] = {
        "face parsing (BiSeNet, 512 pixels)": (BiSeNet(num_class=19), (1, 3, 512, 512)),
        "recognition (ResNet-100, 112 pixels)": (
            Backbone(100, drop_ratio=0, mode="ir"),
            (1, 3, 112, 112),
        ),
    }
    times = {}
    for name, (network, shape) in networks.items():
        network.eval()
        samples = []
        for _ in range(5):
            before = time.perf_counter()
            network(torch.rand(shape))
            samples.append(time.perf_counter() - before)
        times[name] = round(1000 * statistics.median(samples), 1)
    return times


def measure_nodes(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare one Ray node of one processor with two, in alternation."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        people = write_people(arguments.data, arguments.images)
        source = link_people(people, Path(folder) / "people", arguments.sample)
        for index in range(arguments.rounds):
            for count in rates:
                target = Path(folder) / f"{index}-{count}"
                with start_nodes(count) as address:
                    options = ("--ray", address, "--keep-work")
                    run(prepare_command(source, target, arguments.batch, *options))
                rates[count].append(_steady_rate(target, arguments.batch))
                shutil.rmtree(target)
    ratios = [two / one for one, two in zip(rates[1], rates[2], strict=True)]
    return {
        "images per second": {count: [round(x, 2) for x in rates[count]] for count in rates},
        "ratio": round(statistics.median(ratios), 2),
    }


@contextmanager
def start_nodes(count: int) -> Iterator[str]:
    """Start a Ray cluster of nodes with one processor each on this machine."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        for _ in range(count - 1):
            cluster.add_node(num_cpus=1)
        yield cluster.address
    finally:
        cluster.shutdown()


def _steady_rate(dataset: Path, batch: int) -> float:
    """Return images per second between the first tenth of the batches and the last batch."""
    times = sorted(path.stat().st_mtime for path in dataset.glob(f".work/{FACES}/*.parquet"))
    skipped = max(len(times) // 10, 1)
    return (len(times) - 1 - skipped) * batch / (times[-1] - times[skipped])


def measure_memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare the largest memory of all processes for a few images and for many."""
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        people = write_people(arguments.data, arguments.images)
        for count in (arguments.sample, arguments.images):
            source = link_people(people, Path(folder) / f"people-{count}", count)
            command = prepare_command(source, Path(folder) / f"data-{count}", arguments.batch)
            before = time.monotonic()
            process = subprocess.Popen([*command, "--workers", "2"], stdout=subprocess.PIPE)
            samples: list[dict[str, int]] = []
            thread = threading.Thread(target=_sample_memory, args=(process.pid, samples))
            thread.start()
            output = process.communicate()[0]
            thread.join()
            assert process.returncode == 0
            totals = [sum(sample.values()) for sample in samples]
            tenths = [totals[len(totals) * k // 10] for k in range(2, 10)]
            peaks[f"{count} images"] = {
                "peak": max(totals),
                "after each tenth": tenths,
                "at the peak": samples[totals.index(max(totals))],
                "seconds": round(time.monotonic() - before),
                **json.loads(output.splitlines()[-1]),
            }
    return peaks


def _sample_memory(pid: int, samples: list[dict[str, int]]) -> None:
    """Append the proportional memory of a process and its children in MB, until it ends."""
    program = psutil.Process(pid)
    while program.is_running() and program.status() != psutil.STATUS_ZOMBIE:
        sample: dict[str, int] = {}
        for process in (program, *program.children(recursive=True)):
            with suppress(psutil.Error):
                name = _describe_process(process)
                size = process.memory_full_info().pss // 2**20
                sample[name] = sample.get(name, 0) + size
        samples.append(sample)
        time.sleep(1)


def _describe_process(process: psutil.Process) -> str:
    """Return what a process is: a stage, a part of Ray, or the program."""
    words = " ".join(process.cmdline())
    if stage := re.search(r"MapBatches\((\w+)", words):
        return stage[1]
    parts = ("raylet", "gcs_server", "ray::IDLE")
    return next((part for part in parts if part in words), "program and the rest")


def measure_kills(arguments: argparse.Namespace) -> dict[str, Any]:
    """Kill the program again and again; compare the shards with those of an undisturbed run."""
    rng = random.Random(0)
    repeated, kills = [], 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        people = write_people(arguments.data, arguments.images)
        source = link_people(people, folder / "people", arguments.sample)
        run(prepare_command(source, folder / "whole", arguments.batch))
        target = folder / "killed"
        command = [*prepare_command(source, target, arguments.batch), "--workers", "1"]
        stored = target / ".work" / FACES
        attempts = target / ".work" / "attempts"
        while kills < arguments.kills:
            before = len(list(stored.glob("*.parquet")))
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            while len(list(stored.glob("*.parquet"))) == before and process.poll() is None:
                time.sleep(0.05)
            time.sleep(rng.uniform(0, 2))
            if process.poll() is not None:
                break
            process.kill()
            process.wait()
            kills += 1
            time.sleep(1)  # Ray's processes end
            begun = sum(path.stat().st_size for path in attempts.iterdir())
            finished = len(list(stored.glob("*.parquet"))) - before
            repeated.append(begun - finished)
        run(command)
        hashes = [
            [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(data.glob("*/*.tar"))]
            for data in (folder / "whole", target)
        ]
        records = [record for record in read_index(target) if record.is_kept]
    return {
        "kills": kills,
        "batches begun and not stored": repeated,
        "most": max(repeated),
        "images": len(records),
        "images twice": len(records) - len({record.name for record in records}),
        "same shards": hashes[0] == hashes[1],
    }


MEASUREMENTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "stages": measure_stages,
    "nodes": measure_nodes,
    "memory": measure_memory,
    "kills": measure_kills,
}


def main() -> None:
    """Run one measurement, and add its figures to the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=list(MEASUREMENTS))
    parser.add_argument("--data", type=Path, default=Path("runs/data-people"))
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--sample", type=int, default=1000, help="images of the short runs")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("-o", "--out", type=Path)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    figures = MEASUREMENTS[arguments.what](arguments)
    print(json.dumps(figures, indent=2))
    if arguments.out is None:
        return
    configuration = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(arguments).items()
        if name not in ("what", "out")
    }
    measurement = describe_measurement(configuration, figures, torch.device("cpu"))
    replace_measurement(arguments.out, ABOUT, arguments.what, measurement)


if __name__ == "__main__":
    main()
