"""Fixtures of the training tests: a tiny random SDXL, a single thread, further processes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.support import tiny_sdxl as tiny


@pytest.fixture
def pipe():
    return tiny.pipe()


@pytest.fixture(autouse=True)
def one_thread():
    """Use one thread: several threads add up sums in varying order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def start():
    """Return start(code, *arguments, **environment), which starts a Python process.

    It has the import path of the tests. Its imports take longer than a tiny training: one process
    should serve all tests of a module.
    """
    started = []

    def begin(code, *arguments, **environment):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "OMP_NUM_THREADS": "1",
            **environment,
        }
        command = [sys.executable, "-c", code, *map(str, arguments)]
        started.append(
            subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        )
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()
