"""Training on a folder of photographs, at the size of a test: which pictures count, what a batch holds, all three stages."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from diffusers import UNet2DConditionModel
from facexlib.parsing.bisenet import BiSeNet
from facexlib.recognition.arcface_arch import Backbone
from PIL import Image
from safetensors.torch import load_file

from openpulid.errors import OptionError, TrainingError, WeightsError
from openpulid.faces.arcface import (
    ARCFACE_TEMPLATE,
    ArcFaceRecognition,
    arcface_crop,
    build_face_embedder,
    load_arcface_ir_se50,
)
from openpulid.faces.bisenet import FaceParser
from openpulid.faces.scrfd import SCRFDDetector
from openpulid.identity.eva_clip import VisionEncoder
from openpulid.identity.photo_extractor import PhotoExtractor
from openpulid.methods.pulid.sdxl import PuLID
from openpulid.training.pulid import photo_dataset as photos_of
from openpulid.training.pulid.models import SDXLModel
from openpulid.training.pulid.photo_dataset import PhotoDataset
from openpulid.training.pulid.recipes import find_recipe
from openpulid.training.pulid.train_sdxl import fresh_adapter, train
from openpulid.training.rng import StepRNG
from tests.support import tiny_sdxl as tiny
from tests.support.photo_networks import DETECTOR, GROUP, PHOTOS, needs_detector, recognition_file

pytestmark = [needs_detector, pytest.mark.usefixtures("both_precisions")]
PIXELS = 64
MODELS = {"glintr100": "a", "EVA02": "b"}
SMALL = {
    "encoder_width": 16,
    "batch": 2,
    "warmup": 1,
    "validate_every": 100,
    "fast_batch": 1,
    "pixels": PIXELS,
}


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> PhotoExtractor:
    torch.manual_seed(0)
    tower = VisionEncoder(
        img_size=32, patch_size=8, embed_dim=8, depth=5, num_heads=2, num_classes=4, ref_grid=None
    ).eval()
    recogniser = ArcFaceRecognition.load(
        recognition_file(tmp_path_factory.mktemp("faces") / "glintr100.onnx", dim=12)
    )
    return PhotoExtractor(
        SCRFDDetector.load(DETECTOR), recogniser, FaceParser(BiSeNet(num_class=19)), tower, MODELS
    )


@pytest.fixture
def base() -> SDXLModel:
    pipe = tiny.pipe()
    pipe.unet.register_to_config(sample_size=PIXELS // pipe.vae_scale_factor)
    return SDXLModel(pipe)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for name in ("hinton.jpeg", "lecun.jpg"):
        Image.open(PHOTOS / name).save(folder / name)
        (folder / name).with_suffix(".txt").write_text("portrait of a person\n")
    (folder / "more").mkdir()
    Image.fromarray(skimage.data.astronaut()).save(folder / "more" / "astronaut.png")
    (folder / "more" / "astronaut.txt").write_text("a person")
    Image.new("RGB", (200, 200), "gray").save(folder / "wall.png")
    (folder / "wall.txt").write_text("a person")
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "broken.txt").write_text("a person")
    Image.open(GROUP).save(folder / "without-a-sentence.jpg")
    Image.fromarray(skimage.data.astronaut()).resize((200, 200)).save(folder / "small.png")
    (folder / "small.txt").write_text("a person")
    return folder


def opened(
    folder: Path, base: SDXLModel, features: PhotoExtractor, index: Path, batch: int = 3
) -> PhotoDataset:
    return PhotoDataset.open(folder, index, base, features, batch, PIXELS)


def test_pictures_with_a_sentence_and_a_face_count(
    folder, base, features, tmp_path, caplog
) -> None:
    photos = opened(folder, base, features, tmp_path / "faces.json")
    assert photos.names == ["hinton.jpeg", "lecun.jpg", "more/astronaut.png"]
    assert (
        "3 of 6 pictures are left out, they show no face of 64 pixels" in caplog.text
        and "broken.png" in caplog.text
    )
    index = json.loads((tmp_path / "faces.json").read_text())
    assert index["wall.png"] is None and len(index["small.png"]) == 14
    features_of_nobody = PhotoExtractor(
        None, None, None, features.tower
    )  # found once: nobody is asked again
    assert opened(folder, base, features_of_nobody, tmp_path / "faces.json").names == photos.names


def test_other_processes_wait_for_the_index(folder, base, features, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(photos_of, "WATCH_SECONDS", 0.05)
    names = ["hinton.jpeg", "more/astronaut.png"]
    with ThreadPoolExecutor(1) as waiting:
        seen = waiting.submit(photos_of._awaited, names, tmp_path / "faces.json")
        with pytest.raises(TimeoutError):
            seen.result(0.3)
        found = opened(folder, base, features, tmp_path / "faces.json")
        assert set(found.names) <= set(seen.result(30))


def test_a_batch(folder, base, features, tmp_path) -> None:
    photos = opened(folder, base, features, tmp_path / "faces.json")
    batch = photos.batch(StepRNG(0, 0))
    side = PIXELS // base.pipe.vae_scale_factor
    assert batch.latents.shape == (3, 4, side, side) and batch.masks.shape == (3, 1, side, side)
    assert batch.id_cond.shape == (3, 16) and [x.shape for x in batch.hidden] == [(3, 17, 8)] * 5
    assert sorted(batch.prompts) == ["a person", "portrait of a person", "portrait of a person"]
    assert batch.pictures.shape == (3, 3, PIXELS, PIXELS) and 0.02 < batch.masks.mean() < 0.6
    torch.testing.assert_close(batch.latents, base.encode(batch.pictures))
    again = photos.batch(StepRNG(0, 0))
    assert torch.equal(batch.latents, again.latents) and torch.equal(batch.id_cond, again.id_cond)
    two = [photos.batch(StepRNG(0, 0, rank, 3)).prompts for rank in range(3)]
    assert [p for part in two for p in part] == list(batch.prompts)


def test_the_face_is_in_its_square(folder, base, features, tmp_path) -> None:
    photos = opened(folder, base, features, tmp_path / "faces.json")
    for row in range(len(photos)):
        square, face = photos._square(row)
        assert square.shape == (3, PIXELS, PIXELS)
        assert ((face.landmarks >= 0) & (face.landmarks <= PIXELS)).all()
        assert face.landmarks[0, 0] < face.landmarks[1, 0]


def test_the_base_sees_what_it_decodes(base) -> None:
    """Encoding undoes decoding's scale: what differs is the autoencoder, and a random one has no inverse."""
    pictures = torch.rand(1, 3, PIXELS, PIXELS)
    raw = base.vae.encode(2 * pictures - 1).latent_dist.mode()
    torch.testing.assert_close(base.encode(pictures), raw * base.vae.config.scaling_factor)


def test_all_three_stages(folder, base, features, tmp_path) -> None:
    torch.manual_seed(0)
    faces = build_face_embedder(
        features.finder, Backbone(num_layers=50, drop_ratio=0.6, mode="ir_se").eval()
    )
    frozen = {name: value.clone() for name, value in base.unet.state_dict().items()}
    begin = None
    for stage in (1, 2, 3):
        recipe = replace(find_recipe(f"sdxl_stage{stage}"), steps=2, **SMALL)
        out = tmp_path / str(stage)
        known = {"fast": [base], "faces": faces} if stage > 1 else {}
        adapter, result = train(
            recipe, folder, out, base=base, features=features, begin=begin, held_out=folder, **known
        )
        begin = out / "adapter.safetensors"
        assert result.steps == 2 and np.isfinite(list(result.losses.values())).all()
        assert {"held_out_own", "held_out_none"} <= set(result.metrics)
        assert set(load_file(begin)) == set(adapter.state_dict())
    assert all(torch.equal(value, frozen[name]) for name, value in base.unet.state_dict().items())
    assert PuLID.load(begin).models == MODELS
    other = PhotoExtractor(
        None, None, None, features.tower, {**MODELS, "glintr100": "another file"}
    )
    with pytest.raises(
        OptionError,
        match="learned with EVA02 and glintr100, and faces would be read by another glintr100",
    ):
        train(
            find_recipe("sdxl_stage2"),
            folder,
            tmp_path / "other",
            base=base,
            features=other,
            begin=begin,
        )


def test_sdxl_is_told_the_size_that_pictures_have(folder, base, features, tmp_path) -> None:
    """Stages 2 and 3 learn from 768 pixels on a base of 1024."""
    base.unet.register_to_config(sample_size=2 * PIXELS // base.pipe.vae_scale_factor)
    told = []
    hook = base.unet.register_forward_pre_hook(
        lambda module, args, named: told.append(named["added_cond_kwargs"]["time_ids"]),
        with_kwargs=True,
    )
    train(
        replace(find_recipe("sdxl_stage1"), steps=1, **SMALL),
        folder,
        tmp_path,
        base=base,
        features=features,
    )
    hook.remove()
    assert told and all(row == [PIXELS, PIXELS, 0, 0, PIXELS, PIXELS] for row in told[0].tolist())


def test_what_changes_in_the_folder_stops_nothing(folder, base, features, tmp_path, caplog) -> None:
    """A sentence in another encoding, a picture that cannot be read any more; an index that was torn is said."""
    copy, index = tmp_path / "photos", tmp_path / "faces.json"
    shutil.copytree(folder, copy)
    opened(copy, base, features, index)
    written = index.stat().st_mtime_ns
    (copy / "lecun.txt").write_bytes("Porträt".encode("latin-1"))
    photos = opened(copy, base, features, index)
    assert index.stat().st_mtime_ns == written  # nothing was new
    (copy / "hinton.jpeg").write_bytes(b"no picture any more")
    prompts = photos.batch(StepRNG(0, 0)).prompts
    assert (
        sorted(prompts) == ["Portr\ufffdt", "Portr\ufffdt", "a person"]
        and "takes its place" in caplog.text
    )
    index.write_text("{")
    with pytest.raises(TrainingError, match=r"faces\.json is damaged; delete it"):
        opened(copy, base, features, index)


def test_a_run_begins_where_a_photograph_was_damaged(folder, base, features, tmp_path) -> None:
    """Whichever of them: the adapter's widths are those of the features, and any photograph has these."""
    copy, recipe = tmp_path / "photos", replace(find_recipe("sdxl_stage1"), **SMALL)
    shutil.copytree(folder, copy)
    photos = opened(copy, base, features, tmp_path / "faces.json")
    wanted = fresh_adapter(recipe, base, photos, {})
    for name in photos.names:
        (copy / name).write_bytes(b"no picture any more")
        made = fresh_adapter(recipe, base, photos, {})
        assert {k: v.shape for k, v in made.state_dict().items()} == {
            k: v.shape for k, v in wanted.state_dict().items()
        }
        shutil.copy(folder / name, copy / name)


def test_an_adapter_that_a_recipe_cannot_continue_is_said_before_faces_are_looked_for(
    folder, base, features, tmp_path
) -> None:
    begin, out = tmp_path / "v1.safetensors", tmp_path / "run"
    tiny.adapter(base).save(begin)
    known = {"data": folder, "folder": out, "features": features, "begin": begin}
    with pytest.raises(
        OptionError,
        match=r"trains an IDFormer and .* holds an IDEncoder; name an adapter with that encoder",
    ):
        train(find_recipe("sdxl_stage2_v11"), base=base, **known)
    narrow = tiny.base()
    narrow.unet = UNet2DConditionModel.from_config(
        {**narrow.unet.config, "cross_attention_dim": 16}
    )
    with pytest.raises(WeightsError, match="another U-Net"):
        train(find_recipe("sdxl_stage2"), base=narrow, **known)
    assert not out.exists()
    with pytest.raises(
        WeightsError,
        match=r"v1\.safetensors has other sizes than sdxl_stage2 makes, name another adapter: ",
    ):
        train(replace(find_recipe("sdxl_stage2"), **SMALL), base=base, **known)


def test_what_is_missing_is_said(folder, base, features, tmp_path) -> None:
    with pytest.raises(OptionError, match="sdxl_stage2 continues sdxl_stage1"):
        train(find_recipe("sdxl_stage2"), folder, tmp_path, base=base, features=features)
    (tmp_path / "empty").mkdir()
    with pytest.raises(TrainingError, match="none of 0 pictures"):
        opened(tmp_path / "empty", base, features, tmp_path / "faces.json")
    torch.save({"a": torch.ones(1)}, tmp_path / "arcface.pth")
    with pytest.raises(WeightsError, match="not facexlib's ArcFace"):
        load_arcface_ir_se50(tmp_path / "arcface.pth")


def test_the_id_losss_crop_is_in_place_blue_first_and_differentiable() -> None:
    image = torch.rand(1, 3, 200, 200, generator=torch.Generator().manual_seed(0)).requires_grad_(
        True
    )
    landmarks = (ARCFACE_TEMPLATE + 0.5 + torch.tensor([30.0, 20.0]))[None]
    crop = arcface_crop(image, torch.zeros(1, 1, 200, 200), landmarks)
    torch.testing.assert_close(crop, 2 * image[:, :, 20:132, 30:142].flip(1) - 1, atol=1e-4, rtol=0)
    crop.square().sum().backward()
    inside = image.grad[:, :, 22:130, 32:140]
    assert (inside != 0).all() and image.grad.abs().sum() < 1.1 * image.grad[
        :, :, 19:133, 29:143
    ].abs().sum()


def test_the_id_loss_sees_photographs(features) -> None:
    torch.manual_seed(0)
    embedder = build_face_embedder(
        features.finder, Backbone(num_layers=50, drop_ratio=0.6, mode="ir_se").eval()
    )
    photo = torch.from_numpy(skimage.data.astronaut()).permute(2, 0, 1).float() / 255
    pictures = torch.stack([photo, torch.full_like(photo, 0.5)]).requires_grad_(True)
    seen = embedder(pictures)
    assert seen.has_face.tolist() == [True, False] and seen.embeddings.shape == (2, 512)
    torch.testing.assert_close(seen.embeddings.norm(dim=1), torch.tensor([1.0, 0.0]))
    seen.embeddings.sum().backward()
    assert pictures.grad[0].abs().sum() > 0 and pictures.grad[1].abs().sum() == 0
