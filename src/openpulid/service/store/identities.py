"""The identities of owners: files with a lifetime. Nobody else can name them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import delete, insert, select

from openpulid.errors import IdentityError, StoreError
from openpulid.service.jobs import StoredIdentity
from openpulid.service.store.database import Database
from openpulid.service.store.files import (
    FREE_BYTES,
    check_free_space,
    make_private_folder,
    plain_errors,
    remove_file,
    remove_orphans,
    sync_folder,
)
from openpulid.service.store.tables import identities, to_datetime

if TYPE_CHECKING:
    from openpulid.identity.identity import Identity

DAY = 24 * 3600
SUFFIX = ".safetensors"


class IdentityStore:
    """Identity files in a data folder, and their owners in a database.

    Args:
        database: of `Database.open`.
        folder: the data folder.
        lifetime: seconds for which an identity is kept.
        free_bytes: space on the disk below which no identity is stored.
        clock: the time in seconds since 1970.
    """

    def __init__(
        self,
        database: Database,
        folder: Path,
        lifetime: float = 30 * DAY,
        free_bytes: int = FREE_BYTES,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._folder = folder.absolute() / "identities"
        self._lifetime = lifetime
        self._free_bytes = free_bytes
        self._clock = clock
        make_private_folder(self._folder)

    def put(self, owner: str, identity: Identity) -> StoredIdentity:
        """Store an identity.

        Raises:
            StoreError: the disk is full, or the database is not available.
        """
        check_free_space(self._folder, self._free_bytes)
        identity_id = f"identity-{secrets.token_hex(16)}"
        file = self._file(identity_id)
        now = self._clock()
        row = {"id": identity_id, "owner": owner, "created": now, "expires": now + self._lifetime}
        try:
            self._save(identity, file)
            with self._database.write() as connection:
                connection.execute(insert(identities).values(**row))
        except BaseException:
            remove_file(file)
            raise
        return StoredIdentity(
            identity_id, owner, to_datetime(now), to_datetime(now + self._lifetime), file
        )

    def get(self, owner: str, identity_id: str) -> StoredIdentity | None:
        """Return an identity of an owner; None if the owner has no such identity."""
        query = select(identities).where(
            identities.c.id == identity_id,
            identities.c.owner == owner,
            identities.c.expires > self._clock(),
        )
        with self._database.read() as connection:
            row = connection.execute(query).first()
        if row is None or not self._file(row.id).is_file():
            return None
        return StoredIdentity(
            row.id,
            row.owner,
            to_datetime(row.created),
            to_datetime(row.expires),
            self._file(row.id),
        )

    def delete(self, owner: str, identity_id: str) -> bool:
        """Remove an identity of an owner; return whether there was one.

        Jobs that have been submitted with it keep their copy until they end.
        """
        condition = (identities.c.id == identity_id, identities.c.owner == owner)
        with self._database.write() as connection:
            count = connection.execute(delete(identities).where(*condition)).rowcount
        if count:
            remove_file(self._file(identity_id))
        return count > 0

    def expire(self) -> None:
        """Remove identities whose time is over, and files that no row names."""
        with self._database.write() as connection:
            expired = identities.c.expires <= self._clock()
            names = connection.execute(select(identities.c.id).where(expired)).scalars().all()
            connection.execute(delete(identities).where(expired))
        for identity_id in names:
            remove_file(self._file(identity_id))
        with self._database.read() as connection:
            stored = set(connection.execute(select(identities.c.id)).scalars())
        remove_orphans(self._folder, {self._file(identity_id).name for identity_id in stored})

    def _file(self, identity_id: str) -> Path:
        return self._folder / (identity_id + SUFFIX)

    @staticmethod
    def _save(identity: Identity, file: Path) -> None:
        try:
            identity.save(file)
        except IdentityError as error:
            cause: Any = error.__cause__ and error.__cause__.__cause__
            if isinstance(cause, OSError):
                with plain_errors(file):
                    raise cause from error
            raise StoreError("a file of the service cannot be written; try again later.") from error
        with plain_errors(file):
            sync_folder(file.parent)
