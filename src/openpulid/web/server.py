"""How the page is served: to its own browser tab alone, and without Gradio's services."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]

REFUSAL = (
    b"The page is only served to itself. Open it by the IP address of its machine, or as localhost."
)


def launch_options(host: str) -> dict[str, Any]:
    """Return the arguments of `Blocks.launch` for a private page.

    Gradio would store photos and prompts in the browser, offer to send them to a bucket, and
    advertise a public link.

    Args:
        host: the address that is served.
    """
    import gradio as gr
    from starlette.middleware import Middleware

    return {
        # local fonts only
        "theme": gr.themes.Default(
            primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["monospace"]
        ),
        "css_paths": Path(__file__).with_name("page.css"),
        "server_name": host,
        "share": False,
        "quiet": True,
        "run_history": False,
        "footer_links": [],
        "max_file_size": "50mb",
        "app_kwargs": {"middleware": [Middleware(SameOriginMiddleware, host=host)]},
    }


class SameOriginMiddleware:
    """Refuses requests that come from other websites (ASGI).

    A website can send requests to a local server, and read the answers if its own name resolves to
    this machine (DNS rebinding). So a request must name the server by an IP address or by a name of
    this machine, and must not come from a page with another origin.

    Args:
        app: the application.
        host: a name or address under which the page is served.
    """

    def __init__(self, app: App, host: str) -> None:
        self.app = app
        name = socket.gethostname().lower()
        self.names = {"localhost", host.lower(), name, f"{name}.local", socket.getfqdn().lower()}

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Pass the request on, or answer it with status 403."""
        if scope["type"] not in ("http", "websocket") or self.is_same_origin(
            {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        ):
            await self.app(scope, receive, send)
            return
        from starlette.responses import Response

        await Response(REFUSAL, 403, media_type="text/plain")(scope, receive, send)

    def is_same_origin(self, headers: Mapping[str, str]) -> bool:
        """Return whether a request is for this machine, and from a page of this server."""
        host = headers.get("host", "")
        try:
            name = urlsplit(f"//{host}").hostname or ""
            origin = urlsplit(headers.get("origin", f"//{host}")).netloc
        except ValueError:  # not an address
            return False
        return origin == host and (name in self.names or _is_ip_address(name))


def _is_ip_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
