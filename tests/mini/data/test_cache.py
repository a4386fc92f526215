"""The cache of computed arrays: reused for its key, resumable, discarded for another key."""

from __future__ import annotations

import time
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from openpulid.mini.data.cache import ArrayCache


def fill(cache: ArrayCache, value: float, stop: int) -> None:
    """Write rows of two until `stop` rows are complete."""
    while cache.num_done < stop:
        rows = np.full((2, 3), value, np.float16)
        cache.write({"a": rows, "b": rows[:, 0].astype(np.uint8)})


def test_complete_cache_is_reused(tmp_path: Path) -> None:
    fill(ArrayCache(tmp_path, {"net": "x", "shape": (1, 2)}, 4), 7, 4)
    cache = ArrayCache(tmp_path, {"net": "x", "shape": (1, 2)}, 4)
    assert cache.is_complete
    assert cache.load("a").shape == (4, 3) and cache.load("a").dtype == np.float16
    assert (cache.load("a") == 7).all() and cache.load("b").tolist() == [7] * 4
    assert isinstance(cache.load("a", mmap=True), np.memmap)


def test_interrupted_cache_is_resumed(tmp_path: Path) -> None:
    fill(ArrayCache(tmp_path, {"net": "x"}, 6), 1, 4)
    cache = ArrayCache(tmp_path, {"net": "x"}, 6)
    assert cache.num_done == 4 and not cache.is_complete
    fill(cache, 2, 6)
    assert ArrayCache(tmp_path, {"net": "x"}, 6).load("a")[:, 0].tolist() == [1, 1, 1, 1, 2, 2]


def test_fill_continues_with_the_first_missing_batch(tmp_path: Path) -> None:
    batches: list[list[int]] = []

    def compute(rows: np.ndarray) -> dict[str, np.ndarray]:
        if len(batches) == 1 and rows[0] == 64:
            batches.append([])
            raise InterruptedError
        batches.append(rows.tolist())
        return {"a": rows.astype(np.float32)}

    with pytest.raises(InterruptedError):
        ArrayCache(tmp_path, {"net": "x"}, 150).fill(compute)
    cache = ArrayCache(tmp_path, {"net": "x"}, 150)
    steps: list[tuple[int, int]] = []
    cache.fill(compute, on_progress=lambda done, total: steps.append((done, total)))
    assert steps == [(128, 150), (150, 150)]
    assert batches == [[*range(64)], [], [*range(64, 128)], [*range(128, 150)]]
    assert cache.load("a").tolist() == [*range(150)]

    cache.fill(compute)
    assert len(batches) == 4


def test_two_that_fill_a_cache_at_once_share_its_rows(tmp_path: Path) -> None:
    computed: list[int] = []

    def compute(rows: np.ndarray) -> dict[str, np.ndarray]:
        time.sleep(0.01)
        computed.extend(rows.tolist())
        return {"a": rows + 1}

    caches = [ArrayCache(tmp_path, {"net": "x"}, 8) for _ in range(2)]
    threads = [Thread(target=cache.fill, args=(compute, 2)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert computed == [*range(8)]
    assert all(cache.load("a").tolist() == [*range(1, 9)] for cache in caches)


@pytest.mark.parametrize(("net", "num_rows"), [("y", 4), ("x", 6)])
def test_other_key_or_length_discards_arrays(tmp_path: Path, net: str, num_rows: int) -> None:
    fill(ArrayCache(tmp_path, {"net": "x"}, 4), 1, 4)
    cache = ArrayCache(tmp_path, {"net": net}, num_rows)
    assert cache.num_done == 0
    fill(cache, 2, num_rows)
    assert (cache.load("a") == 2).all() and len(cache.load("a")) == num_rows
