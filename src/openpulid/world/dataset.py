"""Rendered people on disk: memory-mapped arrays, written person by person, so a killed run goes on where it stopped."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch

from openpulid.world.person import FACIAL, HELD_OUT_PEOPLE, SKIN, Person
from openpulid.world.render import render
from openpulid.world.scene import ATTRIBUTES, Scene

FAMILY = 4
"""People per family: they share the skin, and in training most of the face too."""
PORTRAIT_SCENE = {
    "pose": "front",
    "light": "studio",
    "glasses": "none",
    "hat": "none",
    "beard": "none",
    "style": "photo",
}
"""What the scenes of `Plan.portraits` share."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Who is drawn how often.

    Attributes:
        held_out: people and colour combinations that no training sees.
        portraits: strangers instead of families, before the camera in studio light with nothing on their heads: little moves
            from one picture to the next but the person, which is what an adapter has to learn.
    """

    people: int = 2560
    scenes: int = 12
    size: int = 96
    held_out: bool = False
    seed: int = 0
    portraits: bool = False

    def person(self, index: int) -> Person:
        """Training families are a person and three siblings (one to sixteen features changed); held-out families are
        four unrelated faces with one skin, the hard case of verification."""
        if self.portraits:
            return Person.from_seed(self.seed * 100_000 + index)
        family, member = divmod(index, FAMILY)
        offset = HELD_OUT_PEOPLE if self.held_out else 0
        first = Person.from_seed(offset + self.seed * 100_000 + family * FAMILY)
        if member == 0:
            return first
        generator = torch.Generator().manual_seed(
            offset + self.seed * 100_000 + family * FAMILY + member
        )
        if self.held_out:
            return Person.sample(generator).replace(**{name: getattr(first, name) for name in SKIN})
        fewest, most = ((1, 3), (4, 8), (10, 16))[member - 1]
        changes = int(torch.randint(fewest, most + 1, (), generator=generator))
        return first.sibling(generator, min(changes, len(FACIAL)))

    def scene(self, index: int, k: int) -> Scene:
        """Scene `k` of person `index`; held-out families share their hair too."""
        generator = torch.Generator().manual_seed(
            (self.seed * 7 + self.held_out) * 10_000_019 + index * 1009 + k
        )
        if self.portraits:
            return Scene.sample(generator, held_out=False, **PORTRAIT_SCENE)
        if not self.held_out:
            return Scene.sample(generator)
        family = torch.Generator().manual_seed(HELD_OUT_PEOPLE + index // FAMILY)
        hair = {name: _uniform(ATTRIBUTES[name], family) for name in ("hair_color", "hair_length")}
        return Scene.sample(generator, held_out=True, **hair)


def _uniform(classes: tuple[str, ...], generator: torch.Generator) -> str:
    return classes[int(torch.randint(len(classes), (), generator=generator))]


class WorldDataset:
    """The arrays of a rendered `Plan`; picture i shows person i // scenes.

    images (N, 3, S, S) uint8, parts (N, S, S) uint8, landmarks (N, 5, 2) float32 pixels, people (N,), families (N,),
    vectors (N, P) float32, attributes (N, A) int8 class index in `ATTRIBUTES` order, -1 where it cannot be seen.
    """

    def __init__(self, folder: Path, mode: str = "r"):
        self.folder = Path(folder)
        self.plan = Plan(**json.loads((self.folder / "plan.json").read_text()))
        plan, count = self.plan, self.plan.people * self.plan.scenes
        size = plan.size
        self.images = _array(self.folder / "images.npy", np.uint8, (count, 3, size, size), mode)
        self.parts = _array(self.folder / "parts.npy", np.uint8, (count, size, size), mode)
        self.landmarks = _array(self.folder / "landmarks.npy", np.float32, (count, 5, 2), mode)
        self.people = np.repeat(np.arange(plan.people), plan.scenes)
        self.families = self.people // FAMILY

    @classmethod
    def open(cls, folder: Path | str) -> WorldDataset:
        """Open a finished data set. Raises FileNotFoundError when `folder` holds none or an unfinished one."""
        folder = Path(folder)
        plan_file, done = folder / "plan.json", folder / "done.txt"
        if not plan_file.exists() or not done.exists():
            raise FileNotFoundError(
                f"{folder} holds no finished data set; make it with: pulid mini build world"
            )
        data = cls(folder)
        people = [data.plan.person(index) for index in range(data.plan.people)]
        data.vectors = np.repeat(
            np.array([p.vector() for p in people], dtype=np.float32), data.plan.scenes, 0
        )
        data.attributes = _attributes(data)
        return data

    vectors: np.ndarray
    attributes: np.ndarray

    def __len__(self) -> int:
        return len(self.people)

    def scene(self, index: int) -> Scene:
        """The scene of picture `index`."""
        return self.plan.scene(*divmod(index, self.plan.scenes))

    def prompt(self, index: int, generator: torch.Generator) -> str:
        """A sentence for picture `index`."""
        return self.scene(index).prompt(generator)


def _array(file: Path, dtype: type, shape: tuple[int, ...], mode: str) -> np.ndarray:
    return np.lib.format.open_memmap(
        file, mode if file.exists() else "w+", dtype=dtype, shape=shape
    )


def encode_attributes(scene: Scene) -> list[int]:
    """Class indices in `ATTRIBUTES` order, -1 where the attribute cannot be seen."""
    seen = scene.attributes()
    return [
        classes.index(seen[name]) if name in seen else -1 for name, classes in ATTRIBUTES.items()
    ]


def _attributes(data: WorldDataset) -> np.ndarray:
    file = data.folder / "attributes.npy"
    if not file.exists():
        np.save(
            file,
            np.array([encode_attributes(data.scene(i)) for i in range(len(data))], dtype=np.int8),
        )
    return np.load(file)


def build_dataset(
    folder: Path | str,
    plan: Plan,
    *,
    workers: int | None = None,
    device: str = "cpu",
    compiled: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> WorldDataset:
    """Render a plan into `folder`, one process per core on a CPU; `on_progress(people done, of)` reports.

    Raises ValueError when `folder` holds another plan's pictures.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plan_file = folder / "plan.json"
    if plan_file.exists() and Plan(**json.loads(plan_file.read_text())) != plan:
        raise ValueError(
            f"{folder} holds pictures of another plan; remove it or choose another folder"
        )
    plan_file.write_text(json.dumps(dataclasses.asdict(plan)))
    if (folder / "done.txt").exists():
        return WorldDataset.open(folder)
    WorldDataset(folder)  # creates the files before the workers open them
    log = folder / "rendered.txt"
    finished = {int(line) for line in log.read_text().split()} if log.exists() else set()
    left = [index for index in range(plan.people) if index not in finished]
    workers = workers or (os.cpu_count() or 1 if device == "cpu" else 1)
    chunks = [left[start : start + 8] for start in range(0, len(left), 8)]
    with (
        ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool,
        log.open("a") as out,
    ):
        jobs = [pool.submit(_render_people, folder, chunk, device, compiled) for chunk in chunks]
        for count, job in enumerate(as_completed(jobs), 1):
            out.write("\n".join(map(str, job.result())) + "\n")
            out.flush()
            if on_progress:
                on_progress(len(finished) + min(8 * count, len(left)), plan.people)
    (folder / "done.txt").write_text("done\n")
    return WorldDataset.open(folder)


def _render_people(folder: Path, people: list[int], device: str, compiled: bool) -> list[int]:
    torch.set_num_threads(1)  # one process per core is faster than one process with all of them
    data = WorldDataset(folder, "r+")
    plan = data.plan
    jobs = [(index, k) for index in people for k in range(plan.scenes)]
    for start in range(0, len(jobs), 8):
        part = jobs[start : start + 8]
        padded = part + part[-1:] * (8 - len(part))  # one batch size, one compilation
        picture = render(
            [plan.person(i) for i, _ in padded],
            [plan.scene(i, k) for i, k in padded],
            plan.size,
            device,
            compiled=compiled,
        )
        rows = [i * plan.scenes + k for i, k in part]
        data.images[rows] = (picture.image[: len(part)] * 255).round().byte().cpu().numpy()
        data.parts[rows] = picture.parts[: len(part)].cpu().numpy()
        data.landmarks[rows] = picture.landmarks[: len(part)].cpu().numpy()
    return people
