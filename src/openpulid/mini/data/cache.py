"""Computed training data on disk: arrays that are reused as long as their inputs stay the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap

from openpulid.io.files import write_json
from openpulid.io.lock import wait_for_directory

STAMP = "cache.json"


def cache_folder(runs: Path, kind: str, dataset: str) -> Path:
    """Return the folder of what is computed of a dataset, such as latents-held-out.

    Args:
        runs: folder of datasets and caches.
        kind: what is computed, such as "latents".
        dataset: name of the dataset, "world" or with a suffix.
    """
    return runs / f"{kind}{dataset.removeprefix('world')}"


class ArrayCache:
    """A folder of arrays with one row per sample, written in order and resumable.

    The folder holds `NAME.npy` for each array and `cache.json` with the key and the number of rows
    that are complete. If the key or the number of rows differs from the stored one, the arrays are
    removed.

    Args:
        folder: the folder of this cache alone; created if missing.
        key: JSON-serializable values that determine the content, such as the fingerprints of
            networks.
        num_rows: length of all arrays.
    """

    def __init__(self, folder: Path, key: Mapping[str, object], num_rows: int) -> None:
        self.folder = Path(folder)
        self.num_rows = num_rows
        # Through JSON and back, so that tuples compare equal to the stored lists.
        self.key = json.loads(json.dumps(dict(key) | {"num_rows": num_rows}))
        self.num_done = self._read_num_done()
        self._arrays: dict[str, np.ndarray] = {}

    @property
    def is_complete(self) -> bool:
        """Whether all rows are computed."""
        return self.num_done == self.num_rows

    def write(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Append rows to all arrays and record them as complete.

        Args:
            arrays: name -> (n, ...); the first call creates the files with these shapes and dtypes.
        """
        if self.num_done == 0 and not self._arrays:
            self._clear()
        end = self.num_done
        for name, values in arrays.items():
            end = self.num_done + len(values)
            self._open(name, values)[self.num_done : end] = values
        self.num_done = end
        self._write_stamp()

    def fill(
        self,
        compute: Callable[[np.ndarray], Mapping[str, np.ndarray]],
        batch_size: int = 64,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Compute the missing rows, batch by batch; wait if another process computes them.

        Args:
            compute: row numbers (n,) -> name -> (n, ...), see `write`.
            batch_size: rows per batch.
            on_progress: called with the number of rows done and their total.
        """
        if self.is_complete:
            return
        with wait_for_directory(self.folder):
            self.num_done = self._read_num_done()  # another process may have computed more
            for start in range(self.num_done, self.num_rows, batch_size):
                self.write(compute(np.arange(start, min(start + batch_size, self.num_rows))))
                if on_progress:
                    on_progress(self.num_done, self.num_rows)

    def load(self, name: str, mmap: bool = False) -> np.ndarray:
        """Load a complete array, memory-mapped and read-only if requested."""
        assert self.is_complete, f"{self.folder} has {self.num_done} of {self.num_rows} rows"
        return np.load(self.folder / f"{name}.npy", mmap_mode="r" if mmap else None)

    def _clear(self) -> None:
        """Create the folder, or remove the arrays and the stamp of another key."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / STAMP).unlink(missing_ok=True)
        for file in self.folder.glob("*.npy"):
            file.unlink()

    def _read_num_done(self) -> int:
        stamp = self.folder / STAMP
        try:
            content = json.loads(stamp.read_bytes())
        except (OSError, ValueError):
            return 0
        return int(content["num_done"]) if content["key"] == self.key else 0

    def _write_stamp(self) -> None:
        for array in self._arrays.values():
            array.flush()  # type: ignore[attr-defined]  # a memory map
        content = {"key": self.key, "num_done": self.num_done}
        write_json(self.folder / STAMP, content)

    def _open(self, name: str, values: np.ndarray) -> np.ndarray:
        if name not in self._arrays:
            file = self.folder / f"{name}.npy"
            shape = (self.num_rows, *values.shape[1:])
            mode = "r+" if file.exists() else "w+"
            self._arrays[name] = open_memmap(file, mode, dtype=values.dtype, shape=shape)
        return self._arrays[name]
