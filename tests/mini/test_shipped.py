"""The shipped weights: small, documented, and of the reported quality."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import openpulid as pulid
from openpulid.bench.metrics.preservation import attribute_accuracy
from openpulid.diffusion.patch_vae import PatchAutoencoderKL
from openpulid.errors import FaceError, PromptError
from openpulid.faces.miniature import MiniFaceDetector
from openpulid.io.checkpoints import load_module
from openpulid.io.image_grid import to_pil, to_tensor
from openpulid.io.images import open_image
from openpulid.mini.evaluation import evaluate
from openpulid.mini.evaluation.image_evaluator import ImageEvaluator
from openpulid.mini.models import build_flux_pipeline
from openpulid.mini.train.autoencoder import reconstruct
from openpulid.mini.train.baselines import FLUX_NAMES, NAMES
from openpulid.mini.train.build_context import BuildContext
from openpulid.mini.train.flux_stages import load_teacher
from openpulid.pipelines.presets import MINIATURE, find_preset
from openpulid.pipelines.selection import with_method
from openpulid.world import HELD_OUT_PEOPLE, Person, Scene, render

PHOTOS = Path(__file__).parents[3] / "shared" / "photos"


BASELINES = [("mini", name) for name in NAMES] + [("mini-flux-4step", name) for name in FLUX_NAMES]
"""Preset and method."""


def method_file(preset, method):
    return with_method(find_preset(preset), method).models.adapter


@pytest.fixture(scope="module")
def held_out():
    """Render 16 held-out people in held-out scenes."""
    generator = torch.Generator().manual_seed(4)
    people = [Person.from_seed(HELD_OUT_PEOPLE + 500 + k) for k in range(16)]
    return render(people, [Scene.sample(generator, held_out=True) for _ in people])


@pytest.fixture(scope="module")
def detector():
    return load_module(MiniFaceDetector, MINIATURE / "detector.safetensors", "cpu")


@pytest.fixture(scope="module")
def studio():
    return pulid.load("mini", device="cpu")


def test_shipped_weights_are_small_and_documented():
    files = [path for path in MINIATURE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 95e6
    for preset, method in BASELINES:
        adapter = method_file(preset, method)
        parts = [adapter] if adapter.is_file() else adapter.rglob("*.*")
        assert sum(path.stat().st_size for path in parts) < 8e6, method
    assert max(path.stat().st_size for path in files) < 16e6
    for path in MINIATURE.rglob("*.json"):  # no local path of the machine that built them
        config = json.loads(path.read_text("utf-8"))
        assert not isinstance(config, dict) or not str(config.get("_name_or_path", "")).startswith(
            "/"
        ), path
    for path in MINIATURE.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert {"revision", "seed", "minutes"} <= set(file.metadata()), path


@pytest.mark.parametrize(("preset", "method"), BASELINES)
def test_every_baseline_reacts_to_identity(preset, method):
    """The effect exceeds that of half precision, and differs between people."""
    baseline = pulid.load(preset, device="cpu", method=method)
    portraits = to_pil(
        render([Person.from_seed(HELD_OUT_PEOPLE + k) for k in (1, 2)], [Scene(), Scene()]).image
    )
    options = {"seed": 3, "num_inference_steps": 5}
    images = [
        baseline.generate("portrait of a person, photo", identity, **options)
        for identity in (None, *map(baseline.identify, portraits))
    ]
    base, first, second = (to_tensor(result.images) for result in images)
    assert (first - base).abs().mean() > 0.01 and (first - second).abs().mean() > 0.005


def test_detector_finds_synthetic_people(detector, held_out):
    faces = detector.detect(held_out.image)
    assert all(face is not None for face in faces)
    masks = torch.stack([face.mask for face in faces])
    union, both = torch.maximum(masks, held_out.face).sum(), (masks * held_out.face).sum()
    assert both / union > 0.88
    width = held_out.face.amax(2).sum(-1)[:, 0]
    points = torch.stack([face.landmarks for face in faces])
    assert ((points - held_out.landmarks).norm(dim=-1).mean(1) / width).mean() < 0.03


def test_detector_rejects_noise_and_plain_colors(detector):
    generator = torch.Generator().manual_seed(0)
    plain = torch.rand(16, 3, 1, 1, generator=generator).expand(-1, -1, 96, 96)
    noise = torch.rand(16, 3, 96, 96, generator=generator)
    assert all(face is None for face in detector.detect(torch.cat([plain, noise])))


@pytest.mark.skipif(not PHOTOS.exists(), reason="the real photos are not available")
def test_detector_rejects_real_photos(detector):
    images = [open_image(path) for path in sorted(PHOTOS.iterdir())]
    assert len(images) == 7
    assert all(detector.detect([to_tensor([image])[0]])[0] is None for image in images)


def test_autoencoder_reconstruction_quality(held_out):
    vae = PatchAutoencoderKL.from_pretrained(
        MINIATURE / "pipeline" / "vae", torch_dtype=torch.float32
    ).eval()
    error = (reconstruct(vae, held_out.image) - held_out.image).square().mean((1, 2, 3))
    assert (-10 * error.log10()).mean() > 31


def test_generation_from_one_portrait(studio):
    portrait = to_pil(render([Person.from_seed(HELD_OUT_PEOPLE)], [Scene()]).image)[0]
    anna = studio.identify(portrait)
    result = studio.generate(
        "portrait, photo, smiling, blue background",
        identity=anna,
        seed=3,
        num_images=2,
        num_inference_steps=4,
    )
    assert [image.size for image in result.images] == [(96, 96)] * 2
    single = studio.generate(
        "portrait, photo, smiling, blue background", identity=anna, seed=4, num_inference_steps=4
    )
    assert single.images[0].tobytes() == result.images[1].tobytes()
    without = studio.generate(
        "portrait, photo, smiling, blue background", seed=4, num_inference_steps=4
    )
    assert without.images[0].tobytes() != single.images[0].tobytes()


def test_unknown_word_and_missing_face_are_reported(studio):
    with pytest.raises(PromptError, match="zebra"):
        studio.generate("portrait of a zebra")
    gray = to_pil(torch.full((1, 3, 96, 96), 0.5))[0]
    with pytest.raises(FaceError, match="no face"):
        studio.identify(gray)


def test_flux_base_draws_the_people_of_its_prompts():
    """A sample of the 512 prompts that give .964."""
    cpu = torch.device("cpu")
    context = BuildContext(MINIATURE, MINIATURE, cpu)
    teacher, vae = load_teacher(context)
    text, tokenizer = teacher.text_encoders, context.load_tokenizer()
    pipe = build_flux_pipeline(teacher.transformer, vae, text, tokenizer)
    evaluator = ImageEvaluator.load(MINIATURE, cpu, pipe=pipe)
    with torch.no_grad():
        images = evaluator.generate(16)
    wanted = [prompt.wanted for prompt in evaluator.prompts[:16]]
    assert attribute_accuracy(evaluator.classifier(images), wanted).mean() > 0.9
    assert evaluator.embedder(images).has_face.all()


def test_flux_adapter_shows_people_who_were_not_trained_on():
    """A sample of the 128 images that give .402."""
    table = evaluate.run(16, people_seed=500, prompts=1, preset="mini-flux-4step", device="cpu")
    base, shown = table.rows["base"], table.rows["stage3"]
    assert base["face_sim"].mean < 0.1 and shown["face_sim"].mean > 0.3
    assert shown["clip_i"].mean > 0.9 and shown["face_found"].mean == 1
