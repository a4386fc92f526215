"""Stores on both databases."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from openpulid.pipelines.request import GenerationRequest
from openpulid.service.store.database import Database
from openpulid.service.store.jobs import JobStore, QueueLimits
from tests.support.postgres import create_database, run_server

numbers = itertools.count()


class Clock:
    """A time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    with run_server() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str | None:
    if request.param == "sqlite":
        return None
    return create_database(request.getfixturevalue("postgres"), f"test{next(numbers)}")


@pytest.fixture
def database(database_url: str | None, tmp_path: Path) -> Iterator[Database]:
    database = Database.open(tmp_path / "data", database_url)
    yield database
    database.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def create_store(database: Database, tmp_path: Path, clock: Clock) -> Callable[..., JobStore]:
    def create(**limits: Any) -> JobStore:
        return JobStore(database, tmp_path / "data", QueueLimits(**limits), clock)

    return create


@pytest.fixture
def store(create_store: Callable[..., JobStore]) -> JobStore:
    return create_store()


def portrait(num_images: int = 1, **options: Any) -> GenerationRequest:
    return GenerationRequest("portrait", num_images=num_images, **options)
