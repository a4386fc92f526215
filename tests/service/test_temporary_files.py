"""The files of requests do not stay when the service is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from openpulid.io.temporary import private_directory

SCRIPT = """
import os, signal
from openpulid.pipelines.request import GenerationRequest
from openpulid.pipelines.request_inputs import Person
from openpulid.service.api.identification import identify
from openpulid.service.api.tensor_files import read_tensor_files
from openpulid.service.cluster.messages import SentFiles

class Killer:
    def __getattr__(self, name):
        os.kill(os.getpid(), signal.SIGKILL)

def request(**files):
    return GenerationRequest("portrait", people=[Person(**files)])

"""


def contents(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "call",
    [
        "identify(Killer(), request(images=['a']), {'people.0.images.0': b'a face'})",
        "read_tensor_files(request(identity='a'), {'people.0.identity': b'a face'}, Killer())",
        "with SentFiles({'/face.png': b'a face'}).write(): Killer().name",
    ],
)
def test_files_of_a_killed_service_are_removed(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.run([sys.executable, "-c", SCRIPT + call], env=environment)
    assert process.returncode == -signal.SIGKILL
    assert b"a face" in contents(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with private_directory():  # as of the next request
        pass
    assert b"a face" not in contents(tmp_path)
