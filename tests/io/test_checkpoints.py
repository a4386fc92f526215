import hashlib
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from openpulid.errors import WeightsError
from openpulid.io.checkpoints import (
    load_module,
    load_state,
    read_metadata,
    read_tensors,
    save_module,
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


def test_a_module_comes_back_from_the_file_alone(tmp_path):
    module = Small(5)
    path = save_module(
        module, tmp_path / "deep" / "small.safetensors", {"seed": 3, "revision": "abc"}
    )
    again = load_module(Small, path)
    assert again.layer.weight.shape == (2, 5)
    assert all(
        torch.equal(value, again.state_dict()[key]) for key, value in module.state_dict().items()
    )
    facts = read_metadata(path)
    assert (facts["seed"], facts["revision"], facts["class"]) == ("3", "abc", "Small")
    assert [file.name for file in path.parent.iterdir()] == ["small.safetensors"]


def test_half_precision_is_stored_and_float32_loaded(tmp_path):
    module = Small()
    path = save_module(module, tmp_path / "small.safetensors", dtype=torch.float16)
    again = load_module(Small, path)
    assert again.layer.weight.dtype == torch.float32 and again.count == 7
    assert torch.equal(again.layer.weight, module.layer.weight.half().float())


def test_what_is_wrong_with_a_file_is_one_sentence(tmp_path):
    path = save_module(Small(), tmp_path / "small.safetensors")
    with pytest.raises(WeightsError, match="does not exist"):
        load_module(Small, tmp_path / "none.safetensors")
    with pytest.raises(WeightsError, match="holds Small, not Other"):
        load_module(Other, path)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(WeightsError, match="not a whole safetensors file"):
        load_module(Small, broken)


def test_weights_of_another_version_are_refused(tmp_path):
    class Wider(Small):
        def __init__(self, width: int = 3):
            super().__init__(width)
            self.layer = nn.Linear(width + 1, 2)

    Wider.__name__ = "Small"
    path = save_module(Small(), tmp_path / "small.safetensors")
    with pytest.raises(WeightsError, match="another version"):
        load_module(Wider, path)


def test_what_does_not_fit_is_named_in_one_line(tmp_path):
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
    """What a pickle may hold: who loads it makes a folder."""

    def __init__(self, made: Path):
        self.made = made

    def __reduce__(self):
        return os.mkdir, (str(self.made),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_pickle_does_nothing(tmp_path, zipped):
    file, made = tmp_path / "pulid_v1.bin", tmp_path / "made"
    torch.save(
        {"layer": torch.ones(1), "more": Hostile(made)}, file, _use_new_zipfile_serialization=zipped
    )
    for read in (read_tensors, PuLID.load):
        with pytest.raises(
            WeightsError, match=r"pulid_v1\.bin is damaged or holds more than weights"
        ) as error:
            read(file)
        assert "\n" not in str(error.value) and not made.exists()
    torch.load(file, weights_only=False)
    assert made.is_dir()  # what it would have done


def test_sha256(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"abc" * 1_000_000)
    assert sha256(file) == hashlib.sha256(b"abc" * 1_000_000).hexdigest()
