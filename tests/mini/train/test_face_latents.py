"""Face latents: the generator's layers, the autoencoder's training, directions and figures."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import conv2d, leaky_relu

from openpulid.faces.miniature import ResNetRecognition
from openpulid.identity.extractor import FaceLatentExtractor
from openpulid.identity.face_latents import FaceLatentEncoder
from openpulid.io.checkpoints import load_module
from openpulid.mini.evaluation.reconstructions import measure_reconstructions
from openpulid.mini.evaluation.value_probe import measure_explained_values
from openpulid.mini.models.face_generator import FaceGenerator, ModulatedConv
from openpulid.mini.train.build import select_stages
from openpulid.mini.train.build_context import BuildContext
from openpulid.mini.train.face_crops import load_crops
from openpulid.mini.train.face_latent_data import FaceLatentRows, fit_directions
from openpulid.mini.train.face_latents import FaceLatentsTask
from openpulid.mini.train.face_latents_stage import train_face_latents
from openpulid.mini.train.recognition import FACIAL_COLUMNS
from openpulid.pipelines.presets import MINIATURE
from openpulid.training.rng import StepRNG
from openpulid.training.trainer import sum_losses
from openpulid.world import ATTRIBUTES

CPU = torch.device("cpu")


def make_encoder() -> FaceLatentEncoder:
    torch.manual_seed(0)
    return FaceLatentEncoder(latent=8, stem=8, widths=(8, 8, 8), head=4)


def test_layer_is_a_convolution_with_a_normalized_kernel_for_each_image() -> None:
    torch.manual_seed(0)
    layer = ModulatedConv(3, 5, latent=4)
    x = torch.randn(2, 3, 6, 6)
    latents = torch.randn(2, 4)
    outputs = layer(x, latents)
    for row in range(2):  # StyleGAN2, equations 1 to 3
        kernel = layer.weight * layer.scale(latents[row])[:, None, None]
        kernel = kernel / (kernel.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        expected = leaky_relu(
            conv2d(x[row : row + 1], kernel, padding=1) + layer.bias[:, None, None], 0.2
        )
        torch.testing.assert_close(outputs[row : row + 1], expected, atol=1e-5, rtol=1e-4)


def test_all_latents_begin_as_the_first_one_and_change_the_image() -> None:
    encoder = make_encoder().eval()
    faces = torch.rand(2, 3, 64, 64)
    latents = encoder(faces)
    assert latents.shape == (2, 18, 8)
    assert torch.equal(latents, latents[:, :1].expand(-1, 18, -1))
    generator = FaceGenerator(latent=8, widths=(8, 8, 8, 8))
    images = generator(latents)
    assert images.shape == (2, 3, 64, 64)
    for layer in range(18):
        changed = latents.clone()
        changed[:, layer] += 1
        assert not torch.allclose(generator(changed), images, atol=1e-6)


def test_training_lowers_the_loss_and_reconstructs_faces(small_world: Any) -> None:
    encoder = make_encoder()
    generator = FaceGenerator(latent=8, widths=(16, 16, 16, 16))
    recognition = ResNetRecognition(stem=8, widths=(8, 8, 8), depths=(1, 1, 1), dim=8)
    task = FaceLatentsTask(
        encoder, generator, recognition, [small_world, small_world], small_world, batch=8
    )
    before = measure_reconstructions(encoder.eval(), generator, small_world)
    encoder.train()
    optimizer = torch.optim.AdamW([*encoder.parameters(), *generator.parameters()], lr=3e-3)
    totals = []
    for step in range(40):
        losses = task.losses(StepRNG(0, step))
        assert list(losses) == ["pixels", "slopes", "identity", "offsets"]
        optimizer.zero_grad()
        sum_losses(losses).backward()
        optimizer.step()
        totals.append(sum_losses(losses).item())
    assert np.mean(totals[-5:]) < 0.7 * totals[0]
    encoder.eval()
    after = measure_reconstructions(encoder, generator, small_world, recognition)
    assert after["psnr_face"] > before["psnr_face"] + 2
    assert before["offsets"] == 0 and after["offsets"] > 0
    assert -1 <= after["face_sim"] <= 1
    assert all(x.grad is None for x in recognition.parameters())
    sheet = task.sheet()
    assert sheet is not None and sheet.width > 8 * 128
    again = task.losses(StepRNG(0, 3))
    assert all(torch.equal(x, again[name]) for name, x in task.losses(StepRNG(0, 3)).items())


def test_crops_are_on_white(small_world: Any) -> None:
    faces, masks = load_crops(small_world, np.arange(4), CPU)
    assert faces.shape == (4, 3, 64, 64)
    assert (faces[(masks == 0).expand_as(faces)] == 1).all() and masks.any()


def test_directions_change_one_value_each() -> None:
    random = torch.Generator().manual_seed(0)
    slopes = torch.randn(3, 18, 2, generator=random)
    values = torch.rand(50, 3, generator=random)
    latents = torch.einsum("nv,vlw->nlw", values, slopes) + 7
    torch.testing.assert_close(fit_directions(latents, values), slopes / 2, atol=1e-4, rtol=1e-4)


def test_rows_are_the_latents_of_the_extractor(small_world: Any, tmp_path: Path) -> None:
    encoder = make_encoder().eval()
    extractor = FaceLatentExtractor(SimpleNamespace(), encoder)  # type: ignore[arg-type]
    folder = tmp_path / "latents"
    rows = FaceLatentRows.build(extractor, small_world, folder)
    latents, hidden = rows.rows(np.array([5, 2]))
    expected = encoder(load_crops(small_world, np.array([5, 2]), CPU)[0]).flatten(1)
    assert hidden == []
    torch.testing.assert_close(latents, expected, atol=2e-3, rtol=2e-3)
    torch.nn.init.normal_(encoder.offsets[0].bias)  # another encoder has other latents
    changed, _ = FaceLatentRows.build(extractor, small_world, folder).rows(np.array([5, 2]))
    assert not torch.allclose(changed, latents, atol=0.1)


def test_probe_explains_what_the_features_contain() -> None:
    random = np.random.default_rng(0)
    vectors = random.random((200, max(FACIAL_COLUMNS) + 1)).astype(np.float32)
    attributes = np.zeros((200, len(ATTRIBUTES)), dtype=np.int8)
    for name, value in {"pose": "front", "glasses": "none", "style": "photo"}.items():
        attributes[:, list(ATTRIBUTES).index(name)] = ATTRIBUTES[name].index(value)

    class World(SimpleNamespace):
        def __len__(self) -> int:
            return 200

    world: Any = World(vectors=vectors, attributes=attributes)

    def encode(data: Any, rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(data.vectors[rows][:, FACIAL_COLUMNS[:5]])

    explained = measure_explained_values(encode, world, world)
    assert explained[:5].min() > 0.98  # the ridge shrinks a little
    assert explained[5:].max() < 0.15


@pytest.mark.parametrize("name", ["w-plus", "face-latents"])
def test_stage_selects_what_it_needs(name: str) -> None:
    names = [stage.name for stage in select_stages([name])]
    assert names == ["face-latents", "w-plus"][: 2 if name == "w-plus" else 1]


def test_stage_writes_small_files_and_its_figures(small_world: Any, tmp_path: Path) -> None:
    class SmallContext(BuildContext):
        """All datasets are a few images."""

        def open(self, name: str) -> Any:
            return small_world

    for name in ("encoder", "scorer"):
        file = f"recognition-{name}.safetensors"
        (tmp_path / file).symlink_to(MINIATURE / file)
    context = SmallContext(tmp_path / "runs", tmp_path, CPU, minutes=0.05)
    figures = train_face_latents(context)
    assert list(figures) == ["psnr_face", "offsets", "face_sim", "values_r2"]
    assert all(np.isfinite(value) for value in figures.values()) and figures["psnr_face"] > 5
    encoder = load_module(FaceLatentEncoder, tmp_path / "face-latents.safetensors")
    generator = load_module(FaceGenerator, tmp_path / "face-generator.safetensors")
    assert generator(encoder(torch.rand(1, 3, 64, 64))).shape == (1, 3, 64, 64)
    assert (tmp_path / "face-latents.safetensors").stat().st_size < 0.7e6
    assert (tmp_path / "face-generator.safetensors").stat().st_size < 1e6
    assert (context.runs / "face-latents").is_dir()
