"""Identities of owners."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch

from openpulid.errors import StoreError
from openpulid.identity.identity import Identity
from openpulid.pipelines.request_inputs import Person
from openpulid.service.store.database import Database
from openpulid.service.store.identities import IdentityStore
from openpulid.service.store.jobs import JobStore
from tests.service.conftest import Clock, portrait
from tests.support.people import anna


@pytest.fixture
def identities(database: Database, tmp_path: Path, clock: Clock) -> IdentityStore:
    return IdentityStore(database, tmp_path / "data", lifetime=100, clock=clock)


def test_an_identity_is_stored_for_its_owner(identities: IdentityStore, clock: Clock) -> None:
    stored = identities.put("ann", anna)
    assert stored.expires.timestamp() == clock.now + 100
    assert identities.get("ann", stored.id) == stored
    assert identities.get("ben", stored.id) is None and not identities.delete("ben", stored.id)
    assert torch.equal(Identity.load(stored.file).id_cond, anna.id_cond)
    assert stat.S_IMODE(stored.file.stat().st_mode) == 0o600


def test_no_identity_is_stored_on_a_disk_that_is_almost_full(
    database: Database, tmp_path: Path
) -> None:
    identities = IdentityStore(database, tmp_path / "data", free_bytes=1 << 62)
    with pytest.raises(StoreError, match="the disk of the service is full"):
        identities.put("ann", anna)
    assert not list(tmp_path.glob("data/identities/*"))


def test_delete(identities: IdentityStore) -> None:
    stored = identities.put("ann", anna)
    assert identities.delete("ann", stored.id)
    assert not stored.file.exists() and identities.get("ann", stored.id) is None
    assert not identities.delete("ann", stored.id)


def test_identities_expire(identities: IdentityStore, clock: Clock) -> None:
    old = identities.put("ann", anna)
    clock.now += 60
    new = identities.put("ann", anna)
    clock.now += 60
    assert identities.get("ann", old.id) is None
    identities.expire()
    assert not old.file.exists() and identities.get("ann", new.id) == new


def test_files_without_a_record_are_removed(identities: IdentityStore) -> None:
    stored = identities.put("ann", anna)
    old, new = (stored.file.with_name(f"identity-{name}.safetensors") for name in ("old", "new"))
    for path in (old, new):
        path.touch()
    os.utime(old, (0, 0))
    os.utime(stored.file, (0, 0))
    identities.expire()
    assert not old.exists() and new.exists() and stored.file.exists()


def test_a_missing_file_is_no_identity(identities: IdentityStore) -> None:
    stored = identities.put("ann", anna)
    stored.file.unlink()
    assert identities.get("ann", stored.id) is None


def test_a_job_keeps_a_deleted_identity(identities: IdentityStore, store: JobStore) -> None:
    stored = identities.put("ann", anna)
    request = portrait(people=[Person(identity=stored.id)])
    store.submit("ann", request, {"people.0.identity": stored.file}, None)
    identities.delete("ann", stored.id)
    (task,) = store.claim("worker", 1, 10)
    file = task.request.people[0].identity
    assert file and torch.equal(Identity.load(file).id_cond, anna.id_cond)
