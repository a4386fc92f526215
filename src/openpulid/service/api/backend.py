"""What the routes work with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from openpulid.service.catalog import Catalog
from openpulid.service.config import ServiceConfig
from openpulid.service.queue.engine import Engine
from openpulid.service.store.identities import IdentityStore
from openpulid.service.store.jobs import JobStore


@dataclass(frozen=True)
class Backend:
    """The queue, and what accepts and runs its jobs.

    Attributes:
        config: limits and lifetimes.
        catalog: the presets that are offered.
        jobs: the queue.
        identities: those of all owners.
        engine: extracts identities.
        is_ready: whether the first preset is loaded.
        wake: lets the worker look at the queue at once.
    """

    config: ServiceConfig
    catalog: Catalog
    jobs: JobStore
    identities: IdentityStore
    engine: Engine
    is_ready: Callable[[], bool]
    wake: Callable[[], None]
