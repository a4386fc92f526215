"""What a base model says about itself is obeyed, or refused by name."""

from __future__ import annotations

import json
import logging
import socket
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from safetensors.torch import load_file, save_file

from openpulid.errors import WeightsError
from openpulid.io.hub import FOLDER_VARIABLE
from openpulid.pipelines import single_files
from openpulid.pipelines.factory import load_pipeline
from openpulid.pipelines.presets import Preset, flux, flux_schnell, sdxl, sdxl_v1
from openpulid.pipelines.selection import with_base
from tests.pipelines.test_factory import single_file
from tests.support.tiny_flux import tiny_pipe

CPU = torch.device("cpu")
SIGMA = 14.6146  # the highest noise level of SDXL's schedule
ZERO_SNR_SIGMA = 4096.0  # that of a schedule without signal at its end, as in diffusers


SCALED_LINEAR: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}


def own_records(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [x.getMessage() for x in caplog.records if x.name.startswith("openpulid")]


def in_float32(preset: Preset) -> Preset:
    return preset.with_models(use_half_precision=False, unet=None)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline: Any) -> Path:
    """A pipeline of a tiny SDXL."""
    folder = tmp_path_factory.mktemp("base") / "stable-diffusion-xl-base-1.0"
    pipe = tiny_pipeline()
    pipe.scheduler = EulerDiscreteScheduler(**SCALED_LINEAR)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def single(base: Path, tiny_pipeline: Any, tmp_path: Path, monkeypatch: Any) -> Any:
    """A function that writes a single file with more tensors and metadata, and loads it."""

    def refuse(*args: Any) -> None:
        raise AssertionError("a network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv(FOLDER_VARIABLE, str(base.parent))
    path = single_file(tiny_pipeline(), tmp_path / "whole.safetensors")
    tensors = load_file(path)

    def load(
        more: dict[str, Any] | None = None,
        metadata: dict[str, str] | None = None,
        without: str = "none",
        preset: Preset | None = None,
    ) -> Any:
        kept = {name: x for name, x in tensors.items() if not name.startswith(without)}
        save_file({**kept, **(more or {})}, path, metadata)
        return load_pipeline(with_base(in_float32(preset or sdxl()), path), CPU)

    return load


MARKS = {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}


def test_marks_of_a_single_file_are_obeyed(single: Any) -> None:
    plain = single().scheduler
    assert plain.config.prediction_type == "epsilon"
    assert float(plain.sigmas[0]) == pytest.approx(SIGMA, abs=1e-3)
    marked = single(MARKS).scheduler
    assert marked.config.prediction_type == "v_prediction"
    assert float(marked.sigmas[0]) == pytest.approx(ZERO_SNR_SIGMA, rel=1e-3)
    only_v = single({"v_pred": torch.empty(0)}).scheduler
    assert only_v.config.prediction_type == "v_prediction"
    assert float(only_v.sigmas[0]) == pytest.approx(SIGMA, abs=1e-3)


@pytest.mark.parametrize("preset", [sdxl, sdxl_v1])
def test_header_of_a_single_file_is_obeyed(single: Any, preset: Any) -> None:
    """Text that trainers write into the header of safetensors files."""
    header = {"modelspec.prediction_type": "v", "ss_zero_terminal_snr": "True"}
    scheduler = single(metadata=header, preset=preset()).scheduler
    scheduler.set_timesteps(4)
    assert scheduler.config.prediction_type == "v_prediction"
    assert float(scheduler.sigmas[0]) == pytest.approx(ZERO_SNR_SIGMA, rel=1e-3)
    assert single(metadata={"modelspec.prediction_type": "epsilon"}).scheduler.config[
        "prediction_type"
    ] == ("epsilon")


@pytest.mark.parametrize(
    ("more", "metadata", "message"),
    [
        ({"edm_mean": torch.ones(4), "edm_std": torch.ones(4)}, None, r"EDM \(it has edm_mean\)"),
        ({"edm_vpred.sigma_max": torch.ones(1)}, None, r"EDM \(it has edm_vpred\.sigma_max\)"),
        (None, {"modelspec.prediction_type": "rf"}, "predicts 'rf'"),
        (
            {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(32, 9, 3, 3)},
            None,
            "base model for inpainting: it reads 9 channels instead of 4",
        ),
        (
            {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(32, 8, 3, 3)},
            None,
            "InstructPix2Pix",
        ),
        ({"model.diffusion_model.out.2.scale_weight": torch.ones(1)}, None, "scaled float8"),
        (
            {"model.diffusion_model.out.2.weight.absmax": torch.ones(1)},
            None,
            "in 4 bits with bitsandbytes",
        ),
        ({"lora_unet_mid.lora_down.weight": torch.ones(1)}, None, "it is a LoRA"),
        ({"conditioner.embedders.0.model.x": torch.ones(1)}, None, "it is SDXL's refiner"),
    ],
)
def test_single_file_of_another_kind_is_refused_by_name(
    single: Any, more: Any, metadata: Any, message: str
) -> None:
    with pytest.raises(WeightsError, match=message) as error:
        single(more, metadata)
    assert "whole.safetensors" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model.diffusion_model.input_blocks.1.0.x"], "Stable Diffusion 1 or 2"),
        (["model.diffusion_model.joint_blocks.0.x_block"], "Stable Diffusion 3"),
        (["double_blocks.0.img_mod.lin.weight", "single_blocks.0.linear1.weight"], "a FLUX.1"),
        (["first_stage_model.decoder.conv_in.weight"], "an autoencoder"),
        (["decoder.up_blocks.0.resnets.0.conv1.weight"], "an autoencoder"),
        (["text_model.encoder.layers.0.mlp.fc1.weight"], "a text encoder"),
        (["down_blocks.0.resnets.0.conv1.weight"], "a U-Net without"),
        (["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.x"], "a ControlNet"),
        (["id_adapter.latents", "id_adapter_attn_layers.1.id_to_k.weight"], "PuLID's adapter"),
        (["something.else"], "unknown kind, such as something.else"),
    ],
)
def test_file_that_is_no_base_is_named(names: list[str], message: str, tmp_path: Path) -> None:
    save_file({name: torch.ones(1) for name in names}, tmp_path / "file.safetensors")
    torch.save({name: torch.ones(1) for name in names}, tmp_path / "file.ckpt")
    for file in ("file.safetensors", "file.ckpt"):
        with pytest.raises(WeightsError, match=message) as error:
            load_pipeline(with_base(sdxl(), tmp_path / file), CPU)
        assert str(error.value).startswith(f"{tmp_path / file} is no SDXL checkpoint")


def test_gguf_is_refused_for_sdxl(tmp_path: Path) -> None:
    (tmp_path / "base.gguf").write_bytes(b"GGUF")
    with pytest.raises(WeightsError, match="only supported for FLUX presets"):
        load_pipeline(with_base(sdxl(), tmp_path / "base.gguf"), CPU)


def test_what_a_single_file_lacks_or_has_in_addition_is_said(
    single: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(WeightsError, match="has no autoencoder"):
        single(without="first_stage_model.")
    with pytest.raises(WeightsError, match=r"whole\.safetensors .*(lacks|cannot be loaded)"):
        single(without="model.diffusion_model.middle_block")
    with pytest.raises(WeightsError, match=r"whole\.safetensors .*(lacks|cannot be loaded)"):
        single(without="model.diffusion_model.out.2.bias")
    assert not own_records(caplog)
    single({"stranger.weight": torch.ones(1), **MARKS, "alphas_cumprod": torch.ones(1)})
    assert "1 tensors that are not used, such as stranger.weight" in caplog.text
    caplog.clear()
    single({"model.diffusion_model.stranger.weight": torch.ones(1)})
    assert "not used, such as 1 of model.diffusion_model" in caplog.text


def test_error_of_a_library_is_one_sentence(single: Any, monkeypatch: Any) -> None:
    from diffusers import StableDiffusionXLPipeline

    def fail(*args: Any, **options: Any) -> None:
        raise AttributeError("'CLIPTextModel' object has no attribute 'text_model'")

    monkeypatch.setattr(StableDiffusionXLPipeline, "from_single_file", fail)
    with pytest.raises(WeightsError, match=r"diffusers .* and transformers .* may not fit"):
        single()


def with_scheduler(base: Path, folder: Path, scheduler: Any) -> Path:
    """Copy a pipeline and give it another scheduler."""
    copytree(base, folder)
    rmtree(folder / "scheduler")
    scheduler.save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    "kind", [EulerDiscreteScheduler, DDIMScheduler, DPMSolverMultistepScheduler]
)
def test_zero_snr_and_v_prediction_of_a_directory_are_obeyed(
    kind: Any, base: Path, tmp_path: Path
) -> None:
    scheduler = kind(**SCALED_LINEAR, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    path = with_scheduler(base, tmp_path / "base", scheduler)
    for preset in (sdxl(), sdxl_v1()):
        loaded = load_pipeline(with_base(in_float32(preset), path), CPU)
        loaded.scheduler.set_timesteps(4)
        assert loaded.scheduler.config.prediction_type == "v_prediction"
        assert float(loaded.scheduler.sigmas[0]) == pytest.approx(ZERO_SNR_SIGMA, rel=1e-3)
        image = loaded("portrait", num_inference_steps=4, output_type="pt").images
        assert bool(image.isfinite().all())


def test_last_step_of_v1_ends_where_the_published_demo_ends(base: Path) -> None:
    """The noise levels that diffusers 0.25, which the demo was written for, computes."""
    scheduler = load_pipeline(with_base(in_float32(sdxl_v1()), base), CPU).scheduler
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    expected = [14.6146, 4.0817, 1.6129, 0.6932, 0.0292]
    assert scheduler.sigmas.tolist() == pytest.approx(expected, abs=1e-4)


def test_own_noise_schedule_is_obeyed(base: Path, tmp_path: Path) -> None:
    """As Kolors has: more timesteps, and more noise in the last."""
    scheduler = EulerDiscreteScheduler(
        num_train_timesteps=1100, beta_start=0.00085, beta_end=0.014, beta_schedule="scaled_linear"
    )
    path = with_scheduler(base, tmp_path / "base", scheduler)
    loaded = load_pipeline(with_base(in_float32(sdxl()), path), CPU).scheduler
    expected = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt()
    assert float(loaded.sigmas[0]) == pytest.approx(float(expected[-1]), rel=1e-5)
    assert float(expected[-1]) > 1.9 * SIGMA


@pytest.mark.parametrize("preset", [sdxl, sdxl_v1])
@pytest.mark.parametrize(
    ("scheduler", "reason"),
    [
        (EDMEulerScheduler(), "EDM"),
        (EDMDPMSolverMultistepScheduler(), "EDM"),
        (FlowMatchEulerDiscreteScheduler(), "flow matching"),
        (UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), "flow"),
        (DDIMScheduler(**SCALED_LINEAR, prediction_type="sample"), "predicts 'sample'"),
        (DDIMScheduler(beta_schedule="squaredcos_cap_v2"), "'squaredcos_cap_v2'"),
    ],
)
def test_base_that_no_preset_samples_is_refused(
    preset: Any, scheduler: Any, reason: str, base: Path, tmp_path: Path
) -> None:
    path = with_scheduler(base, tmp_path / "base", scheduler)
    name = type(scheduler).__name__
    with pytest.raises(WeightsError, match=f"its scheduler is {name}, so .*{reason}"):
        load_pipeline(with_base(in_float32(preset()), path), CPU)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"_class_name": "EDMEulerScheduler", "sigma_data": 0.5}, "EDM"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "flow matching"),
        ({"beta_schedule": None}, "the noise schedule 'linear'"),
        ({"trained_betas": [0.1, 0.2]}, "'trained_betas'"),
    ],
)
def test_settings_of_another_scheduler_are_refused(
    changes: dict[str, Any], reason: str, base: Path, tmp_path: Path
) -> None:
    """diffusers would ignore what the class in the index does not know."""
    path = copytree(base, tmp_path / "base")
    file = path / "scheduler" / "scheduler_config.json"
    config = {**json.loads(file.read_text("utf-8")), **changes}
    file.write_text(json.dumps({name: x for name, x in config.items() if x is not None}))
    with pytest.raises(WeightsError, match=f"cannot be sampled: its scheduler is .*{reason}"):
        load_pipeline(with_base(in_float32(sdxl()), path), CPU)


def test_other_schedulers_load_as_before(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for kind in (EulerAncestralDiscreteScheduler, DDIMScheduler, DPMSolverMultistepScheduler):
        path = with_scheduler(base, tmp_path / kind.__name__, kind(**SCALED_LINEAR))
        loaded = load_pipeline(with_base(in_float32(sdxl()), path), CPU)
        assert float(loaded.scheduler.sigmas[0]) == pytest.approx(SIGMA, abs=1e-3)
    assert not own_records(caplog)
    path = with_scheduler(base, tmp_path / "lcm", LCMScheduler(**SCALED_LINEAR))
    load_pipeline(with_base(in_float32(sdxl()), path), CPU)
    assert "was distilled for LCMScheduler" in caplog.text


def test_files_without_a_suffix_do_no_harm(base: Path, tmp_path: Path) -> None:
    copytree(base, tmp_path / "base")
    for part in ("vae", "unet", "text_encoder"):
        (tmp_path / "base" / part / "LICENSE").touch()
    half = load_pipeline(with_base(in_float32(sdxl()), tmp_path / "base"), CPU)
    half.save_pretrained(tmp_path / "fp16", variant="fp16")
    (tmp_path / "fp16" / "vae" / "LICENSE").touch()
    (tmp_path / "fp16" / "unet" / ".gitattributes").touch()
    loaded = load_pipeline(with_base(in_float32(sdxl()), tmp_path / "fp16"), CPU)
    for name, value in loaded.vae.state_dict().items():
        assert torch.equal(value, half.vae.state_dict()[name])


def test_parts_in_different_variants_are_loaded(base: Path, tmp_path: Path) -> None:
    copytree(base, tmp_path / "base")
    weights = "diffusion_pytorch_model.safetensors"
    for part, variant in (("unet", "fp16"), ("vae", "bf16")):
        path = tmp_path / "base" / part / weights
        path.rename(path.with_name(weights.replace(".", f".{variant}.")))
    loaded = load_pipeline(with_base(in_float32(sdxl()), tmp_path / "base"), CPU)
    for part in ("unet", "vae"):
        expected = load_file(base / part / weights)
        assert all(
            torch.equal(x, expected[n]) for n, x in getattr(loaded, part).state_dict().items()
        )


def test_parts_of_another_pipeline_are_not_needed(base: Path, tmp_path: Path) -> None:
    """As in a directory that was saved with a ControlNet, or with programs for another purpose."""
    path = copytree(base, tmp_path / "base")
    parts = {"controlnet": ["diffusers", "ControlNetModel"], "stranger": ["antigravity", "X"]}
    change_index(path, _class_name="StableDiffusionXLControlNetPipeline", **parts)
    assert "controlnet" not in load_pipeline(with_base(in_float32(sdxl()), path), CPU).components


def change_index(path: Path, **entries: Any) -> Path:
    index = json.loads((path / "model_index.json").read_text("utf-8"))
    (path / "model_index.json").write_text(json.dumps({**index, **entries}))
    return path


def test_directory_of_another_kind_is_refused_by_name(
    base: Path, tmp_path: Path, tiny_pipeline: Any
) -> None:
    def refused(path: Path, message: str) -> None:
        with pytest.raises(WeightsError, match=message) as error:
            load_pipeline(with_base(in_float32(sdxl()), path), CPU)
        assert "\n" not in str(error.value)

    refiner = copytree(base, tmp_path / "refiner")
    change_index(refiner, text_encoder=[None, None], tokenizer=[None, None])
    refused(refiner, "is SDXL's refiner")
    other = change_index(copytree(base, tmp_path / "sd1"), _class_name="StableDiffusionPipeline")
    refused(other, "cannot be loaded for an SDXL preset: it is a StableDiffusionPipeline")

    inpainting = tiny_pipeline()
    inpainting.unet = UNet2DConditionModel.from_config(inpainting.unet.config, in_channels=9)
    inpainting.save_pretrained(tmp_path / "inpainting")
    refused(tmp_path / "inpainting", "base model for inpainting: it reads 9 channels")

    alone = tmp_path / "alone"
    copytree(base / "unet", alone)
    refused(alone, r"contains no pipeline \(no model_index\.json\); pass the file itself")
    lost = copytree(base, tmp_path / "lost")
    rmtree(lost / "vae")
    refused(lost, r"lacks config\.json")
    code = change_index(copytree(base, tmp_path / "code"), vae=["antigravity", "Stranger"])
    refused(code, r"antigravity\.Stranger is not part of diffusers")


# --- FLUX


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pipelines like dev, with a guidance embedding, and like schnell, without."""
    folder = tmp_path_factory.mktemp("flux")
    tiny_pipe().save_pretrained(folder / "dev")
    tiny_pipe(guidance_embeds=False).save_pretrained(folder / "schnell")
    return folder


def transformer_file(pipeline: Path) -> Path:
    return pipeline / "transformer" / "diffusion_pytorch_model.safetensors"


def original_names(has_guidance: bool) -> dict[str, torch.Tensor]:
    """Return the names of the original layout that identify it."""
    names = [
        "img_in.weight",
        "double_blocks.0.img_mod.lin.weight",
        "single_blocks.0.linear1.weight",
    ]
    names += ["guidance_in.in_layer.weight"] if has_guidance else []
    return {name: torch.ones(16, 16) for name in names}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_guidance_embedding_of_a_file_must_match(folder: Path, tmp_path: Path, prefix: str) -> None:
    cases = (("schnell", True, "flux", "dev"), ("dev", False, "flux-schnell", "schnell"))
    for pipeline, has_guidance, preset, kind in cases:
        tensors = {prefix + name: x for name, x in original_names(has_guidance).items()}
        save_file(tensors, tmp_path / "file.safetensors")
        message = f"guidance embedding like FLUX.1-{kind}, .*{pipeline} is for .*--preset {preset}"
        for name in ("file.safetensors", None):
            path = tmp_path / name if name else transformer_file(folder / kind)
            with pytest.raises(WeightsError, match=message):
                load_pipeline(with_base(flux(folder / pipeline), path), CPU)


def test_guidance_embedding_of_a_directory_is_said(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_pipeline(flux(folder / "dev"), CPU)
    load_pipeline(flux_schnell(folder / "schnell"), CPU)
    assert not own_records(caplog)
    with pytest.raises(WeightsError, match=r"FLUX\.1-dev, but this preset .* --preset flux\."):
        load_pipeline(flux_schnell(folder / "dev"), CPU)
    load_pipeline(flux(folder / "schnell"), CPU)
    assert "the guidance scale has no effect; --preset flux-schnell" in caplog.text


@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale"])
def test_scaled_float8_is_multiplied(folder: Path, tmp_path: Path, suffix: str) -> None:
    """Each matrix by its scale, or each row by its own."""
    tensors = load_file(transformer_file(folder / "dev"))
    stored = {}
    for name, tensor in tensors.items():
        stored[name] = tensor
        if name.endswith("weight") and tensor.ndim == 2:
            stored[name] = torch.full(tensor.shape, 96.0).to(torch.float8_e4m3fn)
            stored[name.replace("weight", suffix)] = torch.tensor(0.001)
    rows = torch.arange(len(tensors["proj_out.weight"])).float()[:, None] / 96
    stored[f"proj_out.{suffix}"] = rows
    stored["proj_out.input_scale"] = torch.tensor(2.0)
    stored["scaled_fp8"] = torch.empty(2).to(torch.float8_e4m3fn)
    save_file(stored, tmp_path / "scaled.safetensors")
    preset = with_base(flux(folder / "dev"), tmp_path / "scaled.safetensors")
    transformer = load_pipeline(preset, CPU).transformer
    assert transformer.x_embedder.weight[0, 0].item() == pytest.approx(0.096, rel=5e-3)
    assert transformer.proj_out.weight[:, 0].tolist() == list(range(len(rows)))


def test_plain_float8_keeps_its_values(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = load_file(transformer_file(folder / "dev"))
    stored = {
        name: tensor.to(torch.float8_e4m3fn) if tensor.ndim == 2 else tensor
        for name, tensor in tensors.items()
    }
    stored["stranger.weight"] = torch.ones(1)
    save_file(stored, tmp_path / "plain.safetensors")
    preset = with_base(flux(folder / "dev"), tmp_path / "plain.safetensors")
    for name, value in load_pipeline(preset, CPU).transformer.state_dict().items():
        assert torch.equal(value, stored[name].to(value.dtype))
    assert "not used, such as stranger.weight" in caplog.text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"x_embedder.weight.quant_state.bitsandbytes__nf4": 1}, "in 4 bits with bitsandbytes"),
        ({"x_embedder.SCB": 1}, "in 8 bits with bitsandbytes"),
        ({"x_embedder.wscales": 1}, "SVDQuant"),
        ({"x_embedder.weight_scale_2": 1}, "NVFP4"),
        ({"x_embedder.weight_scale_inv": 1}, "in float8 with scales per block"),
        ({"x_embedder.weight_scale": 7}, r"\(7,\) scales of x_embedder\.weight"),
        ({"nothing.weight_scale": 1}, r"a scale of nothing\.weight, but not nothing\.weight"),
        ({"distilled_guidance_layer.in_proj.bias": 1}, "a Chroma transformer"),
        ({"double_stream_modulation_img.lin.weight": 1}, r"a FLUX\.2 transformer"),
        ({"single.lora_A.weight": 1}, "it is a LoRA"),
    ],
)
def test_flux_file_of_another_kind_is_refused_by_name(
    folder: Path, tmp_path: Path, more: dict[str, int], message: str
) -> None:
    tensors = load_file(transformer_file(folder / "dev"))
    tensors |= {name: torch.ones(size) for name, size in more.items()}
    save_file(tensors, tmp_path / "file.safetensors")
    with pytest.raises(WeightsError, match=rf"file\.safetensors .*{message}") as error:
        load_pipeline(with_base(flux(folder / "dev"), tmp_path / "file.safetensors"), CPU)
    assert "\n" not in str(error.value)


def test_formats_of_comfyui_are_read() -> None:
    def layer(form: str) -> dict[str, torch.Tensor]:
        text = json.dumps({"format": form}).encode()
        return {
            "a.weight": torch.full((2, 2), 4.0).to(torch.float8_e4m3fn),
            "a.weight_scale": torch.tensor(0.5),
            "a.comfy_quant": torch.tensor(list(text), dtype=torch.uint8),
        }

    path = Path("x")
    done = single_files.dequantize(path, layer("float8_e4m3fn"), torch.float32)
    assert done.keys() == {"a.weight"} and torch.equal(done["a.weight"], torch.full((2, 2), 2.0))
    with pytest.raises(WeightsError, match="quantized in mxfp8"):
        single_files.dequantize(path, layer("mxfp8"), torch.float32)


def test_transformer_for_other_inputs_is_refused(folder: Path, tmp_path: Path) -> None:
    """Fill reads a mask and an image, Depth and Canny a control image."""
    tiny_pipe(in_channels=96, out_channels=16).save_pretrained(tmp_path / "fill")
    with pytest.raises(WeightsError, match="it reads 96 channels instead of 16"):
        load_pipeline(flux(tmp_path / "fill"), CPU)
    for path in (tmp_path / "fill" / "transformer", transformer_file(tmp_path / "fill")):
        with pytest.raises(WeightsError, match="it reads 96 channels instead of 16"):
            load_pipeline(with_base(flux(folder / "dev"), path), CPU)
    for channels, purpose in ((384, "Fill"), (128, "Depth or Canny"), (9, "inpainting")):
        with pytest.raises(WeightsError, match=purpose):
            single_files.check_channels(Path("x"), channels, 64)


def test_flux_pipeline_with_another_scheduler_is_refused(folder: Path, tmp_path: Path) -> None:
    path = with_scheduler(folder / "dev", tmp_path / "base", EulerDiscreteScheduler())
    with pytest.raises(WeightsError, match="its scheduler is EulerDiscreteScheduler, and FLUX"):
        load_pipeline(flux(path), CPU)


def test_nothing_is_logged_about_a_good_base(
    base: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        load_pipeline(with_base(in_float32(sdxl()), base), CPU)
        load_pipeline(with_base(flux(folder / "dev"), transformer_file(folder / "dev")), CPU)
        load_pipeline(with_base(flux(folder / "dev"), folder / "dev" / "transformer"), CPU)
    assert not own_records(caplog)
