"""Training on a dataset of `pulid data prepare`, on a disk and at a URL."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import skimage.data
import torch
from PIL import Image

from openpulid.data.index import DatasetInfo, write_index
from openpulid.data.options import PrepareOptions
from openpulid.data.records import ImageRecord
from openpulid.data.shards import plan_shards, write_shard
from openpulid.data.work_folder import FACES, WorkFolder
from openpulid.errors import OptionError, TrainingError
from openpulid.faces.arcface import ArcFaceRecognition
from openpulid.faces.bisenet import FaceParser
from openpulid.identity.eva_clip import VisionEncoder
from openpulid.identity.photo_extractor import PhotoExtractor
from openpulid.training.pulid.models import SDXLModel
from openpulid.training.pulid.photo_dataset import PhotoDataset
from openpulid.training.pulid.photo_models import TrainingModels
from openpulid.training.pulid.recipes import find_recipe
from openpulid.training.pulid.train_photos import check_photos, check_separate, train_on_photos
from openpulid.training.rng import StepRNG
from tests.support import tiny_sdxl as tiny
from tests.support.photo_networks import SmallParser, recognition_file

PIXELS = 64
BOX = [170.0, 60.0, 285.0, 190.0]
LANDMARKS = [201.0, 113.0, 247.0, 111.0, 227.0, 140.0, 207.0, 165.0, 247.0, 163.0]
"""Of the face in scikit-image's photo of an astronaut."""
SMALL = {"encoder_width": 16, "batch": 2, "warmup": 1, "validate_every": 2, "pixels": PIXELS}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """Ten images of five people in two shards, and two images of a person who is held out."""
    folder = tmp_path_factory.mktemp("dataset")
    work = WorkFolder(folder / "work")
    work.create()
    photo = skimage.data.astronaut()
    records, contents = [], []
    for index in range(12):
        content = io.BytesIO()
        # the images differ in their brightness
        Image.fromarray((photo * (0.4 + 0.05 * index)).astype(np.uint8)).save(content, "PNG")
        contents.append(content.getvalue())
        records.append(
            ImageRecord(
                f"{index}.png",
                f"{index:02d}",
                caption=f"photo {index}",
                person=f"p{index // 2}",
                split="held-out" if index >= 10 else "train",
                box=BOX,
                landmarks=LANDMARKS,
                crop_width=512,
                crop_height=512,
            )
        )
    work.write_batch(FACES, records, contents)
    written = []
    for shard in plan_shards(records, 5, seed=0):
        (folder / shard.name).parent.mkdir(exist_ok=True)
        written += write_shard(folder, shard, work)
    dropped = ImageRecord("dropped.png", "99", decision="no_face")
    write_index(folder, [*written, dropped], DatasetInfo(PrepareOptions(), "", {}, ""))
    work.remove()
    return folder


@pytest.fixture(scope="module")
def extractor(tmp_path_factory) -> PhotoExtractor:
    """Has no detector: the positions of the faces are in the index."""
    torch.manual_seed(0)
    encoder = VisionEncoder(
        img_size=32, patch_size=8, embed_dim=8, depth=5, num_heads=2, num_classes=4, ref_grid=None
    ).eval()
    file = recognition_file(tmp_path_factory.mktemp("faces") / "glintr100.onnx", dim=12)
    models = {"glintr100": "a", "EVA02": "b"}
    return PhotoExtractor(
        None, ArcFaceRecognition.load(file), FaceParser(SmallParser()), encoder, models
    )


@pytest.fixture
def base() -> SDXLModel:
    pipe = tiny.pipe()
    pipe.unet.register_to_config(sample_size=PIXELS // pipe.vae_scale_factor)
    return SDXLModel(pipe)


def open_dataset(
    location: str | Path, base: SDXLModel, extractor: PhotoExtractor, **options: object
) -> PhotoDataset:
    return PhotoDataset.open(location, Path("none.json"), base, extractor, 4, PIXELS, **options)


def test_splits_of_a_dataset(dataset, base, extractor) -> None:
    photos = open_dataset(dataset, base, extractor)
    assert len(photos) == 10 and all(name.startswith("train/") for name in photos.names)
    held_out = open_dataset(dataset, base, extractor, split="held-out")
    assert [name.rpartition("/")[2] for name in held_out.names] == ["10.jpg", "11.jpg"]
    _, face = photos._crop(0, photos.square)
    assert face.box.tolist() == pytest.approx([value / 8 for value in BOX], abs=0.1)


def test_processes_and_restarts_see_the_same_images(dataset, base, extractor) -> None:
    photos = open_dataset(dataset, base, extractor)
    whole = [photos.batch(StepRNG(0, step)).prompts for step in range(5)]
    # two epochs, every image once in each
    flat = [prompt for prompts in whole for prompt in prompts]
    assert len(set(flat[:10])) == len(set(flat[10:])) == 10
    again = open_dataset(dataset, base, extractor)
    for step in (2, 3, 4):
        parts = [again.batch(StepRNG(0, step, rank, 2)).prompts for rank in range(2)]
        assert [*parts[0], *parts[1]] == whole[step]


@pytest.mark.parametrize("paired", [False, True])
def test_url_gives_the_batches_of_the_folder(dataset, base, extractor, paired: bool) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(dataset), "/prepared", recursive=True)
    local = open_dataset(dataset, base, extractor, paired=paired)
    remote = open_dataset("memory://prepared", base, extractor, paired=paired)
    for step in range(2):
        one, other = (photos.batch(StepRNG(0, step)) for photos in (local, remote))
        assert one.prompts == other.prompts and torch.equal(one.images, other.images)
        assert torch.equal(one.id_cond, other.id_cond)
        if paired:
            # the other image of each person
            assert not any(map(torch.equal, one.images, one.references))


def test_image_that_cannot_be_read_is_replaced(dataset, base, extractor, caplog) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(dataset), "/damaged", recursive=True)
    shard = memory.ls("/damaged/train", detail=False)[0]
    memory.pipe(shard, memory.cat(shard)[:1000])
    photos = open_dataset("memory://damaged", base, extractor)
    prompts = [prompt for step in range(2) for prompt in photos.batch(StepRNG(0, step)).prompts]
    assert len(prompts) == 8 and "using the next image instead" in caplog.text


def test_training_validates_on_the_held_out_people(dataset, base, extractor, tmp_path) -> None:
    recipe = replace(find_recipe("sdxl_stage1"), steps=2, **SMALL)
    check_photos(dataset)
    _, result = train_on_photos(recipe, TrainingModels(base, extractor), dataset, tmp_path / "run")
    assert result.steps == 2 and "held_out_own" in result.metrics
    assert not (tmp_path / "run" / "faces.json").exists()


def test_held_out_split_is_separate(dataset, tmp_path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(dataset), "/whole", recursive=True)
    for location in (dataset, "memory://whole"):
        check_separate(location, location)
    check_separate("memory://whole", "memory://other")
    check_separate(dataset, tmp_path)
    check_separate(tmp_path, None)
    # an index without held-out people
    table = pyarrow.parquet.read_table(dataset / "index.parquet")
    split = pyarrow.array(["train"] * len(table))
    table = table.set_column(table.schema.get_field_index("split"), "split", split)
    pyarrow.parquet.write_table(table, tmp_path / "index.parquet")
    with pytest.raises(OptionError, match="share images"):
        check_separate(tmp_path, tmp_path)


def test_incomplete_dataset_is_one_sentence(dataset, tmp_path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(dataset / "train"), "/incomplete/train", recursive=True)
    with pytest.raises(TrainingError, match="is no complete dataset: it has no index"):
        check_photos("memory://incomplete")
    (tmp_path / "index.parquet").write_bytes(b"PAR1")
    with pytest.raises(TrainingError, match=r"index\.parquet cannot be read"):
        check_photos(tmp_path)
