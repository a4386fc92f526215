"""Which files make a network, and how networks in folders are opened."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from openpulid.errors import WeightsError
from openpulid.io.networks import (
    Part,
    WeightsFiles,
    describe_load_errors,
    find_missing_parts,
    find_weights,
    load_network,
    read_parts,
    select_weights,
)

STEM = "diffusion_pytorch_model"
SHARDS = tuple(f"{STEM}-0000{k}-of-00002.safetensors" for k in (1, 2))
FP16_SHARDS = tuple(f"{STEM}.fp16-0000{k}-of-00002.safetensors" for k in (1, 2))
INDEX = f"{STEM}.safetensors.index.json"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ((f"{STEM}.safetensors", f"{STEM}.bin"), WeightsFiles((f"{STEM}.safetensors",))),
        (
            (f"{STEM}.safetensors", f"{STEM}.fp16.safetensors", "LICENSE"),
            WeightsFiles((f"{STEM}.fp16.safetensors",), variant="fp16"),
        ),
        (("model.bf16.safetensors",), WeightsFiles(("model.bf16.safetensors",), variant="bf16")),
        (
            ("model.fp16.bin", "model.safetensors"),
            WeightsFiles(("model.safetensors",)),
        ),
        ((*SHARDS, INDEX), WeightsFiles(SHARDS, INDEX)),
        (
            (*FP16_SHARDS, f"{STEM}.safetensors.index.fp16.json", *SHARDS, INDEX),
            WeightsFiles(FP16_SHARDS, f"{STEM}.safetensors.index.fp16.json", "fp16"),
        ),
        # an incomplete variant gives way to a complete one
        (
            (FP16_SHARDS[0], f"{STEM}.safetensors.index.fp16.json", f"{STEM}.safetensors"),
            WeightsFiles((f"{STEM}.safetensors",)),
        ),
        ((SHARDS[1], INDEX), None),
        (SHARDS, None),
        (("diffusion_pytorch_model_twins.safetensors", "config.json"), None),
        (("pytorch_model.bin",), WeightsFiles(("pytorch_model.bin",))),
    ],
)
def test_weights_are_selected_by_name(
    names: tuple[str, ...], expected: WeightsFiles | None
) -> None:
    assert select_weights(names) == expected
    assert select_weights(reversed(names)) == expected


def test_pickles_are_selected_only_where_allowed() -> None:
    assert select_weights(["pytorch_model.bin"], allow_pickle=False) is None


def test_missing_parts_are_named_with_a_reason() -> None:
    parts = {
        "unet": Part("diffusers", "UNet2DConditionModel"),
        "vae": Part("diffusers", "AutoencoderKL"),
        "scheduler": Part("diffusers", "EulerDiscreteScheduler"),
        "tokenizer": Part("transformers", "TokenizersBackend"),
    }
    names = [
        f"unet/{SHARDS[1]}",
        f"unet/{INDEX}",
        "unet/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
    ]
    missing = find_missing_parts(names, parts)
    assert missing == {
        "unet": SHARDS[0],
        "vae": "its configuration",
        "tokenizer": "its configuration",
    }
    assert set(find_missing_parts(names, parts, require_weights=False)) == {"vae", "tokenizer"}


def test_index_names_only_parts_in_use() -> None:
    index = {"_class_name": "X", "a": ["diffusers", "B"], "c": [None, None], "d": True}
    assert read_parts(json.dumps(index)) == {"a": Part("diffusers", "B")}
    for damaged in ("{", "[]", b"\xff\xfe{"):
        with pytest.raises(WeightsError, match=r"model_index\.json is damaged"):
            read_parts(damaged)


def test_classes_of_other_packages_are_refused() -> None:
    assert Part("diffusers", "UNet2DConditionModel").find_class() is UNet2DConditionModel
    for library, name in (("os", "system"), ("diffusers", "NoSuchModel")):
        with pytest.raises(WeightsError, match=rf"{library}\.{name} is not part of"):
            Part(library, name).find_class()


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline: Any) -> Path:
    folder = tmp_path_factory.mktemp("networks") / "unet"
    tiny_pipeline().unet.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("variant", ["fp16", "bf16", "ema"])
@pytest.mark.parametrize("shard_size", ["10GB", "100KB"])
def test_network_is_loaded_in_the_variant_that_it_has(
    unet: Path, tmp_path: Path, variant: str, shard_size: str
) -> None:
    expected = load_network(UNet2DConditionModel, unet)
    expected.save_pretrained(tmp_path, variant=variant, max_shard_size=shard_size)
    (tmp_path / "LICENSE").write_text("terms")
    assert find_weights(tmp_path).variant == variant
    assert (find_weights(tmp_path).index is None) == (shard_size == "10GB")
    loaded = load_network(UNet2DConditionModel, tmp_path, torch.float64)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name].double())


def test_incomplete_network_names_the_file(unet: Path, tmp_path: Path) -> None:
    network = load_network(UNet2DConditionModel, unet)
    network.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    shard = max((tmp_path / "sharded").glob("*-of-*"))
    shard.unlink()
    with pytest.raises(WeightsError, match=f"sharded lacks {shard.name}; download"):
        load_network(UNet2DConditionModel, tmp_path / "sharded")

    weights = f"{STEM}.safetensors"
    for name, content in (
        ("cut", (unet / weights).read_bytes()[:1000]),
        ("empty", b""),
        ("text", b"<html>Not found</html>" * 10),
    ):
        copytree(unet, tmp_path / name)
        (tmp_path / name / weights).write_bytes(content)
        with pytest.raises(WeightsError, match=f"{name}/{weights} cannot be loaded: it is damaged"):
            load_network(UNet2DConditionModel, tmp_path / name)
    copytree(unet, tmp_path / "pointer")
    (tmp_path / "pointer" / weights).write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(WeightsError, match="is a pointer of Git LFS"):
        load_network(UNet2DConditionModel, tmp_path / "pointer")


def test_tensors_that_are_missing_or_not_used_are_said(
    unet: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copytree(unet, tmp_path / "unet")
    file = tmp_path / "unet" / f"{STEM}.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "extra.weight": torch.ones(1)}, file, {"format": "pt"})
    load_network(UNet2DConditionModel, tmp_path / "unet")
    assert "has 1 tensors that are not used, such as extra.weight" in caplog.text
    scaled = {**tensors, "conv_in.weight_scale": torch.ones(1)}
    save_file(scaled, file, {"format": "pt"})
    with pytest.raises(WeightsError, match="stored in scaled float8"):
        load_network(UNet2DConditionModel, tmp_path / "unet")
    del tensors["conv_out.bias"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(WeightsError, match=r"lacks 1 tensors, such as conv_out\.bias"):
        load_network(UNet2DConditionModel, tmp_path / "unet")


def test_other_network_is_named(unet: Path, tmp_path: Path) -> None:
    from diffusers import ControlNetModel

    with pytest.raises(WeightsError, match="holds a UNet2DConditionModel, not a ControlNetModel"):
        load_network(ControlNetModel, unet)
    with pytest.raises(WeightsError, match=r"lacks config\.json"):
        load_network(ControlNetModel, tmp_path)


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (AttributeError("no attribute 'x'"), r"diffusers \S+ and transformers \S+ may not fit"),
        (TypeError("unexpected keyword"), "may not fit"),
        (AssertionError(), r"\(AssertionError\)"),
        (ImportError("bitsandbytes is needed"), "install the package"),
        (KeyError("conv_in"), "copy or build it again"),
    ],
)
def test_every_error_of_a_library_is_one_sentence(error: Exception, advice: str) -> None:
    with (
        pytest.raises(WeightsError, match=advice) as raised,
        describe_load_errors(Path("base.safetensors")),
    ):
        raise error
    assert str(raised.value).startswith("base.safetensors cannot be loaded (")
    assert "\n" not in str(raised.value)


def test_lack_of_memory_is_not_blamed_on_the_file() -> None:
    for error in (MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")):
        with pytest.raises(type(error)), describe_load_errors(Path("x")):
            raise error
