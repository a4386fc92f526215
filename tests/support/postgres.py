"""A PostgreSQL server of Debian's package, on a socket in a temporary folder."""

from __future__ import annotations

import getpass
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

START_SECONDS = 30


def find_programs() -> Path | None:
    """Return the folder of initdb and postgres."""
    candidates = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    if found := shutil.which("initdb"):
        candidates.append(Path(found).resolve().parent)
    return next((path for path in candidates if (path / "postgres").exists()), None)


@contextmanager
def run_server() -> Iterator[str]:
    """Start a server; yield the URL of its databases, with `{name}` for their name.

    Skips the test if that is not possible.
    """
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    user = getpass.getuser()
    options: dict[str, Any] = {"cwd": folder}
    if os.getuid() == 0:  # PostgreSQL refuses to run as root
        user = "nobody"
        options |= {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}
        shutil.chown(folder, user)
    server = None
    try:
        try:
            server = start(folder, user, options)
            wait_for(folder, user)
        except (OSError, subprocess.SubprocessError, TimeoutError) as error:
            pytest.skip(f"PostgreSQL cannot be started: {error}")
        yield f"postgresql://{user}@/{{name}}?host={folder}"
    finally:
        if server is not None:
            server.terminate()
            server.wait(START_SECONDS)
        shutil.rmtree(folder, ignore_errors=True)


def start(folder: Path, user: str, options: dict[str, Any]) -> subprocess.Popen[bytes]:
    programs = find_programs()
    if programs is None:
        raise FileNotFoundError("it is not installed")
    data = folder / "data"
    subprocess.run(
        [programs / "initdb", "-D", data, "-U", user, "-A", "trust", "-E", "UTF8", "--no-sync"],
        check=True,
        capture_output=True,
        **options,
    )
    settings = {"listen_addresses": "", "unix_socket_directories": folder, "fsync": "off"}
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            [programs / "postgres", "-D", data, *arguments], stdout=log, stderr=log, **options
        )


def wait_for(folder: Path, user: str) -> None:
    import psycopg

    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            psycopg.connect(host=str(folder), user=user, dbname="postgres").close()
            return
        except psycopg.OperationalError:
            if time.monotonic() > deadline:
                raise TimeoutError("it does not answer") from None
            time.sleep(0.05)


def create_database(url: str, name: str) -> str:
    """Create an empty database; return its URL."""
    import psycopg

    with psycopg.connect(url.format(name="postgres"), autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    return url.format(name=name)
