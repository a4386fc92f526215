"""Naive, stage 2 and stage 3 on a tiny random SDXL: which parameters each loss reaches."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel

from openpulid.errors import OptionError
from openpulid.faces.embed import copy_paste
from openpulid.methods.pulid.encoders import IDEncoder, IDFormer
from openpulid.methods.pulid.sdxl import PuLID
from openpulid.pipelines.memory_prediction import SDXL_UNET
from openpulid.training.pulid import recipes
from openpulid.training.pulid.task import PuLIDTask, Validation
from openpulid.training.rng import StepRNG
from openpulid.training.trainer import run
from tests.support import tiny_sdxl as tiny

pytestmark = pytest.mark.usefixtures("both_precisions")

STAGE2 = {"id_loss": "accurate", "few_step_batch": 2, "grad_steps": 2, "id_prompt": "portrait"}
STAGE3 = {
    **STAGE2,
    "semantic_weight": 0.6,
    "layout_weight": 0.1,
    "align_prompts": ("portrait", "noir", "red hat"),
}
STAGES = {"naive": {"id_loss": "naive", "few_step_batch": 2}, "stage2": STAGE2, "stage3": STAGE3}
NAMES = {
    "naive": ["diffusion", "id"],
    "stage2": ["diffusion", "id"],
    "stage3": ["diffusion", "id", "semantic", "layout"],
}


def compute_losses(task, step: int = 0):
    """All losses and metrics of a step, as numbers by name."""
    values = {}

    def collect(losses, metrics=None):
        values.update({name: v.item() for name, v in {**losses, **(metrics or {})}.items()})

    task.backward_losses(StepRNG(0, step), collect)
    return values


def gradients(task, names, step: int = 0):
    """Gradients of the named losses alone, by parameter."""
    for parameter in task.adapter.parameters():
        parameter.grad = None

    def backward(losses, metrics=None):
        selected = [v for name, v in losses.items() if name in names and v.requires_grad]
        if selected:
            torch.stack(selected).sum().backward()

    task.backward_losses(StepRNG(0, step), backward)
    return {name: p.grad for name, p in task.adapter.named_parameters()}


@pytest.mark.parametrize("stage", STAGES)
def test_every_loss_reaches_the_whole_adapter_and_nothing_else(pipe, stage):
    task = tiny.task(pipe, **STAGES[stage])
    for name in NAMES[stage]:
        found = gradients(task, [name])
        # the last layer's own queries cannot feel what its identity attention adds after them
        reached = [key for key, grad in found.items() if grad is not None and grad.abs().sum() > 0]
        assert len(reached) > 0.9 * len(found) - 2, name
    frozen = [
        pipe.unet,
        pipe.vae,
        pipe.text_encoder,
        pipe.text_encoder_2,
        *task.face_embedder.models,
    ]
    assert all(p.grad is None and not p.requires_grad for m in frozen for p in m.parameters())


@pytest.mark.parametrize("stage", ["naive", "stage2"])
def test_id_loss_passes_through_the_decoder(stage):
    task = tiny.task(**STAGES[stage])
    assert any(
        grad is not None and grad.abs().sum() > 0 for grad in gradients(task, ["id"]).values()
    )
    for base in {id(b): b for b in (task.base, *task.few_step_models)}.values():
        base.decode = torch.no_grad()(base.decode)
    assert all(grad is None for grad in gradients(task, ["id"]).values())


def test_path_without_identity_is_the_base():
    """The target does not depend on the adapter: with zero values both paths are equal."""
    task = tiny.task(**STAGE3)
    for layer in task.adapter.id_adapter_attn_layers.values():
        torch.nn.init.zeros_(layer.id_to_v.weight)
    losses = compute_losses(task)
    assert losses["semantic"] < 1e-5 and losses["layout"] < 1e-5


@pytest.mark.parametrize(
    "change", [{}, {"align_one_step": True, "guidance_scale": 2.0, "rollout_steps": 6}]
)
def test_stage_without_prompts_uses_the_captions(change):
    own = {**STAGE3, **change, "few_step_batch": 4, "id_prompt": None, "align_prompts": ()}
    said = {}
    for name, figures in {
        "own": own,
        "one": {**own, "id_prompt": "portrait", "align_prompts": ("portrait",)},
    }.items():
        task = tiny.task(**figures)
        for layer in task.adapter.id_adapter_attn_layers.values():
            torch.nn.init.constant_(layer.id_to_v.weight, 0.01)
        said[name] = compute_losses(task)
        every = task.data.batch
        task.data.batch = lambda rng, every=every: every(rng)._replace(prompts=["portrait"] * 4)
        said[f"{name}, all alike"] = compute_losses(task)
    assert said["own"]["id"] != said["one"]["id"] and said["own"]["layout"] != said["one"]["layout"]
    assert said["own, all alike"] == said["one, all alike"]


def test_one_rollout_serves_both_losses_if_their_prompts_are_the_captions():
    """It has the gradients of two rollouts with the same prompts, in one backward pass less."""
    figures = {**STAGE3, "few_step_batch": 4}
    found, passes = {}, {}
    for name, prompts in {
        "two": {"id_prompt": "portrait", "align_prompts": ("portrait",)},
        "one": {"id_prompt": None, "align_prompts": ()},
    }.items():
        task = tiny.task(**{**figures, **prompts})
        assert task.recipe.shares_rollout == (name == "one")
        every = task.data.batch
        task.data.batch = lambda rng, every=every: every(rng)._replace(prompts=["portrait"] * 4)
        found[name] = gradients(task, NAMES["stage3"])
        calls = []
        task.backward_losses(StepRNG(0, 0), lambda losses, metrics=None, c=calls: c.append(losses))
        passes[name] = [set(losses) for losses in calls]
    assert passes["two"] == [{"diffusion"}, {"id"}, {"semantic", "layout"}]
    assert passes["one"] == [{"diffusion"}, {"id", "semantic", "layout"}]
    for name, grad in found["two"].items():
        assert (grad is None) == (found["one"][name] is None)
        if grad is not None:
            assert torch.allclose(found["one"][name], grad, rtol=1e-3, atol=1e-6), name


OUTSIDE = {**STAGE3, "base": "mini", "id_prompt": None, "align_prompts": (), "outside_weight": 2.0}


def outside_task(weight: float) -> PuLIDTask:
    """A stage 3 with faces in the upper half of the images."""
    task = tiny.task(**{**OUTSIDE, "outside_weight": weight})
    assert task.face_embedder is not None
    detect = task.face_embedder.detect

    def detect_above(images):
        faces = detect(images)
        for face in faces:
            face.mask[:, images.shape[-2] // 2 :] = 0
        return faces

    task.face_embedder.detect = detect_above
    return task


def test_outside_loss_is_zero_without_effect_and_reaches_the_adapter_alone():
    """It compares images of the same noise, so an identity without effect changes nothing."""
    task = outside_task(2.0)
    single = compute_losses(task)["outside"]
    assert single > 1e-4
    assert compute_losses(outside_task(4.0))["outside"] == pytest.approx(2 * single)
    found = gradients(task, ["outside"])
    assert any(grad is not None and grad.abs().sum() > 0 for grad in found.values())
    for layer in task.adapter.id_adapter_attn_layers.values():
        torch.nn.init.zeros_(layer.id_to_v.weight)
    assert compute_losses(task)["outside"] < 1e-5


def base_task(scale: float) -> PuLIDTask:
    """The same, whose second rollout is on the base, with guidance `scale`."""
    model, fast = tiny.base(), outside_task(2.0)
    recipe = tiny.recipe(**OUTSIDE, rollout_on_base=True, base_guidance_scale=scale)
    adapter = tiny.adapter(model)
    parts = {"few_step_models": fast.few_step_models, "face_embedder": fast.face_embedder}
    return PuLIDTask(recipe, model, adapter, tiny.People(4), **parts)


def test_guided_rollout_on_the_base_has_no_alignment():
    """Its images and those without the identity are both guided; the student's are not."""
    losses = {scale: compute_losses(base_task(scale), step=1) for scale in (1.0, 2.0, 3.0)}
    assert set(losses[1.0]) - set(losses[2.0]) == {"semantic", "layout"}
    assert losses[1.0]["outside"] < losses[2.0]["outside"] < losses[3.0]["outside"]
    assert compute_losses(base_task(3.0)) == compute_losses(base_task(1.0))
    task = base_task(3.0)
    for name in ("id", "outside"):
        found = gradients(task, [name], step=1)
        assert any(grad is not None and grad.abs().sum() > 0 for grad in found.values())


def test_guided_rollout_without_effect_is_that_of_the_base():
    task = base_task(3.0)
    for layer in task.adapter.id_adapter_attn_layers.values():
        torch.nn.init.zeros_(layer.id_to_v.weight)
    assert compute_losses(task, step=1)["outside"] < 1e-5


@pytest.mark.parametrize("change", [{"rollout_on_base": False}, {"id_prompt": "portrait"}])
def test_base_guidance_needs_the_base_and_one_rollout(change):
    figures = {**OUTSIDE, "outside_weight": 0.0, "rollout_on_base": True, **change}
    with pytest.raises(OptionError, match="base_guidance_scale needs rollout_on_base"):
        tiny.recipe(**figures, base_guidance_scale=3.0)


@pytest.mark.parametrize(
    "change", [{"base": "sdxl"}, {"id_prompt": "portrait"}, {"id_loss": "none"}]
)
def test_outside_loss_needs_masks_and_the_images_of_the_id_loss(change):
    with pytest.raises(OptionError, match="miniature's stage 3 only"):
        tiny.recipe(**{**OUTSIDE, **change})


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"align_one_step": True},
        {"align_one_step": True, "guidance_scale": 2.0, "rollout_steps": 6},
    ],
)
def test_training_does_not_change_the_base(pipe, tmp_path, change):
    modules = (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
    before = [t.clone() for m in modules for t in m.state_dict().values()]
    processors = dict(pipe.unet.attn_processors)
    task = tiny.task(pipe, **{**STAGE3, **change})
    schedule = replace(tiny.recipe().trainer_config(), steps=3, validate_every=2, log_every=1)
    result = run(task, schedule, tmp_path)
    assert set(result.losses) == {"diffusion", "id", "semantic", "layout", "faces"}
    assert (
        result.metrics["held_out_faces"] == 1.0 and -1 <= result.metrics["held_out_face_sim"] <= 1
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(before, (t for m in modules for t in m.state_dict().values()), strict=True)
    )
    assert dict(pipe.unet.attn_processors) == processors
    assert not any(h for m in pipe.unet.modules() for h in (m._forward_hooks, m._forward_pre_hooks))


def test_checkpointing_gives_the_same_gradients():
    plain, again = (
        gradients(tiny.task(**STAGE3, gradient_checkpointing=c), NAMES["stage3"])
        for c in (False, True)
    )
    for name in plain:
        assert torch.allclose(plain[name], again[name], rtol=1e-4, atol=1e-8), name


def test_images_without_a_face_are_ignored_and_counted():
    task = tiny.task(**STAGE2)
    find = task.face_embedder.detect
    task.face_embedder.detect = lambda images: [
        face if k else None for k, face in enumerate(find(images))
    ]
    losses = compute_losses(task)
    assert losses["faces"] == 0.5 and losses["id"] > 0
    task.face_embedder.detect = lambda images: [None] * len(images)
    found = gradients(task, ["id"])
    assert all(grad is None or grad.abs().sum() == 0 for grad in found.values())


def test_few_step_models_are_used_in_round_robin_order():
    task, seen = tiny.task(**STAGE2), []
    first, second = task.few_step_models[0], tiny.base()
    task.adapter.attach(second.pipe)
    task.few_step_models.append(second)
    for name, base in {"first": first, "second": second}.items():
        decode = base.decode
        base.decode = lambda latents, decode=decode, name=name: seen.append(name) or decode(latents)
    for step in range(3):
        gradients(task, ["id"], step)
    assert seen == ["first", "second", "first"]


def test_rollout_on_base_appends_the_base():
    made = tiny.task(**STAGE2)
    fast, faces, second = made.few_step_models, made.face_embedder, tiny.base()
    for walks, expected in ((False, fast), (True, [*fast, second])):
        adapter = tiny.adapter(second)
        task = PuLIDTask(
            tiny.recipe(**STAGE2, rollout_on_base=walks),
            second,
            adapter,
            tiny.People(4),
            few_step_models=fast,
            face_embedder=faces,
        )
        assert task.few_step_models == expected


def test_recipe_without_its_parts_raises():
    with pytest.raises(OptionError, match="lightning branch"):
        tiny.task(semantic_weight=0.6)
    with pytest.raises(OptionError, match="face_embedder"):
        tiny.task(id_loss="naive")


@pytest.mark.parametrize("name", [name for name in recipes.RECIPES if name.startswith("sdxl")])
def test_full_size_recipes_run(name, tmp_path):
    full = recipes.find_recipe(name)
    small = replace(
        full,
        batch=4,
        few_step_batch=min(full.few_step_batch, 2),
        pixels=full.pixels and 16,
        steps=2,
    )
    base = tiny.base()
    adapter = tiny.adapter(base, full.encoder)
    task = PuLIDTask(
        small,
        base,
        adapter,
        tiny.People(4),
        validation=Validation(tiny.People(4)),
        few_step_models=[base],
        face_embedder=tiny.faces(),
    )
    result = run(task, replace(small.trainer_config(), warmup=1, log_every=1), tmp_path)
    expected = {"sdxl_stage1": {"diffusion"}, "sdxl_stage2": {"diffusion", "id", "faces"}}
    stage = name.removesuffix("_v11")
    assert set(result.losses) == expected.get(
        stage, {"diffusion", "id", "faces", "semantic", "layout"}
    )
    if full.few_step_batch:  # the alignment covers all steps, as in the paper
        assert task.rollout.grad_steps == task.rollout.steps == 4


@pytest.mark.parametrize(
    "name, published", [("sdxl_stage3", "pulid_v1"), ("sdxl_stage3_v11", "pulid_v1.1")]
)
def test_full_size_adapter_has_the_published_tensors(golden, name, published):
    encoder = {"IDEncoder": IDEncoder, "IDFormer": IDFormer}[recipes.find_recipe(name).encoder]
    with torch.device("meta"):
        adapter = PuLID.for_unet(UNet2DConditionModel(**SDXL_UNET), encoder())
    assert {k: list(v.shape) for k, v in adapter.state_dict().items()} == golden.manifest[published]


def test_accumulated_step_matches_a_whole_step(tmp_path, both_precisions):
    schedule = replace(tiny.recipe().trainer_config(), steps=4, validate_every=100, log_every=1)
    one = run(tiny.task(**STAGE3), schedule, tmp_path / "one").metrics
    two = run(
        tiny.task(**STAGE3, accumulate=2), replace(schedule, accumulate=2), tmp_path / "two"
    ).metrics
    whole, parts = (losses_of(tmp_path / name) for name in ("one", "two"))
    rel = 2e-2 if both_precisions else 1e-4  # bfloat16 rounds each half of the batch on its own
    assert len(whole) == 4 and all(
        parts[step] == pytest.approx(whole[step], rel=rel, abs=1e-6) for step in whole
    )
    same = (
        "held_out_own",
        "held_out_none",
        "held_out_face_sim",
        "held_out_faces",
    )  # another is the next one of the part
    assert {name: two[name] for name in same} == pytest.approx(
        {name: one[name] for name in same}, rel=rel
    )
    assert two["held_out_other"] != two["held_out_own"]


def losses_of(folder):
    history = json.loads((folder / "history.json").read_text())
    return {r["step"]: r["losses"] for r in history if "losses" in r}


def test_copy_paste_is_reported_for_paired_images():
    """Copies of the reference give 1, copies of the target -1, in the angles of the embeddings."""
    task = tiny.task(**STAGES["stage2"])
    plain = task.validate()
    assert "held_out_copy_paste" not in plain
    people = task.validation.data
    batch = people.batch

    def paired_batch(rng):
        found = batch(rng)
        return found._replace(references=found.images.flip(-1))

    people.batch = paired_batch
    paired = task.validate()
    assert -1.01 <= paired["held_out_copy_paste"] <= 1.01
    assert paired["held_out_face_sim"] == pytest.approx(plain["held_out_face_sim"])

    angles = torch.tensor([0.0, 0.3, 1.0])
    target, middle, reference = torch.stack([angles.cos(), angles.sin()], -1)[:, None]
    for image, expected in ((target, -1.0), (middle, (0.3 - 0.7) / 1.0), (reference, 1.0)):
        value = copy_paste(image, target, reference).item()
        assert value == pytest.approx(expected, abs=1e-3)


def test_scorer_measures_and_does_not_train():
    """A scorer equal to the loss's model has its similarity; another one has its own."""
    task = tiny.task(**STAGE2)
    plain, losses = task.validate(), compute_losses(task)
    assert "held_out_scorer_sim" not in plain
    scorer = tiny.faces()
    task.validation = replace(task.validation, scorer=scorer)
    assert task.validate()["held_out_scorer_sim"] == pytest.approx(plain["held_out_face_sim"])
    torch.manual_seed(9)
    for parameter in scorer.models[0].parameters():
        parameter.copy_(torch.randn_like(parameter))
    scored = task.validate()
    assert abs(scored["held_out_scorer_sim"] - plain["held_out_face_sim"]) > 1e-3
    assert scored["held_out_face_sim"] == pytest.approx(plain["held_out_face_sim"])
    assert compute_losses(task) == losses
