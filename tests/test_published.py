"""Published weights: what is here is found without a network, what is missing is named, a mirror serves downloads."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import huggingface_hub.constants
import pytest

from openpulid import published
from openpulid.errors import OptionError, WeightsError
from openpulid.presets import PRESETS

CONTENT = bytes(range(256)) * 400
COMMIT = "a" * 40


class Mirror(BaseHTTPRequestHandler):
    """As much of the hub as one file needs; counts what it was asked."""

    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_GET(self) -> None:
        self._answer(CONTENT)

    def _answer(self, body: bytes) -> None:
        self.asked.append(f"{self.command} {self.path}")
        known = self.path == "/guozinan/PuLID/resolve/main/pulid_v1.1.safetensors"
        self.send_response(200 if known else 404)
        self.send_header("ETag", f'"{hashlib.sha256(CONTENT).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(CONTENT) if known else 0))
        self.end_headers()
        if known:
            self.wfile.write(body)

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(published.FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "hub"


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[list[str]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    Mirror.asked.clear()
    yield Mirror.asked
    server.shutdown()


def test_what_is_missing_is_named_with_its_command(cache: Path) -> None:
    with pytest.raises(WeightsError, match=r"pulid_v1\.bin is not on this machine; `pulid weights get pulid-v1`"):
        published.locate("pulid-v1")
    with pytest.raises(OptionError, match=r"pulid-v1, pulid-v1\.1"):
        published.locate("pulid-v2")


def test_a_folder_comes_before_the_variable(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pulid_v1.bin").write_bytes(b"x")
    monkeypatch.setenv(published.FOLDER_VARIABLE, str(tmp_path / "two"))
    assert published.locate("pulid-v1") == tmp_path / "two" / "pulid_v1.bin"
    assert published.locate("pulid-v1", tmp_path / "one") == tmp_path / "one" / "pulid_v1.bin"


def test_a_mirror_is_asked_once_and_never_again(mirror: list[str], cache: Path) -> None:
    said: list[str] = []
    path = published.get("pulid-v1.1", say=said.append)
    assert path.read_bytes() == CONTENT and path.is_relative_to(cache)
    assert "forbid commercial use" in said[0] and "not for commercial use" in said[0]
    assert published.verify("pulid-v1.1") == "whole"
    before = len(mirror)
    assert before >= 2
    assert published.get("pulid-v1.1") == published.locate("pulid-v1.1") == path
    assert len(mirror) == before  # no network for what is here
    path.resolve().chmod(0o644)
    path.resolve().write_bytes(CONTENT[:-1] + b"!")
    with pytest.raises(WeightsError, match="is damaged"):
        published.verify("pulid-v1.1")


def test_into_a_folder_and_what_a_server_does_not_have(mirror: list[str], tmp_path: Path) -> None:
    assert published.get("pulid-v1.1", tmp_path / "mine", say=lambda text: None).parent == tmp_path / "mine"
    assert published.verify("pulid-v1.1", tmp_path / "mine") == "whole"
    with pytest.raises(WeightsError, match=r"pulid_v1\.bin could not be downloaded"):
        published.get("pulid-v1", say=lambda text: None)


def test_presets_name_only_what_is_in_the_table() -> None:
    assert PRESETS["mini"]().published == ()
    assert PRESETS["sdxl"]().published == ("juggernaut", "pulid-v1.1", "detector", "arcface", "parsing", "eva")
    assert PRESETS["sdxl-v1"]().published[:3] == ("sdxl-base", "lightning-4step", "pulid-v1")
    assert not set(PRESETS) & set(published.WEIGHTS)  # `weights get NAME` says one thing only
    assert not published.WEIGHTS["arcface"].commercial and published.WEIGHTS["eva"].commercial
