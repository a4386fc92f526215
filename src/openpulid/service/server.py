"""The service on one machine: its data folder, its queue, and its worker."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
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
    limits = QueueLimits(config.limits.jobs, config.limits.jobs_per_key, config.job_seconds)
    with ExitStack() as stack:
        database = Database.open(config.data, config.database)
        stack.callback(database.close)
        jobs = JobStore(database, config.data, limits)
        identities = IdentityStore(database, config.data, config.identity_seconds)
        engine = LocalEngine(config.device, config.max_studios)
        dispatcher = Dispatcher(jobs, engine, config.worker, config.max_batch)
        dispatcher.start()
        stack.callback(dispatcher.stop)
        for store in (jobs, identities):
            stack.enter_context(Periodic(store.expire, EXPIRE_SECONDS))
        is_loaded = threading.Event()

        def load() -> None:
            try:
                engine.studio(catalog.find().preset.selection)
            except Exception:
                logger.exception("the first preset cannot be loaded; the service is not ready")
            else:
                is_loaded.set()

        threading.Thread(target=load, daemon=True).start()
        yield Backend(config, catalog, jobs, identities, engine, is_loaded.is_set, dispatcher.wake)
