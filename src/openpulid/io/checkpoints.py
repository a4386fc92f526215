"""Save and load modules and state dicts as safetensors, and compute file and module hashes.

A module file stores its class name and constructor arguments in its metadata, so `load_module` can
rebuild the module from the file alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any, TypeVar
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from openpulid.errors import OutputError, PulidError, WeightsError, first_line, is_out_of_memory
from openpulid.io.files import make_folder, replace_file

M = TypeVar("M", bound=nn.Module)

TensorGroups = Mapping[str, Mapping[str, torch.Tensor]]
"""Part of a file -> its tensors, such as {"image_proj": {...}, "ip_adapter": {...}}."""

MAX_SIZE = 1 << 16
"""The largest width in the configuration of a module."""
DEPTH_NAMES = ("depth", "num_hidden_layers")
MAX_DEPTH = 256
"""The largest number of layers in the configuration of a module."""
MAX_NESTING = 8
"""Dictionaries within dictionaries that a file of weights may have."""

READ_SIZE = 1 << 20
"""Bytes read at a time when a whole file is hashed."""
PART_SIZE = 1 << 28
"""Bytes of a large file that are mapped at a time."""
SAMPLE_SIZE = 1 << 16
"""Bytes per sample when a large file is fingerprinted."""
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".ckpt")


def save_module(
    module: nn.Module,
    path: str | os.PathLike[str],
    metadata: Mapping[str, object] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Save a module so that `load_module` can rebuild it from the file alone.

    Args:
        module: needs an attribute `config`, a JSON-serializable dict of its constructor's
            arguments.
        path: the file to write; missing parent folders are created.
        metadata: additional facts about the weights (revision, seed, minutes), stored as text.
        dtype: dtype in which floating point tensors are stored; None keeps their dtype.

    Returns:
        The path.

    Raises:
        OutputError: the file cannot be written; an existing one is as it was.
    """
    facts = {key: str(value) for key, value in (metadata or {}).items()}
    facts |= {"class": type(module).__name__, "config": json.dumps(module.config)}
    tensors = {name: _to_storage(tensor, dtype) for name, tensor in module.state_dict().items()}
    return save_tensors(tensors, path, facts)


def save_tensors(
    tensors: Mapping[str, torch.Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a safetensors file in one step; missing parent folders are created.

    Args:
        tensors: name -> tensor, contiguous and on the CPU.
        path: the file to write.
        metadata: entries of the file's header.

    Raises:
        OutputError: the file cannot be written; an existing one is as it was.
    """
    path = Path(path)
    make_folder(path.parent)
    with replace_file(path) as temporary:
        try:
            save_file(dict(tensors), temporary, metadata=dict(metadata or {}))
        except SafetensorError as error:
            raise OutputError(
                f"{path} cannot be written ({error}); free some disk space, or choose another path."
            ) from error
    return path


@contextmanager
def explain_bad_weights(message: str) -> Iterator[None]:
    """Turn any failure of a library with a damaged file into a `WeightsError`.

    Files of weights come from other people. A library that builds a network from one of them can
    raise anything. An error of the user, and lack of memory, pass.

    Args:
        message: the problem and the fix, without a period. The library's reason follows.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, PulidError) or is_out_of_memory(error):
            raise
        reason = shorten(first_line(error), 200, placeholder=" ...")
        raise WeightsError(f"{message} ({reason}).") from error


def parse_config(text: str, message: str) -> dict[str, Any]:
    """Parse the configuration of a module in the metadata of a file.

    Raises:
        WeightsError: it is no JSON object, or has a size that no module can have.
    """
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        config = None
    is_too_large = isinstance(config, dict) and any(
        _exceeds(value, MAX_DEPTH if name in DEPTH_NAMES else MAX_SIZE)
        for name, value in config.items()
    )
    if not isinstance(config, dict) or is_too_large:
        raise WeightsError(f"{message} (its configuration is damaged).")
    return config


def _exceeds(value: object, limit: int) -> bool:
    if isinstance(value, list):
        return len(value) > limit or any(_exceeds(item, limit) for item in value)
    return isinstance(value, (int, float)) and not 0 <= value <= limit


def load_module(
    cls: type[M], path: str | os.PathLike[str], device: str | torch.device = "cpu"
) -> M:
    """Rebuild a module written by `save_module`: float32, in eval mode, without gradients.

    Raises:
        WeightsError: the file is missing, is no safetensors file, holds another class, or its
            tensors do not fit the class.
    """
    facts = read_metadata(path)
    if facts.get("class") != cls.__name__ or "config" not in facts:
        stored = facts.get("class", "something else")
        raise WeightsError(
            f"{path} holds {stored}, not {cls.__name__}; "
            "use the file that `pulid mini build` wrote for this class."
        )
    message = f"{path} is damaged; copy or build it again"
    config = parse_config(facts["config"], message)
    with explain_bad_weights(message):
        module = cls(**config)
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise WeightsError(
            f"{path} was written for another version of {cls.__name__}; build it again."
        ) from error
    return module.to(device).eval().requires_grad_(False)


def load_state(
    module: nn.Module,
    state: Mapping[str, torch.Tensor],
    message: str,
    assign: bool = False,
    is_part: bool = False,
) -> None:
    """Load a state dict into a module, strictly.

    Args:
        module: the module to fill.
        state: exactly its weights.
        message: how the error message begins if they do not fit.
        assign: use the tensors themselves instead of copying their values.
        is_part: the state has only some of the weights.

    Raises:
        WeightsError: a name is missing or unexpected, or a shape differs. The message is one line
            and names the first of them.
    """
    try:
        module.load_state_dict(state, strict=not is_part, assign=assign)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        # The first line names the class; then each kind of mismatch has a line, which can hold
        # hundreds of names if the file is of another model.
        lines = str(error).splitlines()[1:4]
        mismatches = "; ".join(shorten(line, 200, placeholder=" ...") for line in lines)
        raise WeightsError(f"{message}: {mismatches}") from error


def load_in_parts(
    module: nn.Module, path: str | os.PathLike[str], message: str, dtype: torch.dtype
) -> None:
    """Replace all weights of a module by those of a large file, strictly, a part at a time.

    A file that is mapped as a whole is in memory next to the converted weights.

    Args:
        module: the module; its weights may be on the meta device.
        path: a file of safetensors or PyTorch; the latter is read as a whole.
        message: how the error message begins if the weights do not fit.
        dtype: dtype to which floating point tensors are cast.

    Raises:
        WeightsError: the file is missing or damaged, or has other weights.
    """
    if Path(path).suffix != ".safetensors" or read_names(path) != set(module.state_dict()):
        load_state(module, read_tensors(path, dtype), message, assign=True)
        return
    for state in _read_parts(Path(path), sorted(read_names(path)), dtype):
        load_state(module, state, message, assign=True, is_part=True)


def _read_parts(
    path: Path, names: Sequence[str], dtype: torch.dtype | None
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield copies of the tensors of a safetensors file, some at a time.

    Pages of the file that were read stay in memory until it is closed.
    """
    num_parts = _count_parts(path)
    for first in range(num_parts):
        with safe_open(path, framework="pt") as file:
            part = {name: _copy(file.get_tensor(name), dtype) for name in names[first::num_parts]}
        yield part


def _count_parts(path: Path) -> int:
    return 1 + os.path.getsize(path) // PART_SIZE


def read_names(path: str | os.PathLike[str]) -> set[str]:
    """Read the names of the tensors in a safetensors file.

    Raises:
        WeightsError: the file is missing or damaged.
    """
    read_metadata(path)  # reports a missing or damaged file
    with safe_open(path, framework="pt") as file:
        return set(file.keys())


def read_tensors(
    path: str | os.PathLike[str], dtype: torch.dtype | None = None, prefix: str = ""
) -> dict[str, torch.Tensor]:
    """Read the tensors of a published file without running code from it.

    The tensors are copied out of the file, which may be overwritten afterwards.

    Args:
        path: a safetensors file, or a PyTorch file, which is unpickled with `weights_only=True`.
            Nested dictionaries are flattened to dotted names; a "state_dict" or "model" entry is
            unwrapped.
        dtype: dtype to which floating point tensors are cast, one at a time; None keeps theirs.
        prefix: read only the tensors whose names begin with it.

    Raises:
        WeightsError: the file is missing, damaged, or holds anything other than tensors.
    """
    path = Path(path)
    _require_weights(path)
    tensors: dict[str, torch.Tensor] = {}
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            for part in _read_parts(path, names, dtype):
                tensors |= part
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise _damaged_weights(path) from error
        return {name: tensors[name] for name in names}
    num_parts = _count_parts(path) if is_zipfile(path) else 1
    names = []
    for first in range(num_parts):
        state = map_pickle(path)  # the memory of the part before is unmapped
        names = [name for name in state if name.startswith(prefix)]
        tensors |= {name: _copy(state[name], dtype) for name in names[first::num_parts]}
    return {name: tensors[name] for name in names}


def group_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Group tensors by part, which is their name up to the first period."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        part, _, key = name.partition(".")
        parts.setdefault(part, {})[key] = tensor
    return parts


def map_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Open the tensors of a PyTorch file as `read_tensors` does, without reading their values.

    They are mapped into memory: the file must not be overwritten while they are in use.

    Raises:
        WeightsError: the file is missing, damaged, or holds anything other than tensors.
    """
    _require_weights(path)
    try:
        # files of PyTorch before 1.6 are no zip archives and cannot be mapped
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except Exception as error:  # unpickling a file that is none may raise anything
        if is_out_of_memory(error):
            raise
        # torch's own message advises to trust the file
        raise _damaged_weights(path) from error
    state = _flatten(_unwrap(state))
    if not isinstance(state, dict) or not all(
        isinstance(value, torch.Tensor) for value in state.values()
    ):
        raise WeightsError(
            f"{path} is no plain dictionary of tensors; check that it is a weights file."
        )
    return state


def _require_weights(path: Path) -> None:
    if not path.is_file():
        raise WeightsError(
            f"{path} does not exist; `pulid weights list` shows how to get published weights."
        )


def _damaged_weights(path: Path) -> WeightsError:
    return WeightsError(f"{path} is damaged or holds more than weights; download it again.")


def read_optional_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the metadata of a safetensors file; files of another format have none.

    Raises:
        WeightsError: see `read_metadata`.
    """
    return read_metadata(path) if Path(path).suffix == ".safetensors" else {}


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the metadata of a safetensors file.

    Raises:
        WeightsError: the file is missing or is no complete safetensors file.
    """
    if not Path(path).is_file():
        raise WeightsError(
            f"{path} does not exist; `pulid mini build` creates the weights of the miniature."
        )
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path} is not a complete safetensors file; copy or build it again."
        ) from error


def fingerprint(
    path: str | os.PathLike[str], max_full_size: int = 64 << 20, num_samples: int = 64
) -> str:
    """Return a string that identifies the content of a weights file.

    This is the SHA-256 of a file of up to `max_full_size` bytes. For a larger file it is the
    SHA-256 of its length and of `num_samples` evenly spaced samples: reading gigabytes at every
    start would cost more than the check is worth.
    """
    size = os.path.getsize(path)
    if size <= max_full_size:
        return sha256(path)
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for index in range(num_samples):
            file.seek(index * (size - SAMPLE_SIZE) // (num_samples - 1))
            digest.update(file.read(SAMPLE_SIZE))
    return f"sampled-{digest.hexdigest()}"


def hash_weights(path: Path) -> list[str]:
    """Return the fingerprint of a weights file, or those of a folder and its subfolders.

    Raises:
        OSError: the path does not exist.
    """
    if not path.is_dir():
        return [fingerprint(path)]
    # unlike "**", these patterns follow a subfolder that is a symbolic link
    files = sorted([*path.glob("*"), *path.glob("*/*")])
    return [
        fingerprint(file) for file in files if file.suffix in WEIGHT_SUFFIXES and file.is_file()
    ]


def module_fingerprint(module: nn.Module) -> str:
    """Return the SHA-256 of a module's state: names, dtypes, shapes and values of all tensors."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        values = tensor.detach().cpu().contiguous().flatten()
        digest.update(values.view(torch.uint8).numpy())
    return digest.hexdigest()


def sha256(path: str | os.PathLike[str]) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(READ_SIZE):
            digest.update(block)
    return digest.hexdigest()


def _copy(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor.to(dtype if tensor.is_floating_point() else None, copy=True)


def _to_storage(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    return tensor.detach().cpu().contiguous().clone()


def _unwrap(state: object) -> object:
    """Return the innermost "state_dict" or "model" entry of a checkpoint, or the checkpoint.

    Tensors next to the entry are kept, such as the mean latent next to an encoder.
    """
    for _ in range(MAX_NESTING):  # a pickled dictionary can contain itself
        if not isinstance(state, dict):
            break
        inner = state.get("state_dict", state.get("model"))
        if not isinstance(inner, dict):
            break
        tensors = {name: x for name, x in state.items() if isinstance(x, torch.Tensor)}
        state = {**tensors, **inner}
    return state


def _flatten(state: object, levels: int = 2) -> object:
    """Merge nested dictionaries: some files hold each submodule or each layer as a dictionary."""
    if not isinstance(state, dict):
        return state
    flat: dict[str, object] = {}
    for name, value in state.items():
        if isinstance(value, dict) and levels:
            inner = _flatten(value, levels - 1)
            assert isinstance(inner, dict)
            flat |= {f"{name}.{key}": tensor for key, tensor in inner.items()}
        else:
            flat[str(name)] = value
    return flat
