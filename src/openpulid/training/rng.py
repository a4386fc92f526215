"""Random numbers of a training step, as a pure function of (seed, step, name).

No generator state is kept between steps. A run that is killed and resumed therefore draws the same
numbers as an undisturbed run. All draws are for the *global* batch and each rank keeps its slice,
so several processes together draw what a single process draws.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from openpulid.errors import OptionError


def generator_for(*key: object) -> torch.Generator:
    """Create a CPU generator that depends on the key (seed, step, name, ...) alone."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=4).digest()
    # torch's CPU generator (MT19937) uses 32 bits of its seed
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def check_shared(batch: int, parts: int, name: str = "batch") -> None:
    """Check that the processes and micro-batches of a step can share a global batch evenly.

    Args:
        batch: global batch size.
        parts: number of processes times micro-batches.
        name: of the batch, for the message.

    Raises:
        OptionError: they cannot.
    """
    if batch % parts:
        raise OptionError(
            f"a {name} of {batch} cannot be shared by {parts} processes or micro-batches: choose a "
            f"multiple of {parts}."
        )


@dataclass
class StepRNG:
    """Random numbers of one step, as one rank sees them.

    Shapes passed to `randn`, `rand` and `randint` are the rank's own: the first axis is the rank's
    part of the batch. Unnamed draws are numbered in call order and independent of each other. A
    named draw does not depend on the call order, and the same name gives the same numbers.

    Attributes:
        seed: of the run.
        step: index of the step, from 0.
        rank: index of this process, or of this micro-batch of a process.
        world_size: number of slices of the global batch.
        recorded: collects every draw by name, for the report of a loss that is not finite; None
            records nothing.
    """

    seed: int
    step: int
    rank: int = 0
    world_size: int = 1
    recorded: dict[str, Tensor] | None = field(default=None, repr=False)
    _calls: int = field(default=0, init=False, repr=False)

    def generator(self, name: str = "") -> torch.Generator:
        """Create a CPU generator that is the same on every rank.

        Draw for the global batch and take the `local_slice` of it.
        """
        return generator_for(self.seed, self.step, name)

    def indices(self, n: int, batch: int, name: str = "data") -> Tensor:
        """Sample the rank's part of this step's global batch, without replacement in each epoch.

        Every epoch is a new permutation of all samples.

        Args:
            n: number of samples in the dataset.
            batch: global batch size.
            name: of the permutation.

        Returns:
            (batch / world_size,) int64.

        Raises:
            OptionError: the ranks cannot share the batch evenly, or the dataset is empty.
        """
        check_shared(batch, self.world_size)
        if n < 1:
            raise OptionError("the dataset is empty: add training data.")
        start = self.step * batch
        stop = start + batch
        parts = []
        for epoch in range(start // n, (stop - 1) // n + 1):
            order = torch.randperm(n, generator=generator_for(self.seed, name, "epoch", epoch))
            parts.append(order[max(start - epoch * n, 0) : stop - epoch * n])
        return self.record(f"{name}.indices", self.local_slice(torch.cat(parts)))

    def randn(self, shape: Sequence[int], name: str | None = None) -> Tensor:
        """Draw the rank's slice of standard normal float32 numbers, on the CPU."""
        return self._draw(shape, name, torch.randn)

    def rand(self, shape: Sequence[int], name: str | None = None) -> Tensor:
        """Draw the rank's slice of uniform float32 numbers in [0, 1), on the CPU."""
        return self._draw(shape, name, torch.rand)

    def randint(self, high: int, shape: Sequence[int], name: str | None = None) -> Tensor:
        """Draw the rank's slice of uniform int64 numbers in [0, high), on the CPU."""
        return self._draw(
            shape, name, lambda size, generator: torch.randint(high, size, generator=generator)
        )

    def local_slice(self, batch: Tensor) -> Tensor:
        """Return the rank's part of the first axis of a global batch."""
        size = len(batch) // self.world_size
        return batch[self.rank * size : (self.rank + 1) * size]

    def record(self, name: str, value: Tensor) -> Tensor:
        """Return `value`, and keep it for the report of a loss that is not finite."""
        if self.recorded is not None:
            self.recorded[name] = value.detach()
        return value

    def _draw(self, shape: Sequence[int], name: str | None, draw: Callable[..., Tensor]) -> Tensor:
        if name is None:
            name = f"draw-{self._calls}"
            self._calls += 1
        global_shape = (shape[0] * self.world_size, *shape[1:])
        return self.record(
            name, self.local_slice(draw(global_shape, generator=self.generator(name)))
        )


def microbatch_rngs(
    seed: int, step: int, rank: int, world_size: int, count: int, record: bool = False
) -> list[StepRNG]:
    """Create the random numbers of a rank's `count` micro-batches of one step.

    Together the micro-batches draw what one undivided step draws. `record` keeps every draw.
    """
    return [
        StepRNG(seed, step, rank * count + part, world_size * count, {} if record else None)
        for part in range(count)
    ]


def merge_records(rngs: Sequence[StepRNG]) -> dict[str, Tensor]:
    """Join the recorded draws of micro-batches along the first axis."""
    records = [rng.recorded or {} for rng in rngs]
    return {
        name: torch.cat([torch.atleast_1d(record[name]) for record in records])
        for name in records[0]
    }
