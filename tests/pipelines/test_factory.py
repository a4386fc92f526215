"""Loading base models: FLUX transformers, single files, errors in one sentence, dtypes."""

from __future__ import annotations

import re
import socket
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from shutil import copytree, rmtree
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from openpulid.device import best_device, compute_dtype, supports_bf16, training_dtype
from openpulid.errors import OptionError, WeightsError
from openpulid.io.hub import FOLDER_VARIABLE
from openpulid.pipelines import factory
from openpulid.pipelines.factory import load_extractor, load_pipeline
from openpulid.pipelines.memory_levels import FLUX_LEVELS
from openpulid.pipelines.presets import MINIATURE, Preset, flux, mini, mini_lightning, sdxl, sdxl_v1
from openpulid.pipelines.selection import with_base
from openpulid.pipelines.weights import resolve_path
from tests.support.people import anna
from tests.support.tiny_flux import fresh, run, tiny_pipe, tiny_transformer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline, and beside it another transformer: as a folder, and as the single file in it."""
    folder = tmp_path_factory.mktemp("flux")
    tiny_pipe().save_pretrained(folder / "pipeline")
    torch.manual_seed(7)
    tiny_transformer().save_pretrained(folder / "other")
    (folder / "other" / "diffusion_pytorch_model.safetensors").rename(folder / "other.safetensors")
    tiny_transformer().save_pretrained(folder / "third")
    return folder


@pytest.fixture
def preset(folder: Path) -> Preset:
    return flux(folder / "pipeline").with_models(use_half_precision=False)


def test_base_is_a_pipeline_or_a_flux_transformer(folder: Path, preset: Preset) -> None:
    assert (
        with_base(preset, folder / "other.safetensors").models.transformer
        == folder / "other.safetensors"
    )
    assert with_base(preset, folder / "third").models.transformer == folder / "third"
    for whole in (folder / "pipeline", "owner/name"):
        selection = preset.selection.model_copy(update={"base": str(whole)})
        expected = replace(preset.with_models(pipeline=whole), selection=selection)
        assert with_base(preset, whole) == expected
    assert (
        with_base(sdxl(), folder / "other.safetensors").models.pipeline
        == folder / "other.safetensors"
    )
    own = preset.with_models(transformer=folder / "third")
    assert with_base(own, folder / "pipeline").models.transformer is None


def test_other_base_keeps_its_own_unet() -> None:
    chosen = with_base(sdxl_v1(), "owner/name")
    assert "lightning-4step" in sdxl_v1().published and "lightning-4step" not in chosen.published
    assert (
        chosen.models.pipeline,
        chosen.defaults.num_inference_steps,
        chosen.models.sampler,
    ) == ("owner/name", 4, "dpm")
    pipe = load_pipeline(with_base(mini_lightning(), str(MINIATURE / "pipeline")), CPU)
    folders = (MINIATURE / "pipeline" / "unet", MINIATURE / "lightning")
    base, student = (
        UNet2DConditionModel.from_pretrained(x, torch_dtype=torch.float32).state_dict()
        for x in folders
    )
    assert all(torch.equal(value, base[name]) for name, value in pipe.unet.state_dict().items())
    assert any(not torch.equal(value, base[name]) for name, value in student.items())


@pytest.mark.parametrize("level", FLUX_LEVELS)
def test_other_transformer_is_used_at_every_memory_level(
    folder: Path, preset: Preset, level: str
) -> None:
    weights = load_file(folder / "other.safetensors")
    pipe = load_pipeline(
        with_base(preset, folder / "other.safetensors").with_models(memory=level), CPU
    )
    own = load_file(folder / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, value in pipe.transformer.state_dict().items():
        assert torch.equal(value, weights[name].to(value.dtype)), name
    assert not torch.equal(own["x_embedder.weight"], weights["x_embedder.weight"])
    pipe.set_progress_bar_config(disable=True)
    before = run(pipe, steps=1)
    with fresh(pipe).use(anna):
        assert abs(run(pipe, steps=1) - before).max() > 1e-3


def test_transformer_from_a_directory(folder: Path, preset: Preset) -> None:
    pipe = load_pipeline(with_base(preset, folder / "third"), CPU)
    weights = load_file(folder / "third" / "diffusion_pytorch_model.safetensors")
    assert all(
        torch.equal(value, weights[name]) for name, value in pipe.transformer.state_dict().items()
    )
    own = load_file(folder / "pipeline" / "text_encoder_2" / "model.safetensors")
    assert torch.equal(pipe.text_encoder_2.state_dict()["shared.weight"], own["shared.weight"])


@pytest.mark.parametrize("level", ["full", "24gb"])
def test_gguf_transformer(folder: Path, preset: Preset, tmp_path: Path, level: str) -> None:
    """Every matrix in blocks of eight bits, which no memory level squeezes once more."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "flux")
    weights = load_file(folder / "other.safetensors")
    for name, value in weights.items():
        small = value.ndim == 2 and value.shape[1] % 32 == 0
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(
            name,
            gguf.quants.quantize(value.numpy(), kind) if small else value.numpy(),
            raw_dtype=kind if small else None,
        )
    (
        writer.write_header_to_file(),
        writer.write_kv_data_to_file(),
        writer.write_tensors_to_file(),
        writer.close(),
    )
    pipe = load_pipeline(with_base(preset, tmp_path / "other.gguf").with_models(memory=level), CPU)
    exact = load_pipeline(with_base(preset, folder / "other.safetensors"), CPU)
    for one in (pipe, exact):
        one.set_progress_bar_config(disable=True)
    assert abs(run(pipe, steps=1) - run(exact, steps=1)).max() < 0.05
    with fresh(exact).use(anna):
        expected = run(exact, steps=1)
    with fresh(pipe).use(anna):
        assert abs(run(pipe, steps=1) - expected).max() < 0.05


@pytest.mark.skipif(find_spec("gguf") is not None, reason="the package gguf is here")
def test_gguf_without_its_package_is_one_sentence(preset: Preset, tmp_path: Path) -> None:
    (tmp_path / "base.gguf").write_bytes(b"GGUF")
    with pytest.raises(WeightsError, match="pip install gguf"):
        load_pipeline(with_base(preset, tmp_path / "base.gguf"), CPU)


def test_unsuitable_transformer_is_one_sentence(
    folder: Path, preset: Preset, tmp_path: Path
) -> None:
    weights = load_file(folder / "other.safetensors")
    save_file(
        {name: x for name, x in weights.items() if not name.startswith("proj_out")},
        tmp_path / "less.safetensors",
    )
    save_file({**weights, "proj_out.weight": torch.ones(3, 3)}, tmp_path / "shape.safetensors")
    save_file(
        {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(3)},
        tmp_path / "sdxl.safetensors",
    )
    (tmp_path / "cut.safetensors").write_bytes((folder / "other.safetensors").read_bytes()[:1000])
    torch.save(weights, tmp_path / "pickled.bin")
    for name in (
        "less.safetensors",
        "shape.safetensors",
        "sdxl.safetensors",
        "cut.safetensors",
        "pickled.bin",
    ):
        with pytest.raises(WeightsError, match=name) as error:
            load_pipeline(with_base(preset, tmp_path / name), CPU)
        assert "\n" not in str(error.value)


def test_pipeline_without_t5_is_one_sentence(folder: Path, preset: Preset, tmp_path: Path) -> None:
    copytree(folder / "pipeline", tmp_path / "lost")
    rmtree(tmp_path / "lost" / "text_encoder_2"), rmtree(tmp_path / "lost" / "tokenizer_2")
    with pytest.raises(
        WeightsError,
        match=r"lost lacks text_encoder_2 and tokenizer_2; FLUX\.1 needs CLIP and T5",
    ):
        load_pipeline(preset.with_models(pipeline=tmp_path / "lost"), CPU)


def test_base_of_the_other_family_is_one_sentence(
    folder: Path, preset: Preset, tmp_path: Path, tiny_pipeline: Any
) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "sdxl")
    for one, base in (
        (preset, tmp_path / "sdxl"),
        (sdxl().with_models(use_half_precision=False), folder / "pipeline"),
    ):
        with pytest.raises(WeightsError, match="cannot be loaded") as error:
            load_pipeline(with_base(one, base), CPU)
        assert "\n" not in str(error.value)


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without a network and without weights, but for those in this folder."""

    def refused(*words: Any) -> None:
        raise AssertionError("a network was asked")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "weights"))
    return tmp_path / "weights"


RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {
    r"^time_embedding.linear_(\d)": lambda m: f"time_embed.{2 * int(m[1]) - 2}",
    r"^add_embedding.linear_(\d)": lambda m: f"label_emb.0.{2 * int(m[1]) - 2}",
    r"^conv_in": "input_blocks.0.0",
    r"^conv_norm_out": "out.0",
    r"^conv_out": "out.2",
    r"(?<=resnets.\d.)\w+": lambda m: RESNET[m[0]],
    r"^mid_block.(resnets|attentions).(\d)": lambda m: (
        f"middle_block.{1 if m[1] == 'attentions' else 2 * int(m[2])}"
    ),
    r"^down_blocks.(\d).downsamplers.0.conv": lambda m: f"input_blocks.{2 * int(m[1]) + 2}.0.op",
    r"^up_blocks.(\d).upsamplers.0": lambda m: f"output_blocks.{2 * int(m[1]) + 1}.2",
    r"^down_blocks.(\d).(\w+).(\d)": lambda m: (
        f"input_blocks.{2 * int(m[1]) + 1 + int(m[3])}.{int(m[2] == 'attentions')}"
    ),
    r"^up_blocks.(\d).(\w+).(\d)": lambda m: (
        f"output_blocks.{2 * int(m[1]) + int(m[3])}.{int(m[2] == 'attentions')}"
    ),
}
VAE = {
    r"down_blocks.(\d)": r"down.\1",
    r"up_blocks.(\d)": lambda m: f"up.{1 - int(m[1])}",
    r"(down|up)samplers.0": r"\1sample",
    r"mid_block.resnets.(\d)": lambda m: f"mid.block_{int(m[1]) + 1}",
    r"resnets": "block",
    r"conv_shortcut": "nin_shortcut",
    r"conv_norm_out": "norm_out",
    r"mid_block.attentions.0": "mid.attn_1",
    r"group_norm": "norm",
    r"to_([qkv])": r"\1",
    r"to_out.0": "proj_out",
}
"""diffusers' names -> the original ones, of networks with two levels and one layer in each."""


def single_file(pipe: Any, path: Path, text: bool = True) -> Path:
    """Write a pipeline's networks to one file under their original names.

    For both text encoders it has the second one's weights, where Stable Diffusion 1 had its own.
    """
    tensors = {
        f"cond_stage_model.transformer.{name}": x
        for name, x in pipe.text_encoder_2.state_dict().items()
        if text
    }
    for prefix, part, names in (
        ("model.diffusion_model.", pipe.unet, UNET),
        ("first_stage_model.", pipe.vae, VAE),
    ):
        for name, x in part.state_dict().items():
            for pattern, original in names.items():
                name = re.sub(pattern, original, name)
            tensors[prefix + name] = x[..., None, None] if ".attn_1." in name and x.ndim == 2 else x
    save_file({name: x.contiguous() for name, x in tensors.items()}, path)
    return path


def test_single_file_uses_no_network(alone: Path, tmp_path: Path, tiny_pipeline: Any) -> None:
    other = tiny_pipeline(seed=7)
    preset = with_base(
        sdxl().with_models(use_half_precision=False),
        single_file(other, tmp_path / "other.safetensors"),
    )
    with pytest.raises(
        WeightsError,
        match=r"^[^ ]*other\.safetensors is a single file .* `pulid weights get sdxl-base`",
    ):
        load_pipeline(preset, CPU)
    tiny_pipeline().save_pretrained(alone / "Juggernaut-XL-v9")
    for weights in alone.rglob("*.safetensors"):
        weights.unlink()  # the description is enough
    pipe = load_pipeline(preset, CPU)
    for part in ("unet", "vae", "text_encoder_2"):
        expected = getattr(other, part).state_dict()
        assert all(
            torch.equal(x, expected[name]) for name, x in getattr(pipe, part).state_dict().items()
        )
    with torch.no_grad():
        assert bool(
            pipe("portrait", num_inference_steps=1, output_type="pt").images.isfinite().all()
        )


def test_unsuitable_weights_are_one_sentence(
    alone: Path, tmp_path: Path, tiny_pipeline: Any
) -> None:
    tiny = tiny_pipeline()
    tiny.save_pretrained(alone / "stable-diffusion-xl-base-1.0")
    preset = sdxl("sdxl-base").with_models(use_half_precision=False)
    save_file({"conv_in.weight": torch.ones(3)}, tmp_path / "unet.safetensors")
    with pytest.raises(
        WeightsError, match=r"unet\.safetensors contains no U-Net of this base, .*: Missing key"
    ) as error:
        load_pipeline(preset.with_models(unet=tmp_path / "unet.safetensors"), CPU)
    assert (
        "\n" not in str(error.value)
        and "size mismatch for conv_in" in str(error.value)
        and len(str(error.value)) < 1000
    )
    text = alone / "stable-diffusion-xl-base-1.0" / "text_encoder" / "model.safetensors"
    weights = load_file(text)
    save_file({name: x[:-1] for name, x in weights.items()}, text, {"format": "pt"})
    with pytest.raises(WeightsError, match="cannot be loaded") as error:
        load_pipeline(preset, CPU)
    assert "\n" not in str(error.value)
    base = single_file(tiny, tmp_path / "other.safetensors", text=False)
    with pytest.raises(
        WeightsError, match=r"other\.safetensors cannot be loaded .*CLIPTextModel"
    ) as error:
        load_pipeline(with_base(preset, base), CPU)
    assert "\n" not in str(error.value)


def test_published_name_is_not_a_directory_of_that_name(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "instantid").mkdir()
    with pytest.raises(WeightsError, match="`pulid weights get instantid`"):
        resolve_path("instantid")
    alone.mkdir(), (alone / "ip-adapter.bin").write_bytes(b"weights")
    assert resolve_path("instantid") == alone / "ip-adapter.bin"
    assert resolve_path("./instantid") == Path("instantid")


@pytest.mark.parametrize("native", [True, False])
def test_gpu_emulates_bfloat16_or_has_it(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    gpu = torch.device("cuda", 0)
    assert (
        supports_bf16(gpu) is native
        and compute_dtype(gpu) is torch.float16
        and training_dtype(gpu) is (torch.bfloat16 if native else torch.float32)
        and factory.network_dtype(sdxl().models, gpu) is torch.float16
    )
    assert (
        factory.network_dtype(mini().models, gpu) is torch.float32
        and factory.network_dtype(flux().models, gpu) is torch.bfloat16
    )


def test_each_process_uses_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    assert best_device() == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert best_device() == torch.device("cuda", 3)
    for single_process in ("", " ", "-1"):
        monkeypatch.setenv("LOCAL_RANK", single_process)
        assert best_device() == torch.device("cuda")
    for invalid in ("x", "4", "1.5", "-2"):
        monkeypatch.setenv("LOCAL_RANK", invalid)
        with pytest.raises(OptionError, match=f"LOCAL_RANK must be .* 0 to 3, got '{invalid}'"):
            best_device()
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    for rank in ("x", "3"):  # a launcher may show each process one device only
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert best_device() == torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert best_device() == torch.device("cpu")


def test_float16_sdxl_decodes_in_float32(
    tmp_path: Path, tiny_pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factory, "compute_dtype", lambda device: torch.float16)
    tiny_pipeline().save_pretrained(tmp_path)
    pipe = load_pipeline(sdxl(tmp_path), CPU)
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float16}
    seen: list[torch.dtype] = []
    pipe.vae.decoder.register_forward_pre_hook(lambda decoder, given: seen.append(given[0].dtype))
    images = pipe("portrait", num_inference_steps=2, output_type="pt").images
    assert seen == [torch.float32] and bool(images.isfinite().all())


@pytest.mark.parametrize(("level", "expected"), [("full", torch.bfloat16), ("16gb", torch.float32)])
def test_extractor_uses_the_dtype_of_its_own_device(
    level: str, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FLUX in bfloat16 on an accelerator, and beside it a processor that has no bfloat16."""
    monkeypatch.setattr("openpulid.device.supports_bf16", lambda device: device.type != "cpu")
    monkeypatch.setattr(
        factory.PhotoExtractor, "load", lambda *given: SimpleNamespace(given=given, models={})
    )
    files = {
        name: Path(name) for name in ("detector", "recognition", "face_parsing", "vision_encoder")
    }
    preset = flux().with_models(memory=level, **files)
    *_, device, dtype = load_extractor(preset, torch.device("meta")).given
    assert dtype is expected and device.type == ("meta" if level == "full" else "cpu")
