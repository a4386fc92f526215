"""Every random number of a training step, as a function of (seed, step, name) alone.

Nothing is remembered between steps, so a run that is killed and resumed draws what an undisturbed one would
have drawn, and several processes together draw what one process alone draws: everything is drawn for the
*global* batch and each rank keeps its slice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from openpulid.errors import OptionError


def generator_for(*key: object) -> torch.Generator:
    """A CPU generator that depends on the key (seed, step, name, ...) and on nothing else."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=4).digest()
    # torch's CPU generator (MT19937) keeps 32 bits of its seed
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


@dataclass
class StepRNG:
    """The randomness of one step, seen by one rank.

    Shapes given to `randn`, `rand` and `randint` are the rank's own: the first axis is the rank's part of the
    batch. Unnamed draws of one step are numbered in the order of the calls and therefore independent of each
    other; a named one does not depend on the order. Two draws with the same name give the same numbers.
    """

    seed: int
    step: int
    rank: int = 0
    world: int = 1
    record: dict[str, Tensor] | None = field(
        default=None, repr=False
    )  # of what was drawn and noted
    figures: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    samples: int = field(default=0, init=False)  # global batch size, known after the first draw
    _calls: int = field(default=0, init=False, repr=False)

    def figure(self, name: str, value: Tensor) -> None:
        """Something to be shown beside the losses, that nothing is trained on: a scalar, averaged as they are."""
        self.figures[name] = value.detach().float()

    def generator(self, name: str = "") -> torch.Generator:
        """A fresh CPU generator, the same on every rank. Draw for the global batch and take `mine` of it."""
        return generator_for(self.seed, self.step, name)

    def indices(self, n: int, batch: int, name: str = "data") -> Tensor:
        """The rank's (batch / world,) int64 part of this step's global batch out of `n` samples.

        Epoch after epoch a new permutation of all n: nothing comes twice before everything came once. `batch`
        is the global batch size; raises OptionError when the ranks cannot share it evenly.
        """
        if batch % self.world:
            raise OptionError(
                f"a batch of {batch} cannot be shared by {self.world} processes or parts: choose a multiple"
            )
        if n < 1:
            raise OptionError("there is no training data: the data set is empty")
        first, last = self.step * batch, (self.step + 1) * batch
        parts = []
        for epoch in range(first // n, (last - 1) // n + 1):
            order = torch.randperm(n, generator=generator_for(self.seed, name, "epoch", epoch))
            parts.append(order[max(first - epoch * n, 0) : last - epoch * n])
        self.samples = max(self.samples, batch)
        return self.note(f"{name}.indices", self.mine(torch.cat(parts)))

    def randn(self, shape: Sequence[int], name: str | None = None) -> Tensor:
        """Standard normal float32 numbers on the CPU, the rank's slice of what is drawn for the global
        batch."""
        return self._draw(shape, name, torch.randn)

    def rand(self, shape: Sequence[int], name: str | None = None) -> Tensor:
        """Uniform float32 numbers in [0, 1), as `randn`."""
        return self._draw(shape, name, torch.rand)

    def randint(self, high: int, shape: Sequence[int], name: str | None = None) -> Tensor:
        """Uniform int64 numbers in [0, high), as `randn`."""
        return self._draw(
            shape, name, lambda size, generator: torch.randint(high, size, generator=generator)
        )

    def mine(self, globally: Tensor) -> Tensor:
        """The rank's slice along the first axis of something made for the global batch."""
        part = len(globally) // self.world
        return globally[self.rank * part : (self.rank + 1) * part]

    def note(self, name: str, value: Tensor) -> Tensor:
        """Returns `value`, and keeps it for the file that is written when this step's loss is not finite."""
        if self.record is not None:
            self.record[name] = value.detach()
        return value

    def _draw(self, shape: Sequence[int], name: str | None, draw: Callable[..., Tensor]) -> Tensor:
        if name is None:
            name, self._calls = f"draw-{self._calls}", self._calls + 1
        size = (shape[0] * self.world, *shape[1:])
        self.samples = max(self.samples, size[0])
        return self.note(name, self.mine(draw(size, generator=self.generator(name))))


def microbatch_rngs(
    seed: int, step: int, rank: int, world: int, parts: int, keep: bool = False
) -> list[StepRNG]:
    """A rank's draws of a step that is made in several parts, one after the other: together they draw what one would have
    drawn. `keep` records it."""
    return [
        StepRNG(seed, step, rank * parts + part, world * parts, {} if keep else None)
        for part in range(parts)
    ]


def recorded(draws: Sequence[StepRNG]) -> dict[str, Tensor]:
    """What draws that keep their record drew and noted, joined along the first axis."""
    known = [draw.record or {} for draw in draws]
    return {
        name: torch.cat([torch.atleast_1d(record[name]) for record in known]) for name in known[0]
    }
