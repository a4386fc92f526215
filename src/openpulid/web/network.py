"""The address of the page, and the environment of its server."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from openpulid.errors import OptionError

CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR")
"""Variables that make every client fail if they name a file that does not exist."""


@contextmanager
def without_proxy() -> Iterator[None]:
    """Let Gradio reach its own server: ignore the environment's proxy and certificates.

    The page itself needs no network.
    """
    changes: dict[str, str | None] = {"NO_PROXY": "*", "no_proxy": "*"}
    changes |= dict.fromkeys(CERTIFICATES)
    saved = {name: os.environ.get(name) for name in changes}
    _set_environment(changes)
    try:
        yield
    finally:
        _set_environment(saved)


def _set_environment(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_address(host: str, port: int) -> None:
    """Check that a server can be opened at an address.

    Raises:
        OptionError: the host is not an address of this machine, or the port is in use.
    """
    bad_host = OptionError(
        f"--host {host} is not an address of this machine; use 127.0.0.1 for this machine alone, "
        "or 0.0.0.0 for the whole network."
    )
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise bad_host from None
    family, kind, protocol, _, address = addresses[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise bad_host from None
            raise OptionError(
                f"port {port} is not available ({error.strerror}); choose another with --port."
            ) from None
