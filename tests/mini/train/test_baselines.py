"""Baselines on the miniature: they train, the base stays frozen, and saving keeps the result."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from safetensors import safe_open
from transformers import CLIPVisionModelWithProjection

from openpulid.methods.registry import find_method
from openpulid.mini.train.baseline_task import BaselineTask
from openpulid.mini.train.baselines import BASELINES, FEATURES, NAMES, Baseline, draw_uniform
from openpulid.mini.train.build_context import stamp
from openpulid.mini.train.loss_models import create_model
from openpulid.pipelines.factory import check_models, load_pipeline
from openpulid.pipelines.presets import MINIATURE, mini
from openpulid.pipelines.selection import with_method
from openpulid.training.checkpointing import trainable_parameters
from openpulid.training.photoverse import draw_fusion
from openpulid.training.pulid.batch import Batch
from openpulid.training.pulid.branches import DiffusionStep
from openpulid.training.pulid.localization import attention_weights, resize_masks
from openpulid.training.pulid.models import SDXLModel
from openpulid.training.pulid.recipes import find_recipe as recipe
from openpulid.training.rng import StepRNG
from openpulid.training.trainer import sum_losses
from openpulid.training.w_plus import disturb_latents

FACE, SIDE, COUNT = 8, 96, 2
LATENTS = (18, 8)  # of a face
STEP = 0  # whose random numbers are drawn
LEVELS = (5, 37, 96)  # the miniature's vision encoder: levels, tokens, width
IN_8_BITS = ("elite", "instantid")  # the others are stored in 16 bits


class Fixed:
    """The same pictures at every step."""

    def __init__(self, pipe: Any, name: str) -> None:
        generator = torch.Generator().manual_seed(3)
        shape = (COUNT, *SDXLModel(pipe).latent_shape())
        width = math.prod(LATENTS) if FEATURES[name] == "latents" else FACE
        face = torch.randn(COUNT, width, generator=generator)
        pixels = torch.randn(COUNT, 3, SIDE * SIDE, generator=generator)
        marks = torch.rand(COUNT, 5, 2, generator=generator)
        masks = torch.ones(COUNT, 1, *shape[2:])
        prompts = ["portrait of a person, photo", "portrait, smiling"]
        hidden = {
            "embedding": [],
            "latents": [],
            "images": [pixels],
            "levels": [torch.randn(COUNT, *LEVELS[1:], generator=generator) for _ in range(5)],
        }[FEATURES[name]]
        self.rows = Batch(
            torch.randn(shape, generator=generator), masks, prompts, face, hidden, None, marks
        )

    def batch(self, draw: StepRNG) -> Batch:
        return self.rows


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_pipeline(mini(), torch.device("cpu"))


def made(name: str, pipe: Any) -> tuple[Baseline, BaselineTask]:
    torch.manual_seed(0)
    inputs: dict[str, Any] = {
        "embedding": FACE,
        "levels": LEVELS[-1],
        "latents": torch.randn(3, *LATENTS),
    }
    if FEATURES[name] == "images":
        inputs["images"] = CLIPVisionModelWithProjection.from_pretrained(MINIATURE / "clip").float()
    baseline = BASELINES[name](pipe, inputs[FEATURES[name]])
    source = Fixed(pipe, name)
    return baseline, BaselineTask(
        recipe("mini_stage1"), SDXLModel(type(pipe)(**pipe.components)), baseline, source, source
    )


@pytest.mark.parametrize("name", NAMES)
def test_baseline_trains_and_saves_its_result(name: str, pipe: Any, tmp_path: Path) -> None:
    base = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    baseline, task = made(name, pipe)
    learned = list(trainable_parameters(task.modules()).values())
    optimizer = torch.optim.AdamW(learned, lr=3e-3)
    told = []
    for _ in range(6):  # the same noise each time: the loss must fall
        losses = task.losses(StepRNG(0, STEP))
        optimizer.zero_grad()
        sum_losses(losses).backward()
        optimizer.step()
        told.append(losses["diffusion"].item())
    assert told[-1] < told[0] * 0.995
    assert sum(float(x.grad.abs().sum()) > 0 for x in learned if x.grad is not None) > 0.8 * len(
        learned
    )
    assert all(torch.equal(value, base[key]) for key, value in pipe.unet.state_dict().items())
    # a method that always needs an identity never learned what none is
    nobody = set() if baseline.needs_identity else {"held_out_none"}
    assert set(task.validate()) == {"held_out_own", "held_out_other"} | nobody

    place = baseline.save(tmp_path / name, pipe)
    assert place == (tmp_path / name if name == "instantid" else tmp_path / f"{name}.safetensors")
    stamp(place, {"revision": "abc", "minutes": 1})
    size = sum(file.stat().st_size for file in ([place] if place.is_file() else place.rglob("*.*")))
    assert size < 8e6, f"{name} takes {size / 1e6:.1f} million bytes"
    dtypes = set()
    for file in [place] if place.is_file() else place.rglob("*.safetensors"):
        with safe_open(file, framework="pt") as written:
            assert written.metadata()["revision"] == "abc"
            dtypes |= {written.get_slice(key).get_dtype() for key in written.keys()}  # noqa: SIM118
    assert ("F8_E4M3" in dtypes) == (name in IN_8_BITS)
    again: Any = find_method(name)
    loaded = again.load(place).to(torch.device("cpu"), torch.float32)
    check_models(with_method(mini(), name, place))  # the benchmark's check
    loaded.attach(pipe)
    baseline.method.attach(pipe)
    if FEATURES[name] == "images":
        pixels = torch.rand(1, 3, 96, 96)
        seen = []
        for method in (baseline.method, loaded):
            encoder = method.create_extractor(None).vision_encoder
            states = encoder(pixel_values=pixels, output_hidden_states=True).hidden_states
            seen.append(states[-1])
        assert torch.allclose(*seen, atol=0.05), "the tower is not the one that it was trained with"
    people = baseline.identities(task.data.batch(StepRNG(0, 0)))[0]
    images = []
    for method, scale in ((baseline.method, 1.0), (loaded, 1.0), (loaded, 0.0)):
        with method.use(people, scale=scale, start=0.0, pipe=pipe), torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            known = {
                "num_inference_steps": 2,
                "guidance_scale": 2.0,
                "output_type": "latent",
                "generator": generator,
            }
            images.append(pipe("portrait of a person, photo", **known).images)
    lost, shown = (images[0] - images[1]).abs().max(), (images[0] - images[2]).abs().max()
    # only precision is lost in saving
    assert lost < (0.2 if name in IN_8_BITS else 0.05) and lost < shown / 5, (lost, shown)
    baseline.method.detach(pipe)


def text_of(baseline: Baseline, task: BaselineTask, batch: Batch) -> torch.Tensor:
    """Return the text that the U-Net reads for a batch."""
    seen = []
    unet = task.base.unet

    def read(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(kwargs["encoder_hidden_states"])

    with baseline.use(batch, task.base.pipe), torch.no_grad():
        text = task.base.encode_text(batch.prompts)
        handle = unet.register_forward_pre_hook(read, with_kwargs=True)
        task.base.predict(batch.latents, torch.full((COUNT,), 500), text)
        handle.remove()
    return seen[0]


def test_face0_zeroes_the_vectors_of_dropped_identities(pipe: Any) -> None:
    baseline, task = made("face0", pipe)
    batch = task.data.batch(StepRNG(0, 0))
    dropped = baseline.drop(batch, torch.tensor([True, False]), StepRNG(0, STEP))
    text = text_of(baseline, task, dropped)
    assert not text[0, -3:].any() and text[0, -4].any()
    assert torch.equal(text[1], text_of(baseline, task, batch)[1]) and text[1, -3:].any()
    baseline.method.detach(pipe)


@pytest.mark.parametrize("name", ["photoverse", "elite"])
def test_words_learn_through_the_text_encoders(name: str, pipe: Any) -> None:
    baseline, task = made(name, pipe)
    task.losses(StepRNG(0, STEP))["diffusion"].backward()
    networks = {"photoverse": "text_adapter.mapping_0", "elite": "global_mapper.mapping_0"}
    word = baseline.trained.get_submodule(networks[name])
    assert all(x.grad is not None and x.grad.any() for x in word.parameters())
    encoders = (pipe.text_encoder, pipe.text_encoder_2)
    assert all(x.grad is None for encoder in encoders for x in encoder.parameters())
    baseline.method.detach(pipe)


def test_photoverse_draws_the_weights_of_each_training_step(pipe: Any) -> None:
    baseline, task = made("photoverse", pipe)
    torch.nn.init.normal_(baseline.method.networks.cross_attention["1"].to_v_visual.weight)
    reads_image, steps = {}, {}
    for step in (0, 1, 3):
        baseline.method.networks.zero_grad()
        steps[step] = task.losses(StepRNG(0, step))
        steps[step]["diffusion"].backward()
        gradient = baseline.method.networks.image_adapter.mapping_0[6].weight.grad
        reads_image[step] = bool(gradient.any())
    assert reads_image == {0: True, 1: False, 3: True}
    again = task.losses(StepRNG(0, 1))
    assert all(torch.equal(again[name], steps[1][name]) for name in again)
    assert all(losses.keys() == {"diffusion", "words", "values"} for losses in steps.values())
    words = [losses["words"] for losses in steps.values()]
    assert torch.equal(words[0], words[1]) and 0 < words[0] < 0.1 and steps[0]["values"] > 0
    fusions = [draw_fusion(StepRNG(0, step).generator("fusion")) for step in (0, 1, 3)]
    assert [(x.text, x.visual) for x in fusions] == [(1, 1), (2, 0), (0, 2)]
    baseline.method.detach(pipe)


def test_fastcomposer_drops_identity_and_caption(pipe: Any) -> None:
    baseline, task = made("fastcomposer", pipe)
    batch = task.data.batch(StepRNG(0, 0))
    dropped = baseline.drop(batch, torch.tensor([True, False]), StepRNG(0, STEP))
    assert dropped.prompts == ["", batch.prompts[1]]
    text = text_of(baseline, task, dropped)
    assert torch.equal(text[0], task.base.encode_text([""]).embeds[0])
    assert torch.equal(text[1], text_of(baseline, task, batch)[1])
    assert not torch.equal(text[1], task.base.encode_text(batch.prompts).embeds[1])
    baseline.method.detach(pipe)


def test_fastcomposer_localizes_the_words_of_people_who_are_shown(pipe: Any) -> None:
    baseline, task = made("fastcomposer", pipe)
    assert [draw_uniform(StepRNG(0, step), "inside") < 0.5 for step in (0, 2)] == [True, False]
    masks = torch.zeros(COUNT, 1, 12, 12)
    masks[:, :, 3:9, 3:9] = 1
    batch = task.data.batch(StepRNG(0, 0))._replace(masks=masks)
    found = {}
    for row, prompt in enumerate(batch.prompts):
        tokens = pipe.tokenizer_2.convert_ids_to_tokens(pipe.tokenizer_2(prompt).input_ids)
        found[row] = tokens.index("person") if "person" in tokens else 1
    with baseline.use(batch, task.base.pipe), task.base.capture_attention() as attention:
        text = task.base.encode_text(batch.prompts)
        task.base.predict(batch.latents, torch.full((COUNT,), 500), text)
    kept = batch._replace(id_cond=batch.id_cond * torch.tensor([[1.0], [0.0]]))
    terms = []
    for layer in attention:
        maps = attention_weights(layer)[0, :, :, found[0]].mean(0)
        inside = resize_masks(masks[:1], len(maps))[0, 0]
        difference = (maps * (1 - inside)).sum() / (1 - inside).sum()
        terms.append(difference - (maps * inside).sum() / inside.sum())
    expected = 1e-3 * torch.stack(terms).mean() / COUNT  # the second row shows no one
    loss = baseline.extra_losses(kept, task.base.pipe, attention)["localization"]
    assert torch.allclose(loss, expected, rtol=1e-4) and loss != 0

    step = DiffusionStep(batch.latents, torch.zeros_like(batch.latents), batch.latents, text.pooled)
    masked = baseline.masked_loss(step, kept)
    assert masked is not None
    region = batch.latents[0, :, 3:9, 3:9].square().sum() / batch.latents.numel()
    assert torch.allclose(masked, region, rtol=1e-5)
    baseline.method.detach(pipe)


def test_elite_trains_both_mappers_in_turns(pipe: Any) -> None:
    baseline, task = made("elite", pipe)
    mappers = baseline.method.encoder
    learned = {}
    for step in (0, 1):  # that of the local mapper, and that of the global one
        mappers.zero_grad()
        losses = task.losses(StepRNG(0, step))
        losses["diffusion"].backward()
        words = [
            mappers.get_submodule(f"global_mapper.mapping_{level}.6").weight.grad
            for level in range(5)
        ]
        patches = mappers.local_mapper.mapping_4[6].weight.grad
        learned[step] = [x is not None and bool(x.any()) for x in (*words, patches)]
        assert losses.keys() == {"diffusion", "words", "values"}
        levels = [task.data.rows.hidden[level] for level in (4, 0, 1, 2, 3)]
        size = mappers.global_mapper.words(levels).abs().mean()
        assert torch.allclose(losses["words"], 0.01 * size)
        assert mappers.num_words == 1
    assert learned == {0: [True] + 4 * [False] + [True], 1: 5 * [True] + [False]}
    baseline.method.detach(pipe)


def test_w_plus_trains_both_stages_of_its_authors(pipe: Any) -> None:
    baseline, task = made("w-plus", pipe)
    projection = baseline.method.networks.w_proj.proj_0.weight
    layer = baseline.method.networks.wplus_adapter["1"].to_v_wplus.weight
    names, trains_projection = {}, {}
    for step in (0, 1):  # of the first stage, and of the second
        baseline.trained.zero_grad()
        losses = task.losses(StepRNG(0, step))
        sum_losses(losses).backward()
        assert layer.grad is not None and layer.grad.any()
        names[step] = list(losses)
        trains_projection[step] = projection.grad is not None and bool(projection.grad.any())
    assert names == {0: ["diffusion"], 1: ["diffusion", "disentanglement", "preservation"]}
    assert trains_projection == {0: True, 1: False}
    baseline.method.detach(pipe)


def test_w_plus_compares_with_other_latents_and_with_no_identity(pipe: Any) -> None:
    baseline, task = made("w-plus", pipe)
    rng = StepRNG(0, 1)
    batch = task.data.batch(rng)
    latents = batch.id_cond.unflatten(1, LATENTS)
    other, none = baseline.comparisons(batch, rng)
    expected = disturb_latents(latents, rng.generator("disturbance"), baseline.directions)
    assert none is None and torch.equal(other.id_cond, expected.flatten(1))

    masks = torch.zeros(COUNT, 1, 12, 12)
    masks[:, :, 3:9, 3:9] = 1
    batch = batch._replace(masks=masks)
    zero = torch.zeros_like(batch.latents)
    change = zero.clone()
    change[:, :, 3:9, 3:9] = 1  # inside the face alone
    steps = [DiffusionStep(x, zero, zero, zero) for x in (zero, change, change)]
    losses = baseline.comparison_losses(steps[0], steps[1:], batch)
    assert losses["disentanglement"] == 0
    assert losses["preservation"].item() == pytest.approx(0.4 * 36 / 144)
    predictions = task._predict_comparisons(rng, batch)
    with torch.no_grad(), baseline.method.use(baseline.identities(batch), 0.0, pipe=task.base.pipe):
        text = task.base.encode_text(batch.prompts)
        unconditional = task.base.predict(predictions[1].x_t, predictions[1].t, text)
    assert torch.allclose(predictions[1].output, unconditional, atol=1e-5)
    assert torch.equal(predictions[0].x_t, predictions[1].x_t)
    assert not torch.allclose(predictions[0].output, unconditional, atol=1e-3)
    baseline.method.detach(pipe)


def test_w_plus_drops_identities_captions_or_both(pipe: Any) -> None:
    baseline, task = made("w-plus", pipe)
    row = task.data.batch(StepRNG(0, 0))
    count = 4000
    batch = row._replace(id_cond=row.id_cond[:1].expand(count, -1), prompts=row.prompts[:1] * count)
    dropped = torch.rand(count, generator=torch.Generator().manual_seed(0)) < 0.1
    result = baseline.drop(batch, dropped, StepRNG(0, 0))
    assert torch.equal(result.id_cond.any(1), ~dropped)
    has_caption = torch.tensor([bool(prompt) for prompt in result.prompts])
    shares = [
        (dropped & has_caption).float().mean(),
        (~dropped & ~has_caption).float().mean(),
        (dropped & ~has_caption).float().mean(),
    ]
    assert all(abs(float(share) - 0.05) < 0.012 for share in shares)
    baseline.method.detach(pipe)


def test_plain_attention_on_a_cpu_changes_no_prediction() -> None:
    pipe = load_pipeline(mini(), torch.device("cpu"))
    base = SDXLModel(pipe)
    x_t = torch.randn(2, *base.latent_shape(), generator=torch.Generator().manual_seed(0))
    t = torch.tensor([200.0, 800.0])
    text = base.encode_text(["a person", "a person, smiling"])
    with torch.no_grad():
        fused = base.predict(x_t, t, text)
        plain = create_model(recipe("mini_stage1"), pipe).predict(x_t, t, text)
    assert {type(processor) for processor in pipe.unet.attn_processors.values()} == {AttnProcessor}
    torch.testing.assert_close(plain, fused, atol=1e-4, rtol=1e-4)
