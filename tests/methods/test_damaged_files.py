"""Damaged adapter files, and identities that are no numbers: one sentence in every method."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from openpulid.errors import IdentityError, WeightsError
from openpulid.identity.identity import Identity
from openpulid.methods.controlnet import ControlNet
from openpulid.methods.ip_adapter.faceid import FaceID
from openpulid.methods.photomaker.photomaker import PhotoMaker
from openpulid.methods.pulid.encoders import IDEncoder
from openpulid.methods.pulid.flux import PuLIDFlux
from openpulid.methods.pulid.sdxl import PuLID
from tests.methods.photomaker.test_photomaker import file as photomaker_file
from tests.support.token_files import CROSS, person, published


@pytest.fixture(scope="module")
def pipe(tiny_pipeline: Any) -> Any:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def adapter(pipe: Any) -> PuLID:
    return PuLID.for_unet(pipe.unet, IDEncoder(16, CROSS, vit_dim=8, hidden_dim=16))


def save(adapter: PuLID, path: Path, **metadata: str) -> Path:
    facts = {"encoder": "IDEncoder", "config": json.dumps(adapter.encoder.config)}
    state = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    save_file(state, path, facts | metadata)
    return path


@pytest.mark.parametrize(
    "metadata",
    [
        {"encoder": "Module"},
        {"config": "no JSON"},
        {"config": "[]"},
        {"config": "[" * 100_000},
        {"config": '{"width": "a"}'},
        {"config": '{"steps": 1}'},
        {"config": '{"context_dim": -64}'},
        {"encoder": "IDFormer", "config": '{"depth": 1000000000}'},
        {"encoder": "IDFormer", "config": '{"depth": 7}'},
        {"models": "[1]"},
        {"models": "vision"},
    ],
)
def test_damaged_metadata_of_pulid_is_one_sentence(
    adapter: PuLID, tmp_path: Path, metadata: dict[str, str]
) -> None:
    path = save(adapter, tmp_path / "adapter.safetensors", **metadata)
    with pytest.raises(WeightsError, match=r"adapter\.safetensors is damaged") as error:
        PuLID.load(path)
    assert str(error.value).isprintable() and len(str(error.value)) < 400


def test_encoder_and_layers_of_pulid_fit(adapter: PuLID, tmp_path: Path) -> None:
    assert PuLID.load(save(adapter, tmp_path / "adapter.safetensors")).encoder.config
    other = PuLID(IDEncoder(16, 32, vit_dim=8, hidden_dim=16), adapter.id_adapter_attn_layers)
    path = save(other, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=f"tokens of width 32, and its layers read {CROSS}"):
        PuLID.load(path)


def test_damaged_file_of_flux_is_one_sentence(tmp_path: Path) -> None:
    tensors = {"pulid_ca.0.to_q.weight": torch.ones(3), "pulid_ca.0.to_kv.weight": torch.ones(3)}
    save_file(tensors, tmp_path / "flux.safetensors")
    with pytest.raises(WeightsError, match="no adapter of PuLID for FLUX"):
        PuLIDFlux.load(tmp_path / "flux.safetensors")


def drop(tensors: dict[str, Any], name: str) -> None:
    del tensors[name]


def flatten(tensors: dict[str, Any], name: str) -> None:
    tensors[name] = tensors[name].flatten()


def empty(tensors: dict[str, Any], name: str) -> None:
    tensors[name] = tensors[name][:0]


@pytest.mark.parametrize("damage", [drop, flatten, empty])
@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("image_proj", "proj.0.weight"),
        ("image_proj", "proj.2.weight"),
        ("ip_adapter", "1.to_k_ip.weight"),
        ("ip_adapter", "0.to_q_lora.down.weight"),
        ("ip_adapter", "3.to_out_lora.up.weight"),
    ],
)
def test_damaged_file_of_faceid_is_one_sentence(
    pipe: Any, damage: Callable[[dict[str, Any], str], None], part: str, name: str
) -> None:
    parts = published(pipe.unet)
    damage(parts[part], name)
    method = FaceID(parts)
    processors = dict(pipe.unet.attn_processors)
    with pytest.raises(WeightsError, match=r"another base model|does not fit|lacks a matrix"):
        method.attach(pipe)
    assert pipe.unet.attn_processors == processors


@pytest.mark.parametrize("version", [1, 2])
def test_damaged_file_of_photomaker_is_one_sentence(
    pipe: Any, tmp_path: Path, version: int
) -> None:
    parts = photomaker_file(pipe, version)
    name = next(name for name in parts["lora_weights"] if "to_q_lora.up" in name)
    for value in (torch.ones(3, 2), torch.ones(3)):
        changed = {**parts, "lora_weights": {**parts["lora_weights"], name: value}}
        torch.save(changed, tmp_path / "photomaker.bin")
        with pytest.raises(WeightsError, match="LoRA of this adapter does not fit"):
            PhotoMaker.load(tmp_path / "photomaker.bin").attach(pipe)
    encoder = dict(parts["id_encoder"])
    del encoder["fuse_module.layer_norm.weight"]
    torch.save({**parts, "id_encoder": encoder}, tmp_path / "photomaker.bin")
    with pytest.raises(WeightsError, match="not weights of PhotoMaker's encoder"):
        PhotoMaker.load(tmp_path / "photomaker.bin")


@pytest.mark.parametrize("config", ["", "[]", "{}", '{"in_channels": "four"}', "[" * 10_000])
def test_damaged_controlnet_is_one_sentence(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    save_file({"weight": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(WeightsError, match=r"json is damaged|cannot be loaded") as error:
        ControlNet.load(tmp_path)
    assert str(error.value).isprintable() and len(str(error.value)) < 600


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_features_that_are_no_numbers_are_refused(pipe: Any, adapter: PuLID, value: float) -> None:
    hidden = tuple(torch.ones(1, 5, 8) for _ in range(5))
    broken = Identity(torch.full((1, 1, 16), value), hidden)
    one, two = adapter, FaceID(published(pipe.unet))
    for method, identity in ((one, broken), (two, Identity(torch.full((1, 1, 6), value), ()))):
        method.attach(pipe)
        with pytest.raises(IdentityError, match="not finite"), method.use(identity, scale=1.0):
            pass
        method.detach(pipe)
    two.attach(pipe)
    with two.use(person(0)):
        pass
    two.detach(pipe)


def test_identity_without_patches_is_refused(pipe: Any, adapter: PuLID) -> None:
    identity = Identity(torch.ones(1, 2, 16), tuple(torch.ones(1, 2, 8) for _ in range(5)))
    adapter.attach(pipe)
    with pytest.raises(IdentityError, match="has no patches"), adapter.use(identity):
        pass
    adapter.detach(pipe)
