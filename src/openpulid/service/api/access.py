"""API keys: who sends a request."""

from __future__ import annotations

import hmac
import os
import re
from hashlib import sha256
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from openpulid.errors import OptionError
from openpulid.service.api.problems import Problem

LOCAL_OWNER = "local"
"""Owner of all jobs of a service without API keys."""

MIN_KEY = 20
"""Characters of a key; shorter ones could be guessed."""

NAME = re.compile(r"[\w.@-]{1,64}")


class ApiKeys:
    """The keys that are accepted. Only their hashes are kept in memory.

    Args:
        hashes: name of a key -> SHA-256 of the key. Without any, every request is accepted.
    """

    def __init__(self, hashes: dict[str, bytes] | None = None) -> None:
        self._hashes = hashes or {}

    @property
    def are_required(self) -> bool:
        """Whether a request needs a key."""
        return bool(self._hashes)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> ApiKeys:
        """Read a file with one key per line: its name, a space, and the key.

        The name owns the jobs and identities, so that a key can be replaced by another one. Empty
        lines and lines that begin with # are skipped.

        Raises:
            OptionError: the file cannot be read, or a line is no name and key.
        """
        try:
            lines = Path(path).read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise OptionError(f"{path} cannot be read ({reason}).") from None
        hashes: dict[str, bytes] = {}
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            # the message does not quote the line, which may hold a key
            name, key = _parse_line(line, f"{path}, line {number}")
            digest = _hash(key)
            if name in hashes or digest in hashes.values():
                raise OptionError(
                    f"{path}, line {number}: its name or its key is that of another line; each is "
                    "used once."
                )
            hashes[name] = digest
        if not hashes:
            raise OptionError(f"{path} holds no key; write one NAME KEY per line.")
        return cls(hashes)

    def find_owner(self, key: str) -> str | None:
        """Return the name of a key; None if it is not accepted.

        The time does not depend on the key: all hashes are compared completely.
        """
        if not self._hashes:
            return LOCAL_OWNER
        digest = _hash(key)
        owner = None
        for name, known in self._hashes.items():
            if hmac.compare_digest(digest, known):
                owner = name
        return owner


def _parse_line(line: str, location: str) -> tuple[str, str]:
    parts = line.split()
    if len(parts) != 2 or not NAME.fullmatch(parts[0]):
        raise OptionError(f"{location}: expected a name and a key with a space between them.")
    if len(parts[1]) < MIN_KEY:
        raise OptionError(
            f"{location}: the key is shorter than {MIN_KEY} characters; "
            "`openssl rand -hex 24` prints one."
        )
    return parts[0], parts[1]


def _hash(key: str) -> bytes:
    return sha256(key.encode("utf-8", "surrogateescape")).digest()


_bearer = HTTPBearer(auto_error=False, description="An API key of the service.")


def authenticate(
    request: Request,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)],
) -> str:
    """Return the name of the API key of a request.

    Raises:
        Problem: there is none, or it is not accepted (401).
    """
    keys: ApiKeys = request.app.state.keys
    owner = keys.find_owner("" if credentials is None else credentials.credentials)
    if owner is None:
        raise Problem(
            401,
            "the API key is missing or not accepted; send it as Authorization: Bearer KEY.",
            headers={"WWW-Authenticate": "Bearer"},
        )
    return owner


Owner = Annotated[str, Depends(authenticate)]
"""The name of the API key of a request: a parameter of a route."""
