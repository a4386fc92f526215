"""Weights on disk: safetensors with what is needed to rebuild the module in the file's own metadata."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from textwrap import shorten
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from openpulid.errors import WeightsError

M = TypeVar("M", bound=nn.Module)


def save_module(
    module: nn.Module,
    path: str | os.PathLike[str],
    metadata: Mapping[str, object] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Writes a module that `load_module` rebuilds from the file alone. The file appears whole or not at all.

    Args:
        module: must carry `config`, a JSON-able dict of its constructor's arguments.
        path: the file to write; missing folders are made.
        metadata: further facts about the weights (revision, seed, minutes), stored as text.
        dtype: what floating point tensors are stored in; None keeps theirs.
    """
    path = Path(path)
    facts = {key: str(value) for key, value in (metadata or {}).items()}
    facts |= {"class": type(module).__name__, "config": json.dumps(module.config)}
    tensors = {name: _to_storage(tensor, dtype) for name, tensor in module.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(tensors, unfinished, metadata=facts)
    os.replace(unfinished, path)
    return path


def load_module(
    cls: type[M], path: str | os.PathLike[str], device: str | torch.device = "cpu"
) -> M:
    """Rebuilds what `save_module` wrote: float32, in eval mode, without gradients.

    Raises:
        WeightsError: no such file, not a safetensors file, of another class, or its tensors do not fit the class.
    """
    facts = read_metadata(path)
    if facts.get("class") != cls.__name__ or "config" not in facts:
        kind = facts.get("class", "something else")
        raise WeightsError(
            f"{path} holds {kind}, not {cls.__name__}; name the file that `pulid mini build` wrote for it."
        )
    module = cls(**json.loads(facts["config"]))
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise WeightsError(
            f"{path} was written for another version of {cls.__name__}; build it again."
        ) from error
    return module.to(device).eval().requires_grad_(False)


def load_state(
    module: nn.Module, state: Mapping[str, torch.Tensor], wrong: str, assign: bool = False
) -> None:
    """Gives a module these weights, all of them and no others.

    Args:
        wrong: how the message begins where they do not fit.
        assign: the tensors themselves instead of their values.

    Raises:
        WeightsError: a name is missing or too many, or a shape differs; the first of them are named, in one line.
    """
    try:
        module.load_state_dict(state, assign=assign)
    except RuntimeError as error:  # names the class, then a line for each kind of misfit: of a wrong file hundreds of names
        found = [shorten(line, 200, placeholder=" ...") for line in str(error).splitlines()[1:4]]
        raise WeightsError(f"{wrong}: {'; '.join(found)}") from error


def read_tensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The tensors of a published file: safetensors, or a PyTorch file of which nothing but tensors is taken.

    Raises:
        WeightsError: no such file, or it is damaged or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(
            f"{path} does not exist; `pulid weights list` says what is needed and how to get it."
        )
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise WeightsError(
            f"{path} is damaged or holds more than weights; get it again."
        ) from error
    while isinstance(state, dict) and isinstance(
        inner := state.get("state_dict", state.get("model")), dict
    ):
        state = inner
    if isinstance(state, dict):  # some files hold their parts as dictionaries of their own
        flat: dict[str, object] = {}
        for name, part in state.items():
            flat |= (
                {f"{name}.{inner}": x for inner, x in part.items()}
                if isinstance(part, dict)
                else {str(name): part}
            )
        state = flat
    if not isinstance(state, dict) or not all(
        isinstance(value, torch.Tensor) for value in state.values()
    ):
        raise WeightsError(f"{path} holds no plain dictionary of tensors.")
    return state


def fingerprint(path: str | os.PathLike[str], whole: int = 64 << 20, parts: int = 64) -> str:
    """What tells one file of weights from another: its SHA-256, of a file above `whole` bytes that of its length and of so
    many parts of it, since reading gigabytes at every start would cost more than the check is worth."""
    size = os.path.getsize(path)
    if size <= whole:
        return sha256(path)
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for part in range(parts):
            file.seek(part * (size - (1 << 16)) // (parts - 1))
            digest.update(file.read(1 << 16))
    return f"sampled-{digest.hexdigest()}"


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The facts stored beside the tensors of a safetensors file.

    Raises:
        WeightsError: no such file, or not a safetensors file.
    """
    if not Path(path).is_file():
        raise WeightsError(
            f"{path} does not exist; `pulid mini build` makes the miniature's weights."
        )
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise WeightsError(
            f"{path} is not a whole safetensors file; copy or build it again."
        ) from error


def sha256(path: str | os.PathLike[str]) -> str:
    """The hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _to_storage(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    return tensor.detach().cpu().contiguous().clone()
