"""Processes of one training run, and signals from outside."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, reduce
from torch import Tensor, nn

from openpulid.errors import OptionError, TrainingError
from openpulid.io.lock import lock_directory

MINIMUM = {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": -1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 1}
"""Variables of `torchrun` and their smallest value; a LOCAL_RANK of -1 means a single process."""
MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables of MPI launchers; accelerate derives those of `torchrun` from them."""

MPI_RANKS = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def check_launcher(environment: Mapping[str, str]) -> None:
    """Check the variables with which a launcher describes the processes of a run.

    accelerate reads the same variables. It stops in the middle of its start if one is no number,
    waits for ever if one is missing, and starts each process alone without LOCAL_RANK.

    Raises:
        OptionError: a variable is missing or impossible.
    """
    numbers = _read_numbers(environment)
    size = numbers.get("WORLD_SIZE", 1)
    if size == 1 and numbers.get("LOCAL_RANK", -1) == -1:
        return
    if any(name in environment for name in MPI_SIZES):
        return
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name):
            present = "WORLD_SIZE" if size > 1 else "LOCAL_RANK"
            raise OptionError(
                f"{present} is set to {environment[present]}, but {name} is missing: start the "
                f"training with torchrun or accelerate launch, or unset {present}."
            )
    limits = {"RANK": size, "LOCAL_RANK": numbers.get("LOCAL_WORLD_SIZE", size)}
    for name, limit in limits.items():
        if not 0 <= numbers[name] < limit:
            raise OptionError(
                f"{name} is {numbers[name]}, but there are {limit} processes, numbered from 0: "
                "start the training with torchrun or accelerate launch."
            )


def is_first_process() -> bool:
    """Return whether this process has rank 0, before the processes are connected.

    Raises:
        OptionError: see `check_launcher`.
    """
    check_launcher(os.environ)
    ranks = (os.environ.get(name) for name in ("RANK", *MPI_RANKS))
    return next((rank for rank in ranks if rank is not None), "0") == "0"


def count_processes() -> int:
    """Return the number of processes of the run, before they are connected.

    Raises:
        OptionError: see `check_launcher`.
    """
    check_launcher(os.environ)
    sizes = (os.environ.get(name) for name in ("WORLD_SIZE", *MPI_SIZES))
    return int(next((size for size in sizes if size is not None), "1"))


def _read_numbers(environment: Mapping[str, str]) -> dict[str, int]:
    """Return the variables that must be numbers."""
    numbers = {}
    for name in (*MINIMUM, *MPI_SIZES):
        text = environment.get(name)
        if text is None:
            continue
        try:
            numbers[name] = int(text)
        except ValueError:
            numbers[name] = -2
        if numbers[name] < MINIMUM.get(name, 1):
            raise OptionError(
                f"the environment variable {name} is {text!r}, which is not a valid number: unset "
                "it, or start the training with torchrun or accelerate launch."
            )
    return numbers


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


class DistributedContext:
    """The processes of one run; also works for a single process.

    Gradients are averaged explicitly with accelerate: DistributedDataParallel cannot wrap the hooks
    and attention processors that an adapter adds inside a base model.

    Raises:
        TrainingError: the environment variables of a launcher are incomplete or invalid.
    """

    def __init__(self, device: torch.device) -> None:
        check_launcher(os.environ)
        try:
            self._state = PartialState(cpu=device.type == "cpu")
        except (RuntimeError, ValueError) as error:  # torch has several classes for a bad network
            raise TrainingError(
                f"the processes of the run cannot reach each other ({first_line(error)}): check "
                "MASTER_ADDR and MASTER_PORT, or unset WORLD_SIZE and LOCAL_RANK."
            ) from None
        self.device = device
        self.rank: int = self._state.process_index
        self.world_size: int = self._state.num_processes

    @torch.no_grad()
    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        """Copy the first rank's values into the tensors of every rank, in place."""
        if self.world_size > 1:
            for tensor in tensors:
                tensor.copy_(broadcast(tensor.detach().contiguous()))

    def broadcast_int(self, number: int) -> int:
        """Return the first rank's number on every rank."""
        if self.world_size == 1:
            return number
        return int(broadcast(torch.tensor([number], device=self.device)))

    @torch.no_grad()
    def average(self, values: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Average values and gradients over all ranks in one message.

        Args:
            values: (N,) numbers of this rank.
            parameters: their gradients are averaged in place; a missing gradient counts as zero.

        Returns:
            (N,) means over all ranks.
        """
        if self.world_size == 1:
            return values
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        message = torch.cat([values, *(grad.flatten() for grad in grads)])
        message = reduce(message, reduction="mean")
        values, *means = message.split([len(values), *(grad.numel() for grad in grads)])
        for parameter, grad, mean in zip(parameters, grads, means, strict=True):
            parameter.grad = grad.copy_(mean.view(grad.shape))
        return values

    def any(self, flag: bool) -> bool:
        """Return whether the flag is true on at least one rank."""
        if self.world_size == 1:
            return flag
        return bool(reduce(torch.tensor([float(flag)], device=self.device), reduction="sum") > 0)

    @contextmanager
    def lock(self, directory: Path) -> Iterator[None]:
        """Reserve the run directory, which only the first rank writes, inside the block.

        Raises:
            OptionError: see `lock_directory`.
        """
        with lock_directory(directory) if self.rank == 0 else nullcontext():
            yield

    def barrier(self) -> None:
        """Wait until every rank arrives here."""
        if self.world_size > 1:
            self._state.wait_for_everyone()


@contextmanager
def catch_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and the first Ctrl-C instead of interrupting the current step.

    A second Ctrl-C interrupts as usual. Outside the main thread nothing is collected.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def collect(number: int, _frame: object) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    handlers = {
        number: signal.signal(number, collect) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
