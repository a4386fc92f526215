"""GGUF, the file format of ggml's programs; the package gguf is optional."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from openpulid.errors import WeightsError
from openpulid.io.files import replace_file


def import_gguf() -> Any:
    """Return the package gguf.

    Raises:
        WeightsError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise WeightsError("GGUF files need the package gguf: pip install gguf.") from None
    return gguf


def write_gguf(
    path: str | os.PathLike[str],
    architecture: str,
    numbers: Mapping[str, int],
    arrays: Mapping[str, np.ndarray],
    *,
    private: bool = False,
) -> Path:
    """Write a GGUF file, complete or not at all.

    Args:
        path: of the file. Its folder exists.
        architecture: `general.architecture`.
        numbers: further entries, as 32 bits without sign.
        arrays: tensors by name, float16 or float32. GGUF lists their sides in reverse.
        private: only the owner can read the file.

    Raises:
        WeightsError: the package gguf is not installed.
        OutputError: the file cannot be written; an existing one is as it was.
    """
    gguf = import_gguf()
    with replace_file(path, private=private) as temporary:
        writer = gguf.GGUFWriter(temporary, arch=architecture)
        for name, value in numbers.items():
            writer.add_uint32(name, value)
        for name, array in arrays.items():
            writer.add_tensor(name, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return Path(path)
