"""ComfyUI's server with the node pack, and the miniature in place of checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.support.comfyui import PACK

ROOT = Path(__file__).parents[2]
TEST_PACK = Path(__file__).parent / "comfyui_miniature"
START_TIMEOUT = 120
RUN_TIMEOUT = 120

Graph = dict[str, Any]


class Server:
    """A running server."""

    def __init__(self, url: str, directory: Path, process: subprocess.Popen[bytes]) -> None:
        self.url = url
        self.directory = directory
        self.process = process

    def wait_until_ready(self) -> None:
        """Wait until the server answers."""
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.get("/system_stats")
                return
            except OSError:
                time.sleep(0.1)
        raise RuntimeError((self.directory / "server.log").read_text()[-3000:])

    def request(self, path: str, body: Any = None) -> tuple[int, bytes]:
        """Send a request and return status and body."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=RUN_TIMEOUT) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def get(self, path: str) -> Any:
        """Return the JSON of a page."""
        status, body = self.request(path)
        assert status == 200, body
        return json.loads(body)

    def queue(self, graph: Graph) -> tuple[int, Any]:
        """Queue a workflow and return status and answer."""
        status, body = self.request("/prompt", {"prompt": graph})
        return status, json.loads(body)

    def run(self, graph: Graph) -> Any:
        """Run a workflow and return its entry in the history."""
        status, answer = self.queue(graph)
        assert status == 200, answer
        prompt_id = answer["prompt_id"]
        deadline = time.monotonic() + RUN_TIMEOUT
        while time.monotonic() < deadline:
            history = self.get(f"/history/{prompt_id}")
            if history.get(prompt_id, {}).get("status", {}).get("completed") is not None:
                return history[prompt_id]
            time.sleep(0.05)
        raise TimeoutError(f"the workflow did not end in {RUN_TIMEOUT} s")

    def images(self, graph: Graph) -> list[np.ndarray]:
        """Run a workflow and return the images of its SaveImage nodes."""
        entry = self.run(graph)
        assert entry["status"]["status_str"] == "success", entry["status"]
        return self.read_images(entry)

    def read_images(self, entry: Any) -> list[np.ndarray]:
        """Return the images of the SaveImage nodes in an entry of the history."""
        arrays = []
        for output in entry["outputs"].values():
            for file in output.get("images", []):
                if file["type"] != "output":
                    continue
                status, body = self.request("/view?" + urllib.parse.urlencode(file))
                assert status == 200
                arrays.append(np.asarray(Image.open(BytesIO(body)).convert("RGB")).astype(int))
        return arrays

    def free(self) -> None:
        """Unload all models and forget the results of all nodes."""
        status, _ = self.request("/free", {"unload_models": True, "free_memory": True})
        assert status == 200
        # The server does it before the next workflow, or after it; so this is not the test's.
        image = {"class_type": "LoadImage", "inputs": {"image": "gray.png"}}
        preview = {"class_type": "PreviewImage", "inputs": {"images": ["gray", 0]}}
        self.run({"gray": image, "preview": preview})


@contextmanager
def serve(directory: Path, *packs: Path) -> Iterator[Server]:
    """Start a server with these packs on a free port, and end it.

    Args:
        directory: for its files; it has no custom nodes yet.
        packs: folders of custom nodes.
    """
    nodes = directory / "custom_nodes"
    nodes.mkdir(parents=True)
    (directory / "input").mkdir()
    for name in ("anna", "ben"):
        shutil.copy(ROOT / "examples" / f"{name}.png", directory / "input")
    Image.new("RGB", (96, 96), "gray").save(directory / "input" / "gray.png")
    page = directory / "page"
    page.mkdir()
    (page / "index.html").write_text("")
    for pack in packs:
        (nodes / pack.name).symlink_to(pack)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(port),
        "--base-directory", str(directory), "--disable-all-custom-nodes", "--disable-api-nodes",
        "--database-url", f"sqlite:///{directory / 'database.sqlite'}",
        "--front-end-root", str(page), "--whitelist-custom-nodes", *(pack.name for pack in packs),
    ]  # fmt: skip
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    # The server finds no published weights, whatever this machine has.
    environment.update(PULID_WEIGHTS="", HF_HUB_CACHE=str(directory / "hub"), HF_HUB_OFFLINE="1")
    log = (directory / "server.log").open("w")
    process = subprocess.Popen(
        command, cwd=os.environ["COMFYUI_PATH"], env=environment, stdout=log, stderr=log
    )
    try:
        yield Server(f"http://127.0.0.1:{port}", directory, process)
    finally:
        process.terminate()
        process.wait()
        log.close()


def both_packs() -> tuple[Path, Path]:
    """Return the node pack and the one that loads the miniature."""
    return PACK, TEST_PACK
