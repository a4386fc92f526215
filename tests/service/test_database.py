"""Opening the database, its schema, and what happens when it fails."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import text

from openpulid.errors import OptionError, StoreError
from openpulid.service.store.database import Database
from openpulid.service.store.jobs import JobStore
from openpulid.service.store.tables import metadata
from tests.service.conftest import portrait


def test_migrations_give_the_tables(database: Database) -> None:
    with database.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_a_current_database_is_opened_as_it_is(database_url: str | None, tmp_path: Path) -> None:
    for _ in range(2):
        database = Database.open(tmp_path, database_url)
        JobStore(database, tmp_path).submit("ann", portrait(), {}, None)
        database.close()
    database = Database.open(tmp_path, database_url)
    assert JobStore(database, tmp_path).count_waiting() == 2
    database.close()


def test_nothing_of_a_failed_transaction_stays(database: Database) -> None:
    with pytest.raises(ZeroDivisionError), database.write() as connection:
        connection.execute(text("INSERT INTO owners VALUES ('ann', 1)"))
        raise ZeroDivisionError
    with database.read() as connection:
        assert connection.execute(text("SELECT count(*) FROM owners")).scalar() == 0


def test_a_database_of_a_newer_version(database_url: str | None, tmp_path: Path) -> None:
    database = Database.open(tmp_path, database_url)
    with database.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '999'"))
    database.close()
    with pytest.raises(OptionError, match="newer version of openpulid; update openpulid"):
        Database.open(tmp_path, database_url)


@pytest.mark.parametrize(
    "url",
    [
        "mysql://ann:secret@host/name",
        "secret",
        "sqlite:///secret",
        "postgresql://u:secret@h:abc/db",
    ],
)
def test_other_databases_are_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="must be PostgreSQL") as error:
        Database.open(tmp_path, url)
    assert "secret" not in str(error.value)


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    """The service removes what it does not know from its folder."""
    (tmp_path / "jobs").mkdir()
    tmp_path.chmod(0o755)
    with pytest.raises(OptionError, match="holds other files than a service's"):
        Database.open(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["jobs"]
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755


def test_a_folder_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match="choose another folder with --data"):
        Database.open(tmp_path / "file" / "data")


def test_a_server_that_does_not_answer(tmp_path: Path) -> None:
    url = f"postgresql://ann:secret@/name?host={tmp_path}"
    with pytest.raises(StoreError, match="cannot be used now; try again later") as error:
        Database.open(tmp_path, url)
    assert "secret" not in str(error.value) and str(tmp_path) not in str(error.value)


def test_a_damaged_sqlite_database(tmp_path: Path) -> None:
    Database.open(tmp_path).close()
    (tmp_path / "service.sqlite3").write_bytes(os.urandom(8192))
    with pytest.raises(StoreError, match="damaged; restore it from a backup"):
        Database.open(tmp_path)


def test_a_database_that_cannot_grow(tmp_path: Path) -> None:
    """SQLite reports the same on a full disk. What is stored stays readable."""
    database = Database.open(tmp_path)
    store = JobStore(database, tmp_path)
    job = store.submit("ann", portrait(), {}, None)
    with database.read() as connection:  # the pool gives the same connection again
        pages = connection.execute(text("PRAGMA page_count")).scalar()
        connection.execute(text(f"PRAGMA max_page_count = {pages}"))
    with pytest.raises(StoreError, match="disk of the service is full; try again later"):
        for _ in range(100):
            store.submit("ann", portrait(negative_prompt="red" * 500), {}, None)
    assert store.get("ann", job.id) == job
    (task,) = store.claim("worker", 1, 10)
    assert task.job_id == job.id
    folders = {path.name for path in tmp_path.glob("jobs/*")}
    with database.read() as connection:
        assert folders == set(connection.execute(text("SELECT id FROM jobs")).scalars())
    database.close()
