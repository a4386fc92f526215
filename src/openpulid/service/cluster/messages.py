"""What the ingress and the replicas send to each other.

Only the ingress can open the data folder. So the input files of a batch travel as bytes, and a
replica writes them into a folder of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from openpulid.errors import PulidError, StoreError
from openpulid.io.temporary import private_directory
from openpulid.service.jobs import Output, Task, is_service_problem
from openpulid.service.store.records import list_inputs


@dataclass(frozen=True)
class StepEvent:
    """A step is done.

    Attributes:
        positions: in the batch, of the tasks that run together.
        step: steps of each image that are done.
        total: steps of each image.
        previews: position in the batch -> a small image of what the step gave, for some tasks.
    """

    positions: Sequence[int]
    step: int
    total: int
    previews: Mapping[int, Image.Image] = field(default_factory=dict)


@dataclass(frozen=True)
class ResultEvent:
    """A task is done.

    Attributes:
        position: in the batch.
        result: the image, or why there is none.
    """

    position: int
    result: Output | PulidError


Event = StepEvent | ResultEvent


@dataclass(frozen=True)
class SentFiles:
    """Files on their way to another machine.

    Attributes:
        contents: path on the first machine -> content.
    """

    contents: Mapping[str, bytes]

    @contextmanager
    def write(self) -> Iterator[dict[str, str]]:
        """Write the files into a private folder, which is removed when the block ends.

        Yields:
            Path on the first machine -> path on this one.
        """
        with private_directory() as folder:
            paths = {}
            for number, (source, content) in enumerate(self.contents.items()):
                path = Path(folder, str(number), Path(source).name)
                path.parent.mkdir()
                path.write_bytes(content)
                paths[source] = str(path)
            yield paths


def name_sources(error: PulidError, paths: Mapping[str, str]) -> PulidError:
    """Return an error with the files' names on the machine that has sent them.

    Its cause stays here: other machines may lack the library that has raised it.

    Args:
        error: the error.
        paths: of `SentFiles.write`.

    Returns:
        A `StoreError` if the service is the cause, otherwise a `PulidError`.
    """
    sentence = str(error)
    for source, path in paths.items():
        sentence = sentence.replace(path, source)
    return StoreError(sentence) if is_service_problem(error) else PulidError(sentence)


@dataclass(frozen=True)
class Batch:
    """Tasks of equal batch key with their input files.

    Attributes:
        tasks: as they were claimed.
        files: their input files.
    """

    tasks: tuple[Task, ...]
    files: SentFiles

    def localize(self, paths: Mapping[str, str]) -> list[Task]:
        """Return the tasks with the files of this machine.

        Args:
            paths: of `SentFiles.write`.
        """
        return [_localize(task, paths) for task in self.tasks]


def _localize(task: Task, paths: Mapping[str, str]) -> Task:
    files = {name: paths[path] for name, path in list_inputs(task.request)}
    return replace(task, request=task.request.with_files(files))
