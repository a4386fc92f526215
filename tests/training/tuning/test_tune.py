"""Tuning on a tiny pipeline: what changes, what stays, and what the files hold."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image

from openpulid.device import training_dtype
from openpulid.diffusion.noise_schedule import NoiseSchedule
from openpulid.errors import OptionError, TrainingError
from openpulid.identity.reference import open_references
from openpulid.io.checkpoints import read_metadata
from openpulid.methods.tuned import Trigger
from openpulid.training.pulid import DiffusionStep
from openpulid.training.pulid.losses import DiffusionLoss
from openpulid.training.pulid.models import SDXLModel
from openpulid.training.rng import StepRNG, microbatch_rngs
from openpulid.training.tuning import find_tuning_recipe, tune
from openpulid.training.tuning.images import (
    TuningImages,
    encode_person,
    generate_class_images,
)
from openpulid.training.tuning.recipes import TUNING_METHODS, TuningRecipe
from openpulid.training.tuning.task import TuningTask
from openpulid.training.tuning.trained import open_part
from openpulid.training.tuning.tune import CLASS_IMAGES, delete_checkpoints
from tests.support import tiny_sdxl

TRIGGER = Trigger("noir", "person")
SMALL = {"steps": 8, "batch": 2}


@pytest.fixture
def pipe():
    pipe = tiny_sdxl.pipe()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def references():
    """Two images of different sizes."""
    generator = torch.Generator().manual_seed(0)
    images = []
    for size in ((24, 32), (20, 16)):
        pixels = (torch.rand(size[1], size[0], 3, generator=generator) * 255).byte().numpy()
        images.append(Image.fromarray(pixels))
    return open_references(images)


def state(pipe) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": value.clone()
        for part in ("unet", "text_encoder", "text_encoder_2")
        for name, value in getattr(pipe, part).state_dict().items()
    }


def recipe(method: str, **changes):
    return replace(
        find_tuning_recipe(method),
        **{"lr": 1e-2, "num_class_images": 0, **SMALL, **changes},
    )


def run(pipe, references, tmp_path, method: str, **changes):
    options = {"num_inference_steps": 1, "guidance_scale": 1.0}
    return tune(
        recipe(method, **changes),
        pipe,
        references,
        TRIGGER,
        tmp_path / "run",
        class_options=options,
    )


@pytest.mark.parametrize("method", sorted(TUNING_METHODS))
def test_pipeline_is_as_before_and_the_method_changes_images(pipe, references, tmp_path, method):
    before = state(pipe)
    tuned, facts = run(pipe, references, tmp_path, method, num_class_images=2)
    after = state(pipe)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert facts["images"] == 2
    delete_checkpoints(tmp_path / "run")
    assert not (tmp_path / "run").exists()

    def generate():
        return pipe(
            tuned.insert_trigger("a person"),
            num_inference_steps=1,
            output_type="pt",
            generator=torch.Generator().manual_seed(0),
        ).images

    base = generate()
    tuned.attach(pipe)
    with tuned.use():
        assert not torch.allclose(generate(), base, atol=1e-4)


def test_interrupted_tuning_keeps_its_class_images(pipe, references, tmp_path, monkeypatch):
    module = sys.modules["openpulid.training.tuning.tune"]
    generated = []

    def generate(*args):
        generated.append(args[2])
        return generate_class_images(*args)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "generate_class_images", generate)
    with monkeypatch.context() as interrupted:
        interrupted.setattr(module, "run", stop)
        with pytest.raises(KeyboardInterrupt):
            run(pipe, references, tmp_path, "lora", num_class_images=2)
    run(pipe, references, tmp_path, "lora", num_class_images=2)
    assert generated == [2]
    delete_checkpoints(tmp_path / "run")
    run(pipe, references, tmp_path, "lora", num_class_images=3)
    assert generated == [2, 3]


def test_people_and_methods_share_class_images(pipe, references, tmp_path):
    path = tmp_path / "shared" / CLASS_IMAGES

    def tune_once(method: str, person: int, guidance_scale: float = 1.0) -> int:
        tune(
            recipe(method, num_class_images=2, steps=1),
            pipe,
            [references[person]],
            TRIGGER,
            tmp_path / f"{method}-{person}-{guidance_scale}",
            class_options={"num_inference_steps": 1, "guidance_scale": guidance_scale},
            class_images_path=path,
        )
        return path.stat().st_mtime_ns

    first = tune_once("dreambooth-lora", 0)
    assert float(read_metadata(path)["seconds"]) >= 0
    assert tune_once("dreambooth-lora", 1) == first
    assert tune_once("custom-diffusion", 0) == first
    assert tune_once("custom-diffusion", 0, guidance_scale=2.0) != first


@pytest.mark.parametrize("method", sorted(TUNING_METHODS))
def test_base_in_the_dtype_of_trainings(pipe, references, tmp_path, method, both_precisions):
    """Frozen networks are in bfloat16 where it pays, and what is trained is in float32."""
    dtype = training_dtype(torch.device("cpu"))
    pipe.to(dtype)
    before = state(pipe)
    settings = recipe(method)
    with open_part(settings, pipe, TRIGGER) as part:
        trained = [
            x for module in part.modules.values() for x in module.parameters() if x.requires_grad
        ]
        assert {x.dtype for x in trained} == {torch.float32}
    tuned, _ = run(pipe, references, tmp_path, method, steps=2, num_class_images=2)
    assert {x.dtype for x in state(pipe).values() if x.is_floating_point()} == {dtype}
    assert all(torch.equal(x, before[name]) for name, x in state(pipe).items())
    tuned.attach(pipe)
    options = {"num_inference_steps": 1, "generator": torch.Generator().manual_seed(0)}
    with tuned.use():
        images = pipe("noir person", output_type="pt", **options).images
    assert images.isfinite().all()


def test_checkpointed_blocks_have_the_same_loss(pipe, references):
    model = SDXLModel(pipe)
    images = encode_person(model, references)
    gradients = []
    for is_checkpointed in (False, True):
        settings = recipe("custom-diffusion", gradient_checkpointing=is_checkpointed)
        with open_part(settings, pipe, TRIGGER) as part:
            assert pipe.unet.is_gradient_checkpointing == is_checkpointed
            task = TuningTask(settings, model, part, images, ["noir person"])
            task.losses(StepRNG(0, 0))["person"].backward()
            gradients.append(part.word.vectors["clip_l"].grad.clone())
    assert not pipe.unet.is_gradient_checkpointing
    torch.testing.assert_close(*gradients)


def loss(model, part, images) -> float:
    """Loss on the images, with fixed noise."""
    task = TuningTask(recipe("lora", batch=8), model, part, images, ["noir person"])
    with torch.no_grad():
        return sum(float(task.losses(StepRNG(9, k))["person"]) for k in range(4))


@pytest.mark.parametrize("method", sorted(TUNING_METHODS))
def test_loss_falls(pipe, references, method):
    model = SDXLModel(pipe)
    images = encode_person(model, references)
    settings = recipe(method, batch=4)
    with open_part(settings, pipe, TRIGGER) as part:
        before = loss(model, part, images)
        task = TuningTask(settings, model, part, images, ["noir person"])
        parameters = [
            x for module in part.modules.values() for x in module.parameters() if x.requires_grad
        ]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        for step in range(30):
            optimizer.zero_grad()
            sum(task.losses(StepRNG(0, step)).values()).backward()
            optimizer.step()
        # a random U-Net hardly reads the text
        share = 0.97 if settings.trained in ("lora", "unet") else 0.9985
        assert loss(model, part, images) < share * before


def test_only_the_named_embeddings_are_trained(pipe):
    """Weight decay must not move the rows of other words."""
    settings = recipe("textual-inversion")
    with open_part(settings, pipe, TRIGGER) as part:
        trained = [name for name, x in part.modules["word"].named_parameters() if x.requires_grad]
        assert sorted(trained) == ["parameters_by_name.clip_g", "parameters_by_name.clip_l"]
        start = pipe.text_encoder.get_input_embeddings().weight[5]  # "person"
        assert part.create_method().vectors["clip_l"].shape == (4, 16)
        torch.testing.assert_close(part.create_method().vectors["clip_l"][3], start)
        frozen = [pipe.unet, pipe.text_encoder, pipe.text_encoder_2]
        SDXLModel(pipe)
        assert not any(x.requires_grad for network in frozen for x in network.parameters())


def test_losses_match_dreambooths_formula(golden):
    """The mean over the person's rows, and that over the class rows times its weight."""
    prediction = golden.input("dreambooth.pred", 4, 4, 8, 8)
    target = golden.input("dreambooth.target", 4, 4, 8, 8)
    schedule = SDXLModel(tiny_sdxl.pipe()).schedule
    step = DiffusionStep(prediction, target, prediction, torch.zeros(4, dtype=torch.long))
    errors = DiffusionLoss(schedule).per_sample(step)
    assert golden.error("dreambooth.loss.instance", errors[:2].mean()) < 2e-5
    total = errors[:2].mean() + 1.0 * errors[2:].mean()
    assert golden.error("dreambooth.loss.total_1.0", total) < 2e-5


@pytest.mark.parametrize(
    ("prediction", "entry"), [("epsilon", "epsilon"), ("v_prediction", "v_prediction_paper")]
)
def test_min_snr_weights_are_the_papers(golden, prediction, entry):
    """For v, diffusers' scripts have another formula than the paper."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    schedule = NoiseSchedule((1 - betas).cumprod(0), prediction)
    steps = torch.tensor([3, 250, 600, 998])
    assert golden.error("dreambooth.snr", schedule.snr(steps)) < 2e-5
    weights = DiffusionLoss(schedule, min_snr_gamma=5.0).timestep_weight(steps)
    assert golden.error(f"dreambooth.min_snr_5.{entry}", weights) < 2e-5


def test_class_images_have_the_weight_of_the_recipe(pipe, references):
    model = SDXLModel(pipe)
    images = encode_person(model, references)
    class_images = generate_class_images(
        model, ["a person", "a portrait"], 3, {"num_inference_steps": 1, "guidance_scale": 1.0}
    )
    assert class_images.latents.shape == (3, 4, 8, 8)
    values = {}
    for weight in (1.0, 0.25):
        settings = recipe("dreambooth", prior_weight=weight)
        with open_part(settings, pipe, TRIGGER) as part:
            task = TuningTask(
                settings, model, part, images, ["noir person"], class_images, ["a person"]
            )
            values[weight] = {name: x.item() for name, x in task.losses(StepRNG(0, 0)).items()}
    assert values[0.25]["person"] == pytest.approx(values[1.0]["person"])
    assert values[0.25]["class"] == pytest.approx(0.25 * values[1.0]["class"])


def test_processes_share_a_batch(pipe, references):
    """Each has a part of the images, and of the class images."""
    model = SDXLModel(pipe)
    latents = torch.zeros(2, 4, 8, 8)
    settings = recipe("dreambooth", batch=4, face_loss_weight=2.0)
    images = TuningImages(latents, torch.ones(2, 1, 8, 8))
    with open_part(settings, pipe, TRIGGER) as part:
        others = TuningImages(latents)
        task = TuningTask(settings, model, part, images, ["noir"], others, ["person"])
        parts = [task.losses(rng) for rng in microbatch_rngs(0, 0, 0, 1, 2)]
    for losses in parts:
        assert set(losses) == {"person", "class"}
        assert all(0.5 < loss < 2 for loss in losses.values())


def test_masks_weigh_the_face(pipe):
    model = SDXLModel(pipe)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(2, 1, 8, 8)
    masks[..., :4] = 1
    values = []
    for masked in (None, masks, torch.ones_like(masks)):
        settings = recipe("lora", face_loss_weight=20.0)
        with open_part(settings, pipe, TRIGGER) as part:
            task = TuningTask(settings, model, part, TuningImages(latents, masked), ["noir"])
            values.append(float(task.losses(StepRNG(0, 0))["person"]))
    assert values[0] == pytest.approx(values[2])
    assert values[1] != pytest.approx(values[0], rel=1e-3)


def test_crops_are_squares_of_the_models_size(pipe, references):
    images = encode_person(SDXLModel(pipe), references, num_crops=3)
    assert images.latents.shape == (6, 4, 8, 8)
    assert not torch.allclose(images.latents[0], images.latents[1])
    again = encode_person(SDXLModel(pipe), references, num_crops=3)
    assert torch.equal(images.latents, again.latents)


@pytest.fixture
def interrupt_at(monkeypatch):
    """Return a function that interrupts runs in a step; None lets them run. Steps are recorded."""
    losses = TuningTask.losses
    trainer_config = TuningRecipe.trainer_config
    monkeypatch.setattr(  # a checkpoint after every step
        TuningRecipe,
        "trainer_config",
        lambda self, name: replace(trainer_config(self, name), save_minutes=0.0),
    )
    steps: list[int] = []

    def set_step(number: int | None) -> list[int]:
        steps.clear()

        def run_or_interrupt(task, rng):
            if rng.step == number:
                raise KeyboardInterrupt
            steps.append(rng.step)
            return losses(task, rng)

        monkeypatch.setattr(TuningTask, "losses", run_or_interrupt)
        return steps

    return set_step


def test_interrupted_run_continues(pipe, references, tmp_path, interrupt_at):
    whole, _ = run(pipe, references, tmp_path, "textual-inversion")
    delete_checkpoints(tmp_path / "run")
    interrupt_at(5)
    with pytest.raises(KeyboardInterrupt):
        run(pipe, references, tmp_path, "textual-inversion")
    assert (tmp_path / "run" / "run.safetensors").exists()
    steps = interrupt_at(None)
    resumed, _ = run(pipe, references, tmp_path, "textual-inversion")
    assert steps == [5, 6, 7]
    for name, vectors in whole.vectors.items():
        torch.testing.assert_close(resumed.vectors[name], vectors)


def test_run_of_other_images_is_not_continued(pipe, references, tmp_path, interrupt_at):
    interrupt_at(2)
    with pytest.raises(KeyboardInterrupt):
        run(pipe, references, tmp_path, "lora")
    interrupt_at(None)
    with pytest.raises((TrainingError, OptionError), match="another"):
        run(pipe, references[:1], tmp_path, "lora")


@pytest.mark.parametrize("differs", ["name", "unet"])
def test_run_on_another_base_is_not_continued(pipe, references, tmp_path, interrupt_at, differs):
    interrupt_at(2)
    with pytest.raises(KeyboardInterrupt):
        run(pipe, references, tmp_path, "lora")
    interrupt_at(None)
    if differs == "name":
        pipe.register_to_config(_name_or_path="another")
    else:  # such as a student's, with the same other parts
        with torch.no_grad():
            pipe.unet.conv_out.weight.mul_(1.1)
    with pytest.raises((TrainingError, OptionError), match="another"):
        run(pipe, references, tmp_path, "lora")


@pytest.mark.parametrize("trigger", [Trigger("unheard", "person"), Trigger("noir", "unheard")])
@pytest.mark.parametrize("method", ["lora", "textual-inversion"])
def test_word_that_is_not_one_token_is_refused(
    pipe, references, tmp_path, monkeypatch, method, trigger
):
    # the package has a function of the module's name
    module = sys.modules["openpulid.training.tuning.tune"]
    monkeypatch.setattr(module, "encode_person", lambda *args: pytest.fail("encoded"))
    before = state(pipe)
    with pytest.raises(OptionError, match="'unheard' is not one token"):
        tune(recipe(method), pipe, references, trigger, tmp_path / "run")
    assert state(pipe).keys() == before.keys()


def test_pipeline_with_a_lora_is_refused(pipe, references, tmp_path):
    run(pipe, references, tmp_path, "lora")[0].save(tmp_path / "own.safetensors")
    pipe.load_lora_weights(str(tmp_path), weight_name="own.safetensors", adapter_name="own")
    with pytest.raises(OptionError, match=r"has LoRAs \(own\): call unload_lora_weights"):
        tune(recipe("lora"), pipe, references, TRIGGER, tmp_path / "again")
    assert pipe.get_active_adapters() == ["own"]


def test_unknown_method_is_refused():
    with pytest.raises(OptionError, match="choose one of custom-diffusion"):
        find_tuning_recipe("hypernetwork")
