"""What every request passes before it reaches a route (ASGI middleware)."""

from __future__ import annotations

import time
from typing import Any

from starlette.datastructures import Headers, MutableHeaders

from openpulid.io.serving import App, Scope
from openpulid.service.api.metrics import Metrics
from openpulid.service.api.problems import Problem

HEADERS = {
    "Cache-Control": "no-store",  # images of people stay out of caches
    "X-Content-Type-Options": "nosniff",
}
"""Headers of every response, unless the route sets another one."""


class BodyLimit:
    """Refuses requests whose body is too large, also if their length is not declared.

    Args:
        app: the application.
        max_bytes: of a body.
    """

    def __init__(self, app: App, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Pass the request on, or answer it with status 413."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdecimal() and int(length) > self.max_bytes:
            await self._too_large().to_response()(scope, receive, send)
            return
        received = 0

        async def receive_limited() -> Any:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                raise self._too_large()
            return message

        await self.app(scope, receive_limited, send)

    def _too_large(self) -> Problem:
        limit = f"{self.max_bytes / 2**20:g} MB"
        return Problem(413, f"the request is larger than {limit}; send smaller images.")


class Observer:
    """Measures requests, and adds the headers of every response.

    Args:
        app: the application.
        metrics: receives the status and the duration.
    """

    def __init__(self, app: App, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.perf_counter()
        status = 500

        async def send_observed(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self.app(scope, receive, send_observed)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.observe(scope["method"], route, status, time.perf_counter() - start)
