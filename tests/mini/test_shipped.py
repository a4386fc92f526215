"""The weights that travel with the package: small enough, labelled, and as good as the report says."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import openpulid as pulid
from openpulid.diffusion.patch_vae import PatchAutoencoderKL
from openpulid.errors import FaceError, PromptError
from openpulid.faces.mini_detector import MiniFaceDetector
from openpulid.io.checkpoints import load_module
from openpulid.io.image_grid import to_pil, to_tensor
from openpulid.io.images import open_image
from openpulid.mini.train.autoencoder import there_and_back
from openpulid.mini.train.baselines import NAMES
from openpulid.pipelines.presets import MINIATURE, mini, with_method
from openpulid.world import HELD_OUT_PEOPLE, Person, Scene, render

PHOTOS = Path(__file__).parents[3] / "shared" / "photos"


def method_file(name):
    return with_method(mini(), name).adapter


@pytest.fixture(scope="module")
def strangers():
    """Sixteen held-out people in held-out scenes."""
    generator = torch.Generator().manual_seed(4)
    people = [Person.from_seed(HELD_OUT_PEOPLE + 500 + k) for k in range(16)]
    return render(people, [Scene.sample(generator, held_out=True) for _ in people])


@pytest.fixture(scope="module")
def finder():
    return load_module(MiniFaceDetector, MINIATURE / "detector.safetensors", "cpu")


@pytest.fixture(scope="module")
def studio():
    return pulid.load("mini", device="cpu")


def test_shipped_weights_are_small_and_documented():
    files = [path for path in MINIATURE.rglob("*") if path.is_file()]
    rivals = {
        name: [path for path in files if name in path.relative_to(MINIATURE).parts[0]]
        for name in NAMES
    }
    assert all(sum(path.stat().st_size for path in rival) < 8e6 for rival in rivals.values())
    assert (
        sum(
            path.stat().st_size
            for path in files
            if not any(path in rival for rival in rivals.values())
        )
        < 60e6
    )
    assert max(path.stat().st_size for path in files) < 16e6
    for path in MINIATURE.rglob("*.json"):  # no folder of the machine that made them
        named = json.loads(path.read_text("utf-8"))
        assert not isinstance(named, dict) or not str(named.get("_name_or_path", "")).startswith(
            "/"
        ), path
    for path in MINIATURE.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert {"revision", "seed", "minutes"} <= set(file.metadata()), path


@pytest.mark.parametrize("method", [name for name in NAMES if method_file(name).exists()])
def test_every_baseline_reacts_to_identity(method, studio):
    """More than saving in half precision could change, and different people differently."""
    rival = pulid.load("mini", device="cpu", method=method)
    portraits = to_pil(
        render([Person.from_seed(HELD_OUT_PEOPLE + k) for k in (1, 2)], [Scene(), Scene()]).image
    )
    known = {"seed": 3, "steps": 5}
    images = [
        rival.generate("portrait of a person, photo", who, **known)
        for who in (None, *map(rival.identify, portraits))
    ]
    base, first, second = (to_tensor(result.images) for result in images)
    assert (first - base).abs().mean() > 0.01 and (first - second).abs().mean() > 0.005


def test_detector_finds_synthetic_people(finder, strangers):
    found = finder.detect(strangers.image)
    assert all(face is not None for face in found)
    masks = torch.stack([face.mask for face in found])
    union, both = torch.maximum(masks, strangers.face).sum(), (masks * strangers.face).sum()
    assert both / union > 0.88
    width = strangers.face.amax(2).sum(-1)[:, 0]
    points = torch.stack([face.landmarks for face in found])
    assert ((points - strangers.landmarks).norm(dim=-1).mean(1) / width).mean() < 0.03


def test_detector_rejects_noise_and_plain_colors(finder):
    generator = torch.Generator().manual_seed(0)
    plain = torch.rand(16, 3, 1, 1, generator=generator).expand(-1, -1, 96, 96)
    noise = torch.rand(16, 3, 96, 96, generator=generator)
    assert all(face is None for face in finder.detect(torch.cat([plain, noise])))


@pytest.mark.skipif(not PHOTOS.exists(), reason="the real photographs are not beside this checkout")
def test_detector_rejects_real_photos(finder):
    pictures = [open_image(path) for path in sorted(PHOTOS.iterdir())]
    assert len(pictures) == 7
    assert all(finder.detect([to_tensor([picture])[0]])[0] is None for picture in pictures)


def test_autoencoder_reconstruction_quality(strangers):
    vae = PatchAutoencoderKL.from_pretrained(
        MINIATURE / "pipeline" / "vae", torch_dtype=torch.float32
    ).eval()
    error = (there_and_back(vae, strangers.image) - strangers.image).square().mean((1, 2, 3))
    assert (-10 * error.log10()).mean() > 31


def test_generation_from_one_portrait(studio):
    portrait = to_pil(render([Person.from_seed(HELD_OUT_PEOPLE)], [Scene()]).image)[0]
    anna = studio.identify(portrait)
    result = studio.generate(
        "portrait, photo, smiling, blue background", identity=anna, seed=3, num_images=2, steps=4
    )
    assert [image.size for image in result.images] == [(96, 96)] * 2
    alone = studio.generate(
        "portrait, photo, smiling, blue background", identity=anna, seed=4, steps=4
    )
    assert alone.images[0].tobytes() == result.images[1].tobytes()
    without = studio.generate("portrait, photo, smiling, blue background", seed=4, steps=4)
    assert without.images[0].tobytes() != alone.images[0].tobytes()


def test_unknown_word_and_missing_face_are_reported(studio):
    with pytest.raises(PromptError, match="zebra"):
        studio.generate("portrait of a zebra")
    gray = to_pil(torch.full((1, 3, 96, 96), 0.5))[0]
    with pytest.raises(FaceError, match="no face"):
        studio.identify(gray)
