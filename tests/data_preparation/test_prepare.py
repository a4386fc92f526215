"""Datasets prepared with Ray from synthetic people, and continued after every kind of failure."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import psutil
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image, ImageFilter

from openpulid.data.index import read_index, read_info
from openpulid.data.options import MINI_OPTIONS, PrepareOptions
from openpulid.data.prepare import Summary, prepare_dataset
from openpulid.data.prepared_images import PreparedImages
from openpulid.data.report import write_report
from openpulid.errors import OptionError, TrainingError
from openpulid.ray_session import connect_ray
from openpulid.world.person import Person
from openpulid.world.render import render
from openpulid.world.scene import Scene
from tests.support.tiny_captioner import save_tiny_captioner

ROOT = Path(__file__).parents[2]
PEOPLE = 8
OPTIONS = replace(
    MINI_OPTIONS,
    filters=replace(MINI_OPTIONS.filters, max_yaw=70),
    people="folders",
    held_out=0.25,
    shard_size=8,
    batch=4,
)
SCENE = {"style": "photo", "light": "studio", "glasses": "none", "hat": "none", "pose": "front"}


def encode(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


@pytest.fixture(scope="session")
def portraits() -> list[list[Image.Image]]:
    """Three images of each of eight people."""
    generator = torch.Generator().manual_seed(0)
    people = []
    for index in range(PEOPLE):
        scenes = [Scene.sample(generator, **SCENE) for _ in range(3)]
        person = Person.from_seed(1_000_000 + 7 * index)
        images = (255 * render([person] * 3, scenes, size=128).image.clamp(0, 1)).byte()
        people.append([Image.fromarray(x.permute(1, 2, 0).numpy()) for x in images])
    return people


@pytest.fixture(scope="session")
def source(portraits, tmp_path_factory) -> Path:
    """A folder with files, an archive and a table; and images that have to be dropped."""
    folder = tmp_path_factory.mktemp("source") / "photos"
    for index, images in enumerate(portraits[:4]):
        (folder / f"p{index}").mkdir(parents=True)
        for k, image in enumerate(images):
            image.save(folder / f"p{index}" / f"{k}.png")
            (folder / f"p{index}" / f"{k}.txt").write_text(f"an old man, number {index}-{k}")
    with tarfile.open(folder / "more.tar", "w") as tar:
        for index, images in enumerate(portraits[4:6]):
            for k, image in enumerate(images):
                for suffix, data in {"png": encode(image), "txt": b"a person"}.items():
                    info = tarfile.TarInfo(f"q{index}/{k}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    rows = [encode(image) for images in portraits[6:] for image in images]
    table = pyarrow.table({"image": rows, "text": ["a table"] * len(rows)})
    pyarrow.parquet.write_table(table, folder / "rows.parquet", row_group_size=2)

    image = portraits[0][0]
    dropped = {
        "broken": b"no image",
        "blurred": encode(image.filter(ImageFilter.GaussianBlur(2.5))),
        "gray": encode(Image.new("RGB", (128, 128), "gray")),
        "wide": encode(Image.new("RGB", (512, 128), "gray")),
        "turned": encode(image.transpose(Image.Transpose.ROTATE_180)),
        "copy": encode(image),
        "silent": encode(portraits[1][0].transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
    }
    for name, data in dropped.items():
        (folder / f"{name}.png").write_bytes(data)
        if name != "silent":
            (folder / f"{name}.txt").write_text("a person")
    return folder


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[None]:
    """Start Ray once: it takes seconds."""
    before = signal.getsignal(signal.SIGTERM)
    with connect_ray(workers=1, extra="data"):
        assert signal.getsignal(signal.SIGTERM) == before
        yield


def prepare(source: Path, dataset: Path, options: PrepareOptions, **changes: bool) -> Summary:
    return prepare_dataset([source], dataset, options, log=lambda _: None, **changes)


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> PrepareOptions:
    """With a tiny captioner for the image without a caption."""
    return replace(OPTIONS, captioner=str(save_tiny_captioner(tmp_path_factory.mktemp("blip"))))


@pytest.fixture(scope="module")
def dataset(source, options, tmp_path_factory, ray) -> Path:
    dataset = tmp_path_factory.mktemp("datasets") / "whole"
    prepare(source, dataset, options)
    return dataset


def hash_shards(dataset: Path) -> dict[str, str]:
    return {
        str(path.relative_to(dataset)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(dataset.glob("*/*.tar"))
    }


def test_every_image_has_a_decision(dataset, options) -> None:
    records = {record.name: record for record in read_index(dataset)}
    assert len(records) == 3 * PEOPLE + 7
    decisions = {
        name: records[f"photos/{name}.png"].decision
        for name in ("broken", "blurred", "gray", "wide", "turned", "copy", "silent")
    }
    assert decisions == {
        "broken": "unreadable",
        "blurred": "blurred",
        "gray": "no_face",
        "wide": "aspect",
        "turned": "turned",
        # of two equal images, the first by name is kept
        "copy": "kept",
        "silent": "kept",
    }
    original = records["photos/p0/0.png"]
    assert (original.decision, original.duplicate_of) == ("duplicate", "photos/copy.png")
    assert (original.file, original.offset) == ("", -1)
    assert records["photos/broken.png"].error
    kept = [record for record in records.values() if record.is_kept]
    assert len(kept) == 3 * PEOPLE + 1
    assert {len(record.landmarks) for record in kept} == {10}
    assert all(record.file and record.size > 0 and record.person for record in kept)
    assert records["photos/p1/2.png"].caption == "a man, number 1-2"
    assert records["photos/p1/2.png"].identity_words == ["old"]
    assert records["photos/p1/2.png"].captioner == ""
    silent = records["photos/silent.png"]
    assert silent.caption and silent.captioner == options.captioner


def test_nothing_private_stays(dataset, options) -> None:
    table = pyarrow.parquet.read_table(dataset / "index.parquet")
    assert "embedding" not in table.column_names
    assert not (dataset / ".work").exists()
    assert {path.name for path in dataset.iterdir()} == {
        "train",
        "held-out",
        "examples",
        "index.parquet",
        "run.lock",
    }
    info = read_info(dataset)
    assert info.options == options and len(info.face_models) == 2


def test_prepared_images_are_read_by_split(dataset) -> None:
    splits = {split: PreparedImages.open(dataset, split) for split in ("train", "held-out")}
    people = {
        split: {images.find_person(name) for name in images.names}
        for split, images in splits.items()
    }
    assert not people["train"] & people["held-out"]
    images = splits["train"]
    assert images.faces.shape == (len(images.names), 16)
    for name, face in zip(images.names, images.faces, strict=True):
        image = images.open_image(name)
        assert image.size == tuple(face[14:])
        assert 0 <= face[0] < face[2] <= image.width
        assert images.read_caption(name)


def test_dataset_at_a_url(dataset) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(dataset), "/data", recursive=True)
    local, remote = PreparedImages.open(dataset), PreparedImages.open("memory://data")
    assert remote.names == local.names
    remote.prefetch(remote.names[:3])
    for name in remote.names[:4]:
        assert remote.open_image(name).tobytes() == local.open_image(name).tobytes()
    file = f"/data/{remote.names[0].partition('.tar')[0]}.tar"
    memory.pipe(file, memory.cat(file)[:2000])
    remote.prefetch([])
    with pytest.raises(OSError, match="is shorter than its index says"):
        remote.open_image(remote.names[-1] if file in remote.names[-1] else remote.names[1])
    with pytest.raises(OptionError, match="nowhere://data cannot be opened"):
        PreparedImages.open("nowhere://data")


def test_failing_server_is_asked_again(dataset, monkeypatch) -> None:
    fsspec.filesystem("memory").put(str(dataset), "/busy", recursive=True)
    local, images = PreparedImages.open(dataset), PreparedImages.open("memory://busy")
    read, name = images.file_system.cat_file, images.names[0]
    answers: list[bool] = []

    def cat_file(*args: Any) -> bytes:
        if not answers.pop():
            raise RuntimeError("503, Service Unavailable")
        return read(*args)

    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setattr(images.file_system, "cat_file", cat_file)
    answers += [True, False, False, False]
    assert images.open_image(name).tobytes() == local.open_image(name).tobytes()
    assert waits == [1, 2, 4]
    answers += [False] * 7
    with pytest.raises(TrainingError, match=r"503, Service Unavailable.*run the same command"):
        images.open_image(name)
    assert not answers


def test_complete_dataset_is_not_prepared_again(dataset, source, options) -> None:
    before = (dataset / "index.parquet").stat().st_mtime_ns
    summary = prepare(source, dataset, options)
    # six images of the table and two of the folder are in no folder of a person
    assert summary.decisions["kept"] == 3 * PEOPLE + 1 and summary.people == 6 + 6 + 2
    assert (dataset / "index.parquet").stat().st_mtime_ns == before
    with pytest.raises(OptionError, match="the sources have changed since"):
        prepare(source / "p0", dataset, options)


def test_report_shows_counts_and_examples(dataset, tmp_path) -> None:
    page = write_report(dataset, tmp_path / "report.html").read_text()
    assert re.search(r"<td>blurred</td><td>the face is blurred</td><td[^>]*>1</td>", page)
    assert "Identity words, removed: old" in page and "the image that is kept" in page
    assert page.count("<img") > 30
    with pytest.raises(TrainingError, match="is no complete dataset"):
        write_report(tmp_path, tmp_path / "report.html")


def test_killed_preparation_gives_the_same_shards(dataset, source, options, tmp_path) -> None:
    """Kill the program, then a worker of the program that finishes."""
    target = tmp_path / "killed"
    batches = target / ".work" / "faces"
    command = [sys.executable, "-m", "openpulid.cli.main", "data", "prepare", str(source)]
    command += ["-o", str(target), "--faces", "mini", "--max-yaw", "70", "--people", "folders"]
    command += ["--held-out", "0.25", "--shard-size", "8", "--batch", "4"]
    command += ["--captioner", options.captioner, "--workers", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    program = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while len(list(batches.glob("*.parquet"))) < 2:
        assert program.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    program.kill()
    program.wait()
    stored = len(list(batches.glob("*.parquet")))
    begun = sum(path.stat().st_size for path in (target / ".work" / "attempts").iterdir())
    assert stored < 8 and not (target / "index.parquet").exists()
    # nothing was lost but the batch of the only worker
    assert begun - stored <= 1
    # a killed run may leave a file that was being written, which the next one removes
    finished = [path for path in batches.glob("*.parquet") if not path.name.startswith(".part")]
    times = {path: path.stat().st_mtime_ns for path in finished}
    # a file that was being written
    (batches / ".part-0.parquet").write_bytes(b"PAR1")

    killed: list[int] = []
    thread = threading.Thread(target=kill_worker, args=(killed,), daemon=True)
    thread.start()
    prepare(source, target, options, keep_work=True)
    thread.join(1)
    assert killed
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert hash_shards(target) == hash_shards(dataset)
    assert read_index(target) == read_index(dataset)


def kill_worker(killed: list[int]) -> None:
    """Kill the first worker of this program with face models, as soon as it has a batch."""
    deadline = time.monotonic() + 240
    while not killed and time.monotonic() < deadline:
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if "(FacesStage)).submit" in "".join(process.cmdline()):
                    process.kill()
                    killed.append(process.pid)
                    return
        time.sleep(0.01)


def test_sources_are_added_to_kept_work(source, options, tmp_path) -> None:
    target = tmp_path / "data"
    prepare(source / "p1", target, options, keep_work=True)
    (before,) = target.glob(".work/faces/*.parquet")
    with pytest.raises(OptionError, match=r"with --quality 95, not 50: use that, start again"):
        prepare(source / "p1", target, replace(options, quality=50))
    (target / "index.parquet").unlink()
    sources = [source / "p1", source / "p2"]
    prepare_dataset(sources, target, options, keep_work=True, log=lambda _: None)
    names = [record.name for record in read_index(target)]
    assert names == ["p1/0.png", "p1/1.png", "p1/2.png", "p2/0.png", "p2/1.png", "p2/2.png"]
    assert before in target.glob(".work/faces/*.parquet")


def test_folder_of_the_user_is_not_touched(source, options, tmp_path) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(OptionError, match="train exists and is not of `pulid data prepare`"):
        prepare(source, tmp_path, options)
    with pytest.raises(OptionError, match="exists and is not of"):
        prepare(source, tmp_path, options, is_fresh=True)


def test_nothing_that_can_be_used_is_no_error(options, tmp_path) -> None:
    (tmp_path / "gray").mkdir()
    Image.new("RGB", (128, 128), "gray").save(tmp_path / "gray" / "1.png")
    summary = prepare(tmp_path / "gray", tmp_path / "data", options)
    assert summary.decisions == {"no_face": 1} and summary.people == 0
    assert json.loads(json.dumps(summary.splits)) == {}
    write_report(tmp_path / "data", tmp_path / "report.html")
