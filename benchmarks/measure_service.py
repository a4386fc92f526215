"""Measure `pulid serve` on the miniature: throughput, memory, crashes, and identities.

    python benchmarks/measure_service.py throughput -o benchmarks/service.json
    python benchmarks/measure_service.py memory -o benchmarks/service.json
    python benchmarks/measure_service.py crashes -o benchmarks/service.json
    python benchmarks/measure_service.py identities -o benchmarks/service.json

Each command starts servers of its own, in temporary folders, and adds its figures to the file.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from PIL import Image

import openpulid as pulid
from openpulid.bench.measurement import describe_measurement, replace_measurement
from openpulid.io.image_grid import to_pil
from openpulid.world import HELD_OUT_PEOPLE, Person, Scene, render

ABOUT = "The HTTP service on the miniature: throughput, memory, crashes, identities"

MAIN = "from openpulid.cli.main import main; main()"
NUM_CLIENTS = 8
PROMPTS = ("portrait, film noir", "portrait, smiling, photo", "a person, pencil sketch", "poster")
KEYS = {"anna": "anna-0123456789-abcdef", "ben": "ben-0123456789-abcdefg"}
TIMEOUT = 600.0
"""Seconds after which a request counts as lost."""


@dataclass
class Server:
    """`pulid serve` in a process of its own.

    Attributes:
        folder: its data folder.
        options: further words of the command.
    """

    folder: Path
    options: tuple[str, ...] = ()
    process: subprocess.Popen[str] | None = None
    url: str = ""
    log: list[str] = field(default_factory=list)

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        command = [sys.executable, "-c", MAIN, "serve", "--port", "0"]
        self.process = subprocess.Popen(
            [*command, "--data", str(self.folder), "--rate", "1000000/minute", *self.options],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if match := re.search(r"serving (http\S+?);", line):
                self.url = match[1]
                break
        else:
            raise SystemExit("the server has not started:\n" + "".join(self.log))
        threading.Thread(target=self._read, args=(self.process,), daemon=True).start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            self.log.append(line)

    def wait_until_ready(self) -> None:
        """Wait until the models are loaded."""
        while httpx.get(f"{self.url}/readyz").status_code != 200:
            time.sleep(0.1)

    def kill(self) -> None:
        """End the server as a crash does."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """Stop the server as Ctrl-C does."""
        assert self.process is not None
        self.process.send_signal(signal.SIGINT)
        self.process.wait(60)

    @property
    def megabytes(self) -> float:
        """Resident memory of the process."""
        assert self.process is not None
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        match = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert match is not None
        return int(match[1]) / 1024


@contextmanager
def run_server(*options: str) -> Iterator[Server]:
    """Run a server in a temporary folder while this is open."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder) / "data", options)
        server.start()
        server.wait_until_ready()
        try:
            yield server
        finally:
            server.stop()


def draw_person(seed: int) -> bytes:
    """Draw a person who is held out of training, as a PNG file."""
    portrait = to_pil(render([Person.from_seed(HELD_OUT_PEOPLE + seed)], [Scene()]).image)[0]
    file = io.BytesIO()
    portrait.save(file, "png")
    return file.getvalue()


def create_identity(server: Server, seed: int, **options: Any) -> str:
    """Store the identity of a drawn person on a server, and return its id."""
    files = {"image": ("person.png", draw_person(seed), "image/png")}
    answer = httpx.post(f"{server.url}/v1/identities", files=files, timeout=TIMEOUT, **options)
    return str(answer.raise_for_status().json()["id"])


def generate(client: httpx.Client, identity: str, prompt: str, seed: int, steps: int) -> np.ndarray:
    """Generate one image over HTTP, (H, W, 3)."""
    body = {
        "prompt": prompt,
        "seed": seed,
        "people": [{"identity": identity}],
        "num_inference_steps": steps,
    }
    answer = client.post("/v1/images/generations", json=body).raise_for_status().json()
    content = base64.b64decode(answer["data"][0]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)


def measure_throughput(arguments: argparse.Namespace) -> dict[str, Any]:
    """Let clients send requests one after another, to servers with and without batching."""
    rounds: dict[int, list[dict[str, float]]] = {size: [] for size in (1, arguments.batch)}
    with run_server("--batch", "1") as single, run_server("--batch", str(arguments.batch)) as batch:
        servers = {1: single, arguments.batch: batch}
        identities = {
            size: [create_identity(server, seed) for seed in range(NUM_CLIENTS)]
            for size, server in servers.items()
        }
        for number in range(arguments.rounds + 1):
            for size, server in servers.items():
                figures = _run_clients(server, identities[size], arguments)
                if number:  # the first round warms up
                    rounds[size].append(figures)
                print(f"batch {size}: {json.dumps(figures)}", flush=True)
    rows = [
        {"batch": size, **{name: statistics.median(f[name] for f in runs) for name in runs[0]}}
        for size, runs in rounds.items()
    ]
    ratios = [
        b["images_per_second"] / a["images_per_second"]
        for a, b in zip(rounds[1], rounds[arguments.batch], strict=True)
    ]
    return {
        "rows": rows,
        "speedup": round(statistics.median(ratios), 3),
        "speedup_per_round": [round(ratio, 3) for ratio in ratios],
    }


def _run_clients(
    server: Server, identities: list[str], arguments: argparse.Namespace
) -> dict[str, float]:
    latencies: list[float] = []

    def work(number: int) -> None:
        with httpx.Client(base_url=server.url, timeout=TIMEOUT) as client:
            for k in range(arguments.requests):
                start = time.perf_counter()
                prompt = PROMPTS[(number + k) % len(PROMPTS)]
                generate(client, identities[number], prompt, k, arguments.steps)
                latencies.append(time.perf_counter() - start)

    start = time.perf_counter()
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        list(pool.map(work, range(NUM_CLIENTS)))
    seconds = time.perf_counter() - start
    return {
        "images_per_second": round(len(latencies) / seconds, 3),
        "latency_p50": round(statistics.median(latencies), 3),
        "latency_p95": round(statistics.quantiles(latencies, n=20)[-1], 3),
    }


def measure_memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the memory of a server over many requests."""
    with run_server("--batch", str(arguments.batch)) as server:
        identities = [create_identity(server, seed) for seed in range(NUM_CLIENTS)]
        sizes = []
        with httpx.Client(base_url=server.url, timeout=TIMEOUT) as client:

            def request(k: int) -> None:
                generate(client, identities[k % NUM_CLIENTS], PROMPTS[k % len(PROMPTS)], k, 1)

            with ThreadPoolExecutor(NUM_CLIENTS) as pool:
                for first in range(0, arguments.total, 100):
                    list(pool.map(request, range(first, first + 100)))
                    sizes.append(round(server.megabytes, 1))
                    print(f"{first + 100} requests: {sizes[-1]} MB", flush=True)
    return {"megabytes_after_each_100": sizes, "growth": round(sizes[-1] - sizes[0], 1)}


def measure_crashes(arguments: argparse.Namespace) -> dict[str, Any]:
    """Kill a server at random moments while clients submit jobs, and check every job."""
    random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder) / "data", ("--batch", "4", "--max-jobs", "100000"))
        server.options += ("--max-jobs-per-key", "100000")
        server.start()
        server.wait_until_ready()
        identity = create_identity(server, 0)
        submitted: dict[str, int] = {}
        hashes: dict[tuple[str, int], str] = {}
        republished = 0
        stopping = threading.Event()

        def submit(number: int) -> None:
            k = number
            while not stopping.is_set():
                count = 1 + k % 3
                body = {
                    "prompt": PROMPTS[k % len(PROMPTS)],
                    "seed": k,
                    "num_images": count,
                    "num_inference_steps": 4,
                    "people": [{"identity": identity}],
                }
                k += 1
                try:
                    answer = httpx.post(f"{server.url}/v1/jobs", json=body, timeout=30)
                except httpx.HTTPError:
                    time.sleep(0.1)
                    continue
                if answer.status_code == 202:
                    submitted[answer.json()["id"]] = count
                time.sleep(random.uniform(0, arguments.pause))

        def check(job: str) -> str:
            nonlocal republished
            answer = httpx.get(f"{server.url}/v1/jobs/{job}", timeout=30)
            if answer.status_code != 200:
                return "lost"
            body = answer.json()
            indices = [image["index"] for image in body["images"]]
            if len(set(indices)) != len(indices):
                republished += 1
            for image in body["images"]:
                content = httpx.get(f"{server.url}/v1/jobs/{job}/images/{image['index']}").content
                digest = hashlib.sha256(content).hexdigest()
                if hashes.setdefault((job, image["index"]), digest) != digest:
                    republished += 1
            return str(body["status"])

        with ThreadPoolExecutor(4) as pool:
            workers = [pool.submit(submit, number) for number in range(4)]
            for number in range(arguments.kills):
                time.sleep(random.uniform(0.2, 4.0))
                server.kill()
                server.start()
                sample = random.sample(list(submitted), min(10, len(submitted)))
                states = [check(job) for job in sample]
                print(f"kill {number + 1}: {len(submitted)} jobs, {states}", flush=True)
            stopping.set()
            for worker in workers:
                worker.result()
        deadline = time.monotonic() + TIMEOUT
        states = {job: check(job) for job in submitted}
        while time.monotonic() < deadline:
            unfinished = [job for job, state in states.items() if state in ("queued", "running")]
            if not unfinished:
                break
            time.sleep(2)
            states |= {job: check(job) for job in unfinished}
        states = {job: check(job) for job in submitted}
        incomplete = [
            job
            for job, count in submitted.items()
            if states[job] == "completed" and sum(key[0] == job for key in hashes) != count
        ]
        server.stop()
    counts = {state: list(states.values()).count(state) for state in sorted(set(states.values()))}
    return {
        "kills": arguments.kills,
        "acknowledged_jobs": len(submitted),
        "images": len(hashes),
        "states": counts,
        "lost": counts.get("lost", 0) + len(incomplete),
        "published_twice": republished,
    }


def measure_identities(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare the images of concurrent requests of two API keys with single runs."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "keys"
        file.write_text("".join(f"{name} {key}\n" for name, key in KEYS.items()))
        file.chmod(0o600)
        people = 8
        studio = pulid.load("mini", device="cpu")
        with run_server("--batch", str(arguments.batch), "--api-keys", str(file)) as server:
            headers = {name: {"Authorization": f"Bearer {key}"} for name, key in KEYS.items()}
            ids = {
                name: [
                    create_identity(server, seed, headers=headers[name])
                    for seed in range(offset, offset + people)
                ]
                for offset, name in enumerate(KEYS)
            }
            clients = {
                name: httpx.Client(base_url=server.url, headers=header, timeout=TIMEOUT)
                for name, header in headers.items()
            }

            def request(job: tuple[str, int]) -> np.ndarray:
                name, k = job
                prompt = PROMPTS[k % len(PROMPTS)]
                return generate(clients[name], ids[name][k % people], prompt, k % 16, 2)

            jobs = [(name, k) for k in range(arguments.total // 2) for name in KEYS]
            with ThreadPoolExecutor(64) as pool:
                images = list(pool.map(request, jobs))
        identities = [
            studio.identify(Image.open(io.BytesIO(draw_person(seed))))
            for seed in range(people + len(KEYS))
        ]
    offsets = {name: offset for offset, name in enumerate(KEYS)}
    expected: dict[Any, np.ndarray] = {}
    differences = []
    for (name, k), image in zip(jobs, images, strict=True):
        key = (offsets[name] + k % people, PROMPTS[k % len(PROMPTS)], k % 16)
        if key not in expected:
            person, prompt, seed = key
            result = studio.generate(prompt, identities[person], seed=seed, num_inference_steps=2)
            expected[key] = np.asarray(result.images[0]).astype(int)
        differences.append(int(np.abs(image - expected[key]).max()))
    between = [
        int(np.abs(expected[a] - expected[b]).max())
        for a in expected
        for b in expected
        if a[0] < b[0] and a[1:] == b[1:]
    ]
    return {
        "requests": len(jobs),
        "largest_difference_to_single_run": max(differences),
        "smallest_difference_between_people": min(between),
    }


MEASUREMENTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "throughput": measure_throughput,
    "memory": measure_memory,
    "crashes": measure_crashes,
    "identities": measure_identities,
}


def main() -> None:
    """Run one measurement, and add its figures to the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=list(MEASUREMENTS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10, help="of each image of `throughput`")
    parser.add_argument("--requests", type=int, default=6, help="of each client and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--total", type=int, default=1000, help="requests in all")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--pause", type=float, default=1.0, help="longest, between two jobs")
    parser.add_argument("-o", "--out", type=Path)
    arguments = parser.parse_args()
    figures = MEASUREMENTS[arguments.what](arguments)
    print(json.dumps(figures, indent=2))
    if arguments.out is None:
        return
    configuration = {
        name: value for name, value in vars(arguments).items() if name not in ("what", "out")
    }
    measurement = describe_measurement(configuration, figures, torch.device("cpu"))
    replace_measurement(arguments.out, ABOUT, arguments.what, measurement)


if __name__ == "__main__":
    main()
