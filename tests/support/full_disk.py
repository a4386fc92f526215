"""Fill a small disk under a store, and print what the store says. Argument: the data folder."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from openpulid.errors import StoreError
from openpulid.pipelines.request import GenerationRequest
from openpulid.pipelines.request_inputs import Person
from openpulid.service.jobs import Output
from openpulid.service.store.database import Database
from openpulid.service.store.jobs import JobStore, QueueLimits

PHOTO = {"people.0.images.0": b"x" * 1_000_000}


def attempt(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except StoreError as error:
        return str(error)


def fill(path: Path) -> None:
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(b"\0" * 4096):
            pass


def main() -> None:
    """Run the steps; each entry of the output is one answer of the store."""
    logging.disable()
    data = Path(sys.argv[1])
    store = JobStore(Database.open(data), data, QueueLimits(free_bytes=6_000_000))
    answers: dict[str, Any] = {}

    request = GenerationRequest("portrait", people=[Person(images=["face"])])
    # without a reserve, jobs fill the disk up to the last file
    greedy = JobStore(Database.open(data), data, QueueLimits(free_bytes=0))
    filler = data / "filler"
    jobs = [store.submit("ann", request, PHOTO, None)]
    while not isinstance(answer := attempt(lambda: store.submit("ann", request, PHOTO, None)), str):
        jobs.append(answer)
    answers["submit"] = answer
    fill(filler)
    answers["submit_to_the_last"] = attempt(lambda: greedy.submit("ann", request, PHOTO, None))
    answers["folders"] = len(list(data.glob("jobs/*"))) - len(jobs)
    answers["claim"] = attempt(lambda: store.claim("worker", 1, 10))
    answers["get"] = attempt(lambda: store.get("ann", jobs[0].id)) == jobs[0]
    answers["position"] = attempt(lambda: store.position(jobs[0].id))

    filler.unlink()
    (task,) = store.claim("worker", 1, 10)
    fill(filler)
    output = Output(b"\0" * 50_000, 64, 64)
    answers["publish"] = attempt(lambda: store.publish(task, output))
    filler.unlink()
    answers["publish_later"] = attempt(lambda: store.publish(task, output))
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
