"""The service on one machine: its data folder, its queue, and its worker."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from openpulid.service.api.backend import Backend
from openpulid.service.catalog import Catalog
from openpulid.service.config import ServiceConfig
from openpulid.service.queue.dispatcher import Dispatcher
from openpulid.service.queue.engine import LocalEngine
from openpulid.service.queue.periodic import Periodic
from openpulid.service.store.database import Database
from openpulid.service.store.identities import IdentityStore
from openpulid.service.store.jobs import JobStore, QueueLimits

logger = logging.getLogger(__name__)

EXPIRE_SECONDS = 60.0
"""Between two removals of jobs and identities whose time is over."""


@contextmanager
def open_backend(config: ServiceConfig) -> Iterator[Backend]:
    """Open the queue of a service, and run its jobs until the block ends.

    The first preset is loaded in the background; requests wait for it.

    Args:
        config: of the service.

    Raises:
        OptionError: a preset or the database does not exist, or another process uses the folder.
        WeightsError: weights are not installed.
        StoreError: the database or the folder cannot be used.
    """
    catalog = Catalog(config.models)
    engine = LocalEngine(config.device, config.max_studios)
    with ExitStack() as stack:
        jobs, identities = stack.enter_context(open_stores(config))
        dispatcher = Dispatcher(jobs, engine, config.worker, config.max_batch)
        dispatcher.start()
        stack.callback(dispatcher.stop)
        is_loaded = load_in_background(lambda: engine.studio(catalog.find().preset.selection))
        yield Backend(config, catalog, jobs, identities, engine, is_loaded, dispatcher.wake)


@contextmanager
def open_stores(config: ServiceConfig) -> Iterator[tuple[JobStore, IdentityStore]]:
    """Open the queue and the identities, and remove what expires until the block ends.

    Raises:
        OptionError: the database does not exist.
        StoreError: the database or the folder cannot be used.
    """
    limits = QueueLimits(config.limits.jobs, config.limits.jobs_per_key, config.job_seconds)
    with ExitStack() as stack:
        database = Database.open(config.data, config.database)
        stack.callback(database.close)
        jobs = JobStore(database, config.data, limits)
        identities = IdentityStore(database, config.data, config.identity_seconds)
        for store in (jobs, identities):
            stack.enter_context(Periodic(store.expire, EXPIRE_SECONDS))
        yield jobs, identities


def load_in_background(load: Callable[[], object]) -> Callable[[], bool]:
    """Call a function in a thread.

    Returns:
        Whether it has succeeded by now.
    """
    is_loaded = threading.Event()

    def run() -> None:
        try:
            load()
        except Exception:
            logger.exception("the first preset cannot be loaded; the service is not ready")
        else:
            is_loaded.set()

    threading.Thread(target=run, daemon=True).start()
    return is_loaded.is_set
