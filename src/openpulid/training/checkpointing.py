"""What a training run must remember: weights, their running average, the optimizer's moments, and where it
stands."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from openpulid.errors import TrainingError


def named_parameters(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """What trains, as {"module.name": parameter}; a parameter that is shared appears once."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for prefix, module in modules.items():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                found.setdefault(id(parameter), (_plain(f"{prefix}.{name}"), parameter))
    return dict(found.values())


def named_buffers(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The buffers that belong to a module's state (running statistics)."""
    found: dict[int, tuple[str, Tensor]] = {}
    for prefix, module in modules.items():
        for name, value in module.state_dict(keep_vars=True).items():
            if not isinstance(value, nn.Parameter):
                found.setdefault(id(value), (_plain(f"{prefix}.{name}"), value))
    return dict(found.values())


def _plain(name: str) -> str:
    return name.replace("_orig_mod.", "")  # torch.compile's wrapper leaves no trace in a checkpoint


class EMA:
    """Exponential moving average of tensors; early on it forgets faster, so that the random start is soon
    gone."""

    def __init__(self, tensors: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.live = {name: t for name, t in tensors.items() if t.is_floating_point()}
        self.mean = {name: t.detach().clone() for name, t in self.live.items()}
        self._live, self._mean = list(self.live.values()), list(self.mean.values())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step number `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._mean, self._live, 1.0 - decay)

    @torch.no_grad()
    def apply(self) -> None:
        """The average becomes the weights, for good."""
        torch._foreach_copy_(self._live, self._mean)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The average is in the modules inside the block; the weights are back, bit for bit, after it."""
        kept = [t.detach().clone() for t in self._live]
        self.apply()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._live, kept)


class TrainingState:
    """The tensors of a run under the names "weights.*", "average.*" and "optimizer.*", and how they go to one
    file."""

    def __init__(
        self, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer, average: EMA
    ) -> None:
        self.parameters = named_parameters(modules)
        self.weights = {**self.parameters, **named_buffers(modules)}
        self.optimizer, self.average = optimizer, average

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is saved, on the device where it lies."""
        moments = {
            f"optimizer.{name}.{key}": value
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }
        return {
            **self.weight_tensors(),
            **{f"average.{n}": t for n, t in self.average.mean.items()},
            **moments,
        }

    def weight_tensors(self) -> dict[str, Tensor]:
        return {f"weights.{name}": t.detach() for name, t in self.weights.items()}

    def save(self, path: Path, facts: Mapping[str, object]) -> None:
        """Replaces `path` in one move. Raises TrainingError and leaves the old file when it cannot be
        written."""
        write_tensors(path, self.tensors(), facts)

    @torch.no_grad()
    def load(self, path: Path) -> dict:
        """Puts everything back and returns the facts. Raises TrainingError when the file is of another
        training."""
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads(file.metadata()["facts"])
                saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise TrainingError(
                f"{path} is no checkpoint of a run ({error}): remove it to begin anew"
            ) from None
        mine = {n: t for n, t in self.tensors().items() if not n.startswith("optimizer.")}
        theirs = {n: t for n, t in saved.items() if not n.startswith("optimizer.")}
        different = [
            n
            for n in sorted(mine.keys() | theirs.keys())
            if not _same_shape(mine.get(n), theirs.get(n))
        ]
        if different:
            raise TrainingError(
                f"{path} belongs to another model ({len(different)} entries differ, first {different[0]}): "
                "choose another folder or remove it to begin anew"
            )
        for name, tensor in mine.items():
            tensor.copy_(theirs[name])
        self._load_moments(saved)
        return facts

    def _load_moments(self, saved: Mapping[str, Tensor]) -> None:
        state: dict[int, dict[str, Tensor]] = {}
        index = {
            id(p): i
            for i, p in enumerate(p for g in self.optimizer.param_groups for p in g["params"])
        }
        for name, parameter in self.parameters.items():
            values = {
                k: saved[f]
                for k in ("step", "exp_avg", "exp_avg_sq")
                if (f := f"optimizer.{name}.{k}") in saved
            }
            if (
                values
            ):  # a fused update walks over memory: the moments need the strides of their parameter
                state[index[id(parameter)]] = {
                    k: torch.empty_like(parameter, dtype=v.dtype).copy_(v) if k != "step" else v
                    for k, v in values.items()
                }
        self.optimizer.load_state_dict(
            {"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]}
        )


def _same_shape(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.shape == b.shape


def write_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, object]) -> None:
    """A safetensors file with `facts` as JSON in its metadata, written beside and renamed: whole, or not at
    all."""
    beside = path.with_name(f".{path.name}.part")
    try:
        plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        save_file(plain, beside, metadata={"facts": json.dumps(facts)})
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, SafetensorError) as error:
        beside.unlink(missing_ok=True)
        raise TrainingError(
            f"{path} could not be written ({error}): the last good one is kept; free some space"
        ) from None


def write_text(path: Path, text: str) -> None:
    """As `write_tensors`, for a small text file."""
    beside = path.with_name(f".{path.name}.part")
    try:
        beside.write_text(text)
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise TrainingError(f"{path} could not be written ({error}): free some space") from None
