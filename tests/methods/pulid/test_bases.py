"""PuLID for FLUX in FLUX.1 and its relatives: Chroma, FLUX.2, Qwen-Image and Z-Image."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    ChromaTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    ZImageTransformer2DModel,
)
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity

from openpulid.errors import OptionError, WeightsError
from openpulid.methods.pulid.encoders import IDFormer
from openpulid.methods.pulid.flux import PuLIDFlux, delay_guidance
from openpulid.methods.transformer_kinds import BlockKey, find_transformer, identity_blocks
from tests.support import tiny_flux
from tests.support.people import anna, ben, distance
from tests.support.tiny_bases import BASES, fresh_adapter, run_base, tiny_base

ROWS, COLUMNS = 4, 6
LEFT = torch.zeros(ROWS, COLUMNS)
LEFT[:, :3] = 1


@pytest.fixture(params=BASES)
def base(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, tiny_base(request.param)


def modules_with_hooks(transformer: Any) -> list[Any]:
    return [m for m in transformer.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_identity_acts_and_pipeline_is_restored(base) -> None:
    name, pipe = base
    baseline = run_base(name, pipe)
    adapter = fresh_adapter(pipe)
    assert len(adapter.layers) == BASES[name].num_layers
    images = []
    for person in (anna, ben):
        with adapter.use(person):
            images.append(run_base(name, pipe))
    assert min(distance(baseline, x) for x in images) > 1e-3 and distance(*images) > 1e-3
    with adapter.use(anna, scale=0):
        assert np.array_equal(run_base(name, pipe), baseline)
    assert np.array_equal(run_base(name, pipe), baseline)
    assert not modules_with_hooks(pipe.transformer)
    adapter.detach(pipe)
    with pytest.raises(OptionError, match="is not attached to this pipeline"), adapter.use(anna):
        pass


def test_untrained_adapter_changes_nothing(base) -> None:
    name, pipe = base
    encoder = IDFormer(**tiny_flux.SMALL, output_dim=16, hidden_dim=16)
    adapter = PuLIDFlux.for_transformer(pipe.transformer, encoder, dim_head=8, heads=2)
    adapter.attach(pipe)
    baseline = run_base(name, pipe)
    with adapter.use(anna):
        assert np.array_equal(run_base(name, pipe), baseline)


def test_start_step_and_fractions_agree(base) -> None:
    name, pipe = base
    adapter = fresh_adapter(pipe)
    variants: dict[str, dict[str, Any]] = {
        "all": {},
        "fraction": {"start": 0.5},
        "step": {"start_step": 2},
        "end": {"end": 0.5},
        "never": {"start_step": 4},
    }
    images = {}
    for variant, options in variants.items():
        with adapter.use(anna, **options):
            images[variant] = run_base(name, pipe)
    assert np.array_equal(images["fraction"], images["step"])
    assert np.array_equal(images["never"], run_base(name, pipe))
    assert len({images[variant].tobytes() for variant in ("all", "step", "end", "never")}) == 4


def test_negative_prompt_has_unconditional_tokens(base) -> None:
    name, pipe = base
    adapter = fresh_adapter(pipe)
    unconditional = adapter.unconditional(anna.id_cond, anna.hidden).detach()
    tokens = adapter.encode(anna.id_cond, anna.hidden).detach()
    with adapter.use(anna):
        images = run_base(name, pipe, negative=True)
        unguided = run_base(name, pipe)
    assert distance(images, unguided) > 1e-3
    with adapter.use_tokens(tokens, negative=unconditional):
        assert distance(run_base(name, pipe, negative=True), images) < 1e-5
    with adapter.use_tokens(tokens, negative=tokens):  # the same identity on both sides
        assert distance(run_base(name, pipe, negative=True), images) > 1e-3


def test_guidance_is_delayed_with_and_without_identity(base) -> None:
    name, pipe = base
    adapter = fresh_adapter(pipe)
    images = []
    for first in (0, 2, 4):
        with adapter.use(anna, timestep_to_start_cfg=first):
            images.append(run_base(name, pipe, negative=True))
    assert len({image.tobytes() for image in images}) == 3
    with adapter.use(anna):
        assert distance(run_base(name, pipe), images[2]) < 1e-5
    with delay_guidance(pipe, 4):
        assert distance(run_base(name, pipe, negative=True), run_base(name, pipe)) < 1e-5


@pytest.mark.parametrize("negative", [False, True])
def test_batches_match_single_images(base, negative: bool) -> None:
    name, pipe = base
    adapter = fresh_adapter(pipe)
    with adapter.use([anna, ben]):
        both = run_base(name, pipe, count=2, negative=negative)
    for index, one in enumerate((anna, ben)):
        with adapter.use([one, one]):
            twice = run_base(name, pipe, count=2, negative=negative)
        apart = [distance(*pair) for pair in zip(both, twice, strict=True)]
        assert apart[index] < 1e-5 and apart[1 - index] > 1e-3
    with pytest.raises(OptionError, match="do not fit"), adapter.use([anna, ben]):
        run_base(name, pipe, count=3, negative=negative)


def changes(
    name: str, pipe: Any, adapter: PuLIDFlux, people: Any, **options: Any
) -> dict[BlockKey, Tensor]:
    """Return per hooked block which tokens (B, T) the identity changes, text first for pairs."""
    transformer, kind = find_transformer(pipe)
    outputs: dict[tuple[BlockKey, bool], Tensor] = {}
    handles = []

    def capture(key: BlockKey, is_after: bool) -> None:
        def keep(block: Any, args: Any, output: Any) -> None:
            tokens = output if isinstance(output, Tensor) else torch.cat(output, 1)
            outputs.setdefault((key, is_after), tokens)

        handles.append(kind.blocks(transformer, key).register_forward_hook(keep))

    keys = identity_blocks(transformer)
    for key in keys:
        capture(key, False)
    with adapter.use(people):
        for key in keys:
            capture(key, True)
        run_base(name, pipe, steps=1, **options)
    for handle in handles:
        handle.remove()
    return {key: (outputs[key, True] != outputs[key, False]).any(-1) for key in keys}


@pytest.mark.parametrize("is_masked", [False, True])
def test_only_generated_tokens_change(base, is_masked: bool) -> None:
    """Text, padding and tokens outside a mask remain, in each block that returns them."""
    name, pipe = base
    adapter = fresh_adapter(pipe)
    region = LEFT.bool().flatten() if is_masked else torch.ones(ROWS * COLUMNS, dtype=torch.bool)
    for changed in changes(name, pipe, adapter, [(anna, LEFT if is_masked else None)]).values():
        num_others = changed.shape[1] - len(region)
        others = torch.zeros(num_others, dtype=torch.bool)
        parts = [region, others] if name == "Z-Image" else [others, region]
        assert num_others >= 7 and torch.equal(changed[0], torch.cat(parts))


def test_masks_divide_the_image_among_people(base) -> None:
    name, pipe = base
    adapter = fresh_adapter(pipe)
    pair = [(anna, LEFT), (ben, 1 - LEFT)]
    images = {}
    for order, people in {"pair": pair, "same": pair[::-1]}.items():
        with adapter.use([people]):
            images[order] = run_base(name, pipe, negative=True, count=2)
    assert distance(images["pair"], images["same"]) < 1e-5
    with adapter.use([[(anna, 1 - LEFT), (ben, LEFT)]]):
        assert distance(run_base(name, pipe, negative=True, count=2), images["pair"]) > 1e-3


def call_transformer(pipe: Any, name: str, x: Tensor) -> Tensor:
    """Call a transformer alone with latents (B, 4, 8, 12); gradients flow."""
    text = torch.randn(len(x), 7, 24, generator=torch.Generator().manual_seed(2))
    time = torch.full((len(x),), 0.5)
    if name == "Z-Image":
        output = pipe.transformer(list(x[:, :, None]), time, list(text), return_dict=False)[0]
        return torch.stack(output)
    tokens = torch.nn.functional.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)
    call = {"hidden_states": tokens, "encoder_hidden_states": text, "timestep": time}
    if name == "Qwen-Image":
        call["img_shapes"] = [[(1, ROWS, COLUMNS)]] * len(x)
    else:
        if name == "FLUX.1":
            call["pooled_projections"] = text[:, 0, :20]
            call["guidance"] = torch.full((len(x),), 3.5)
        axes = [torch.zeros(1), torch.arange(float(ROWS)), torch.arange(float(COLUMNS))]
        width = 4 if name == "FLUX.2" else 3
        call["img_ids"] = torch.cartesian_prod(*axes, *[torch.zeros(1)] * (width - 3))
        call["txt_ids"] = torch.zeros(7, width)
    return pipe.transformer(**call, return_dict=False)[0]


def test_gradients_reach_only_the_adapter(base) -> None:
    """The same with and without gradient checkpointing."""
    name, pipe = base
    adapter = fresh_adapter(pipe).requires_grad_(True)
    transformer = pipe.transformer.requires_grad_(False)
    x = torch.randn(1, 4, 2 * ROWS, 2 * COLUMNS, generator=torch.Generator().manual_seed(0))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        transformer.train(checkpointing)
        adapter.zero_grad()
        with adapter.use_tokens(adapter.encode(anna.id_cond, anna.hidden)):
            call_transformer(pipe, name, x).square().sum().backward()
        gradients.append([p.grad.clone() for p in adapter.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(list(adapter.parameters()))
    for one, second in zip(*gradients, strict=True):
        torch.testing.assert_close(one, second)
    assert all(p.grad is None for p in transformer.parameters())


def test_training_on_one_identity_raises_its_similarity(base) -> None:
    """The similarity is the cosine of the change of the output and a direction of the identity."""
    name, pipe = base
    torch.manual_seed(0)
    encoder = IDFormer(**tiny_flux.SMALL, output_dim=16, hidden_dim=16)
    adapter = PuLIDFlux.for_transformer(pipe.transformer, encoder, dim_head=8, heads=2)
    adapter.attach(pipe)
    pipe.transformer.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 2 * ROWS, 2 * COLUMNS, generator=generator)
    with torch.no_grad():
        baseline = call_transformer(pipe, name, x)
    identity = torch.randn(baseline.shape, generator=generator)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-2)
    similarities = []
    for _ in range(25):
        with adapter.use_tokens(adapter.encode(anna.id_cond, anna.hidden)):
            output = call_transformer(pipe, name, x)
        similarity = cosine_similarity(output.flatten(), identity.flatten(), dim=0)
        optimizer.zero_grad()
        (-similarity).backward()
        optimizer.step()
        similarities.append(similarity.item())
    assert similarities[-1] > similarities[0] + 0.1


FULL_SIZE = {
    "FLUX.1": lambda: FluxTransformer2DModel(guidance_embeds=True),
    "Chroma": lambda: ChromaTransformer2DModel(approximator_hidden_dim=16, approximator_layers=1),
    "FLUX.2": lambda: Flux2Transformer2DModel(
        num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680
    ),
    "Qwen-Image": lambda: QwenImageTransformer2DModel(),
    "Z-Image": lambda: ZImageTransformer2DModel(),
}


def test_published_weights_at_full_size(golden) -> None:
    """They fit FLUX.1 and Chroma. For other bases the message says how to get an adapter."""
    names = golden.manifest["pulid_flux"]
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in names.items()}
        adapter = PuLIDFlux.from_state_dict(state, IDFormer())
        transformers = {name: create() for name, create in FULL_SIZE.items()}
        counts = {
            name: len(PuLIDFlux.for_transformer(transformer, IDFormer()).layers)
            for name, transformer in transformers.items()
        }
    for name in ("FLUX.1", "Chroma"):
        adapter.attach(transformers[name])
    assert counts == {"FLUX.1": 20, "Chroma": 20, "FLUX.2": 8, "Qwen-Image": 20, "Z-Image": 15}
    advice = {
        "FLUX.2": "no adapter for FLUX.2 is published: train one with pulid train flux2_klein_st",
        "Qwen-Image": "no adapter for Qwen-Image is published: train one with pulid train qwen_im",
        "Z-Image": "no adapter for Z-Image is published: train one with pulid train z_image_stage1",
    }
    for name, message in advice.items():
        with pytest.raises(WeightsError, match=message):
            adapter.attach(transformers[name])


def test_references_of_flux2_are_unchanged() -> None:
    pipe = tiny_base("FLUX.2")
    adapter = fresh_adapter(pipe)
    image = Image.new("RGB", (256, 256), (200, 30, 30))
    for changed in changes("FLUX.2", pipe, adapter, anna, image=image).values():
        generated = changed[0].nonzero().flatten()
        assert torch.equal(generated, torch.arange(7, 7 + ROWS * COLUMNS))
        assert changed.shape[1] > 7 + 2 * ROWS * COLUMNS


def test_references_before_the_image_are_unchanged() -> None:
    """FLUX.2 klein caches the keys of references, which it then puts first."""
    pipe = tiny_base("FLUX.2")
    axes = torch.arange(float(ROWS)), torch.arange(float(COLUMNS)), torch.zeros(1)
    image, reference = (torch.cartesian_prod(torch.full((1,), t), *axes) for t in (0.0, 10.0))
    _, kind = find_transformer(pipe)
    call = kind.read_call(
        pipe,
        (torch.zeros(2, 48, 16), torch.zeros(2, 7, 24), torch.tensor([0.5])),
        {"img_ids": torch.cat([reference, image])[None]},
    )
    assert (call.generated, call.grid, call.num_leading) == ((24, 48), (ROWS, COLUMNS), 7)


def test_z_image_guides_until_truncation() -> None:
    """With its truncation, the last steps have no negative rows."""
    pipe = tiny_base("Z-Image")
    adapter = fresh_adapter(pipe)
    tokens = adapter.encode(anna.id_cond, anna.hidden).detach()
    unconditional = adapter.unconditional(anna.id_cond, anna.hidden).detach()
    images = []
    for truncation in (0.2, 1.0):
        with adapter.use(anna):
            images.append(run_base("Z-Image", pipe, negative=True, cfg_truncation=truncation))
        with adapter.use_tokens(tokens, negative=unconditional):
            again = run_base("Z-Image", pipe, negative=True, cfg_truncation=truncation)
        assert distance(again, images[-1]) < 1e-5
    assert distance(*images) > 1e-4
    with pytest.raises(OptionError, match="images of one size"), adapter.use(anna):
        pipe.transformer(
            [torch.zeros(4, 1, 8, 8), torch.zeros(4, 1, 8, 12)],
            torch.zeros(2),
            [torch.zeros(3, 24)] * 2,
        )
