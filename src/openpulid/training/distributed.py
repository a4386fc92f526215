"""What a training run shares with its surroundings: signals from outside, and the other processes of the same
run."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, reduce
from torch import Tensor, nn


class DistributedContext:
    """The processes of one run, which alone may be one. Gradients are averaged by hand with accelerate,
    because hooks and processors inside a base model cannot be wrapped by DistributedDataParallel."""

    def __init__(self, device: torch.device) -> None:
        self._state = PartialState(cpu=device.type == "cpu")
        self.device, self.rank, self.world = (
            device,
            self._state.process_index,
            self._state.num_processes,
        )

    @torch.no_grad()
    def same(self, tensors: Iterable[Tensor]) -> None:
        """The first rank's values, in place, on every rank."""
        if self.world > 1:
            for tensor in tensors:
                tensor.copy_(broadcast(tensor.detach().contiguous()))

    def agree(self, number: int) -> int:
        """The first rank's number on every rank."""
        return (
            int(broadcast(torch.tensor([number], device=self.device))) if self.world > 1 else number
        )

    @torch.no_grad()
    def mean(self, values: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
        """`values` and the parameters' gradients averaged in one message; what a rank did not use counts as
        zero."""
        if self.world == 1:
            return values
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = reduce(torch.cat([values, *(g.flatten() for g in grads)]), reduction="mean")
        values, *means = flat.split([len(values), *(g.numel() for g in grads)])
        for parameter, grad, mean in zip(parameters, grads, means, strict=True):
            parameter.grad = grad.copy_(mean.view(grad.shape))
        return values

    def any(self, flag: bool) -> bool:
        """Whether it is true on one rank, known to all at the same step."""
        if self.world == 1:
            return flag
        return bool(reduce(torch.tensor([float(flag)], device=self.device), reduction="sum") > 0)

    def wait(self) -> None:
        if self.world > 1:
            self._state.wait_for_everyone()


@contextmanager
def signals_noted() -> Iterator[list[int]]:
    """SIGTERM and the first Ctrl-C only leave a note, so that no step is torn apart; the second Ctrl-C works
    as ever."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, _frame: object) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
