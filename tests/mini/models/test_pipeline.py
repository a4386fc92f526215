"""Training uses the conditioning of the diffusers pipeline, and saved folders load again."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from openpulid.errors import NonFiniteError
from openpulid.mini.data.captions import token_ids
from openpulid.mini.models.pipeline import build_pipeline, build_scheduler, sample, save_folder
from openpulid.mini.models.tokenizer import build_tokenizer
from tests.support import mini_networks as networks


@pytest.fixture(scope="module")
def pipe():
    return build_pipeline(
        networks.small_unet(), networks.small_vae(), networks.small_words(), build_tokenizer()
    )


def test_text_encoders_match_pipeline(pipe):
    text = networks.small_words()(token_ids(build_tokenizer(), networks.PROMPTS))
    embeds, negative, pooled, negative_pooled = pipe.encode_prompt(
        networks.PROMPTS, device="cpu", num_images_per_prompt=1
    )
    assert torch.equal(text.embeds, embeds) and torch.equal(text.pooled, pooled)
    assert not negative.any() and not negative_pooled.any()
    ids = pipe._get_add_time_ids(
        (96, 96), (0, 0), (96, 96), torch.float32, text_encoder_projection_dim=128
    )
    assert torch.equal(text.time_ids, ids.expand(4, -1))


def test_dropped_prompt_is_zero():
    keep = torch.tensor([True, False, True, False])
    text = networks.small_words()(token_ids(build_tokenizer(), networks.PROMPTS), keep)
    assert text.embeds.abs().sum((1, 2)).bool().tolist() == keep.tolist()
    assert text.pooled.abs().sum(1).bool().tolist() == keep.tolist()


def test_last_timestep_is_pure_noise():
    scheduler = build_scheduler()
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    assert scheduler.alphas_cumprod[-1] < 1e-6


def test_image_depends_on_its_seed_only(pipe):
    batch = sample(pipe, networks.PROMPTS[:3], [5, 6, 7], steps=2, guidance=3.0)
    single = sample(pipe, networks.PROMPTS[1:2], [6], steps=2, guidance=3.0)
    assert batch.shape == (3, 3, 96, 96)
    assert torch.allclose(batch[1], single[0], atol=1e-5)
    assert not torch.allclose(batch[0], batch[1], atol=1e-2)


def test_images_that_are_not_finite_are_refused():
    broken = build_pipeline(
        networks.small_unet(), networks.small_vae(), networks.small_words(), build_tokenizer()
    )
    torch.nn.init.constant_(broken.vae.decoder.conv_out.bias, float("nan"))
    with pytest.raises(NonFiniteError, match="NaN or infinity instead of images"):
        sample(broken, networks.PROMPTS[:1], [5], steps=1, guidance=1.0)


def test_save_folder_stores_bf16_and_keeps_model(tmp_path):
    unet = networks.small_unet()
    weight = unet.conv_in.weight.clone()
    save_folder(unet, tmp_path)
    assert unet.dtype == torch.float32 and torch.equal(unet.conv_in.weight, weight)
    stored = UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert (
        sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
        < 2.2 * stored.num_parameters()
    )
    assert torch.equal(stored.conv_in.weight, weight.bfloat16())


def test_single_file_replaces_shards(tmp_path, monkeypatch):
    unet = networks.small_unet()
    monkeypatch.setattr("openpulid.mini.models.pipeline.SHARD_SIZE", "100KB")
    save_folder(unet, tmp_path)
    assert list(tmp_path.glob("*.index.json"))
    monkeypatch.undo()
    save_folder(unet, tmp_path, in_8_bits=True)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    loaded = UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=torch.float32)
    expected = unet.conv_in.weight.bfloat16().to(torch.float8_e4m3fn).float()
    assert torch.equal(loaded.conv_in.weight, expected)


def test_saved_config_names_no_local_path(tmp_path):
    for name, model in {
        "unet": networks.small_unet(),
        "words": networks.small_words().second,
    }.items():
        save_folder(model, tmp_path / "first" / name)
        loaded = type(model).from_pretrained(tmp_path / "first" / name)
        save_folder(loaded, tmp_path / "second" / name)
        assert "first" not in (tmp_path / "second" / name / "config.json").read_text()
