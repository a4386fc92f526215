"""Processes of one training run, and signals from outside."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, reduce
from torch import Tensor, nn

from openpulid.errors import TrainingError


class DistributedContext:
    """The processes of one run; also works for a single process.

    Gradients are averaged explicitly with accelerate: DistributedDataParallel cannot wrap the hooks
    and attention processors that an adapter adds inside a base model.

    Raises:
        TrainingError: the environment variables of a launcher are incomplete or invalid.
    """

    def __init__(self, device: torch.device) -> None:
        try:
            self._state = PartialState(cpu=device.type == "cpu")
        except ValueError as error:
            raise TrainingError(
                "the environment variables of a distributed run (LOCAL_RANK, RANK, WORLD_SIZE, "
                f"MASTER_ADDR) are incomplete or invalid: {error}; start the run with torchrun, "
                "or unset them."
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
