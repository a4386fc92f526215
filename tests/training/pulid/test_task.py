"""Stage 1 on a tiny random SDXL: which parameters train, with one process and two."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

import openpulid
from openpulid.errors import OptionError, TrainingError
from openpulid.methods.pulid.sdxl import PuLID
from openpulid.training import code_revision
from openpulid.training.pulid import recipes
from openpulid.training.pulid.batch import (
    Batch,
    drop_identity,
    loss_weight_map,
    swap_identities,
)
from openpulid.training.pulid.export import save_adapter
from openpulid.training.rng import StepRNG
from openpulid.training.trainer import run
from tests.support import tiny_sdxl as tiny

pytestmark = pytest.mark.usefixtures("both_precisions")


def everything(pipe):
    modules = (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
    return {f"{i}.{n}": t for i, m in enumerate(modules) for n, t in m.state_dict().items()}


def losses_of(folder):
    history = json.loads((folder / "history.json").read_text())
    return {r["step"]: r["losses"]["diffusion"] for r in history if "losses" in r}


def backward_diffusion(losses, metrics=None):
    losses["diffusion"].backward()


def schedule(**changes):
    return replace(tiny.recipe().trainer_config(), validate_every=6, log_every=1, **changes)


def test_gradients_reach_the_adapter_and_nothing_else(pipe):
    task = tiny.task(pipe, drop_identity=0.0)
    for layer in task.adapter.id_adapter_attn_layers.values():  # a fresh adapter's values are zero
        torch.nn.init.normal_(layer.id_to_v.weight, std=0.1)
    task.backward_losses(StepRNG(0, 0), backward_diffusion)
    for name, parameter in task.adapter.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    frozen = [pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2]
    assert all(p.grad is None and not p.requires_grad for m in frozen for p in m.parameters())


def test_loss_weight_map_emphasizes_landmarks():
    masks = torch.zeros(2, 1, 16, 16)
    masks[:, :, 2:14, 2:14] = 1
    places = (
        torch.tensor([[5.5, 6.5], [9.5, 6.5], [7.5, 8.5], [6.5, 11.5], [8.5, 11.5]]) / 16 + 0.5 / 16
    )
    shown = Batch(
        torch.zeros(2, 4, 16, 16),
        masks,
        ["a", "b"],
        torch.zeros(2, 3),
        [],
        landmarks=places.expand(2, 5, 2),
    )
    weights = loss_weight_map(shown, 4.0)
    assert weights[:, 0, 6:8, 5:7].min() > 3 and weights[0, 0, 2, 13].item() == pytest.approx(
        1.0, abs=1e-3
    )
    assert (
        weights.max() <= 4 and weights[:, :, :2].max() == 0
    )  # outside of the face there are no features
    eye = torch.exp(
        torch.tensor(-0.5 / (2 * 1.4**2))
    )  # eyes four positions apart, half a position away on both axes
    assert weights[0, 0, 6, 5].item() == pytest.approx(1 + 3 * eye.item(), rel=1e-5)
    assert (
        loss_weight_map(shown, 1.0) is masks
        and loss_weight_map(shown._replace(landmarks=None), 4.0) is masks
    )
    assert loss_weight_map(shown._replace(masks=None), 4.0) is None


def test_recomputed_blocks_use_the_identity_in_backward():
    grads = []
    for checkpointed in (False, True):
        task = tiny.task(drop_identity=0.0)
        if checkpointed:
            task.base.unet.enable_gradient_checkpointing()
            task.base.unet.train()
        for layer in task.adapter.id_adapter_attn_layers.values():
            torch.nn.init.constant_(layer.id_to_v.weight, 0.05)
        task.backward_losses(StepRNG(0, 0), backward_diffusion)
        grads.append([p.grad for p in task.adapter.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))


def test_training_lowers_the_loss_and_does_not_change_the_base(pipe, tmp_path):
    before = {name: t.clone() for name, t in everything(pipe).items()}
    processors = dict(pipe.unet.attn_processors)
    task = tiny.task(pipe, batch=8)
    fresh = task.validate()
    assert (
        fresh["held_out_own"] == fresh["held_out_other"] == fresh["held_out_none"]
    )  # values start at zero
    trained = run(task, schedule(ema=0.9, lr=3e-2), tmp_path).metrics
    assert trained["held_out_own"] < 0.97 * fresh["held_out_own"]
    own, other, none = (trained[f"held_out_{name}"] for name in ("own", "other", "none"))
    assert len({own, other, none}) == 3
    assert trained["held_out_over_none"] == pytest.approx(none - own, abs=1e-6)
    assert trained["held_out_over_other"] == pytest.approx(other - own, abs=1e-6)
    assert all(torch.equal(t, before[name]) for name, t in everything(pipe).items())
    assert dict(pipe.unet.attn_processors) == processors


def test_killed_run_resumes_with_the_same_losses(tmp_path):
    run(tiny.task(), schedule(), tmp_path / "a")
    broken = tiny.task()
    source = broken.data.batch

    def stop(rng):
        if rng.step == 7:
            raise MemoryError("killed")
        return source(rng)

    broken.data.batch = stop
    with pytest.raises(MemoryError):
        run(broken, schedule(save_minutes=0.0), tmp_path / "b")
    run(tiny.task(), schedule(), tmp_path / "b")
    assert losses_of(tmp_path / "a") == losses_of(tmp_path / "b")


@pytest.mark.parametrize("parts", [1, 2])
def test_nan_stops_and_saves_the_batch(tmp_path, parts):
    task = tiny.task()
    task.data.latents[:] = float("nan")
    with pytest.raises(TrainingError, match="not finite at step 0"):
        run(task, schedule(accumulate=parts), tmp_path)
    with safe_open(tmp_path / "not-finite-step-0-rank-0.safetensors", framework="pt") as file:
        names = set(file.keys())
        assert {
            "batch.latents",
            "batch.id_cond",
            "batch.noise",
            "batch.time",
            "batch.drop",
        } <= names
        assert file.get_tensor("batch.latents").shape == (4, 4, 8, 8)


def test_drop_identity_zeroes_features():
    batch = tiny.People().batch(StepRNG(0, 0))
    half = drop_identity(batch, torch.tensor([True, False, True, False]))
    assert half.id_cond[0].abs().sum() == 0 and torch.equal(half.id_cond[1], batch.id_cond[1])
    assert all(level[2].abs().sum() == 0 and level[3].abs().sum() > 0 for level in half.hidden)


def test_swapped_identity_is_that_of_another_person():
    batch = tiny.People().batch(StepRNG(0, 0))
    features = batch.id_cond[:, 0]
    assert torch.equal(swap_identities(batch).id_cond[:, 0], features[[3, 0, 1, 2]])
    people = batch._replace(people=torch.tensor([5, 5, 9, 5]))
    swapped = swap_identities(people)
    assert torch.equal(swapped.id_cond[:, 0], features[[2, 2, 1, 2]])
    assert torch.equal(swapped.hidden[4], batch.hidden[4][[2, 2, 1, 2]])
    assert swap_identities(batch._replace(people=torch.tensor([5, 5, 5, 5]))) is None


def test_held_out_person_without_another_one_is_not_compared():
    task = tiny.task()
    source = task.validation.data.batch
    task.validation.data.batch = lambda rng: source(rng)._replace(people=torch.tensor([3] * 4))
    metrics = task.validate()
    assert math.isnan(metrics["held_out_other"]) and math.isnan(metrics["held_out_over_other"])
    assert metrics["held_out_own"] > 0 and metrics["held_out_over_none"] == 0


def test_captions_are_dropped_with_a_probability():
    prompts = []
    task = tiny.task(batch=24, drop_caption=0.25)
    encode = task.base.encode_text

    def record(texts, **options):
        prompts.extend(texts)
        return encode(texts, **options)

    task.base.encode_text = record
    for step in range(8):
        task.backward_losses(StepRNG(0, step), backward_diffusion)
    assert 0.15 < prompts.count("") / len(prompts) < 0.35
    first = list(prompts)
    prompts.clear()
    for step in range(8):
        task.backward_losses(StepRNG(0, step), backward_diffusion)
    assert prompts == first
    with pytest.raises(OptionError, match="drop_caption"):
        tiny.recipe(drop_caption=1.5)


def test_adapter_file_has_published_names_and_metadata(tmp_path):
    task = tiny.task(steps=2)
    result = run(task, replace(schedule(), steps=2), tmp_path)
    path = save_adapter(
        task.adapter, tmp_path / "adapter.safetensors", task.recipe, result, {"base": "tiny"}
    )
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        assert {"id_adapter_attn_layers.1.id_to_k.weight", "id_adapter.body.0.weight"} <= names
        assert all(n.startswith(("id_adapter.", "id_adapter_attn_layers.")) for n in names)
        facts = file.metadata()
    assert (
        json.loads(facts["recipe"])["name"] == "tiny"
        and facts["steps"] == "2"
        and facts["base"] == "tiny"
    )
    again = PuLID.load(path)
    for name, tensor in task.adapter.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


def test_revision_ignores_a_surrounding_repository(tmp_path, monkeypatch):
    installed = tmp_path / ".venv" / "code_revision.py"
    installed.parent.mkdir()
    shutil.copy(code_revision.__file__, installed)
    (tmp_path / ".gitignore").write_text(".venv\n")
    (tmp_path / "README.md").write_text("ours")
    (tmp_path / "measure.py").write_text("ours")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "theirs"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(code_revision, "__file__", str(installed))
    assert code_revision.revision() == f"openpulid {openpulid.__version__}"
    subprocess.run([*git, "add", "-f", str(installed)], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "ours"], check=True)
    commit = subprocess.run(
        [*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()
    assert code_revision.revision() == commit
    (tmp_path / "README.md").write_text("")
    assert code_revision.revision() == commit
    for file in (installed, tmp_path / "measure.py"):
        content = file.read_text()
        file.write_text("")
        assert code_revision.revision() == f"{commit}+changes"
        file.write_text(content)


def test_find_recipe_by_name():
    assert recipes.find_recipe("mini_stage1").name == "mini_stage1"
    with pytest.raises(ValueError, match="mini_stage1"):
        recipes.find_recipe("stage9")
