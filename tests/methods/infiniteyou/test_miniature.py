"""InfiniteYou on the miniature with FLUX's architecture: training, its files, the preset."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from openpulid.errors import IdentityError, OptionError, WeightsError
from openpulid.identity.extractor import FaceEmbeddingExtractor
from openpulid.identity.reference import ReferenceFaces
from openpulid.io.image_grid import to_pil
from openpulid.methods.infiniteyou import InfiniteYou
from openpulid.mini.models.flux import save_flux_pipeline
from openpulid.mini.models.pipeline import save_folder
from openpulid.mini.train.baseline_data import make_sheet_function
from openpulid.mini.train.baseline_task import BaselineTask
from openpulid.mini.train.baselines import BASELINES, Baseline
from openpulid.mini.train.build_context import stamp
from openpulid.mini.train.loss_models import create_model
from openpulid.pipelines.factory import check_models, load_extractor
from openpulid.pipelines.loading import load
from openpulid.pipelines.presets import MINIATURE, Preset, mini, mini_flux
from openpulid.pipelines.selection import with_method
from openpulid.training.pulid import Batch, find_recipe
from openpulid.training.rng import StepRNG
from openpulid.training.trainer import sum_losses
from openpulid.world import Person, Scene, render
from tests.support import mini_networks as networks

FACE, COUNT = 128, 2


class FixedBatch:
    """The same two people at every step, with the features that InfiniteYou reads."""

    def batch(self, rng: StepRNG) -> Batch:
        generator = torch.Generator().manual_seed(3)
        latents = torch.randn(COUNT, networks.CHANNELS, 12, 12, generator=generator)
        return Batch(
            latents,
            torch.ones(COUNT, 1, 12, 12),
            networks.PROMPTS[:COUNT],
            torch.randn(COUNT, FACE, generator=generator),
            [],
            landmarks=torch.rand(COUNT, 5, 2, generator=generator),
        )


@pytest.fixture(scope="module")
def task() -> BaselineTask:
    torch.manual_seed(0)
    pipe = networks.small_flux_pipeline()
    recipe = replace(find_recipe("mini_flux_stage1"), bf16=False)
    baseline = BASELINES["infiniteyou"](pipe, FACE)
    return BaselineTask(recipe, create_model(recipe, pipe), baseline, FixedBatch(), FixedBatch())


@pytest.fixture(scope="module")
def preset(task: BaselineTask, tmp_path_factory: pytest.TempPathFactory) -> Preset:
    """The preset with InfiniteYou, after a few steps."""
    train(task, steps=6)
    folder = tmp_path_factory.mktemp("weights")
    for file in MINIATURE.glob("*.safetensors"):
        (folder / file.name).symlink_to(file)
    pipe = task.base.pipe
    save_flux_pipeline(pipe, folder / "flux" / "pipeline")
    save_folder(pipe.vae, folder / "pipeline" / "vae")
    path = task.baseline.save(folder / "flux" / "infiniteyou", pipe)
    stamp(path, {"revision": "abc"})
    return with_method(mini_flux(folder), "infiniteyou").with_defaults(num_inference_steps=2)


def train(task: BaselineTask, steps: int, bf16: bool = False) -> list[float]:
    optimizer = torch.optim.AdamW(task.baseline.trained.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):  # the same noise each time: the loss must fall
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):  # emulated on other CPUs
            loss = task.losses(StepRNG(0, 0))
        optimizer.zero_grad()
        sum_losses(loss).backward()
        optimizer.step()
        losses.append(loss["diffusion"].item())
    return losses


@pytest.mark.parametrize("bf16", [False, True])
def test_training_lowers_the_loss_and_changes_no_base(task: BaselineTask, bf16: bool) -> None:
    before = {name: value.clone() for name, value in task.base.network.state_dict().items()}
    losses = train(task, steps=6, bf16=bf16)
    assert losses[-1] < 0.98 * losses[0]
    parameters = list(task.baseline.trained.parameters())
    reached = [x for x in parameters if x.grad is not None and x.grad.abs().sum() > 0]
    assert len(reached) > 0.8 * len(parameters)
    after = task.base.network.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert set(task.validate()) == {"held_out_own", "held_out_other"}  # never dropped


def test_saved_files_give_the_same_images(task: BaselineTask, preset: Preset) -> None:
    check_models(preset)
    path = preset.models.require_adapter()
    assert isinstance(path, Path) and path.parts[-2:] == ("flux", "infiniteyou")
    loaded = InfiniteYou.load(path, torch.float32)
    baseline: Baseline = task.baseline
    pipe = task.base.pipe
    person = baseline.identities(FixedBatch().batch(StepRNG(0, 0)))[0]
    loaded.attach(pipe)
    images = []
    for method, scale in ((baseline.method, 1.0), (loaded, 1.0), (loaded, 0.0)):
        with method.use(person, scale=scale, pipe=pipe), torch.no_grad():
            images.append(
                pipe(
                    networks.PROMPTS[0],
                    height=96,
                    width=96,
                    num_inference_steps=2,
                    max_sequence_length=32,
                    output_type="latent",
                    generator=torch.Generator().manual_seed(0),
                ).images
            )
    loaded.detach(pipe)
    own, saved, none = images
    assert (own - saved).abs().max() < (own - none).abs().max() / 4  # InfuseNet has 8 bits


def test_preset_reads_the_face_embedding_alone(preset: Preset) -> None:
    studio = load(preset, device="cpu")
    assert isinstance(studio.extractor, FaceEmbeddingExtractor)
    portrait = to_pil(render([Person.from_seed(3)], [Scene()]).image)[0]
    identity = studio.identify([portrait])
    assert identity.id_cond.shape == (1, 1, FACE) and not identity.hidden
    pulid = ReferenceFaces.detect(load_extractor(mini(), "cpu"), [portrait]).identity()
    assert torch.allclose(identity.id_cond, pulid.id_cond[..., :FACE], atol=1e-6)
    (face,) = studio.detect([portrait]).images[0].faces
    (crop,) = studio.extractor.debug_crops(face)
    assert crop.shape == (3, 64, 64)
    base, shown = (
        studio.generate(networks.PROMPTS[0], person, seed=5).images[0]
        for person in (None, identity)
    )
    assert base.tobytes() != shown.tobytes()
    with pytest.raises(IdentityError):
        studio.generate(networks.PROMPTS[0], pulid, seed=5)


def test_sheet_shows_people(task: BaselineTask, preset: Preset) -> None:
    extractor = load_extractor(mini(), "cpu")
    sheet = make_sheet_function(task.baseline, task.base.pipe, extractor, preset)()
    assert sheet.size == (5 * 146 - 2, 6 * 146 - 2)


def test_messages_name_the_command_and_the_base(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="only available for FLUX presets, and mini is not one"):
        with_method(mini(), "infiniteyou")
    with pytest.raises(OptionError, match="available: pulid, infiniteyou"):
        with_method(mini_flux(), "infiniteyou-sim")
    for file in MINIATURE.glob("*.safetensors"):
        (tmp_path / file.name).symlink_to(file)
    save_flux_pipeline(networks.small_flux_pipeline(), tmp_path / "flux" / "pipeline")
    save_folder(networks.small_vae(), tmp_path / "pipeline" / "vae")
    with pytest.raises(WeightsError, match=r"`pulid mini build --method infiniteyou` trains them"):
        check_models(with_method(mini_flux(tmp_path), "infiniteyou"))
