"""Published weights: what is here is found without a network, what is missing is named, a mirror serves downloads."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import huggingface_hub.constants
import huggingface_hub.hf_api
import pytest
import torch
from typer.testing import CliRunner

from openpulid.cli import weights as stores
from openpulid.errors import OptionError, WeightsError
from openpulid.io import hub as published
from openpulid.pipelines.presets import PRESETS

CONTENT = bytes(range(256)) * 400
COMMIT = "a" * 40


class Mirror(BaseHTTPRequestHandler):
    """As much of the hub as a file and a pipeline need; counts what it was asked, and breaks off where it is told to."""

    asked: ClassVar[list[str]] = []
    breaks: ClassVar[list[int]] = []  # after so many bytes of the next bodies
    gated: ClassVar[str] = "black-forest-labs/FLUX.1-dev"
    pipeline: ClassVar[dict[str, bytes]] = {
        "model_index.json": b'{"_class_name": "Some", "unet": ["diffusers", "UNet"], "image_encoder": [null, null]}',
        "unet/config.json": b"{}",
        "unet/model.safetensors.index.json": json.dumps(
            {"weight_map": {name: f"model-{name}-of-2.safetensors" for name in "12"}}
        ).encode(),
        "unet/model.fp16.safetensors": CONTENT,
        "unet/model-1-of-2.safetensors": CONTENT * 2,
        "unet/model-2-of-2.safetensors": CONTENT * 2,
        "vae_decoder/config.json": b"{}",  # another program's part, as beside SDXL's base: it has no weights for this one
        "vae_decoder/model.onnx": CONTENT,
        "README.md": b"words",
    }

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        owner_name, _, rest = self.path.removeprefix("/").partition("/resolve/")
        name = rest.partition("/")[2]
        if self.path.startswith("/api/models/"):
            return self._send(json.dumps(self._api()).encode())
        known = {
            "guozinan/PuLID": {"pulid_v1.1.safetensors": CONTENT},
            "stabilityai/stable-diffusion-xl-base-1.0": self.pipeline,
            "somebody/some.Pipeline-1": self.pipeline,
        }
        self._send(known.get(owner_name, {}).get(name))

    def _api(self) -> object:
        files = [
            {"type": "file", "path": p, "size": len(x), "oid": sha256(x)[:40]}
            for p, x in self.pipeline.items()
        ]
        return (
            files
            if "/tree/" in self.path
            else {"id": "x/y", "sha": COMMIT, "siblings": [{"rfilename": p} for p in self.pipeline]}
        )

    def _send(self, body: bytes | None) -> None:
        first = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        part = (body or b"")[first:]
        if first:
            self.asked[-1] += f" from {first}"
        closed = self.path.startswith(f"/{self.gated}/")
        self.send_response(403 if closed else 404 if body is None else 206 if first else 200)
        if closed:
            self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("ETag", f'"{sha256(body or b"")}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(part)))
        if first:
            self.send_header(
                "Content-Range", f"bytes {first}-{len(body or b'') - 1}/{len(body or b'')}"
            )
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(
                part[: self.breaks.pop(0)] if self.breaks and len(part) > 1000 else part
            )

    def log_message(self, *words: object) -> None:
        pass


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


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
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    Mirror.asked.clear(), Mirror.breaks.clear()
    yield Mirror.asked
    server.shutdown()


def test_what_is_missing_is_named_with_its_command(cache: Path) -> None:
    with pytest.raises(
        WeightsError, match=r"pulid_v1\.bin is not on this machine; `pulid weights get pulid-v1`"
    ):
        published.locate("pulid-v1")
    with pytest.raises(OptionError, match=r"pulid-v1, pulid-v1\.1"):
        published.locate("pulid-v2")


FILES = (
    "./missing.safetensors",
    "../x",
    "~/x",
    "/none/x",
    "models/missing.safetensors",
    "models/missing.GGUF",
    "a/b/c",
)


@pytest.mark.parametrize("name", [*FILES, "missing.ckpt", "owner/na--me"])
def test_a_file_that_is_not_here_is_no_name_of_the_hub(name: str, cache: Path) -> None:
    with pytest.raises(
        WeightsError,
        match=re.escape(f"{name} does not exist; name a file or a folder that is here"),
    ):
        published.locate(name)


def test_any_pipeline_of_the_hub_by_the_command_that_is_named(
    mirror: list[str], tmp_path: Path
) -> None:
    name = "somebody/some.Pipeline-1"
    with pytest.raises(
        WeightsError,
        match=rf"^{name} is not on this machine; `pulid weights get {name}` downloads it, or put",
    ):
        published.locate(name)
    assert mirror == []
    done = CliRunner().invoke(stores.weights, ["get", name, "--folder", str(tmp_path)])
    assert (
        done.exit_code == 0
        and done.output.split("\n")[0] == f"{name}, licence: its own; read its page"
    )
    assert published.locate(name, tmp_path) == tmp_path / "some.Pipeline-1"
    for wrong, said in (
        ("everything", "neither a preset"),
        ("models/none.safetensors", "does not exist"),
    ):
        assert said in str(CliRunner().invoke(stores.weights, ["get", wrong]).exception)
    own = tmp_path / "own.safetensors"
    own.write_bytes(CONTENT)
    with pytest.raises(WeightsError, match=r"own\.safetensors is no published weight"):
        published.download(str(own))


def test_a_licence_that_was_not_accepted(mirror: list[str]) -> None:
    said = rf"accept its licence: do so at https://huggingface\.co/{Mirror.gated}, set HF_TOKEN .*, and run the same command"
    with pytest.raises(WeightsError, match=said):
        published.download("flux-dev", say=lambda text: None)


def test_a_folder_comes_before_the_variable(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pulid_v1.bin").write_bytes(b"x")
    monkeypatch.setenv(published.FOLDER_VARIABLE, str(tmp_path / "two"))
    assert published.locate("pulid-v1") == tmp_path / "two" / "pulid_v1.bin"
    assert published.locate("pulid-v1", tmp_path / "one") == tmp_path / "one" / "pulid_v1.bin"


def test_a_mirror_is_asked_once_and_never_again(mirror: list[str], cache: Path) -> None:
    said: list[str] = []
    path = published.download("pulid-v1.1", say=said.append)
    assert path.read_bytes() == CONTENT and path.is_relative_to(cache)
    assert "forbid commercial use" in said[0] and "not for commercial use" in said[0]
    assert published.verify_weights("pulid-v1.1") == "whole"
    before = len(mirror)
    assert before >= 2
    assert published.download("pulid-v1.1") == published.locate("pulid-v1.1") == path
    assert len(mirror) == before  # no network for what is here
    path.resolve().chmod(0o644)
    path.resolve().write_bytes(CONTENT[:-1] + b"!")
    with pytest.raises(WeightsError, match="is damaged"):
        published.verify_weights("pulid-v1.1")


def test_what_is_known_of_a_file_is_held_against_it(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, known in published.SHA256.items():
        assert published.WEIGHTS[name].file and re.fullmatch("[0-9a-f]{64}", known)
    (tmp_path / "pulid_v1.bin").write_bytes(CONTENT)
    monkeypatch.setitem(published.SHA256, "pulid-v1", sha256(CONTENT))
    assert published.verify_weights("pulid-v1", tmp_path) == "whole"
    monkeypatch.setitem(published.SHA256, "pulid-v1", sha256(b""))
    with pytest.raises(WeightsError, match="is damaged"):
        published.verify_weights("pulid-v1", tmp_path)


@pytest.mark.parametrize(
    ("name", "held"), [("parsing", published.SHA256["parsing"]), ("scorer-lpips", "7be5be79")]
)
def test_a_file_from_a_page_is_checked_as_it_comes(
    name: str, held: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str, str | None]] = []
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *args: asked.append(args))
    published.download(name, tmp_path, say=lambda text: None)
    entry = published.WEIGHTS[name]
    assert asked == [(entry.repo, str(tmp_path / entry.file), held)]


def test_into_a_folder_and_what_a_server_does_not_have(mirror: list[str], tmp_path: Path) -> None:
    assert (
        published.download("pulid-v1.1", tmp_path / "mine", say=lambda text: None).parent
        == tmp_path / "mine"
    )
    assert published.verify_weights("pulid-v1.1", tmp_path / "mine") == "whole"
    with pytest.raises(WeightsError, match=r"pulid_v1\.bin could not be downloaded"):
        published.download("pulid-v1", say=lambda text: None)


def test_a_broken_connection_is_taken_up_where_it_was(
    mirror: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    Mirror.breaks[:] = [50_000]
    assert published.download("pulid-v1.1", say=lambda text: None).read_bytes() == CONTENT
    assert mirror[-2:] == [
        "GET /guozinan/PuLID/resolve/main/pulid_v1.1.safetensors",
        f"{mirror[-2]} from 50000",
    ]


def test_offline_nothing_is_asked(mirror: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    elsewhere: list[tuple[object, ...]] = []
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *args: elsewhere.append(args))
    for name in ("pulid-v1.1", "sdxl-base", "parsing", "scorer-lpips"):
        with pytest.raises(
            WeightsError, match=r"could not be downloaded .* files that are whole are kept"
        ):
            published.download(name, say=lambda text: None)
    assert mirror == elsewhere == []


def test_a_pipeline_comes_in_half_precision_where_there_is_one(
    mirror: list[str], cache: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    for folder in (None, tmp_path / "mine"):
        path = published.download("sdxl-base", folder, say=said.append)
        files = sorted(
            str(file.relative_to(path))
            for file in path.rglob("*")
            if file.is_file() and ".cache" not in file.parts
        )
        assert [name for name in files if "json" not in name] == [
            "unet/model.fp16.safetensors"
        ] and len(files) == 5
        assert published.locate("sdxl-base", folder) == path
    assert "not for commercial use" not in said[0]
    before = len(mirror)
    assert (
        published.download("sdxl-base") == published.locate("sdxl-base") and len(mirror) == before
    )


def test_half_a_pipeline_is_not_here(mirror: list[str], tmp_path: Path) -> None:
    path = published.download("sdxl-base", tmp_path, say=lambda text: None)
    weights = path / "unet" / "model.fp16.safetensors"
    weights.rename(path / "unet" / "model-1-of-2.safetensors")
    for change in (None, (path / "unet" / "config.json").unlink):
        if change:
            change()
        with pytest.raises(WeightsError, match="is not on this machine"):
            published.locate("sdxl-base", tmp_path)
    assert (
        published.download("sdxl-base", tmp_path, say=lambda text: None) == path
        and weights.is_file()
    )
    weights.unlink(), (path / "unet" / "model-2-of-2.safetensors").write_bytes(CONTENT)
    assert published.locate("sdxl-base", tmp_path) == path


def test_presets_name_only_what_is_in_the_table() -> None:
    assert PRESETS["mini"]().published == ()
    assert PRESETS["sdxl"]().published == (
        "juggernaut",
        "pulid-v1.1",
        "detector",
        "arcface",
        "parsing",
        "eva",
    )
    assert PRESETS["sdxl-v1"]().published[:3] == ("sdxl-base", "lightning-4step", "pulid-v1")
    assert not set(PRESETS) & set(published.WEIGHTS)  # `weights get NAME` says one thing only
    assert not published.WEIGHTS["arcface"].commercial and published.WEIGHTS["eva"].commercial
