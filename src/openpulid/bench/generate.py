"""Making the images of a run: every method with the same people, prompts and seeds."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from openpulid.bench.perf.timing import peak, reset_peak, wait
from openpulid.bench.run_dir import BASE, WEIGHTS, Job, RunDir, SampleKey, Subject, chunks
from openpulid.bench.suite import Suite
from openpulid.device import hardware_name
from openpulid.errors import PulidError
from openpulid.identity.identity import Identity
from openpulid.io.checkpoints import fingerprint
from openpulid.pipelines.presets import Preset
from openpulid.pipelines.studio import Studio
from openpulid.pipelines.weights import resolve_path

LIBRARIES = ("torch", "diffusers", "transformers")
OF_THE_BASE, OF_METHODS = (
    ("pipeline", "unet", "transformer"),
    ("detector", "recognition", "face_parsing", "vision_encoder"),
)
STORED = (".safetensors", ".bin", ".ckpt")


class Worker:
    """Methods on one base model, and the people that they are shown.

    Args:
        suite: what is asked.
        studios: method -> a studio with it; "base" has none and comes first.
        sitters: the people, by name.
        folder: where it all goes.
        start: what all workers of one start of a run call it; times of different starts are not compared.
    """

    def __init__(
        self,
        suite: Suite,
        studios: Mapping[str, Studio],
        sitters: Mapping[str, Subject],
        folder: RunDir,
        start: str | None = None,
    ) -> None:
        self.suite, self.studios, self.sitters, self.folder, self.start = (
            suite,
            studios,
            sitters,
            folder,
            start,
        )
        # of the files as they were loaded: one that is replaced later changes no image of this contest
        self._made = {
            name: configuration(name, studio.preset, suite.options)
            for name, studio in studios.items()
        }
        self._known: dict[tuple[str, str], tuple[Identity, float]] = {}

    def make(self, chunk: Job) -> None:
        """Images of a chunk and their records. What goes wrong is recorded."""
        first = chunk.cells[0]
        studio = self.studios[first.method]
        options = dict(self.suite.options)
        facts: dict[str, Any] = {
            "configuration": self._made[first.method],
            "start": self.start,
            **surroundings(studio),
        }
        try:
            # of several adapters on one pipeline the last attached one serves it
            studio.adapter.attach(studio.pipe)
            identity, knowing = self._identity(first, studio)
            reset_peak(studio.pipe.device)
            begun = time.perf_counter()
            seeds = [cell.seed for cell in chunk.cells]
            images = [
                studio.generate(
                    self.suite.prompts[first.prompt].text, identity, seed=seed, **options
                )
                for seed in seeds
            ]
            wait(studio.pipe.device)
            seconds = (time.perf_counter() - begun) / len(seeds)
        except (
            Exception
        ) as error:  # whatever it is: a benchmark that stops at one picture tells nothing
            told = (
                str(error) if isinstance(error, PulidError) else f"{type(error).__name__}: {error}"
            )
            for cell in chunk.cells:
                self.folder.keep(
                    cell, {"cell": asdict(cell), "status": "failed", "error": told, **facts}
                )
            return
        facts |= {
            "seconds": round(seconds, 4),
            "identify_seconds": round(knowing, 4),
            "memory": peak(studio.pipe.device),
        }
        for cell, result in zip(chunk.cells, images, strict=True):
            self.folder.keep(
                cell, {"cell": asdict(cell), "status": "done", **facts}, result.images[0]
            )

    def _identity(self, cell: SampleKey, studio: Studio) -> tuple[Identity | None, float]:
        """Who it is to this method, and the seconds it took to know; known once."""
        if cell.method == BASE:
            return None, 0.0
        key = cell.method, cell.person
        if key not in self._known:
            begun = time.perf_counter()
            identity = studio.identify(self.sitters[cell.person].portrait)
            wait(studio.pipe.device)
            self._known[key] = identity, time.perf_counter() - begun
        return self._known[key]


def configuration(method: str, preset: Preset, options: Mapping[str, Any]) -> dict[str, Any]:
    """What an image is made with, as JSON gives it back: weights by the fingerprints of their files.

    Raises:
        OSError, WeightsError: a file of weights is not there.
    """
    defaults = preset.with_defaults(**options).defaults
    said: dict[str, Any] = {
        "preset": preset.name,
        "sampler": preset.models.sampler,
        "steps": defaults.num_inference_steps,
        "guidance": defaults.guidance_scale,
        "negative": defaults.negative_prompt,
        "size": [defaults.width, defaults.height],
    }
    # every place is told, an empty one too: its absence from a record means an older run
    places = OF_THE_BASE if method == BASE else (*OF_THE_BASE, *OF_METHODS)
    said[WEIGHTS] = {
        name: stored(resolve_path(place)) if (place := getattr(preset.models, name)) else []
        for name in places
    }
    if method != BASE:
        place = resolve_path(preset.models.adapter)
        files = sorted(place.rglob("*.safetensors")) if place.is_dir() else [place]
        said |= {
            **defaults.identity.model_dump(exclude_none=True),
            "adapter": [fingerprint(file) for file in files],
        }
        said[WEIGHTS]["adapter"] = stored(place)
        if (
            preset.models.method == "instantid"
            and place.is_file()
            and (net := place.parent / "ControlNetModel").is_dir()
        ):
            said[WEIGHTS]["adapter"] += stored(net)  # beside the file; a folder has it inside
    known: dict[str, Any] = json.loads(json.dumps(said))
    return known


def stored(place: Path) -> list[str]:
    """Fingerprints of a file of weights, or of all in a folder and in those in it, as a pipeline's parts lie.

    Raises:
        OSError: it is not there.
    """
    if not place.is_dir():
        return [fingerprint(place)]
    files = sorted(
        [*place.glob("*"), *place.glob("*/*")]
    )  # unlike **, it follows a part that is a link
    return [fingerprint(file) for file in files if file.suffix in STORED and file.is_file()]


def surroundings(studio: Studio) -> dict[str, Any]:
    """Where it was made."""
    return {
        "versions": {name: version(name) for name in LIBRARIES},
        "hardware": hardware_name(studio.pipe.device),
    }


Executor = Callable[[Iterable[Job]], Iterable[Job]]
"""Makes chunks, wherever, and gives each back when it is made."""


class Progress(Protocol):
    """How far a run is."""

    def __call__(self, done: int, total: int) -> None: ...


def run(
    suite: Suite,
    presets: Mapping[str, Preset],
    sitters: Sequence[Subject],
    folder: RunDir,
    spread: Executor,
    on_progress: Progress | None = None,
) -> None:
    """Every image that is missing, or that was made otherwise than it would be now.

    Args:
        presets: method -> what it is used with; the base comes first.
    """
    asked = {
        method: configuration(method, preset, suite.options) for method, preset in presets.items()
    }
    folder.begin(
        suite, list(presets), sitters
    )  # after that: a row whose file is missing is not written down
    wanted = list(chunks(suite, list(presets), [sitter.name for sitter in sitters]))
    missing = [
        chunk
        for chunk in wanted
        if not all(folder.done(cell, asked[cell.method]) for cell in chunk.cells)
    ]
    for count, _ in enumerate(spread(missing), len(wanted) - len(missing) + 1):
        if on_progress:
            on_progress(count, len(wanted))


def here(contest: Worker) -> Executor:
    """In this process, one after the other."""

    def spread(chunks: Iterable[Job]) -> Iterable[Job]:
        for chunk in chunks:
            contest.make(chunk)
            yield chunk

    return spread
