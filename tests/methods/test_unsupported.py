"""What methods cannot work with is refused with the reason: guiders, patches, other files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from openpulid.errors import OptionError, WeightsError
from openpulid.io.checkpoint_kinds import KINDS, find_kind
from openpulid.io.hub import WEIGHTS
from openpulid.methods.controlnet import ControlNet
from openpulid.methods.elite.elite import ELITE
from openpulid.methods.fastcomposer.fastcomposer import FastComposer
from openpulid.methods.ip_adapter.faceid import FaceID, FaceIDPlus
from openpulid.methods.ip_adapter.instantid import InstantID
from openpulid.methods.ip_adapter.ip_adapter import IPAdapter
from openpulid.methods.photomaker.photomaker import PhotoMaker
from openpulid.methods.pulid import PuLID, PuLIDFlux
from tests.support import people, tiny_flux
from tests.support.clip_files import faceid_plus, plain, plus
from tests.support.token_files import controlnet, published, resampler

MASK = torch.zeros(16, 16)
MASK[:, :8] = 1


# --- guiders


def test_pipeline_with_a_guider_is_refused(tiny_pipeline: Any) -> None:
    """Its guider calls the U-Net once per condition, and the identity would act in both."""
    from diffusers import StableDiffusionXLAutoBlocks

    pipe = tiny_pipeline()
    modular = StableDiffusionXLAutoBlocks().init_pipeline()
    names = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    modular.update_components(**{name: getattr(pipe, name) for name in names})
    for method in (people.fresh(pipe), ControlNet(controlnet(pipe.unet))):
        with pytest.raises(OptionError, match="guides with ClassifierFreeGuidance, which calls"):
            method.attach(modular)
        method.attach(pipe)


# --- patches of the attention


def merge_tokens(hidden: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Keep every other token, and put each back twice."""
    return hidden[:, ::2], lambda x: x.repeat_interleave(2, dim=1)[:, : hidden.shape[1]]


def split_batch(hidden: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Attend in two tiles, as HyperTile does."""
    return hidden.unflatten(1, (2, -1)).flatten(0, 1), lambda x: x.unflatten(0, (-1, 2)).flatten(
        1, 2
    )


def patch(unet: Any, change: Callable[[Tensor], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every cross-attention see changed tokens."""
    for name, layer in unet.named_modules():
        if not name.endswith("attn2"):
            continue

        def forward(
            hidden: Tensor,
            encoder_hidden_states: Tensor,
            original: Any = layer.forward,
            **options: Any,
        ) -> Tensor:
            changed, restore = change(hidden)
            repeats = len(changed) // len(hidden)
            text = encoder_hidden_states.repeat_interleave(repeats, 0)
            return restore(original(changed, encoder_hidden_states=text, **options))

        monkeypatch.setattr(layer, "forward", forward)


def test_mask_with_merged_tokens_is_refused(
    tiny_pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny_pipeline()
    adapter = people.fresh(pipe)
    adapter.attach(pipe)
    patch(pipe.unet, merge_tokens, monkeypatch)
    with adapter.use(people.anna):
        people.run(pipe)  # without a mask any number of tokens is fine
    with (
        adapter.use([(people.anna, MASK)]),
        pytest.raises(OptionError, match=r"masks need .*\(token merging, tiles\)"),
    ):
        people.run(pipe)


def test_attention_in_tiles_is_refused(tiny_pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline()
    adapter = people.fresh(pipe)
    adapter.attach(pipe)
    patch(pipe.unet, split_batch, monkeypatch)
    people.run(pipe)
    with adapter.use(people.anna), pytest.raises(OptionError, match=r"changed its batch \(tiles\)"):
        people.run(pipe)


def test_mask_with_merged_image_tokens_of_flux_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_flux.tiny_pipe()
    adapter = tiny_flux.fresh(pipe)

    def merged(block: Any, args: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return output[0], output[1][:, ::2]

    with adapter.use([(people.anna, MASK)]):
        block = pipe.transformer.transformer_blocks[0]
        monkeypatch.setattr(block, "_forward_hooks", {0: merged, **block._forward_hooks})
        monkeypatch.setattr(block, "_forward_hooks_with_kwargs", {})
        with pytest.raises(OptionError, match="masks need the transformer's own image tokens"):
            tiny_flux.run(pipe)


# --- files of other methods


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline: Any) -> dict[str, Path]:
    """A file of each method, under the names that it is published with."""
    folder, unet = tmp_path_factory.mktemp("files"), tiny_pipeline().unet

    def write(name: str, parts: dict[str, dict[str, Tensor]]) -> Path:
        tensors = {f"{part}.{key}": x for part, named in parts.items() for key, x in named.items()}
        save_file({key: x.clone() for key, x in tensors.items()}, folder / name)
        return folder / name

    one = torch.ones(1)
    people.fresh(tiny_pipeline()).save(folder / "pulid.safetensors")
    return {
        "pulid": folder / "pulid.safetensors",
        "flux": write("flux.safetensors", {"pulid_encoder": {"a": one}, "pulid_ca": {"0.b": one}}),
        "faceid": write("faceid.safetensors", published(unet)),
        "faceid-plus": write("faceid-plus.safetensors", faceid_plus(unet)),
        "ip-adapter": write("ip.safetensors", plain(unet)),
        "ip-adapter-plus": write("plus.safetensors", plus(unet)),
        "instantid": write("instantid.safetensors", resampler(unet)),
        "photomaker": write(
            "photomaker.safetensors", {"id_encoder": {"a": one}, "lora_weights": {"b": one}}
        ),
        "fastcomposer": write(
            "fastcomposer.safetensors", {"image_encoder": {"a": one}, "postfuse_module": {"b": one}}
        ),
        "elite": write(
            "elite.safetensors",
            {"global_mapper": {"mapping_patch_0.0.weight": one, "a_attn2_to_k.weight": one}},
        ),
        "lora": write("lora.safetensors", {"unet": {"mid_block.attn.to_q.lora_A.weight": one}}),
        "base": write("base.safetensors", {"model": {"diffusion_model.label_emb.0.0.weight": one}}),
    }


ACCEPTED: dict[type, tuple[str, ...]] = {
    PuLID: ("pulid",),
    PuLIDFlux: ("flux",),
    FaceID: ("faceid",),
    FaceIDPlus: ("faceid-plus",),
    IPAdapter: ("ip-adapter", "ip-adapter-plus", "instantid"),  # the last two look alike
    PhotoMaker: ("photomaker",),
}
NAMES = {
    "pulid": "PuLID's adapter for SDXL",
    "flux": "PuLID's adapter for FLUX",
    "faceid": "an IP-Adapter-FaceID adapter",
    "faceid-plus": "an IP-Adapter-FaceID-Plus adapter",
    "ip-adapter": "an IP-Adapter",
    "ip-adapter-plus": "an IP-Adapter-Plus or InstantID adapter",
    "instantid": "an IP-Adapter-Plus or InstantID adapter",
    "photomaker": "a PhotoMaker adapter",
    "fastcomposer": "a FastComposer adapter",
    "elite": "a file of ELITE",
    "lora": "a LoRA",
    "base": "an SDXL checkpoint",
}


@pytest.mark.parametrize("method", ACCEPTED, ids=lambda method: method.__name__)
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_file_of_another_method_is_named(
    method: Any, suffix: str, files: dict[str, Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    for kind, path in files.items():
        if kind in ACCEPTED[method]:
            continue
        if suffix == ".bin":
            path = path.with_suffix(".bin")
            torch.save(load_file(path.with_suffix(".safetensors")), path)
        with pytest.raises(WeightsError, match=rf": it is {NAMES[kind]} \(.*`pulid weights get "):
            method.load(path)


@pytest.mark.parametrize("method", [FastComposer, ELITE])
def test_file_of_another_method_is_named_without_a_download(
    method: Any, files: dict[str, Path]
) -> None:
    """No weights of these methods have been published."""
    for kind, path in files.items():
        if kind == method.__name__.lower():
            continue
        with pytest.raises(WeightsError, match=rf": it is {NAMES[kind]} \(.*; use one that is\."):
            method.load(path)


def test_pulid_names_the_file_to_get(files: dict[str, Path]) -> None:
    message = r"is not PuLID's adapter for SDXL: it is .* pulid-v1\.1 or pulid-v1 \(`pulid weights"
    for kind in ("ip-adapter", "flux"):
        with pytest.raises(WeightsError, match=message):
            PuLID.load(files[kind])
    with pytest.raises(WeightsError, match=r"FLUX: it is .* pulid-flux-v0\.9\.1 or"):
        PuLIDFlux.load(files["pulid"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unet.down_blocks.0.attn1.processor.to_q_lora.down.weight", "it is a LoRA"),
        ("lora_te1_text_model.alpha", "it is a LoRA"),
        ("stranger.weight", "of an unknown kind, such as stranger.weight"),
    ],
)
def test_file_of_no_method_is_named(name: str, message: str, tmp_path: Path) -> None:
    save_file({name: torch.ones(1)}, tmp_path / "file.safetensors")
    for method in (PuLID, PuLIDFlux, PhotoMaker):
        with pytest.raises(WeightsError, match=rf"file\.safetensors is not .*: .*{message}"):
            method.load(tmp_path / "file.safetensors")


def test_instantid_names_another_file(
    files: dict[str, Path], tmp_path: Path, tiny_pipeline: Any
) -> None:
    controlnet(tiny_pipeline().unet).save_pretrained(tmp_path / "ControlNetModel")
    for kind in ("instantid", "pulid"):
        (tmp_path / "ip-adapter.safetensors").write_bytes(files[kind].read_bytes())
        if kind == "instantid":
            InstantID.load(tmp_path)
            continue
        with pytest.raises(WeightsError, match=r"it is PuLID's adapter for SDXL .* instantid"):
            InstantID.load(tmp_path)


def test_kinds_name_registered_weights() -> None:
    names = {name for kind in KINDS for name in kind.weights}
    assert names <= set(WEIGHTS) and "pulid-v1.1" in names
    assert find_kind([]) is None and find_kind(["x"]) is None
