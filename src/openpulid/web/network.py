"""The environment of the page's server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

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
