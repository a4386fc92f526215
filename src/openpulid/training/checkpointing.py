"""Checkpoints of a training run: weights, their moving average, the optimizer, and the progress."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from openpulid.errors import TrainingError
from openpulid.training.schedule import TrainerConfig

CHECKPOINT = "run.safetensors"


def trainable_parameters(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Collect the trainable parameters as {"module.name": parameter}, shared ones once."""
    by_id: dict[int, tuple[str, nn.Parameter]] = {}
    for prefix, module in modules.items():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                by_id.setdefault(id(parameter), (_plain_name(f"{prefix}.{name}"), parameter))
    return dict(by_id.values())


def state_buffers(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Collect the buffers of the modules' state, such as running statistics."""
    by_id: dict[int, tuple[str, Tensor]] = {}
    for prefix, module in modules.items():
        for name, value in module.state_dict(keep_vars=True).items():
            if not isinstance(value, nn.Parameter):
                by_id.setdefault(id(value), (_plain_name(f"{prefix}.{name}"), value))
    return dict(by_id.values())


def _plain_name(name: str) -> str:
    return name.replace("_orig_mod.", "")  # torch.compile's wrapper is not part of a checkpoint


class EMA:
    """Exponential moving average of tensors.

    The decay is lower in the first steps, so that the random start is soon forgotten.

    Args:
        tensors: name -> tensor to average; tensors that are not floating point are ignored.
        decay: weight of the previous average.
    """

    def __init__(self, tensors: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.live = {name: t for name, t in tensors.items() if t.is_floating_point()}
        self.mean = {name: t.detach().clone() for name, t in self.live.items()}
        self._live = list(self.live.values())
        self._mean = list(self.mean.values())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the average after optimizer step number `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._mean, self._live, 1.0 - decay)

    @torch.no_grad()
    def apply(self) -> None:
        """Replace the weights by their average."""
        torch._foreach_copy_(self._live, self._mean)

    @contextmanager
    def swap_in(self) -> Iterator[None]:
        """Put the average into the modules inside the block, and restore the weights after it."""
        weights = [t.detach().clone() for t in self._live]
        self.apply()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._live, weights)


class TrainingState:
    """All tensors of a run, under the names "weights.*", "average.*" and "optimizer.*"."""

    def __init__(
        self, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer, average: EMA
    ) -> None:
        self.parameters = trainable_parameters(modules)
        self.weights = {**self.parameters, **state_buffers(modules)}
        self.optimizer = optimizer
        self.average = average

    def tensors(self) -> dict[str, Tensor]:
        """Collect everything that a checkpoint stores, on its current device."""
        tensors = self.weight_tensors()
        tensors |= {f"average.{name}": t for name, t in self.average.mean.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}"] = value
        return tensors

    def weight_tensors(self) -> dict[str, Tensor]:
        """Collect the weights and buffers alone."""
        return {f"weights.{name}": t.detach() for name, t in self.weights.items()}

    def save(self, path: Path, metadata: Mapping[str, object]) -> None:
        """Write a checkpoint, replacing `path` atomically.

        Raises:
            TrainingError: it cannot be written; the previous file stays.
        """
        write_tensors(path, self.tensors(), metadata)

    @torch.no_grad()
    def load(self, path: Path) -> RunFacts:
        """Restore all tensors from a checkpoint and return its metadata.

        Raises:
            TrainingError: the file is not a checkpoint, is damaged, or belongs to another model.
        """
        facts, saved = read_checkpoint(path)
        live = {n: t for n, t in self.tensors().items() if not n.startswith("optimizer.")}
        stored = {n: t for n, t in saved.items() if not n.startswith("optimizer.")}
        mismatches = [
            name
            for name in sorted(live.keys() | stored.keys())
            if not _same_shape(live.get(name), stored.get(name))
        ]
        if mismatches:
            raise TrainingError(
                f"{path} belongs to another model ({len(mismatches)} tensors differ, the first is "
                f"{mismatches[0]}): choose another run directory, or delete it to start again."
            )
        for name, tensor in live.items():
            tensor.copy_(stored[name])
        self._load_moments(saved)
        return facts

    def _load_moments(self, saved: Mapping[str, Tensor]) -> None:
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        index = {id(parameter): i for i, parameter in enumerate(trained)}
        state: dict[int, dict[str, Tensor]] = {}
        for name, parameter in self.parameters.items():
            moments: dict[str, Tensor] = {}
            for key in ("step", "exp_avg", "exp_avg_sq"):
                value = saved.get(f"optimizer.{name}.{key}")
                if value is None:
                    continue
                if key != "step":
                    # a fused update needs moments with the strides of their parameter
                    value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
                moments[key] = value
            if moments:
                state[index[id(parameter)]] = moments
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


def _same_shape(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.shape == b.shape


Count = Annotated[int, Field(ge=0)]


@dataclass
class Progress:
    """How far a run has come; stored in every checkpoint.

    Attributes:
        total: planned number of steps.
        step: number of finished steps.
        validated_step: step of the last validation.
        seconds: training time up to the checkpoint, over all processes of the run.
    """

    total: Count
    step: Count = 0
    validated_step: Count = 0
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0


@dataclass(frozen=True)
class RunIdentity:
    """The settings that a resumed run must share with its checkpoint."""

    name: str
    seed: int
    optimizer: str
    inputs: Mapping[str, str]


@dataclass(frozen=True)
class RunFacts:
    """The metadata of a checkpoint.

    Attributes:
        progress: how far the run has come.
        config: the settings that cannot change.
        minutes: the run's time budget.
    """

    progress: Progress
    config: RunIdentity
    minutes: float | None


class Checkpointer:
    """Saves and resumes a run.

    Args:
        path: the checkpoint.
        state: the run's tensors.
        config: of the run; a checkpoint of another recipe or seed is rejected.
        minutes: the run's time budget, which belongs to the planned number of steps.
    """

    def __init__(
        self, path: Path, state: TrainingState, config: TrainerConfig, minutes: float | None
    ) -> None:
        self.path = path
        self.state = state
        self.config = config
        self.minutes = minutes
        self._saved_at = 0.0

    def is_due(self, seconds: float) -> bool:
        """Return whether the last save is long enough ago, in seconds of training."""
        return seconds - self._saved_at >= self.config.save_minutes * 60

    def start_interval(self, seconds: float) -> None:
        """Count the time until the next save from here, in seconds of training."""
        self._saved_at = seconds

    def save(self, progress: Progress) -> None:
        """Write the checkpoint.

        Raises:
            TrainingError: it cannot be written; the previous checkpoint stays.
        """
        metadata = {
            "progress": asdict(progress),
            "minutes": self.minutes,
            "config": asdict(self.config),
        }
        self.state.save(self.path, metadata)

    def resume(self) -> Progress:
        """Restore the run's tensors and return its progress; without a checkpoint, start at step 0.

        Raises:
            TrainingError: the checkpoint is damaged or belongs to another run.
        """
        if not self.path.exists():
            return Progress(total=self.config.steps)
        facts = self.state.load(self.path)
        progress = facts.progress
        stored = facts.config
        if stored.seed != self.config.seed:
            raise TrainingError(
                f"{self.path} was started with seed {stored.seed}, not {self.config.seed}: use "
                "that seed, or another run directory."
            )
        if stored.name != self.config.name:
            raise TrainingError(
                f"{self.path} is a run of {stored.name}, not of {self.config.name}: choose another "
                "run directory, or start again with --fresh."
            )
        if stored.optimizer != self.config.optimizer:
            raise TrainingError(
                f"{self.path} was trained with {stored.optimizer}, not {self.config.optimizer}: "
                "use that optimizer, or another run directory."
            )
        options = sorted({*stored.inputs, *self.config.inputs})
        for option in options:
            if stored.inputs.get(option) != self.config.inputs.get(option):
                raise TrainingError(
                    f"{self.path} is a run with another {option}: use the same weights, choose "
                    "another run directory, or start again with --fresh."
                )
        # the planned end stays only while the time budget stays
        keeps_end = self.minutes is not None and self.minutes == facts.minutes
        progress.total = min(progress.total, self.config.steps) if keeps_end else self.config.steps
        return progress


def read_checkpoint(path: Path) -> tuple[RunFacts, dict[str, Tensor]]:
    """Read the metadata and all tensors of a checkpoint, and compare their checksum.

    Raises:
        TrainingError: the file is not a checkpoint, is damaged, or was written by another version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        text = header["facts"]
        expected = header["checksum"]
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise TrainingError(
            f"{path} is not a checkpoint of a training run ({error}): delete it to start "
            "again, or put a copy in its place."
        ) from None
    if checksum(tensors, text) != expected:
        raise TrainingError(
            f"{path} is damaged: its content differs from what was saved. Delete it to start "
            "again, or put a copy in its place."
        )
    try:
        return TypeAdapter(RunFacts).validate_json(text, strict=True), tensors
    except ValidationError:
        raise TrainingError(
            f"{path} was written by another version: choose another run directory, or "
            "start again with --fresh."
        ) from None


def checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    """Return the CRC-32 of tensors on the CPU and of a text, in hexadecimal.

    A file system does not notice every bit that a disk or a copy changes, and safetensors stores
    no checksum. CRC-32 takes a tenth of the time of writing the same file.
    """
    value = zlib.crc32(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        content = tensor.contiguous().flatten().view(torch.uint8).numpy()
        value = zlib.crc32(content.data, value)
    return f"{value:08x}"


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, object]
) -> None:
    """Write a safetensors file atomically, with `metadata` as JSON and a checksum in its header.

    Raises:
        TrainingError: the file cannot be written; an existing one stays.
    """
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    facts = json.dumps(metadata)
    header = {"facts": facts, "checksum": checksum(plain, facts)}
    temporary = path.with_name(f".{path.name}.part")
    try:
        save_file(plain, temporary, metadata=header)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise _write_error(path, temporary, error) from None


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically; see `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a small file atomically.

    Raises:
        TrainingError: the file cannot be written; an existing one stays.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise _write_error(path, temporary, error) from None


def _write_error(path: Path, temporary: Path, error: Exception) -> TrainingError:
    """Remove an incomplete file, and say why it could not be written."""
    with suppress(OSError):
        temporary.unlink(missing_ok=True)
    reason = getattr(error, "strerror", None) or error
    return TrainingError(
        f"{path} could not be written ({reason}): free some disk space, and check that the "
        "directory is writable. The previous file is intact."
    )
