"""Naive, stage 2 and stage 3 on a tiny random SDXL: what reaches the adapter, and what is left alone."""

from __future__ import annotations

import json
import socket
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel

from openpulid.bench.perf.training import SDXL_UNET
from openpulid.errors import OptionError
from openpulid.methods.pulid.encoders import IDEncoder, IDFormer
from openpulid.methods.pulid.sdxl import PuLID
from openpulid.training.pulid import recipes
from openpulid.training.pulid.task import PuLIDTask
from openpulid.training.rng import StepRNG
from openpulid.training.trainer import run
from tests.support import tiny_sdxl as tiny

pytestmark = pytest.mark.usefixtures("both_precisions")

STAGE2 = {"id_loss": "accurate", "fast_batch": 2, "last": 2, "id_prompt": "portrait"}
STAGE3 = {
    **STAGE2,
    "semantic": 0.6,
    "layout": 0.1,
    "align_prompts": ("portrait", "noir", "red hat"),
}
STAGES = {"naive": {"id_loss": "naive", "fast_batch": 2}, "stage2": STAGE2, "stage3": STAGE3}
NAMES = {
    "naive": ["diffusion", "id"],
    "stage2": ["diffusion", "id"],
    "stage3": ["diffusion", "id", "semantic", "layout"],
}


def gradients(task, names, step: int = 0):
    """Of the named losses alone, by parameter."""
    for parameter in task.adapter.parameters():
        parameter.grad = None
    for part in task.losses(StepRNG(0, step)):
        wanted = [value for name, value in part.items() if name in names and value.requires_grad]
        if wanted:
            torch.stack(wanted).sum().backward()
    return {name: p.grad for name, p in task.adapter.named_parameters()}


@pytest.mark.parametrize("stage", STAGES)
def test_every_loss_reaches_all_of_the_adapter_and_nothing_else(pipe, stage):
    task = tiny.task(pipe, **STAGES[stage])
    for name in NAMES[stage]:
        found = gradients(task, [name])
        # the last layer's own queries cannot feel what its identity attention adds after them
        reached = [key for key, grad in found.items() if grad is not None and grad.abs().sum() > 0]
        assert len(reached) > 0.9 * len(found) - 2, name
    frozen = [pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2, task.faces.recognition]
    assert all(p.grad is None and not p.requires_grad for m in frozen for p in m.parameters())


@pytest.mark.parametrize("stage", ["naive", "stage2"])
def test_the_id_loss_comes_through_the_decoder(stage):
    task = tiny.task(**STAGES[stage])
    assert any(
        grad is not None and grad.abs().sum() > 0 for grad in gradients(task, ["id"]).values()
    )
    for base in {id(b): b for b in (task.base, *task.fast)}.values():
        base.decode = torch.no_grad()(base.decode)
    assert all(grad is None for grad in gradients(task, ["id"]).values())


def test_the_path_without_identity_is_the_base_itself():
    """Its queries do not depend on the adapter: with values of zero both paths are one."""
    task = tiny.task(**STAGE3)
    for layer in task.adapter.id_adapter_attn_layers.values():
        torch.nn.init.zeros_(layer.id_to_v.weight)
    *_, last = task.losses(StepRNG(0, 0))
    assert last["semantic"].item() < 1e-5 and last["layout"].item() < 1e-5


@pytest.mark.parametrize("change", [{}, {"align_one_step": True, "guidance": 2.0, "fast_steps": 6}])
def test_without_prompts_of_its_own_a_stage_hears_those_of_the_pictures(change):
    own = {**STAGE3, **change, "fast_batch": 4, "id_prompt": None, "align_prompts": ()}
    said = {}
    for name, figures in {
        "own": own,
        "one": {**own, "id_prompt": "portrait", "align_prompts": ("portrait",)},
    }.items():
        task = tiny.task(**figures)
        for layer in task.adapter.id_adapter_attn_layers.values():
            torch.nn.init.constant_(layer.id_to_v.weight, 0.01)
        said[name] = {
            key: value.item() for part in task.losses(StepRNG(0, 0)) for key, value in part.items()
        }
        every = task.data.batch
        task.data.batch = lambda draw, every=every: every(draw)._replace(prompts=["portrait"] * 4)
        said[f"{name}, all alike"] = {
            k: v.item() for part in task.losses(StepRNG(0, 0)) for k, v in part.items()
        }
    assert said["own"]["id"] != said["one"]["id"] and said["own"]["layout"] != said["one"]["layout"]
    assert said["own, all alike"] == said["one, all alike"]


@pytest.mark.parametrize(
    "change",
    [{}, {"align_one_step": True}, {"align_one_step": True, "guidance": 2.0, "fast_steps": 6}],
)
def test_training_leaves_the_base_as_it_was(pipe, tmp_path, change):
    modules = (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
    before = [t.clone() for m in modules for t in m.state_dict().values()]
    processors = dict(pipe.unet.attn_processors)
    task = tiny.task(pipe, **{**STAGE3, **change})
    schedule = replace(tiny.recipe().schedule(), steps=3, validate_every=2, log_every=1)
    result = run(task, schedule, tmp_path)
    assert set(result.losses) == {"diffusion", "id", "semantic", "layout", "faces"}
    assert (
        result.metrics["held_out_faces"] == 1.0 and -1 <= result.metrics["held_out_likeness"] <= 1
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(before, (t for m in modules for t in m.state_dict().values()), strict=True)
    )
    assert dict(pipe.unet.attn_processors) == processors
    assert not any(h for m in pipe.unet.modules() for h in (m._forward_hooks, m._forward_pre_hooks))


def test_checkpointing_gives_the_same_gradients():
    plain, again = (
        gradients(tiny.task(**STAGE3, checkpoint=c), NAMES["stage3"]) for c in (False, True)
    )
    for name in plain:
        assert torch.allclose(plain[name], again[name], rtol=1e-4, atol=1e-8), name


def test_pictures_without_a_face_are_left_out_and_counted():
    task = tiny.task(**STAGE2)
    find = task.faces.find
    task.faces.find = lambda images: [face if k else None for k, face in enumerate(find(images))]
    draw = StepRNG(0, 0)
    parts = [{name: value.item() for name, value in part.items()} for part in task.losses(draw)]
    assert draw.figures["faces"].item() == 0.5 and parts[1]["id"] > 0
    task.faces.find = lambda images: [None] * len(images)
    draw = StepRNG(0, 0)
    found = gradients(task, ["id"])
    assert all(grad is None or grad.abs().sum() == 0 for grad in found.values())


def test_bases_take_turns():
    task, seen = tiny.task(**STAGE2), []
    first, second = task.fast[0], tiny.base()
    task.adapter.attach(second.pipe)
    task.fast.append(second)
    for name, base in {"first": first, "second": second}.items():
        decode = base.decode
        base.decode = lambda latents, decode=decode, name=name: seen.append(name) or decode(latents)
    for step in range(3):
        gradients(task, ["id"], step)
    assert seen == ["first", "second", "first"]


def test_a_recipe_that_walks_on_its_base_has_it_last_among_the_fast_ones():
    made = tiny.task(**STAGE2)
    fast, faces, second = made.fast, made.faces, tiny.base()
    for walks, expected in ((False, fast), (True, [*fast, second])):
        adapter = tiny.adapter(second)
        task = PuLIDTask(
            tiny.recipe(**STAGE2, walk_base=walks),
            second,
            adapter,
            tiny.People(4),
            fast=fast,
            faces=faces,
        )
        assert task.fast == expected


def test_what_a_recipe_needs_is_asked_for():
    with pytest.raises(OptionError, match="lightning branch"):
        tiny.task(semantic=0.6)
    with pytest.raises(OptionError, match="faces"):
        tiny.task(id_loss="naive")


@pytest.mark.parametrize("name", [name for name in recipes.RECIPES if name.startswith("sdxl")])
def test_the_recipes_of_full_size_run(name, tmp_path):
    full = recipes.find_recipe(name)
    small = replace(
        full, batch=4, fast_batch=min(full.fast_batch, 2), pixels=full.pixels and 16, steps=2
    )
    base = tiny.base()
    adapter = tiny.adapter(base, full.encoder)
    task = PuLIDTask(
        small, base, adapter, tiny.People(4), tiny.People(4), fast=[base], faces=tiny.faces()
    )
    result = run(task, replace(small.schedule(), warmup=1, log_every=1), tmp_path)
    expected = {"sdxl_stage1": {"diffusion"}, "sdxl_stage2": {"diffusion", "id", "faces"}}
    stage = name.removesuffix("_v11")
    assert set(result.losses) == expected.get(
        stage, {"diffusion", "id", "faces", "semantic", "layout"}
    )
    if full.fast_batch:  # the alignment is over all steps, as in the paper, and the ID loss reaches those that decide who is seen
        assert task.walk.last == task.walk.steps == 4


@pytest.mark.parametrize(
    "name, published", [("sdxl_stage3", "pulid_v1"), ("sdxl_stage3_v11", "pulid_v1.1")]
)
def test_a_checkpoint_of_full_size_is_what_every_loader_opens(golden, name, published):
    encoder = {"IDEncoder": IDEncoder, "IDFormer": IDFormer}[recipes.find_recipe(name).encoder]
    with torch.device("meta"):
        adapter = PuLID.for_unet(UNet2DConditionModel(**SDXL_UNET), encoder())
    assert {k: list(v.shape) for k, v in adapter.state_dict().items()} == golden.manifest[published]


def test_a_step_in_parts_is_the_step(tmp_path, both_precisions):
    schedule = replace(tiny.recipe().schedule(), steps=4, validate_every=100, log_every=1)
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
        "held_out_likeness",
        "held_out_faces",
    )  # another is the next one of the part
    assert {name: two[name] for name in same} == pytest.approx(
        {name: one[name] for name in same}, rel=rel
    )
    assert two["held_out_other"] != two["held_out_own"]


WORKER = """
import sys, torch
from tests.support import tiny_sdxl as tiny
from dataclasses import replace
from openpulid.training.trainer import run
torch.set_num_threads(1)
task = tiny.task(id_loss="accurate", fast_batch=2, last=2, semantic=0.6, layout=0.1)
for name in ("data", "held_out"):
    def counted(draw, name=name, every=getattr(task, name).batch):
        batch = every(draw)
        with open(f"{sys.argv[1]}.{name}", "a") as file:
            print(len(batch.latents), file=file)
        return batch
    getattr(task, name).batch = counted
run(task, replace(tiny.recipe().schedule(), steps=4, validate_every=100, log_every=1), sys.argv[1])
"""


def test_two_processes_give_the_losses_of_one_and_validate_in_their_shares(
    tmp_path, start, both_precisions
):
    changes = {"id_loss": "accurate", "fast_batch": 2, "last": 2, "semantic": 0.6, "layout": 0.1}
    schedule = replace(tiny.recipe().schedule(), steps=4, validate_every=100, log_every=1)
    run(tiny.task(**changes), schedule, tmp_path / "one")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    shared = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    workers = [
        start(WORKER, tmp_path / "two", RANK=str(r), LOCAL_RANK=str(r), **shared) for r in range(2)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=500)
        assert worker.returncode == 0, errors
    one, two = (losses_of(tmp_path / name) for name in ("one", "two"))
    rel = 2e-2 if both_precisions else 1e-4  # bfloat16 rounds each half of the batch on its own
    assert len(one) == 4 and all(
        two[step] == pytest.approx(one[step], rel=rel, abs=1e-6) for step in one
    )
    # one process validates alone, and has memory for what it reads in a step
    trained, validated = (
        {int(n) for n in (tmp_path / f"two.{name}").read_text().split()}
        for name in ("data", "held_out")
    )
    assert trained == validated == {2}


def losses_of(folder):
    history = json.loads((folder / "history.json").read_text())
    return {r["step"]: r["losses"] for r in history if "losses" in r}
