"""Errors of `pulid serve --ray` before Ray is started."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from openpulid.errors import OptionError
from openpulid.pipelines.request import ModelSelection
from openpulid.service.cluster.run import Place, make_paths_absolute, run_cluster
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


def test_paths_do_not_depend_on_the_folder_of_a_replica(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.safetensors").write_bytes(b"")
    for name in ("mini", "open", "juggernaut"):
        (tmp_path / name).mkdir()
    selection = ModelSelection(
        preset="mini", adapter="mine.safetensors", base="juggernaut", face_pack="open"
    )
    files = (Path("cert.pem"), Path("key.pem"))
    config = ServiceConfig(Path("data"), (selection,), signer_files=files)
    absolute = make_paths_absolute(config)
    assert absolute.data == tmp_path / "data"
    assert absolute.signer_files == (tmp_path / "cert.pem", tmp_path / "key.pem")
    (models,) = absolute.models
    assert models.adapter == str(tmp_path / "mine.safetensors")
    assert (models.preset, models.base, models.face_pack) == ("mini", "juggernaut", "open")


def test_a_free_port_cannot_be_chosen(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--port"):
        run_cluster(ServiceConfig(tmp_path), None, Place("local", None, "127.0.0.1", 0), print)
