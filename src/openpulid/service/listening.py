"""Serve an application at an address."""

from __future__ import annotations

import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from openpulid.errors import OptionError

BACKLOG = 1024
"""Connections that wait until the process accepts them."""

SHUTDOWN_SECONDS = 5
"""How long requests may go on when the service stops."""


def run_app(app: FastAPI, host: str, port: int, on_listening: Callable[[str], object]) -> None:
    """Serve an application until the process gets SIGINT or SIGTERM.

    Args:
        app: the application.
        host: address to serve.
        port: 0 takes a free one.
        on_listening: receives the address, as soon as it accepts requests.

    Raises:
        OptionError: the port is in use.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise OptionError(
            f"port {port} is not available ({error.strerror}); choose another with --port."
        ) from None
    with listener:
        name = f"[{host}]" if family == socket.AF_INET6 else host
        on_listening(f"http://{name}:{listener.getsockname()[1]}")
        config = uvicorn.Config(
            app,
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        )
        uvicorn.Server(config).run([listener])
