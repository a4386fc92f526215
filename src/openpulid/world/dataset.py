"""Rendered datasets: memory-mapped arrays, written person by person so that runs can resume."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from openpulid.errors import OptionError
from openpulid.io.files import replace_file, write_json
from openpulid.world.person import FACIAL, HELD_OUT_PEOPLE, SKIN, Person
from openpulid.world.render import render
from openpulid.world.scene import ATTRIBUTES, Scene

FAMILY = 4
"""People per family: they share the skin, and in training most of the face as well."""
SIBLING_CHANGES = ((1, 3), (4, 8), (10, 16))
"""Minimum and maximum number of changed features of the siblings in a training family."""
PORTRAIT_SCENE = {
    "pose": "front",
    "light": "studio",
    "glasses": "none",
    "hat": "none",
    "beard": "none",
    "style": "photo",
}
"""Attributes that all scenes of `Plan.portraits` share."""
BATCH = 8
"""People per job, and images per call of the renderer: a single batch size compiles once."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The people and scenes of a dataset.

    Attributes:
        people: number of people.
        scenes: number of scenes, and so of images, per person.
        size: width and height of the images in pixels.
        held_out: use people and color combinations that are held out of training.
        seed: determines people and scenes.
        portraits: unrelated people in studio light instead of families. Little varies from image to
            image but the person, which is what an adapter has to learn.
    """

    people: int = 2560
    scenes: int = 12
    size: int = 96
    held_out: bool = False
    seed: int = 0
    portraits: bool = False

    def person(self, index: int) -> Person:
        """Return person `index`.

        A training family is a person and three siblings with `SIBLING_CHANGES`. A held-out family
        is four unrelated faces with the same skin, the hard case of face verification.
        """
        if self.portraits:
            return Person.from_seed(self.seed * 100_000 + index)
        family, member = divmod(index, FAMILY)
        offset = HELD_OUT_PEOPLE if self.held_out else 0
        seed = offset + self.seed * 100_000 + family * FAMILY
        first = Person.from_seed(seed)
        if member == 0:
            return first
        generator = torch.Generator().manual_seed(seed + member)
        if self.held_out:
            return Person.sample(generator).replace(**{name: getattr(first, name) for name in SKIN})
        low, high = SIBLING_CHANGES[member - 1]
        changes = int(torch.randint(low, high + 1, (), generator=generator))
        return first.sibling(generator, min(changes, len(FACIAL)))

    def scene(self, index: int, k: int) -> Scene:
        """Return scene `k` of person `index`; held-out families also share their hair."""
        generator = torch.Generator().manual_seed(
            (self.seed * 7 + self.held_out) * 10_000_019 + index * 1009 + k
        )
        if self.portraits:
            return Scene.sample(generator, held_out=False, **PORTRAIT_SCENE)
        if not self.held_out:
            return Scene.sample(generator)
        family = torch.Generator().manual_seed(HELD_OUT_PEOPLE + index // FAMILY)
        hair = {name: _sample(ATTRIBUTES[name], family) for name in ("hair_color", "hair_length")}
        return Scene.sample(generator, held_out=True, **hair)


class WorldDataset:
    """The arrays of a rendered `Plan`; image i shows person i // scenes.

    Attributes:
        images: (N, 3, S, S) uint8.
        parts: (N, S, S) uint8 labels of `PARTS`.
        landmarks: (N, 5, 2) float32 pixels.
        people: (N,) index of the person.
        families: (N,) index of the family.
        vectors: (N, P) float32 parameters of the person; only of a dataset opened with `open`.
        attributes: (N, A) int8 class indices in the order of `ATTRIBUTES`, -1 where an attribute is
            not visible; only of a dataset opened with `open`.
    """

    vectors: np.ndarray
    attributes: np.ndarray

    def __init__(self, folder: Path, mode: str = "r"):
        self.folder = Path(folder)
        self.plan = Plan(**json.loads((self.folder / "plan.json").read_text()))
        plan = self.plan
        count = plan.people * plan.scenes
        self.images = self._open("images", np.uint8, (count, 3, plan.size, plan.size), mode)
        self.parts = self._open("parts", np.uint8, (count, plan.size, plan.size), mode)
        self.landmarks = self._open("landmarks", np.float32, (count, 5, 2), mode)
        self.people = np.repeat(np.arange(plan.people), plan.scenes)
        self.families = self.people // FAMILY

    @classmethod
    def open(cls, folder: Path | str) -> WorldDataset:
        """Open a complete dataset.

        Raises:
            FileNotFoundError: the folder holds no dataset, or an incomplete one.
        """
        folder = Path(folder)
        if not (folder / "plan.json").exists() or not (folder / "done.txt").exists():
            raise FileNotFoundError(
                f"{folder} holds no complete dataset; create it with `pulid mini build world`."
            )
        data = cls(folder)
        people = [data.plan.person(index) for index in range(data.plan.people)]
        vectors = np.array([person.vector() for person in people], dtype=np.float32)
        data.vectors = np.repeat(vectors, data.plan.scenes, 0)
        data.attributes = _load_attributes(data)
        return data

    @property
    def key(self) -> dict[str, object]:
        """What determines the images, as JSON values."""
        return {"plan": dataclasses.asdict(self.plan)}

    def __len__(self) -> int:
        return len(self.people)

    def scene(self, index: int) -> Scene:
        """Return the scene of image `index`."""
        return self.plan.scene(*divmod(index, self.plan.scenes))

    def prompt(self, index: int, generator: torch.Generator) -> str:
        """Generate a prompt for image `index`."""
        return self.scene(index).prompt(generator)

    def _open(self, name: str, dtype: type, shape: tuple[int, ...], mode: str) -> np.ndarray:
        """Memory-map an array; create its file if it does not exist."""
        file = self.folder / f"{name}.npy"
        if not file.exists():
            mode = "w+"
        return np.lib.format.open_memmap(file, mode, dtype=dtype, shape=shape)


def encode_attributes(scene: Scene) -> list[int]:
    """Return class indices in the order of `ATTRIBUTES`, -1 where an attribute is not visible."""
    visible = scene.attributes()
    return [
        classes.index(visible[name]) if name in visible else -1
        for name, classes in ATTRIBUTES.items()
    ]


def build_dataset(
    folder: Path | str,
    plan: Plan,
    *,
    workers: int | None = None,
    device: str = "cpu",
    compiled: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> WorldDataset:
    """Render a dataset, or the people that an interrupted run has not rendered yet.

    Args:
        folder: where the arrays are stored.
        plan: the people and scenes.
        workers: number of processes; by default one per core on a CPU, and one on any other device.
        device: where to render.
        compiled: compile the renderer; see `render`.
        on_progress: called with the number of people rendered and their total.

    Raises:
        OptionError: the folder holds the images of another plan.
        KeyboardInterrupt: Ctrl-C. The workers are stopped; what is rendered is kept.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plan_file = folder / "plan.json"
    if plan_file.exists() and Plan(**json.loads(plan_file.read_text())) != plan:
        raise OptionError(
            f"{folder} holds images of another plan, such as another number of people: delete it, "
            "start again with --fresh, or choose another folder."
        )
    if (folder / "done.txt").exists():
        return WorldDataset.open(folder)
    write_json(plan_file, dataclasses.asdict(plan))
    WorldDataset(folder)  # creates the files before the workers open them
    log = folder / "rendered.txt"
    finished = {int(line) for line in log.read_text().split()} if log.exists() else set()
    remaining = [index for index in range(plan.people) if index not in finished]
    if workers is None:
        workers = os.cpu_count() or 1 if device == "cpu" else 1
    chunks = [remaining[start : start + BATCH] for start in range(0, len(remaining), BATCH)]
    with (
        ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool,
        log.open("a") as out,
        _stop_on_interrupt(pool),
    ):
        with _ignore_interrupt():  # the workers inherit that
            jobs = [
                pool.submit(_render_people, folder, chunk, device, compiled) for chunk in chunks
            ]
        for count, job in enumerate(as_completed(jobs), 1):
            out.write("\n".join(map(str, job.result())) + "\n")
            out.flush()
            if on_progress:
                on_progress(len(finished) + min(BATCH * count, len(remaining)), plan.people)
    (folder / "done.txt").write_text("done\n")
    return WorldDataset.open(folder)


@contextmanager
def _ignore_interrupt() -> Iterator[None]:
    """Ignore Ctrl-C, which a terminal sends to all processes: each would print a traceback."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set signal handlers
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


@contextmanager
def _stop_on_interrupt(pool: ProcessPoolExecutor) -> Iterator[None]:
    """Stop the workers at Ctrl-C instead of waiting for all jobs."""
    earlier = set(multiprocessing.active_children())
    try:
        yield
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - earlier:
            process.terminate()
        raise


def _render_people(folder: Path, people: list[int], device: str, compiled: bool) -> list[int]:
    torch.set_num_threads(1)  # one process per core is faster than one process with all cores
    data = WorldDataset(folder, "r+")
    plan = data.plan
    pairs = [(index, k) for index in people for k in range(plan.scenes)]
    for start in range(0, len(pairs), BATCH):
        batch = pairs[start : start + BATCH]
        # Padded to one batch size, so that the renderer is compiled only once.
        padded = batch + batch[-1:] * (BATCH - len(batch))
        rendering = render(
            [plan.person(index) for index, _ in padded],
            [plan.scene(index, k) for index, k in padded],
            plan.size,
            device,
            compiled=compiled,
        )
        rows = [index * plan.scenes + k for index, k in batch]
        images = rendering.image[: len(batch)] * 255
        data.images[rows] = images.round().byte().cpu().numpy()
        data.parts[rows] = rendering.parts[: len(batch)].cpu().numpy()
        data.landmarks[rows] = rendering.landmarks[: len(batch)].cpu().numpy()
    return people


def _load_attributes(data: WorldDataset) -> np.ndarray:
    """Load the attributes of a dataset; compute and store them first if necessary."""
    file = data.folder / "attributes.npy"
    if not file.exists():
        rows = [encode_attributes(data.scene(index)) for index in range(len(data))]
        with replace_file(file) as temporary:
            np.save(temporary, np.array(rows, dtype=np.int8))
    return np.load(file)


def _sample(classes: tuple[str, ...], generator: torch.Generator) -> str:
    return classes[int(torch.randint(len(classes), (), generator=generator))]
