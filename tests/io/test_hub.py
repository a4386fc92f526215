"""Published weights are located offline, and downloaded and verified against a local mirror."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub.constants
import huggingface_hub.hf_api
import pytest
import torch
from typer.testing import CliRunner

from openpulid.cli import weights as cli_weights
from openpulid.errors import OptionError, WeightsError
from openpulid.io import hub
from openpulid.methods.controlnet import ControlNet
from openpulid.pipelines.presets import PRESETS
from tests.support.token_files import controlnet

CONTENT = bytes(range(256)) * 400
COMMIT = "a" * 40


class Mirror(BaseHTTPRequestHandler):
    """The part of the hub that a file and a pipeline need.

    Records all requests, and closes connections early where a test asks for it.
    """

    requests: ClassVar[list[str]] = []
    breaks: ClassVar[list[int]] = []  # bytes after which the next responses are cut off
    gated: ClassVar[str] = "black-forest-labs/FLUX.1-dev"
    pipeline: ClassVar[dict[str, bytes]] = {
        "model_index.json": (
            b'{"_class_name": "Some", "unet": ["diffusers", "UNet"], "image_encoder": [null, null]}'
        ),
        "unet/config.json": b"{}",
        "unet/model.safetensors.index.json": json.dumps(
            {"weight_map": {name: f"model-{name}-of-2.safetensors" for name in "12"}}
        ).encode(),
        "unet/model.fp16.safetensors": CONTENT,
        "unet/model-1-of-2.safetensors": CONTENT * 2,
        "unet/model-2-of-2.safetensors": CONTENT * 2,
        # A component for another program, as in SDXL's repository: no weights that diffusers reads.
        "vae_decoder/config.json": b"{}",
        "vae_decoder/model.onnx": CONTENT,
        "README.md": b"words",
    }

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.requests.append(f"{self.command} {self.path}")
        repository, _, file_path = self.path.removeprefix("/").partition("/resolve/")
        name = file_path.partition("/")[2]
        if self.path.startswith("/api/models/"):
            return self._send(json.dumps(self._api()).encode())
        repositories = {
            "guozinan/PuLID": {"pulid_v1.1.safetensors": CONTENT},
            "stabilityai/stable-diffusion-xl-base-1.0": self.pipeline,
            "someone/some.Pipeline-1": self.pipeline,
            "ByteDance/InfiniteYou": self.pipeline,
        }
        self._send(repositories.get(repository, {}).get(name))

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
            self.requests[-1] += f" from {first}"
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
    monkeypatch.delenv(hub.FOLDER_VARIABLE, raising=False)
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
    Mirror.requests.clear(), Mirror.breaks.clear()
    yield Mirror.requests
    server.shutdown()


def test_missing_weight_names_download_command(cache: Path) -> None:
    with pytest.raises(
        WeightsError, match=r"pulid_v1\.bin is not installed; `pulid weights get pulid-v1`"
    ):
        hub.locate("pulid-v1")
    with pytest.raises(OptionError, match=r"pulid-v1, pulid-v1\.1"):
        hub.locate("pulid-v2")


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
def test_missing_file_is_not_taken_for_repository(
    name: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # whose parent has no folder x
    with pytest.raises(
        WeightsError,
        match=re.escape(f"{name} does not exist; name an existing file or folder"),
    ):
        hub.locate(name)


def test_any_hub_pipeline_can_be_downloaded_by_name(mirror: list[str], tmp_path: Path) -> None:
    name = "someone/some.Pipeline-1"
    with pytest.raises(
        WeightsError,
        match=rf"^{name} is not installed; `pulid weights get {name}` downloads it, or put",
    ):
        hub.locate(name)
    assert mirror == []
    done = CliRunner().invoke(cli_weights.weights, ["get", name, "--folder", str(tmp_path)])
    assert (
        done.exit_code == 0
        and done.output.split("\n")[0] == f"{name}, license: see its page on the hub"
    )
    assert hub.locate(name, tmp_path) == tmp_path / "some.Pipeline-1"
    for wrong, message in (
        ("everything", "neither a preset"),
        ("models/none.safetensors", "does not exist"),
    ):
        assert message in str(CliRunner().invoke(cli_weights.weights, ["get", wrong]).exception)
    local = tmp_path / "own.safetensors"
    local.write_bytes(CONTENT)
    with pytest.raises(WeightsError, match=r"own\.safetensors is no published weight"):
        hub.download(str(local))


def test_gated_repository_explains_license(mirror: list[str]) -> None:
    message = (
        rf"requires accepting its license; accept it at https://huggingface\.co/{Mirror.gated}, "
        "set HF_TOKEN .*, and run the same command"
    )
    with pytest.raises(WeightsError, match=message):
        hub.download("flux-dev", log=lambda text: None)


def test_folder_argument_precedes_environment_variable(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pulid_v1.bin").write_bytes(b"x")
    monkeypatch.setenv(hub.FOLDER_VARIABLE, str(tmp_path / "two"))
    assert hub.locate("pulid-v1") == tmp_path / "two" / "pulid_v1.bin"
    assert hub.locate("pulid-v1", tmp_path / "one") == tmp_path / "one" / "pulid_v1.bin"


def test_download_is_cached_and_verified(mirror: list[str], cache: Path) -> None:
    messages: list[str] = []
    path = hub.download("pulid-v1.1", log=messages.append)
    assert path.read_bytes() == CONTENT and path.is_relative_to(cache)
    assert "forbid commercial use" in messages[0] and "not for commercial use" in messages[0]
    assert hub.verify_weights("pulid-v1.1") == "verified"
    num_requests = len(mirror)
    assert num_requests >= 2
    assert hub.download("pulid-v1.1") == hub.locate("pulid-v1.1") == path
    assert len(mirror) == num_requests  # no network for installed weights
    path.resolve().chmod(0o644)
    path.resolve().write_bytes(CONTENT[:-1] + b"!")
    with pytest.raises(WeightsError, match="is damaged"):
        hub.verify_weights("pulid-v1.1")


def test_known_hash_is_verified(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, digest in hub.SHA256.items():
        assert hub.WEIGHTS[name].file and re.fullmatch("[0-9a-f]{64}", digest)
    (tmp_path / "pulid_v1.bin").write_bytes(CONTENT)
    monkeypatch.setitem(hub.SHA256, "pulid-v1", sha256(CONTENT))
    assert hub.verify_weights("pulid-v1", tmp_path) == "verified"
    monkeypatch.setitem(hub.SHA256, "pulid-v1", sha256(b""))
    with pytest.raises(WeightsError, match="is damaged"):
        hub.verify_weights("pulid-v1", tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"), [("parsing", hub.SHA256["parsing"]), ("scorer-lpips", "7be5be79")]
)
def test_url_download_passes_expected_hash(
    name: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, str, str | None]] = []
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *args: calls.append(args))
    hub.download(name, tmp_path, log=lambda text: None)
    entry = hub.WEIGHTS[name]
    assert calls == [(entry.repo, str(tmp_path / entry.file), expected)]


def test_download_to_folder_and_missing_remote_file(mirror: list[str], tmp_path: Path) -> None:
    assert (
        hub.download("pulid-v1.1", tmp_path / "mine", log=lambda text: None).parent
        == tmp_path / "mine"
    )
    assert hub.verify_weights("pulid-v1.1", tmp_path / "mine") == "verified"
    with pytest.raises(WeightsError, match=r"pulid_v1\.bin could not be downloaded"):
        hub.download("pulid-v1", log=lambda text: None)


def test_interrupted_download_is_resumed(
    mirror: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    Mirror.breaks[:] = [50_000]
    assert hub.download("pulid-v1.1", log=lambda text: None).read_bytes() == CONTENT
    assert mirror[-2:] == [
        "GET /guozinan/PuLID/resolve/main/pulid_v1.1.safetensors",
        f"{mirror[-2]} from 50000",
    ]


def test_offline_mode_uses_no_network(mirror: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    url_calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *args: url_calls.append(args))
    for name in ("pulid-v1.1", "sdxl-base", "parsing", "scorer-lpips"):
        with pytest.raises(
            WeightsError, match=r"could not be downloaded .* complete files are kept"
        ):
            hub.download(name, log=lambda text: None)
    assert mirror == url_calls == []


def test_pipeline_download_prefers_fp16(mirror: list[str], cache: Path, tmp_path: Path) -> None:
    messages: list[str] = []
    for folder in (None, tmp_path / "mine"):
        path = hub.download("sdxl-base", folder, log=messages.append)
        files = sorted(
            str(file.relative_to(path))
            for file in path.rglob("*")
            if file.is_file() and ".cache" not in file.parts
        )
        assert [name for name in files if "json" not in name] == [
            "unet/model.fp16.safetensors"
        ] and len(files) == 5
        assert hub.locate("sdxl-base", folder) == path
    assert "not for commercial use" not in messages[0]
    num_requests = len(mirror)
    assert hub.download("sdxl-base") == hub.locate("sdxl-base") and len(mirror) == num_requests


def test_incomplete_pipeline_is_not_installed(mirror: list[str], tmp_path: Path) -> None:
    path = hub.download("sdxl-base", tmp_path, log=lambda text: None)
    weights = path / "unet" / "model.fp16.safetensors"
    weights.rename(path / "unet" / "model-1-of-2.safetensors")
    for change in (None, (path / "unet" / "config.json").unlink):
        if change:
            change()
        with pytest.raises(WeightsError, match="is not installed"):
            hub.locate("sdxl-base", tmp_path)
    assert hub.download("sdxl-base", tmp_path, log=lambda text: None) == path and weights.is_file()
    weights.unlink(), (path / "unet" / "model-2-of-2.safetensors").write_bytes(CONTENT)
    assert hub.locate("sdxl-base", tmp_path) == path


def test_no_two_weights_have_the_same_path_in_a_folder() -> None:
    paths = [Path(x.folder, x.file) for x in hub.WEIGHTS.values() if x.file and not x.repo_folder]
    assert len(set(paths)) == len(paths)


def test_presets_use_registered_weights() -> None:
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
    assert not set(PRESETS) & set(hub.WEIGHTS)  # `weights get NAME` is unambiguous
    assert not hub.WEIGHTS["arcface"].commercial and hub.WEIGHTS["eva"].commercial


PIPELINE = "someone/some.Pipeline-1"
PARTS = {
    "_class_name": "Some",
    "unet": ["diffusers", "UNet"],
    "vae": ["diffusers", "VAE"],
    "scheduler": ["diffusers", "SomeScheduler"],
}


def repository(*weights: str) -> dict[str, bytes]:
    """Return the files of a repository with two networks and a scheduler."""
    files = {
        "model_index.json": json.dumps(PARTS).encode(),
        "unet/config.json": b"{}",
        "vae/config.json": b"{}",
        "vae/LICENSE": b"terms",
        "scheduler/scheduler_config.json": b"{}",
    }
    return files | dict.fromkeys(weights, CONTENT)


def stored_weights(path: Path) -> set[str]:
    return {
        file.relative_to(path).as_posix()
        for file in path.rglob("*")
        if ".cache" not in file.parts and file.suffix in (".safetensors", ".bin")
    }


@pytest.mark.parametrize(
    ("published", "expected"),
    [
        (
            ("unet/model.fp16.safetensors", "vae/model.safetensors"),
            {"unet/model.fp16.safetensors", "vae/model.safetensors"},
        ),
        (
            ("unet/model.safetensors", "vae/model.fp16.safetensors", "vae/model.safetensors"),
            {"unet/model.safetensors", "vae/model.fp16.safetensors"},
        ),
        (
            ("unet/model.bf16.safetensors", "vae/model.fp16.safetensors", "unet/model.bin"),
            {"unet/model.bf16.safetensors", "vae/model.fp16.safetensors"},
        ),
    ],
)
def test_each_part_is_downloaded_in_its_own_variant(
    published: tuple[str, ...],
    expected: set[str],
    mirror: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Mirror, "pipeline", repository(*published, "top.safetensors"))
    for folder in (tmp_path, None):
        path = hub.download(PIPELINE, folder, log=lambda text: None)
        assert stored_weights(path) == expected
        assert hub.locate(PIPELINE, folder) == path
    # what a folder lacks is said, and fetched
    (tmp_path / "some.Pipeline-1" / min(expected)).unlink()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(WeightsError, match=r"lacks weights as safetensors of (unet|vae)\); `pulid"):
        hub.locate(PIPELINE, tmp_path)
    hub.download(PIPELINE, tmp_path, log=lambda text: None)
    assert stored_weights(tmp_path / "some.Pipeline-1") == expected


def test_repository_of_a_lora(
    mirror: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"film.safetensors": CONTENT, "README.md": b"words", "images/1.png": CONTENT}
    monkeypatch.setattr(Mirror, "pipeline", files)
    with pytest.raises(WeightsError, match="is not installed; `pulid weights get someone/some"):
        hub.locate(PIPELINE)
    path = hub.download(PIPELINE, log=lambda text: None)
    assert [file.name for file in path.iterdir()] == ["film.safetensors"]
    assert hub.locate(PIPELINE) == path


@pytest.mark.parametrize(
    ("published", "message"),
    [
        (
            ("unet/model.safetensors", "vae/model.bin"),
            "it lacks vae weights as safetensors (it has pickles, which can hold code); choose",
        ),
        (
            ("whole.safetensors",),
            "it lacks unet weights as safetensors and vae weights as safetensors; "
            "download its file whole.safetensors and pass that with --base",
        ),
        (
            ("unet/model-1-of-2.safetensors", "vae/model.safetensors"),
            "it lacks unet model-2-of-2.safetensors; choose",
        ),
    ],
)
def test_incomplete_repository_is_refused_before_its_weights(
    published: tuple[str, ...],
    message: str,
    mirror: list[str],
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Mirror, "pipeline", repository(*published))
    with pytest.raises(WeightsError, match=re.escape(message)):
        hub.download(PIPELINE, log=lambda text: None)
    assert not any("/resolve/" in request and "safetensors" in request for request in mirror)


def test_repository_without_pipeline_is_refused(
    mirror: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"style.safetensors": CONTENT, "film.safetensors": CONTENT, "README.md": b"words"}
    monkeypatch.setattr(Mirror, "pipeline", files)
    message = r"no complete pipeline, .* its file film\.safetensors .* with --base or --lora"
    with pytest.raises(WeightsError, match=message):
        hub.download(PIPELINE, log=lambda text: None)


def test_downloaded_controlnet_is_loaded(
    mirror: list[str], tmp_path: Path, tiny_pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The repository of a single network, with its weights twice."""
    net = controlnet(tiny_pipeline().unet)
    for variant in (None, "fp16"):
        net.save_pretrained(tmp_path / "net", variant=variant)
    files = {file.name: file.read_bytes() for file in (tmp_path / "net").iterdir()}
    assert len(files) == 3
    monkeypatch.setattr(Mirror, "pipeline", files)
    for folder in (None, tmp_path / "mine"):
        path = hub.download(PIPELINE, folder, log=lambda text: None)
        assert stored_weights(path) == {"diffusion_pytorch_model.fp16.safetensors"}
        loaded = ControlNet.load(hub.locate(PIPELINE, folder)).model
        for name, value in loaded.state_dict().items():
            assert torch.equal(value, net.state_dict()[name])


def test_network_in_a_folder_comes_next_to_its_adapter(
    mirror: list[str], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of InfiniteYou's repository, only the files of one variant are downloaded."""
    stem = "diffusion_pytorch_model"
    shards = [f"{stem}-0000{k}-of-00002.safetensors" for k in (1, 2)]
    index = json.dumps({"weight_map": {"a": shards[0], "b": shards[1]}}).encode()
    stage = {f"InfuseNetModel/{name}": CONTENT for name in shards} | {
        "InfuseNetModel/config.json": b"{}",
        f"InfuseNetModel/{stem}.safetensors.index.json": index,
        "image_proj_model.bin": CONTENT,
        "infusenet_bf16.safetensors": CONTENT,
    }
    stages = ("infu_flux_v1.0/aes_stage2", "infu_flux_v1.0/sim_stage1")
    files = {f"{folder}/{name}": content for folder in stages for name, content in stage.items()}
    monkeypatch.setattr(Mirror, "pipeline", files | {"README.md": b"words", "config.json": b"{}"})
    names = ("infiniteyou-sim", "infusenet-sim")
    for folder in (tmp_path / "mine", None):
        with pytest.raises(WeightsError, match=r"sim_stage1/InfuseNetModel is not installed; `pul"):
            hub.locate(names[1], folder)
        file, net = (hub.download(name, folder, log=lambda text: None) for name in names)
        assert (hub.locate(names[0], folder), hub.locate(names[1], folder)) == (file, net)
        assert net == file.parent / "InfuseNetModel" and file.parent.name == "sim_stage1"
        assert {path.name for path in net.iterdir()} == {
            name.removeprefix("InfuseNetModel/") for name in stage if "/" in name
        }
        top = file.parents[2]
        assert stored_weights(top) == {
            f"{stages[1]}/{name}" for name in stage if name.endswith((".bin", "2.safetensors"))
        }
        assert not (top / "config.json").exists()
        with pytest.raises(WeightsError, match="aes_stage2/InfuseNetModel is not installed"):
            hub.locate("infusenet", folder)
    (tmp_path / "mine" / stages[1] / "InfuseNetModel" / shards[1]).unlink()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(WeightsError, match=rf"InfuseNetModel lacks {shards[1]}\); `pulid weights"):
        hub.locate(names[1], tmp_path / "mine")


@pytest.mark.parametrize("ref", [None, f"{COMMIT}\n", "b" * 40, ""])
def test_cache_without_a_valid_reference_is_used(ref: str | None, cache: Path) -> None:
    """As after copying a cache by hand."""
    root = cache / "models--guozinan--PuLID"
    weights = root / "snapshots" / COMMIT / "pulid_v1.1.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(CONTENT)
    if ref is not None:
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text(ref)
    assert hub.locate("pulid-v1.1") == weights


def test_current_snapshot_precedes_others(cache: Path) -> None:
    root = cache / "models--guozinan--PuLID"
    for k, commit in enumerate("abc"):
        weights = root / "snapshots" / (commit * 40) / "pulid_v1.1.safetensors"
        weights.parent.mkdir(parents=True)
        weights.write_bytes(CONTENT)
        os.utime(weights.parent, (k, k))
    assert hub.locate("pulid-v1.1").parent.name == "c" * 40  # the newest
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("b" * 40)
    assert hub.locate("pulid-v1.1").parent.name == "b" * 40
    # the beginning of an update, with a link whose target is missing
    hub.locate("pulid-v1.1").unlink()
    (root / "snapshots" / ("b" * 40) / "pulid_v1.1.safetensors").symlink_to("../../blobs/none")
    assert hub.locate("pulid-v1.1").parent.name == "c" * 40


def test_download_without_network_is_one_quick_sentence(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing listens on this port."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("a retry"))
    for name in ("pulid-v1.1", "sdxl-base"):
        messages: list[str] = []
        with pytest.raises(
            WeightsError, match=r"^\S+ could not be downloaded \(no connection: .*proxy"
        ) as error:
            hub.download(name, log=messages.append)
        assert "\n" not in str(error.value)
        assert not messages
    assert not caplog.records
