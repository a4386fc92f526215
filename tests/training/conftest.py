"""What the tests of training share: a tiny random SDXL, one thread, and further processes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from openpulid import device
from tests.support import tiny_sdxl as tiny


@pytest.fixture
def pipe():
    return tiny.pipe()


@pytest.fixture(autouse=True)
def one_thread():
    """Sums over several threads are added up in any order; bit for bit needs one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def start():
    """start(code, *arguments, **environment): a Python process that finds what the tests find.

    It has bfloat16 where this process has it, or pretends to (`both_precisions`).
    """
    started = []
    available = device.supports_bf16(torch.device("cpu"))
    same_bf16 = f"from openpulid import device; device.supports_bf16 = lambda device: {available}\n"

    def begin(code, *arguments, **environment):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "OMP_NUM_THREADS": "1",
            **environment,
        }
        command = [sys.executable, "-c", same_bf16 + code, *map(str, arguments)]
        started.append(
            subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        )
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()
