"""The accelerated training matches the ordinary one, and a dry run completes every stage."""

from __future__ import annotations

import json
import tarfile
from copy import deepcopy
from io import BytesIO

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerFast

from openpulid.diffusion.patch_vae import PatchAutoencoderKL
from openpulid.faces.miniature import MiniFaceDetector
from openpulid.io.checkpoints import load_module
from openpulid.mini.accelerated import __main__ as command
from openpulid.mini.accelerated import autoencoder, face_detection, probe, stages, unet
from openpulid.mini.accelerated.face_detection import detect_faces
from openpulid.mini.accelerated.output import Output
from openpulid.mini.accelerated.portraits import DevicePortraits
from openpulid.mini.accelerated.scenes import (
    COLUMNS,
    CaptionWriter,
    draw_people,
    draw_scenes,
)
from openpulid.mini.accelerated.state import Sizes
from openpulid.mini.accelerated.steps import DeviceMuon, TimedSchedule
from openpulid.mini.accelerated.train_set import build_train_set
from openpulid.mini.accelerated.world import plan_world, render_world
from openpulid.mini.models.pipeline import TextEncoders
from openpulid.mini.models.tokenizer import build_tokenizer
from openpulid.mini.train.loss_models import load_face_embedder
from openpulid.pipelines.factory import load_extractor
from openpulid.pipelines.presets import MINIATURE, mini
from openpulid.training import StepRNG
from openpulid.training.muon import Muon
from openpulid.world import ATTRIBUTES, Person, render
from openpulid.world.render import render_stage
from openpulid.world.scene import _CLAUSES, _clause


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(3)


@pytest.fixture(scope="module")
def world():
    return render_world(*plan_world(2, 1, 1, torch.Generator().manual_seed(4)), 2, batch=4)


@pytest.fixture(scope="module")
def text_encoders():
    first = CLIPTextModel.from_pretrained(
        MINIATURE / "pipeline" / "text_encoder", torch_dtype=torch.float32
    )
    second = CLIPTextModelWithProjection.from_pretrained(
        MINIATURE / "pipeline" / "text_encoder_2", torch_dtype=torch.float32
    )
    return TextEncoders(first, second)


@pytest.fixture(scope="module")
def data(world, text_encoders):
    vae = PatchAutoencoderKL.from_pretrained(
        MINIATURE / "pipeline" / "vae", torch_dtype=torch.float32
    ).eval()
    writer = CaptionWriter(
        PreTrainedTokenizerFast.from_pretrained(MINIATURE / "pipeline" / "tokenizer"),
        torch.device("cpu"),
    )
    return build_train_set(vae, text_encoders, writer, world, torch.Generator().manual_seed(5))


def test_tensor_scenes_render_like_world_scenes(generator):
    scenes, people = draw_scenes(3, generator), draw_people(3, generator)
    rendering = render_stage(people, scenes.tensors(), 48)
    expected = render(
        [Person.from_vector(row.tolist()) for row in people],
        [scenes.scene(k) for k in range(3)],
        48,
    )
    assert torch.equal(rendering.image, expected.image)
    assert torch.equal(rendering.parts, expected.parts)
    assert torch.equal(rendering.landmarks, expected.landmarks)
    colors = [
        [0.604658, 0.490096, 0.400837],
        [0.608334, 0.531878, 0.502458],
        [0.246240, 0.398761, 0.375270],
    ]
    torch.testing.assert_close(
        rendering.image.mean((2, 3)), torch.tensor(colors), atol=1e-4, rtol=0
    )


def test_scenes_keep_held_out_combinations_apart(generator):
    for held_out in (True, False):
        scenes = draw_scenes(50, generator, held_out)
        assert all(scenes.scene(k).is_held_out == held_out for k in range(50))


def test_portraits_are_frontal_photos():
    _, scenes = plan_world(5, 1, 1, torch.Generator().manual_seed(0))
    assert all(
        scenes.scene(k).style == "photo" and scenes.scene(k).pose == "front"
        for k in range(1, 10, 2)
    )


def test_id_loss_compares_with_the_image_itself(world, data):
    """Another image of the person has another pose and expression, which the loss would keep."""
    extractor = load_extractor(mini(), torch.device("cpu"))
    source = DevicePortraits(world, data, extractor, portraits=2, batch_size=8)
    batch = source.batch(StepRNG(0, 0))
    for latents, image, features in zip(batch.latents, batch.images, batch.id_cond, strict=True):
        (row,) = (data.latents.float() == latents).all((1, 2, 3)).nonzero()
        images, masks, landmarks = world.rows(row)
        assert torch.equal(image, images[0])
        own, _ = extractor.extract_batch(images, masks, landmarks)
        assert not torch.allclose(features, own[0], atol=1e-3)  # features are of another image


def test_captions_only_mention_visible_attributes(generator):
    scenes = draw_scenes(40, generator)
    tokenizer = build_tokenizer()
    tokens = CaptionWriter(tokenizer, torch.device("cpu")).write(scenes, generator, keep=1.0)
    for row in range(40):
        scene = scenes.scene(row)
        attributes = scene.attributes()
        visible = {name for name in ATTRIBUTES if scenes.visible()[row, COLUMNS[name]]}
        assert visible == set(attributes)
        allowed = [
            {_clause(name, attributes, generator) for _ in range(30)} - {""} for name in _CLAUSES
        ]
        text = tokenizer.decode(tokens[row], skip_special_tokens=True).replace(" ,", ",")
        clauses = text.split(", ")[2:]
        assert len(clauses) == sum(map(bool, allowed)), text
        assert all(clause in set().union(*allowed) for clause in clauses), text
        expected = tokenizer([text], padding="max_length", return_tensors="pt").input_ids[0]
        assert torch.equal(tokens[row], expected)


def test_device_muon_steps_like_muon():
    torch.manual_seed(0)
    one = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 5), torch.nn.LayerNorm(5)
    )
    two = deepcopy(one)
    muon = Muon(one.parameters(), 1e-2)
    device_muon = DeviceMuon(two.parameters())
    device_muon.lr.fill_(1e-2)
    for _ in range(3):
        images = torch.randn(6, 3, 4, 4)
        for network in (one, two):
            network.zero_grad()
            network(images).square().sum().backward()
        torch.nn.utils.clip_grad_norm_(one.parameters(), 1.0)
        muon.step()
        device_muon.step()
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=3e-4, rtol=1e-2)  # both iterate in bfloat16


def test_schedule_ends_at_zero():
    schedule = TimedSchedule(10, lr=2.0, warmup=10, decay=0.5)
    assert schedule.rate(0, 0.0) == pytest.approx(0.2)
    assert schedule.rate(100, 0.5) == 2.0
    assert schedule.rate(100, 0.75) == 1.0
    assert schedule.rate(100, 1.0) == 0.0


def test_shipped_base_has_a_low_loss(data):
    model = UNet2DConditionModel.from_pretrained(
        MINIATURE / "pipeline" / "unet", torch_dtype=torch.float32
    )
    torch.manual_seed(0)
    loss = unet.base_step(model, DeviceMuon(model.parameters()), data, 16)()["diffusion"]
    assert 0.05 < float(loss) < 0.4  # an untrained base starts near 1


class UnsizedModule(torch.nn.Module):
    """Wraps a U-Net like `torch.compile`: its length, and so its truth value, raises."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def __len__(self):
        raise TypeError("a compiled U-Net has no length")

    def forward(self, *inputs, **options):
        return self.module(*inputs, **options)


def test_fit_accepts_compiled_modules_without_a_truth_value(data, text_encoders):
    model = unet.create_unet(data, text_encoders, widths=(32, 32, 32))
    compiled = UnsizedModule(model)
    with pytest.raises(TypeError):
        bool(compiled)
    messages = []
    options = {"compiled_unet": compiled, "batch": 2, "max_steps": 1, "log": messages.append}
    steps, network = unet.fit_base(model, data, 60.0, **options)
    assert steps == 1
    assert network is compiled
    assert not [message for message in messages if "not compiled" in message]
    assert unet.fit_student(model, data, 60.0, count=2, **options) == 1


def test_autoencoder_without_patch_borders_starts_as_the_linear_code(world, tmp_path):
    vae = autoencoder.create_autoencoder(world, channels=20)
    autoencoder.standardize(vae, world)
    metrics = autoencoder.evaluate(vae, world)
    assert metrics["psnr"] > 24
    vae.save_pretrained(tmp_path)
    loaded = PatchAutoencoderKL.from_pretrained(tmp_path).eval()
    assert (loaded.config.folded, loaded.config.overlap) == (1, 4)
    assert autoencoder.evaluate(loaded, world)["psnr"] == pytest.approx(metrics["psnr"], abs=1e-4)


def test_detect_agrees_with_the_detector(world):
    detector = load_module(MiniFaceDetector, MINIATURE / "detector.safetensors")
    images = torch.cat([world.images[:3].float() / 255, torch.full((1, 3, 96, 96), 0.5)])
    faces = detect_faces(detector, images)
    expected = detector.detect(images)
    assert faces.has_face.tolist() == [face is not None for face in expected]
    assert torch.equal(faces.masks[0], expected[0].mask)
    torch.testing.assert_close(faces.landmarks[0], expected[0].landmarks)


def test_embedder_without_a_detour_has_the_same_gradient(world):
    device = torch.device("cpu")
    plain = load_face_embedder(MINIATURE, device, is_ensemble=True)
    detector = load_module(MiniFaceDetector, MINIATURE / "detector.safetensors")
    fast = face_detection.load_face_embedder(detector, MINIATURE, device)
    gradients = []
    for embedder in (plain, fast):
        images = (world.images[:2].float() / 255).requires_grad_()
        embedder(images).embeddings[:, :64].sum().backward()
        gradients.append(images.grad)
    torch.testing.assert_close(*gradients)


def test_large_archives_are_split_into_pieces(tmp_path):
    file = tmp_path / "noise.bin"
    file.write_bytes(np.random.default_rng(0).bytes(17 * 2**20))
    out = Output(tmp_path / "out")
    out.pack("noise", [(file, "a/noise.bin")])
    pieces = sorted((tmp_path / "out").glob("noise.tar.gz.*"))
    assert len(pieces) == 2 and all(piece.stat().st_size <= 15 * 2**20 for piece in pieces)
    archive_bytes = BytesIO(b"".join(piece.read_bytes() for piece in pieces))
    with tarfile.open(fileobj=archive_bytes) as archive:
        assert archive.extractfile("a/noise.bin").read() == file.read_bytes()


def test_dry_run_writes_every_stage(tmp_path, monkeypatch):
    tiny = Sizes(
        people=2,
        held_out=4,
        render_batch=4,
        encode_batch=12,
        autoencoder_batch=2,
        batch=2,
        rollouts=2,
        prompts=2,
        adapter_batch=2,
        few_step_batch=2,
        max_steps=1,
    )
    monkeypatch.setattr(command, "SMALL", tiny)
    monkeypatch.setattr(stages, "evaluate_shipped", lambda run: None)
    command.main(["--device", "cpu", "--small", "--seconds", "20", "-o", str(tmp_path)])
    report = json.loads((tmp_path / "report.json").read_text())
    assert not [line for line in report["log"] if "failed" in line]
    assert set(report["metrics"]) >= {"world", "autoencoder", "base", "student"}
    assert {file.name.split(".")[0] for file in tmp_path.glob("*.tar.gz.*")} == {
        "vae",
        "base",
        "student",
    }
    assert (tmp_path / "sheets.jpg").exists()


def test_probe_reports_failed_steps(tmp_path):
    probe.main("base", tmp_path / "base.json", torch.device("cpu"), 2, (192, 128))
    status = json.loads((tmp_path / "base.json").read_text())
    assert not status["captured"]["works"]
    assert "compiled" not in status
    idle = probe.Probe(None, torch.device("cpu"))
    assert not idle.works("captured")
    assert not idle.pays("compiled", "captured")
