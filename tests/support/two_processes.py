"""Two processes of one training run."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

# The imports take longer than all trainings, so both ranks are forks of one process.
WORKERS = """
import os, sys
from importlib import import_module
from pathlib import Path

import torch
from openpulid.training import logger

work = getattr(import_module(sys.argv[1]), sys.argv[2])

def run(rank, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    logger.draw_curves = lambda history, path: None
    work(folder)

children = []
for rank in range(2):
    child = os.fork()
    if not child:
        try:
            run(rank, Path(sys.argv[3]))
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    children.append(child)
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""


def run_in_two_processes(start: Any, module: str, function: str, folder: Path) -> None:
    """Call a function with a folder in two connected processes, and wait for both.

    Args:
        start: the fixture.
        module: of the function.
        function: its name.
        folder: its argument.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    workers = start(
        WORKERS, module, function, folder, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", **address
    )
    _, errors = workers.communicate(timeout=500)
    assert workers.returncode == 0, errors
