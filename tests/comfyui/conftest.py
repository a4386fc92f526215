"""Servers that the tests over HTTP share: starting one takes most of their time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from tests.support.comfyui_server import TEST_PACK, Server, both_packs, serve


@pytest.fixture(scope="session")
def servers(tmp_path_factory) -> Iterator[tuple[Server, Server]]:
    """One with the node pack, and one that never loads it; they start at the same time."""
    with (
        serve(tmp_path_factory.mktemp("comfyui"), *both_packs()) as server,
        serve(tmp_path_factory.mktemp("plain"), TEST_PACK) as plain_server,
    ):
        sides = {"left": (0, 48), "right": (48, 96)}
        for name, (first, end) in sides.items():
            mask = np.zeros((96, 96, 3), np.uint8)
            mask[:, first:end] = 255
            Image.fromarray(mask).save(server.directory / "input" / f"{name}.png")
        server.wait_until_ready()
        plain_server.wait_until_ready()
        yield server, plain_server


@pytest.fixture(scope="session")
def server(servers) -> Server:
    """The server with the node pack."""
    return servers[0]


@pytest.fixture(scope="session")
def plain_server(servers) -> Server:
    """The server that never loads the node pack."""
    return servers[1]
