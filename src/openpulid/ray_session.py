"""Connect to Ray: on this machine, or on a cluster.

Ray reads its environment when it is imported, so that happens in the functions.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from openpulid.errors import OptionError, first_line

LOCAL = "local"
"""The address that starts Ray on this machine."""

AUTO = "auto"
"""The address of the cluster that this machine is part of."""

CONNECT_SECONDS = 10.0
"""How long the first machine of a cluster may take to answer. Ray itself waits for minutes."""

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # processes listen on 127.0.0.1; the name is older than what it does
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # it calls the restart of a worker an error
    "RAY_BACKEND_LOG_LEVEL": "fatal",
}
"""Of Ray on this machine. Its connections also need a token, which Ray writes to ~/.ray."""


def check_address(address: str, option: str = "--ray") -> None:
    """Check an address, and that something answers there.

    Args:
        address: "local", "auto" or HOST:PORT.
        option: of the command line that sets the address, for messages.

    Raises:
        OptionError: it has another form, or nothing answers.
    """
    if address in (LOCAL, AUTO):
        return
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise OptionError(f"{option} {address}: expected local, auto or HOST:PORT.")
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _not_reached(address, option, error) from None


@contextmanager
def connect_ray(
    address: str = LOCAL,
    workers: int | None = None,
    *,
    option: str = "--ray",
    extra: str = "cluster",
) -> Iterator[None]:
    """Start Ray on this machine, or join a cluster, until the block ends.

    A program that has connected to Ray before keeps its connection.

    Args:
        address: see `check_address`; or ray://HOST:PORT of a client server, unless Ray Serve or
            Ray Data is used.
        workers: processes on this machine; one per processor by default.
        option: of the command line that sets the address, for messages.
        extra: of the package that installs Ray, for messages.

    Raises:
        OptionError: Ray is not installed, or the cluster cannot be reached.
    """
    if address == LOCAL:
        os.environ.update(ENVIRONMENT)
    try:
        import ray
        from ray.exceptions import RayError
    except ImportError:
        raise OptionError(f"{option} needs Ray: pip install 'openpulid[{extra}]'.") from None
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if address == LOCAL:
        options |= {"num_cpus": workers, "include_dashboard": False}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address, **options)
    except (ConnectionError, ValueError, RuntimeError, RayError) as error:
        raise _not_reached(address, option, error) from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray has replaced it
    try:
        yield
    finally:
        ray.shutdown()


def _not_reached(address: str, option: str, error: Exception) -> OptionError:
    reason = first_line(error)
    return OptionError(f"{option} {address}: the cluster cannot be reached ({reason}).")
