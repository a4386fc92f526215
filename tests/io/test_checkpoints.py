"""Saving, loading and hashing of modules and state dicts."""

import hashlib
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from openpulid.device import peak_memory, reset_peak_memory
from openpulid.errors import WeightsError
from openpulid.io import checkpoints
from openpulid.io.checkpoints import (
    load_module,
    load_state,
    module_fingerprint,
    read_metadata,
    read_tensors,
    save_module,
    save_tensors,
    sha256,
)
from openpulid.methods.pulid.sdxl import PuLID


class Small(nn.Module):
    def __init__(self, width: int = 3):
        super().__init__()
        self.config = {"width": width}
        self.layer = nn.Linear(width, 2)
        self.register_buffer("count", torch.tensor(7))


class Other(Small):
    pass


def test_module_is_rebuilt_from_file(tmp_path):
    module = Small(5)
    path = save_module(
        module, tmp_path / "deep" / "small.safetensors", {"seed": 3, "revision": "abc"}
    )
    loaded = load_module(Small, path)
    assert loaded.layer.weight.shape == (2, 5)
    assert all(
        torch.equal(value, loaded.state_dict()[key]) for key, value in module.state_dict().items()
    )
    facts = read_metadata(path)
    assert (facts["seed"], facts["revision"], facts["class"]) == ("3", "abc", "Small")
    assert [file.name for file in path.parent.iterdir()] == ["small.safetensors"]


def test_fp16_file_loads_as_float32(tmp_path):
    module = Small()
    path = save_module(module, tmp_path / "small.safetensors", dtype=torch.float16)
    loaded = load_module(Small, path)
    assert loaded.layer.weight.dtype == torch.float32 and loaded.count == 7
    assert torch.equal(loaded.layer.weight, module.layer.weight.half().float())


def test_unusable_module_file_raises_weights_error(tmp_path):
    path = save_module(Small(), tmp_path / "small.safetensors")
    with pytest.raises(WeightsError, match="does not exist"):
        load_module(Small, tmp_path / "none.safetensors")
    with pytest.raises(WeightsError, match="holds Small, not Other"):
        load_module(Other, path)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(WeightsError, match="not a complete safetensors file"):
        load_module(Small, broken)


def test_state_of_other_version_is_rejected(tmp_path):
    class Wider(Small):
        def __init__(self, width: int = 3):
            super().__init__(width)
            self.layer = nn.Linear(width + 1, 2)

    Wider.__name__ = "Small"
    path = save_module(Small(), tmp_path / "small.safetensors")
    with pytest.raises(WeightsError, match="another version"):
        load_module(Wider, path)


def test_mismatch_is_reported_in_one_line(tmp_path):
    state = {f"layer.{n}": torch.zeros(1) for n in range(1000)} | {
        "layer.weight": torch.zeros(1, 3)
    }
    with pytest.raises(
        WeightsError,
        match=r'^not these: Missing key.*"layer.bias".*; Unexpected key.* \.\.\.; size mismatch',
    ) as error:
        load_state(Small(), state, "not these")
    assert "\n" not in str(error.value) and len(str(error.value)) < 700
    module = Small()
    load_state(module, Other().state_dict(), "not these")


class Hostile:
    """A pickle that creates a folder when it is loaded without protection."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_pickle_is_not_executed(tmp_path, zipped):
    file = tmp_path / "pulid_v1.bin"
    target = tmp_path / "created"
    content = {"layer": torch.ones(1), "more": Hostile(target)}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    for read in (read_tensors, PuLID.load):
        with pytest.raises(
            WeightsError, match=r"pulid_v1\.bin is damaged or holds more than weights"
        ) as error:
            read(file)
        assert "\n" not in str(error.value) and not target.exists()
    torch.load(file, weights_only=False)
    assert target.is_dir()  # the effect that was prevented


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "legacy.pt"])
def test_tensors_are_cast_and_selected_on_reading(tmp_path, name):
    path = tmp_path / name
    values = torch.linspace(0, 1, 7).half()
    tensors = {"visual.w": values, "visual.n": torch.arange(3), "text.w": values + 1}
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=name != "legacy.pt")
    read = read_tensors(path, torch.bfloat16, "visual.")
    assert set(read) == {"visual.w", "visual.n"} and read["visual.n"].dtype == torch.int64
    assert torch.equal(read["visual.w"], values.to(torch.bfloat16))

    # what was read does not depend on the file any more
    copies = [read_tensors(path)["text.w"], read_tensors(path, torch.float16)["text.w"]]
    path.write_bytes(bytes(path.stat().st_size))
    assert all(torch.equal(copy, values + 1) for copy in copies)


def test_sha256(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"abc" * 1_000_000)
    assert sha256(file) == hashlib.sha256(b"abc" * 1_000_000).hexdigest()


def test_module_fingerprint_depends_on_every_value():
    torch.manual_seed(0)
    module = Small()
    same = Small()
    same.load_state_dict(module.state_dict())
    assert module_fingerprint(module) == module_fingerprint(same)
    with torch.no_grad():  # a change that leaves all sums as they are
        same.layer.weight[0, 0] += 1
        same.layer.weight[0, 1] -= 1
    assert module_fingerprint(module) != module_fingerprint(same)
    assert module_fingerprint(module) != module_fingerprint(module.to(torch.bfloat16))


def test_tensors_next_to_a_state_dict_are_kept(tmp_path):
    state = {"state_dict": {"weight": torch.ones(1)}, "mean": torch.zeros(2), "step": 3}
    torch.save(state, tmp_path / "file.bin")
    assert read_tensors(tmp_path / "file.bin").keys() == {"weight", "mean"}


def test_dictionary_that_contains_itself_is_refused(tmp_path):
    for key in ("state_dict", "model", "layer"):
        state = {"weight": torch.ones(1)}
        state[key] = state
        torch.save(state, tmp_path / "loop.bin")
        with pytest.raises(WeightsError, match="no plain dictionary of tensors"):
            read_tensors(tmp_path / "loop.bin")


@pytest.mark.parametrize(
    "content",
    [b"", b"notes", b"\x80", b"PK\x03\x04", b"\x80\x02}q\x00.", b"<html>", b"(lp0\n."],
    ids=["empty", "text", "pickle", "zip", "nothing", "page", "list"],
)
@pytest.mark.parametrize("suffix", [".bin", ".pt", ".safetensors", ".txt"])
def test_file_of_something_else_is_one_sentence(tmp_path, content, suffix):
    file = tmp_path / f"notes{suffix}"
    file.write_bytes(content)
    for read in (read_tensors, PuLID.load):
        with pytest.raises(WeightsError) as error:
            read(file)
        assert str(error.value).isprintable() and len(str(error.value)) < 400


@pytest.mark.parametrize(
    "config",
    [
        "no JSON",
        "[]",
        "null",
        "[" * 100_000,
        '{"width": -1}',
        '{"width": 1e400}',
        '{"width": "a"}',
        '{"width": null}',
        '{"width": 1000000000000}',
        '{"depth": 1000}',
        '{"x": 1}',
    ],
)
def test_damaged_configuration_is_one_sentence(tmp_path, config):
    path = tmp_path / "small.safetensors"
    save_tensors(Small().state_dict(), path, {"class": "Small", "config": config})
    with pytest.raises(WeightsError, match=r"small\.safetensors is damaged") as error:
        load_module(Small, path)
    assert str(error.value).isprintable() and len(str(error.value)) < 400


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_large_file_is_read_in_parts(suffix, tmp_path, monkeypatch):
    """Pages of the file that were read do not stay in memory next to the copies."""
    size = 8 << 20
    path = tmp_path / f"large{suffix}"
    stored = {f"a.{k}": torch.full((size // 2,), float(k)).half() for k in range(12)}
    save_file(stored, path) if suffix == ".safetensors" else torch.save(stored, path)
    monkeypatch.setattr(checkpoints, "PART_SIZE", size)
    reset_peak_memory(torch.device("cpu"))
    before = peak_memory(torch.device("cpu"))
    tensors = read_tensors(path, torch.bfloat16, "a.")
    peak = peak_memory(torch.device("cpu"))
    assert tensors.keys() == stored.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, stored[name].bfloat16())
    if before is not None and peak is not None:  # Linux
        assert peak - before < 1.5 * 12 * size / 2**30
