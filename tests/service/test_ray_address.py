"""Errors of `pulid serve --ray` before Ray is started."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from openpulid.errors import OptionError
from openpulid.service.cluster.run import Place, run_cluster
from openpulid.service.config import ServiceConfig


@pytest.mark.parametrize("address", ["", "ray://host:10001", "host", "host:", "host:port", ":1"])
def test_an_address_of_another_form_is_refused(tmp_path: Path, address: str) -> None:
    place = Place(address, max_replicas=None, host="127.0.0.1", port=8100)
    with pytest.raises(OptionError, match="expected local, auto or HOST:PORT"):
        run_cluster(ServiceConfig(tmp_path), None, place, print)


def test_an_address_where_no_cluster_listens_is_refused(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # but does not listen
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        place = Place(address, max_replicas=None, host="127.0.0.1", port=8100)
        with pytest.raises(OptionError, match=f"--ray {address}: the cluster cannot be reached"):
            run_cluster(ServiceConfig(tmp_path), None, place, print)


def test_a_free_port_cannot_be_chosen(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--port"):
        run_cluster(ServiceConfig(tmp_path), None, Place("local", None, "127.0.0.1", 0), print)
