"""Where the page and the service listen, and which requests they answer."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from openpulid.errors import OptionError

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]


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


class SameOriginMiddleware:
    """Refuses requests that come from other websites (ASGI).

    A website can send requests to a local server, and read the answers if its own name resolves to
    this machine (DNS rebinding). So a request must name the server as `is_own_host` says, and must
    not come from a page with another origin.

    Args:
        app: the application.
        is_own_host: whether a host name or address, in lower case, is one of this server.
        refusal: an application that answers all other requests.
    """

    def __init__(self, app: App, is_own_host: Callable[[str], bool], refusal: App) -> None:
        self.app = app
        self.is_own_host = is_own_host
        self.refusal = refusal

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] not in ("http", "websocket") or self.is_same_origin(
            {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        ):
            await self.app(scope, receive, send)
            return
        await self.refusal(scope, receive, send)

    def is_same_origin(self, headers: Mapping[str, str]) -> bool:
        """Return whether a request is for this server, and from a page of it."""
        host = headers.get("host", "")
        try:
            name = urlsplit(f"//{host}").hostname or ""
            origin = urlsplit(headers.get("origin", f"//{host}")).netloc
        except ValueError:  # not an address
            return False
        return origin == host and self.is_own_host(name)


def own_hosts(host: str) -> Callable[[str], bool]:
    """Return a function that tells whether a host is an IP address or a name of this machine.

    Args:
        host: a further name or address that is served.
    """
    machine = socket.gethostname().lower()
    names = {"localhost", host.lower(), machine, f"{machine}.local", socket.getfqdn().lower()}
    return lambda name: name in names or _is_ip_address(name)


def _is_ip_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
