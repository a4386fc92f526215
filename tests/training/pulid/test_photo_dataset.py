"""Training on a folder of photos at test size: selection of images, batches, all three stages."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from diffusers import UNet2DConditionModel
from facexlib.recognition.arcface_arch import Backbone
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from openpulid.data.captioned_images import CaptionedImages, find_captioned_images
from openpulid.errors import ImageError, OptionError, TrainingError, WeightsError
from openpulid.faces.arcface import (
    ARCFACE_TEMPLATE,
    ArcFaceRecognition,
    arcface_crop,
    build_face_embedder,
    load_arcface_ir_se50,
)
from openpulid.faces.bisenet import FaceParser
from openpulid.faces.scrfd import SCRFDDetector
from openpulid.identity.detection import PhotoFaceDetection
from openpulid.identity.eva_clip import VisionEncoder
from openpulid.identity.photo_extractor import PhotoExtractor
from openpulid.methods.pulid.sdxl import PuLID
from openpulid.training.pulid import buckets, face_index
from openpulid.training.pulid.models import SDXLModel
from openpulid.training.pulid.photo_dataset import PhotoDataset, find_others, number_people
from openpulid.training.pulid.photo_models import TrainingModels
from openpulid.training.pulid.recipes import find_recipe
from openpulid.training.pulid.train import build_adapter
from openpulid.training.pulid.train_photos import check_data, train_on_photos
from openpulid.training.rng import StepRNG
from tests.support import tiny_sdxl as tiny
from tests.support.photo_networks import (
    DETECTOR,
    GROUP,
    PHOTOS,
    SmallParser,
    needs_detector,
    recognition_file,
)

pytestmark = needs_detector
PIXELS = 64
MODELS = {"glintr100": "a", "EVA02": "b"}
SMALL = {
    "encoder_width": 16,
    "batch": 2,
    "warmup": 1,
    "validate_every": 100,
    "few_step_batch": 1,
    "pixels": PIXELS,
}


class SmallRecognition(nn.Module):
    """Embeddings (B, 512) of crops (B, 3, 112, 112), as of the network of the ID loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.AvgPool2d(16), nn.Flatten(), nn.Linear(3 * 49, 512))

    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        return self.layers(crops)


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
        PhotoFaceDetection.load(DETECTOR, "cpu"),
        recogniser,
        FaceParser(SmallParser()),
        tower,
        MODELS,
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


@pytest.fixture(scope="module")
def found(folder, features, tmp_path_factory) -> Path:
    """The index of the folder: detecting its faces takes as long as a training."""
    index = tmp_path_factory.mktemp("index") / "faces.json"
    face_index.build_index(find_captioned_images(folder), index, features, None)
    return index


@pytest.fixture
def index(found, tmp_path) -> Path:
    """A copy of the index that a test may change."""
    return Path(shutil.copy(found, tmp_path / "faces.json"))


def opened(
    folder: Path,
    base: SDXLModel,
    features: PhotoExtractor,
    index: Path,
    batch: int = 3,
    paired: bool = False,
) -> PhotoDataset:
    return PhotoDataset.open(folder, index, base, features, batch, PIXELS, paired=paired)


def test_images_with_caption_and_face_are_used(folder, base, features, tmp_path, caplog) -> None:
    photos = opened(folder, base, features, tmp_path / "faces.json")
    assert photos.names == ["hinton.jpeg", "lecun.jpg", "more/astronaut.png"]
    assert (
        "skipping 3 of 6 images without a face of at least 64 pixels" in caplog.text
        and "broken.png" in caplog.text
    )
    index = json.loads((tmp_path / "faces.json").read_text())
    assert index["wall.png"][1] is None and len(index["small.png"][1]) == 16
    features_of_nobody = PhotoExtractor(
        None, None, None, features.vision_encoder
    )  # found once: nobody is asked again
    assert opened(folder, base, features_of_nobody, tmp_path / "faces.json").names == photos.names


def test_face_of_a_replaced_photo_is_detected_again(features, tmp_path) -> None:
    images, index = tmp_path / "photos", tmp_path / "faces.json"
    images.mkdir()
    photo = Image.fromarray(skimage.data.astronaut())
    for name in ("a.png", "b.png"):
        photo.save(images / name)
        (images / name).with_suffix(".txt").write_text("a person")
    before = face_index.build_index(find_captioned_images(images), index, features, None)
    assert before["a.png"] == before["b.png"]
    photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(images / "a.png")
    os.utime(images / "a.png", ns=(5, 5))  # an older file
    (images / "b.txt").unlink()
    face_index.drop_outdated(find_captioned_images(images), index)
    assert face_index.read_index(index) == {}  # what other processes wait for
    after = face_index.build_index(find_captioned_images(images), index, features, None)
    assert after.keys() == {"a.png"} == face_index.read_index(index).keys()
    assert after["a.png"][0] == pytest.approx(512 - before["a.png"][2], abs=8)


def test_turned_photo_is_not_used(features, tmp_path, caplog) -> None:
    photo = Image.fromarray(skimage.data.astronaut()).crop((100, 0, 356, 256))
    photo.save(tmp_path / "upright.png")
    photo.transpose(Image.Transpose.ROTATE_180).save(tmp_path / "turned.png")
    images = find_captioned_images(tmp_path)
    assert face_index._locate_face(images, "upright.png", features) is not None
    assert face_index._locate_face(images, "turned.png", features) is None
    (message,) = [record.getMessage() for record in caplog.records]
    assert "turned.png: the face is not upright" in message


def test_other_processes_wait_for_the_index(found, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(face_index, "POLL_SECONDS", 0.05)
    names = ["hinton.jpeg", "more/astronaut.png"]
    with ThreadPoolExecutor(1) as waiting:
        seen = waiting.submit(face_index.wait_for_index, names, tmp_path / "faces.json")
        with pytest.raises(TimeoutError):
            seen.result(0.3)
        shutil.copy(found, tmp_path / "faces.json")
        assert set(names) <= set(seen.result(30))


def test_batch_contents(folder, base, features, index) -> None:
    photos = opened(folder, base, features, index)
    batch = photos.batch(StepRNG(0, 0))
    side = PIXELS // base.pipe.vae_scale_factor
    assert batch.latents.shape == (3, 4, side, side) and batch.masks.shape == (3, 1, side, side)
    assert batch.id_cond.shape == (3, 16) and [x.shape for x in batch.hidden] == [(3, 17, 8)] * 5
    assert sorted(batch.prompts) == ["a person", "portrait of a person", "portrait of a person"]
    assert batch.images.shape == (3, 3, PIXELS, PIXELS) and 0.02 < batch.masks.mean() < 0.6
    assert batch.landmarks.shape == (3, 5, 2) and batch.landmarks.std() > 0.02
    assert ((batch.landmarks > 0) & (batch.landmarks < 1)).all()
    torch.testing.assert_close(batch.latents, base.encode(batch.images))
    again = photos.batch(StepRNG(0, 0))
    assert torch.equal(batch.latents, again.latents) and torch.equal(batch.id_cond, again.id_cond)
    two = [photos.batch(StepRNG(0, 0, rank, 3)).prompts for rank in range(3)]
    assert [p for part in two for p in part] == list(batch.prompts)


def test_paired_features_are_those_of_another_image(folder, base, features, index) -> None:
    photos = opened(folder, base, features, index)
    photos.others = [[1], [0], []]
    batch = photos.batch(StepRNG(0, 0))
    own = opened(folder, base, features, index).batch(StepRNG(0, 0))
    assert torch.equal(batch.images, own.images) and batch.prompts == own.prompts
    alone = own.prompts.index("a person")
    two = [row for row in range(3) if row != alone]
    for row, partner in ((two[0], two[1]), (two[1], two[0]), (alone, alone)):
        assert torch.equal(batch.references[row], own.images[partner])
        assert torch.allclose(batch.id_cond[row], own.id_cond[partner], atol=1e-5)
    assert own.references is None


def test_single_folder_says_nothing_about_people(folder, base, features, index) -> None:
    photos = opened(folder, base, features, index)
    assert sorted(photos.batch(StepRNG(0, 0)).people.tolist()) == [0, 1, 2]
    photos.people = [0, 0, 0]
    assert sorted(photos.batch(StepRNG(0, 0)).people.tolist()) == [0, 1, 2]


def test_people_without_a_second_image_cannot_be_paired(folder) -> None:
    images = find_captioned_images(folder)
    with pytest.raises(TrainingError, match="no person has two images; put the images of each"):
        find_others(number_people(images, list(images.captions)), folder)
    names = ["anna/1.jpg", "ben/1.jpg", "2.jpg", "anna/2.jpg", "0.tar/3.jpg", "0.tar/4.jpg"]
    people = number_people(images, names)
    assert people == [0, 1, 2, 0, 3, 4]
    assert find_others(people, folder) == [[3], [], [], [0], [], []]
    # known before models are loaded and faces are detected
    with pytest.raises(TrainingError, match="no person has two images"):
        check_data(folder, None, is_paired=True)


def test_held_out_people_may_have_a_single_image(folder, base, features, index, tmp_path) -> None:
    pairs = tmp_path / "pairs"
    for number in (1, 2):
        (pairs / "yann").mkdir(parents=True, exist_ok=True)
        for name in ("lecun.jpg", "lecun.txt"):
            copy = Path(shutil.copy(folder / name, pairs / "yann"))
            copy.rename(copy.with_stem(str(number)))
    check_data(pairs, folder, is_paired=True)
    recipe = replace(find_recipe("sdxl_stage1"), steps=1, paired=True, **SMALL)
    shutil.copy(index, tmp_path / "held-out-faces.json")
    models = TrainingModels(base, features)
    _, result = train_on_photos(recipe, models, pairs, tmp_path, held_out=folder)
    assert "held_out_own" in result.metrics


def test_image_that_replaces_an_unreadable_one_keeps_its_own_features(
    folder, base, features, index, monkeypatch
) -> None:
    """The next image shows another person, whom the other images do not show."""
    photos = opened(folder, base, features, index)
    photos.others = [[1], [0], [1]]
    open_image = CaptionedImages.open_image

    def fail_once(self: CaptionedImages, name: str) -> Image.Image:
        if name == "lecun.jpg":
            raise ImageError(name, "cannot be read")
        return open_image(self, name)

    monkeypatch.setattr(CaptionedImages, "open_image", fail_once)
    batch = photos.batch(StepRNG(0, 0))
    # hinton's partner is lecun, who cannot be read; astronaut replaces lecun
    assert torch.equal(batch.references, batch.images)
    people = batch.people.tolist()
    assert sorted(people) == [0, 2, 2]


def test_buckets_give_batches_of_one_shape(folder, base, features, index, monkeypatch) -> None:
    """A portrait and a square: the face stays inside, and SDXL is told the size."""
    monkeypatch.setattr(buckets, "MULTIPLE", 8)
    monkeypatch.setattr(buckets.list_sizes, "__defaults__", (8,))
    photos = PhotoDataset.open(folder, index, base, features, 1, PIXELS, has_buckets=True)
    assert len(photos.buckets.rows) > 1
    shapes = set()
    for step in range(3):
        batch = photos.batch(StepRNG(0, step))
        height, width = batch.images.shape[-2:]
        shapes.add((height, width))
        scale = base.pipe.vae_scale_factor
        assert batch.latents.shape[-2:] == (height // scale, width // scale)
        assert batch.masks.shape[-2:] == batch.latents.shape[-2:] and batch.masks.sum() > 0
        assert 0.8 < height * width / PIXELS**2 < 1.25
    assert len(shapes) == len(photos.buckets.rows)
    for size in photos.buckets.rows:
        for row in photos.buckets.rows[size].tolist():
            crop, face = photos._crop(row, size)
            assert crop.shape == (3, size.height, size.width)
            limits = torch.tensor([size.width, size.height])
            assert ((face.landmarks >= 0) & (face.landmarks <= limits)).all()
    text = base.encode_text(["portrait"], pixels=(48, 64))
    assert text.time_ids.tolist() == [[48, 64, 0, 0, 48, 64]]


def test_archives_give_the_batches_of_the_files(
    folder, base, features, index, found, tmp_path
) -> None:
    packed = tmp_path / "packed"
    packed.mkdir()
    with tarfile.open(packed / "0.tar", "w") as tar:
        tar.add(folder, ".")
    modified = (packed / "0.tar").stat().st_mtime_ns
    indexed = {
        f"0.tar/{name}": [modified, position]
        for name, (_, position) in json.loads(found.read_text()).items()
    }
    (tmp_path / "faces.json").write_text(json.dumps(indexed))
    one = opened(folder, base, features, index).batch(StepRNG(0, 0))
    other = opened(packed, base, features, tmp_path / "faces.json").batch(StepRNG(0, 0))
    assert torch.equal(one.images, other.images) and one.prompts == other.prompts
    assert torch.equal(one.id_cond, other.id_cond)


def test_face_is_inside_its_crop(folder, base, features, index) -> None:
    photos = opened(folder, base, features, index)
    for row in range(len(photos)):
        square, face = photos._crop(row, photos.square)
        assert square.shape == (3, PIXELS, PIXELS)
        assert ((face.landmarks >= 0) & (face.landmarks <= PIXELS)).all()
        assert face.landmarks[0, 0] < face.landmarks[1, 0]


def test_encode_undoes_the_scale_of_decode(base) -> None:
    """Compare without the VAE's networks, because a random VAE has no inverse."""
    pictures = torch.rand(1, 3, PIXELS, PIXELS)
    raw = base.vae.encode(2 * pictures - 1).latent_dist.mode()
    torch.testing.assert_close(base.encode(pictures), raw * base.vae.config.scaling_factor)


@pytest.mark.usefixtures("both_precisions")
def test_all_three_stages(folder, base, features, found, tmp_path) -> None:
    torch.manual_seed(0)
    detector = SCRFDDetector.load(DETECTOR)
    faces = build_face_embedder(detector, SmallRecognition().eval())
    frozen = {name: value.clone() for name, value in base.unet.state_dict().items()}
    validation = shutil.copytree(folder, tmp_path / "validation")  # with the same times
    begin = None
    for stage in (1, 2, 3):
        recipe = replace(find_recipe(f"sdxl_stage{stage}"), steps=2, **SMALL)
        out = tmp_path / str(stage)
        out.mkdir()
        for name in ("faces.json", "held-out-faces.json"):
            shutil.copy(found, out / name)
        models = TrainingModels(base, features)
        if stage > 1:
            models = TrainingModels(base, features, [base], faces)
        adapter, result = train_on_photos(
            recipe, models, folder, out, init_adapter=begin, held_out=validation
        )
        begin = out / "adapter.safetensors"
        assert result.steps == 2 and np.isfinite(list(result.losses.values())).all()
        assert {"held_out_own", "held_out_none"} <= set(result.metrics)
        assert set(load_file(begin)) == set(adapter.state_dict())
    assert all(torch.equal(value, frozen[name]) for name, value in base.unet.state_dict().items())
    assert PuLID.load(begin).models == MODELS
    other = PhotoExtractor(
        None,
        features.recognition,
        None,
        features.vision_encoder,
        {**MODELS, "glintr100": "another file"},
    )
    with pytest.raises(
        OptionError,
        match="trained with EVA02 and glintr100, but the current glintr100 differs",
    ):
        train_on_photos(
            find_recipe("sdxl_stage2"),
            TrainingModels(base, other),
            folder,
            tmp_path / "other",
            init_adapter=begin,
        )
    with pytest.raises(TrainingError, match="is a run with another --begin"):
        train_on_photos(recipe, models, folder, out, init_adapter=tmp_path / "1" / begin.name)
    with pytest.raises(TrainingError, match="is a run with another --base"):
        other_base = replace(models, hashes={"--base": "another file"})
        train_on_photos(recipe, other_base, folder, out, init_adapter=tmp_path / "2" / begin.name)
    with pytest.raises(TrainingError, match="with other face models: use the same --faces"):
        recipe = replace(find_recipe("sdxl_stage1"), steps=2, **SMALL)
        train_on_photos(recipe, TrainingModels(base, other), folder, tmp_path / "1")


def test_size_conditioning_is_that_of_the_images(folder, base, features, index) -> None:
    """Stages 2 and 3 train with 768 pixels on a base of 1024."""
    base.unet.register_to_config(sample_size=2 * PIXELS // base.pipe.vae_scale_factor)
    told = []
    hook = base.unet.register_forward_pre_hook(
        lambda module, args, named: told.append(named["added_cond_kwargs"]["time_ids"]),
        with_kwargs=True,
    )
    recipe = replace(find_recipe("sdxl_stage1"), steps=1, **SMALL)
    train_on_photos(recipe, TrainingModels(base, features), folder, index.parent)
    hook.remove()
    assert told and all(row == [PIXELS, PIXELS, 0, 0, PIXELS, PIXELS] for row in told[0].tolist())


def test_changed_files_do_not_stop_the_training(
    folder, base, features, index, tmp_path, caplog
) -> None:
    """A caption in another encoding, an unreadable image, and a damaged index."""
    copy = tmp_path / "photos"
    shutil.copytree(folder, copy)
    written = index.stat().st_mtime_ns
    (copy / "lecun.txt").write_bytes("Porträt".encode("latin-1"))
    photos = opened(copy, base, features, index)
    assert index.stat().st_mtime_ns == written  # nothing was new
    (copy / "hinton.jpeg").write_bytes(b"no picture any more")
    prompts = photos.batch(StepRNG(0, 0)).prompts
    assert sorted(prompts) == ["Porträt", "Porträt", "a person"]
    assert "using the next image instead" in caplog.text
    index.write_text("{")
    with pytest.raises(TrainingError, match=r"faces\.json is damaged: delete it"):
        opened(copy, base, features, index)


def test_adapter_widths_are_those_of_the_features_whichever_photo_is_damaged(
    folder, base, features, index, tmp_path
) -> None:
    copy = tmp_path / "photos"
    recipe = replace(find_recipe("sdxl_stage1"), **SMALL)
    adapter = build_adapter(recipe, base, TrainingModels(base, features).feature_widths)
    shutil.copytree(folder, copy)
    photos = opened(copy, base, features, index)
    for name in photos.names:
        (copy / name).write_bytes(b"not an image any more")
        batch = photos.batch(StepRNG(0, 0))
        assert adapter.encoder.config["width"] == batch.id_cond.shape[-1]
        assert {level.shape[-1] for level in batch.hidden} == {adapter.encoder.config["vit_dim"]}
        shutil.copy(folder / name, copy / name)


def test_incompatible_adapter_fails_before_indexing(folder, base, features, tmp_path) -> None:
    begin, out = tmp_path / "v1.safetensors", tmp_path / "run"
    tiny.adapter(base).save(begin)
    options = {"data": folder, "run_dir": out, "init_adapter": begin}
    models = TrainingModels(base, features)
    with pytest.raises(
        OptionError,
        match=r"trains an IDFormer, but .* has an IDEncoder: choose an adapter with that encoder",
    ):
        train_on_photos(find_recipe("sdxl_stage2_v11"), models, **options)
    narrow = tiny.base()
    narrow.unet = UNet2DConditionModel.from_config(
        {**narrow.unet.config, "cross_attention_dim": 16}
    )
    with pytest.raises(WeightsError, match="another U-Net"):
        narrow_models = TrainingModels(narrow, features)
        train_on_photos(find_recipe("sdxl_stage2"), narrow_models, **options)
    with pytest.raises(
        WeightsError,
        match=r"v1\.safetensors does not have the sizes of sdxl_stage2, choose another adapter: ",
    ):
        train_on_photos(replace(find_recipe("sdxl_stage2"), **SMALL), models, **options)
    assert not out.exists()


@pytest.mark.parametrize(("data", "held_out"), [(".", "more"), ("more", "."), (".", ".")])
def test_held_out_images_in_the_training_data_are_refused(
    folder, base, features, tmp_path, data: str, held_out: str
) -> None:
    models = TrainingModels(base, features)
    with pytest.raises(OptionError, match="people would be in the training data and held out"):
        train_on_photos(
            find_recipe("sdxl_stage1"), models, folder / data, tmp_path, held_out=folder / held_out
        )


def test_missing_parts_raise(folder, base, features, tmp_path) -> None:
    with pytest.raises(OptionError, match="sdxl_stage2 continues sdxl_stage1"):
        models = TrainingModels(base, features)
        train_on_photos(find_recipe("sdxl_stage2"), models, folder, tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(TrainingError, match="has no image with a caption"):
        opened(tmp_path / "empty", base, features, tmp_path / "faces.json")
    torch.save({"a": torch.ones(1)}, tmp_path / "arcface.pth")
    with pytest.raises(WeightsError, match="not facexlib's ArcFace"):
        load_arcface_ir_se50(tmp_path / "arcface.pth")


def test_id_loss_crop_is_aligned_bgr_and_differentiable() -> None:
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


def test_id_loss_embeds_faces_of_photos(features) -> None:
    torch.manual_seed(0)
    embedder = build_face_embedder(
        features.detection.detector, Backbone(num_layers=50, drop_ratio=0.6, mode="ir_se").eval()
    )
    photo = torch.from_numpy(skimage.data.astronaut()).permute(2, 0, 1).float() / 255
    pictures = torch.stack([photo, torch.full_like(photo, 0.5)]).requires_grad_(True)
    seen = embedder(pictures)
    assert seen.has_face.tolist() == [True, False] and seen.embeddings.shape == (2, 512)
    torch.testing.assert_close(seen.embeddings.norm(dim=1), torch.tensor([1.0, 0.0]))
    seen.embeddings.sum().backward()
    assert pictures.grad[0].abs().sum() > 0 and pictures.grad[1].abs().sum() == 0
