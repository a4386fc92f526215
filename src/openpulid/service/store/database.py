"""The database: SQLite in the data folder, or PostgreSQL. One writer at a time on both."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DatabaseError,
    InterfaceError,
    InternalError,
    OperationalError,
    SQLAlchemyError,
    TimeoutError,
)

from openpulid.errors import OptionError, StoreError
from openpulid.service.store.files import open_data_folder

logger = logging.getLogger(__name__)

FILE = "service.sqlite3"
"""Name of the SQLite database in the data folder."""

BUSY_TIMEOUT = 30
"""Seconds that a writer waits for another."""

LOCK_KEY = 0x50754C4944
"""PostgreSQL's advisory lock of the writer."""

POOL_SIZE = 20
"""Connections; requests wait for a free one."""


class Database:
    """Connections to a database of the current schema.

    Writers take turns: a claim, for example, reads the whole queue and must see no half of another
    claim. SQLite has one writer anyway; on PostgreSQL they hold an advisory lock.

    Args:
        engine: SQLAlchemy's.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # one writer of this process at a time takes up a connection, however many wait
        self._turn = threading.Lock()
        self._is_sqlite = engine.dialect.name == "sqlite"

    @classmethod
    def open(cls, folder: Path, url: str | None = None) -> Database:
        """Open the database, and create or upgrade its tables.

        Args:
            folder: the data folder: a new or empty one, or that of an earlier call.
            url: `postgresql://...`; by default SQLite in the data folder.

        Raises:
            OptionError: the URL is none, or of another database, or a newer version created it, or
                the folder holds other files.
            StoreError: the database cannot be opened.
        """
        open_data_folder(folder)
        parsed = _parse_url(folder, url)
        options: dict[str, Any] = {"pool_size": POOL_SIZE, "max_overflow": 0}
        options["hide_parameters"] = True  # prompts and names of owners are not for a log
        if parsed.get_backend_name() == "sqlite":
            assert parsed.database is not None
            _create_private(Path(parsed.database))
            engine = create_engine(parsed, connect_args={"timeout": BUSY_TIMEOUT}, **options)
            _configure_sqlite(engine)
        else:
            engine = create_engine(parsed, pool_pre_ping=True, **options)
        database = cls(engine)
        try:
            with database.write() as connection:
                _upgrade(connection)
        except BaseException:
            database.close()
            raise
        return database

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Open a transaction that only reads.

        Raises:
            StoreError: the database cannot be read.
        """
        with _plain_errors(), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """Open a transaction that excludes other writers. It is on the disk when the block ends.

        Raises:
            StoreError: the database cannot be written; nothing of the block has happened.
        """
        engine = self._engine.execution_options(writes=True)
        with self._turn, _plain_errors(), engine.begin() as connection:
            if not self._is_sqlite:
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK_KEY})")
            yield connection

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()


def _parse_url(folder: Path, url: str | None) -> URL:
    if url is None:
        return URL.create("sqlite", database=str(folder.absolute() / FILE))
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # such as a port that is no number
        parsed = None
    # the URL may hold a password: it is not quoted
    if parsed is None or parsed.get_backend_name() not in ("postgresql", "postgres"):
        raise OptionError(
            "the database must be PostgreSQL, as postgresql://USER@HOST/NAME; without a URL it is "
            "SQLite in the data folder."
        )
    try:
        import psycopg  # noqa: F401
    except ImportError:
        raise OptionError(
            "PostgreSQL needs the package psycopg: pip install 'psycopg[binary]'."
        ) from None
    return parsed.set(drivername="postgresql+psycopg")


def _create_private(file: Path) -> None:
    """Create an empty SQLite database that only its owner can read; SQLite keeps the mode."""
    try:
        os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise StoreError.of_file(error) from error


def _configure_sqlite(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def configure(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # `begin` below opens transactions
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")  # a commit is on the disk
        connection.execute("PRAGMA foreign_keys = ON")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        is_writer = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if is_writer else "BEGIN")


def _upgrade(connection: Connection) -> None:
    """Bring the tables to the newest version."""
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", "openpulid.service.store:migrations")
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError:  # it does not know the version of the tables
        raise OptionError(
            "the database was created by a newer version of openpulid; update openpulid, or choose "
            "another database."
        ) from None


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Turn failures of the database, not of its use, into a StoreError."""
    try:
        yield
    except SQLAlchemyError as error:
        is_failure = isinstance(
            error, (OperationalError, InterfaceError, InternalError, TimeoutError)
        )
        if not is_failure and type(error) is not DatabaseError:
            raise
        reason = str(getattr(error, "orig", error))  # without the statement and its values
        logger.error("database: %s", reason)
        raise StoreError(_describe(reason.lower())) from error


def _describe(reason: str) -> str:
    if "full" in reason or "no space" in reason:
        return "the disk of the service is full; try again later."
    if "malformed" in reason or "not a database" in reason or "corrupt" in reason:
        return "the database of the service is damaged; restore it from a backup."
    return "the database of the service cannot be used now; try again later."
