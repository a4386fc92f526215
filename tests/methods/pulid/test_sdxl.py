"""PuLID on tiny SDXL pipelines: every guarantee of `use`."""

from __future__ import annotations

import copy
import json
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLInstructPix2PixPipeline, StableDiffusionXLPAGPipeline
from safetensors.torch import save_file
from torch import nn

from openpulid.errors import IdentityError, OptionError, WeightsError
from openpulid.identity.identity import Identity
from openpulid.methods.adapter import Adapter
from openpulid.methods.pulid.encoders import IDEncoder, IDFormer
from openpulid.methods.pulid.sdxl import PuLID
from openpulid.methods.pulid.sdxl_attention import IdentityLayer
from openpulid.methods.registry import METHODS, find_method
from tests.support.people import STEPS, anna, ben, distance, fresh, run, someone
from tests.support.versions import same_noise_in_every_precision


@pytest.fixture
def pipe(tiny_pipeline) -> Any:
    return tiny_pipeline()


@pytest.fixture
def adapter(pipe) -> PuLID:
    adapter = fresh(pipe)
    adapter.attach(pipe)
    return adapter


def hooked_modules(pipe: Any) -> list[str]:
    """Return the names of all modules with hooks."""
    return [
        name
        for name, part in pipe.unet.named_modules()
        if part._forward_hooks or part._forward_pre_hooks
    ]


def test_pulid_is_a_registered_adapter(adapter) -> None:
    assert isinstance(adapter, Adapter)
    assert all(find_method(name) for name in METHODS) and find_method("pulid") is PuLID
    with pytest.raises(OptionError, match="no method 'other'"):
        find_method("other")


def test_identities_change_image_and_differ(pipe, adapter) -> None:
    without = run(pipe)
    images = []
    for person in (anna, ben):
        with adapter.use(person):
            images.append(run(pipe))
    assert min(distance(without, image) for image in images) > 1e-3
    assert distance(*images) > 1e-3


def test_untrained_adapter_changes_nothing(pipe) -> None:
    adapter = PuLID.for_unet(pipe.unet, IDEncoder(12, 64, vit_dim=8, hidden_dim=16))
    adapter.attach(pipe)
    without = run(pipe)
    with adapter.use(anna, projection="none"):
        assert np.array_equal(run(pipe), without)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_pipeline_is_restored_outside_use(pipe, adapter, guidance: float) -> None:
    baseline, names, hooks = (
        run(pipe, guidance=guidance),
        dict(pipe.unet.attn_processors),
        len(pipe.unet._forward_pre_hooks),
    )
    with adapter.use(anna):
        run(pipe, guidance=guidance)
    with pytest.raises(RuntimeError, match="inside"), adapter.use(anna):
        raise RuntimeError("inside")
    assert np.array_equal(run(pipe, guidance=guidance), baseline)
    assert pipe.unet.attn_processors == names and len(pipe.unet._forward_pre_hooks) == hooks
    state = set(vars(pipe.unet))
    adapter.detach(pipe)
    assert set(vars(pipe.unet)) < state and np.array_equal(run(pipe, guidance=guidance), baseline)
    with pytest.raises(OptionError, match="attach"), adapter.use(anna):
        pass


def test_identity_of_other_sizes_raises(pipe, adapter) -> None:
    second = Identity(torch.zeros(1, 1, 20), anna.hidden, {})
    shallow = Identity(anna.id_cond, (), {})
    for identity, message in (
        (second, "this identity has 20 and 8, 8, 8, 8, 8"),
        (shallow, "has 12 and none"),
    ):
        with pytest.raises(IdentityError, match=message), adapter.use(identity):
            pass


@pytest.mark.parametrize("options", [{"scale": 0}, {"start": 0.5, "end": 0.5}])
def test_inactive_identity_registers_no_hooks(pipe, adapter, options: dict[str, float]) -> None:
    with adapter.use(anna):
        assert hooked_modules(pipe)
    with adapter.use(anna, **options):
        assert not hooked_modules(pipe)
    assert not hooked_modules(pipe)


def test_keys_and_values_are_computed_once(pipe, adapter) -> None:
    calls = []
    layer = adapter.id_adapter_attn_layers["1"].id_to_k
    layer.register_forward_hook(lambda *_: calls.append(1))
    with adapter.use(anna):
        assert len(calls) == 1
        run(pipe)
        run(pipe, count=2)
        assert len(calls) == 1
        run(pipe, guidance=4.0)
        assert len(calls) == 2  # the unconditional ones, computed when guidance first needs them
        run(pipe, guidance=4.0)
        assert len(calls) == 2


def test_start_and_end_split_the_schedule(pipe, adapter) -> None:
    """[0, 1/3) is step 0 alone; consecutive spans neither overlap nor leave a gap."""
    acted: list[list[int]] = []
    for start, end in ((0.0, 1 / 3), (1 / 3, 1.0), (0.0, 1.0), (0.9, 1.0)):
        steps: list[int] = []
        with adapter.use(anna, start=start, end=end):
            (baseline,) = pipe.unet._forward_pre_hooks.values()
            injection = baseline.__self__

            def note(
                pipe: Any, step: int, time: Any, kwargs: dict, injection=injection, steps=steps
            ) -> dict:
                steps.extend([step] * injection.calls[1].is_active)
                return kwargs

            run(pipe, callback_on_step_end=note)
        acted.append(steps)
    assert acted == [[0], [1, 2], [0, 1, 2], []]


def test_start_and_end_are_exact_in_images(pipe, adapter) -> None:
    without = run(pipe)
    with adapter.use(anna, start=0.99):
        assert np.array_equal(run(pipe), without)
    with adapter.use(anna, end=0.3):
        early = run(pipe)
    with adapter.use(anna):
        assert distance(early, without) > 1e-4 and distance(early, run(pipe)) > 1e-4


def test_negative_half_has_unconditional_tokens(pipe, adapter) -> None:
    """Each half of a guided batch equals a batch of its own."""
    calls: list[tuple[Any, ...]] = []
    with adapter.use(anna):
        hook = pipe.unet.register_forward_hook(lambda *call: calls.append(call), with_kwargs=True)
        run(pipe, guidance=5.0)
        hook.remove()
    _, (latents, time), kwargs, (together,) = calls[0]
    added = kwargs["added_cond_kwargs"]
    tokens = adapter.encode(anna.id_cond, anna.hidden)
    unconditional = adapter.unconditional(anna.id_cond, anna.hidden)
    for half, one in enumerate((unconditional, tokens)):
        part = slice(half, half + 1)
        text = kwargs["encoder_hidden_states"][part]
        conditions = {name: x[part] for name, x in added.items()}
        with torch.no_grad(), adapter.use_tokens(one, scale=0.8, num_zero=20, guided=False):
            alone = pipe.unet(latents[part], time, text, added_cond_kwargs=conditions)[0]
        torch.testing.assert_close(alone, together[part], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_batches_match_single_images(pipe, adapter, guidance: float) -> None:
    prompts, people = ["portrait", "film noir"], [anna, ben]
    with adapter.use(people):
        together = run(pipe, prompts, count=2, guidance=guidance)
    for k in range(4):
        with adapter.use(people[k // 2]):
            alone = run(pipe, prompts[k // 2], seed=k, guidance=guidance)
        np.testing.assert_allclose(together[k : k + 1], alone, atol=1e-4)


def test_identities_must_fit_batch(pipe, adapter) -> None:
    with (
        adapter.use([anna, ben]),
        pytest.raises(OptionError, match="2 identities do not fit 3 images"),
    ):
        run(pipe, ["portrait", "film", "noir"])
    run(pipe)


def test_batches_of_three_parts_raise(pipe, adapter) -> None:
    """Perturbed attention guidance has rows [negative, positive, perturbed], not two halves."""
    parts = {
        name: part
        for name, part in pipe.components.items()
        if name not in ("image_encoder", "feature_extractor")
    }
    perturbed = StableDiffusionXLPAGPipeline(
        **parts, pag_applied_layers=["mid"], add_watermarker=False
    )
    perturbed.set_progress_bar_config(disable=True)
    adapter.attach(perturbed)
    with adapter.use(anna, pipe=perturbed):
        run(perturbed, ["portrait"] * 2, guidance=3.0, pag_scale=0.0)
        with pytest.raises(OptionError, match="perturbed attention guidance"):
            run(perturbed, ["portrait"] * 2, guidance=3.0, pag_scale=3.0)
    calls = StableDiffusionXLInstructPix2PixPipeline(**parts, add_watermarker=False)
    with pytest.raises(OptionError, match="InstructPix2PixPipeline has three rows per image"):
        adapter.attach(calls)


def test_masks_limit_identities_to_regions(pipe, adapter) -> None:
    """In the first cross-attention the other half of the image stays bit for bit the same."""
    left = torch.zeros(64, 32)
    left[:, :16] = 1
    layer = pipe.unet.get_submodule("down_blocks.1.attentions.0.transformer_blocks.0.attn2")
    captured: list[torch.Tensor] = []
    layer.register_forward_hook(lambda m, a, out: captured.append(out))
    for people in (
        None,
        [(anna, left)],
        [(anna, left), (ben, 1 - left)],
        [(ben, 1 - left)],
        [(ben, np.uint8(255) * (1 - left.numpy()).astype("uint8"))],
    ):
        if people is None:
            run(pipe)
        else:
            with adapter.use(people):
                run(pipe)
    plain, only_anna, both, only_ben, as_picture = (x.reshape(4, 4, -1) for x in captured[::STEPS])
    assert torch.equal(only_anna[:, 2:], plain[:, 2:]) and not torch.allclose(
        only_anna[:, :2], plain[:, :2]
    )
    torch.testing.assert_close(both[:, :2], only_anna[:, :2])
    torch.testing.assert_close(both[:, 2:], only_ben[:, 2:])
    torch.testing.assert_close(as_picture, only_ben)


def test_mask_of_another_ratio_is_cropped(pipe, adapter, caplog) -> None:
    mask = torch.zeros(64, 128)
    mask[:, :64] = 1
    with adapter.use([(anna, mask)]):
        cropped = run(pipe)
    (message,) = caplog.messages
    assert "the mask has 128 x 64 pixels (width over height 2.00) and is cropped" in message
    with adapter.use([(anna, mask[:, 32:96])]):
        assert np.array_equal(run(pipe), cropped)
    caplog.clear()
    with adapter.use([(anna, torch.ones(98, 100))]):  # two percent
        run(pipe)
    assert not caplog.messages


def test_mask_values_scale_identity(pipe, adapter) -> None:
    with adapter.use(anna, projection="none"):
        everywhere = run(pipe, guidance=3.0)
    with adapter.use([(anna, torch.ones(1, 5, 7))], projection="none"):
        np.testing.assert_allclose(run(pipe, guidance=3.0), everywhere, atol=1e-4)
    with adapter.use([(anna, torch.full((3, 3), 0.5))], projection="none", scale=0.8):
        half = run(pipe)
    with adapter.use(anna, projection="none", scale=0.4):
        np.testing.assert_allclose(half, run(pipe), atol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_prompts_with_different_numbers_of_people(pipe, adapter, guidance: float) -> None:
    left = torch.tensor([[1.0, 0.0]])
    two = [(anna, left), (ben, 1 - left)]
    with adapter.use([two, anna]):
        together = run(pipe, ["portrait", "film"], count=2, guidance=guidance)
    for k, (people, prompt) in enumerate(
        ((two, "portrait"), (two, "portrait"), (anna, "film"), (anna, "film"))
    ):
        with adapter.use(people):
            np.testing.assert_allclose(
                together[k : k + 1], run(pipe, prompt, seed=k, guidance=guidance), atol=1e-4
            )


@pytest.mark.parametrize("bad", [[], [3], [[(anna, None), 3]], "anna", None])
def test_invalid_people_raise(adapter, bad: Any) -> None:
    with pytest.raises(OptionError), adapter.use(bad):
        pass


@pytest.mark.parametrize(
    "options",
    [{"projection": "ortho_v3"}, {"num_zero": -1}, {"num_zero": 1.5}, {"start": -0.1}, {"end": 2}],
)
def test_options_out_of_range_raise(adapter, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError), adapter.use(anna, **options):
        pass


def test_masks_out_of_range_raise(adapter) -> None:
    for mask in (torch.full((2, 2), 1.5), torch.zeros(3, 2, 2)):
        with pytest.raises(OptionError, match="mask"), adapter.use([(anna, mask)]):
            pass


def test_attaching_another_adapter_replaces(pipe, adapter) -> None:
    with adapter.use(anna):
        once = run(pipe)
    adapter.attach(pipe)
    with adapter.use(anna):
        assert np.array_equal(run(pipe), once)
    second = fresh(pipe, seed=5)
    second.attach(pipe)
    with pytest.raises(OptionError, match="attach"), adapter.use(anna):
        pass
    with second.use(anna):
        assert distance(run(pipe), once) > 1e-4
    adapter.detach(pipe)  # it was replaced already: the other adapter stays attached
    with second.use(anna):
        run(pipe)


def test_nested_use_raises(pipe, adapter) -> None:
    with adapter.use(anna):
        once = run(pipe)
        with pytest.raises(OptionError, match="already in use"), adapter.use(ben):
            pass
        assert np.array_equal(run(pipe), once)


def test_adapter_for_another_base_raises(pipe) -> None:
    narrow = PuLID(IDEncoder(12, 32, vit_dim=8, hidden_dim=16), nn.ModuleDict())
    with pytest.raises(WeightsError, match="0 layers"):
        narrow.attach(pipe)
    second = nn.ModuleDict({"1": IdentityLayer(8, 64)})
    with pytest.raises(WeightsError, match="trained for another U-Net: it has 1 layers"):
        PuLID(IDEncoder(12, 64, vit_dim=8, hidden_dim=16), second).attach(pipe)
    with pytest.raises(OptionError, match="no U-Net"):
        narrow.attach(object())


def test_two_pipelines_in_two_threads_do_not_mix(tiny_pipeline) -> None:
    pairs = []
    for seed, person in ((0, anna), (1, ben)):
        pipe = tiny_pipeline(seed)
        adapter = fresh(pipe, seed)
        adapter.attach(pipe)
        with adapter.use(person):
            expected = run(pipe, guidance=2.0)
        pairs.append((pipe, adapter, person, expected))

    def often(pair: Any) -> bool:
        pipe, adapter, person, expected = pair
        for _ in range(4):
            with adapter.use(person):
                if not np.array_equal(run(pipe, guidance=2.0), expected):
                    return False
        return True

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(often, pairs))


def test_one_adapter_serves_two_pipelines(tiny_pipeline) -> None:
    first, second = tiny_pipeline(0), tiny_pipeline(1)
    adapter = fresh(first)
    adapter.attach(first), adapter.attach(second)
    without = run(second)
    with adapter.use(anna, pipe=first):
        assert np.array_equal(run(second), without)
    with adapter.use(anna, pipe=first), adapter.use(ben, pipe=second):
        assert distance(run(second), without) > 1e-4
    with adapter.use(anna):
        assert distance(run(second), without) > 1e-4
    adapter.detach()
    with pytest.raises(OptionError), adapter.use(anna):
        pass


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_adapter_through_several_steps(
    pipe, adapter, checkpointing: bool
) -> None:
    """Two batch sizes in one `use`, with backward inside: equal with and without checkpointing."""
    pipe.unet.requires_grad_(False)
    pipe.unet.train()
    if checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    x, text = torch.ones(2, 4, 8, 8), torch.ones(2, 5, 64)
    added = {"text_embeds": torch.ones(2, 32), "time_ids": torch.ones(2, 6)}
    tokens = adapter.encode(anna.id_cond, anna.hidden)
    with adapter.use_tokens(tokens, num_zero=4):
        y = pipe.unet(x, 500, text, added_cond_kwargs=added).sample
        one = {name: value[:1] for name, value in added.items()}
        z = pipe.unet(y[:1], 200, text[:1], added_cond_kwargs=one).sample
        z.square().mean().backward()
    for name, weight in adapter.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all(), name
        assert weight.grad.abs().sum() > 0 or name.endswith("bias"), name
    total = sum(float(weight.grad.double().abs().sum()) for weight in adapter.parameters())
    assert all(weight.grad is None for weight in pipe.unet.parameters())
    assert total == pytest.approx(36.2604, rel=1e-3)


def test_span_with_gradient_checkpointing_raises(pipe, adapter) -> None:
    pipe.unet.enable_gradient_checkpointing()
    with (
        adapter.use_tokens(torch.ones(1, 10, 64), start=0.5),
        pytest.raises(OptionError, match="checkpointing"),
    ):
        pipe.unet(torch.ones(1, 4, 8, 8), 500, torch.ones(1, 5, 64))


def test_guided_tokens_need_negatives(pipe, adapter) -> None:
    tokens = adapter.encode(anna.id_cond, anna.hidden).detach()
    with adapter.use_tokens(tokens), pytest.raises(OptionError, match="negative"):
        run(pipe, guidance=3.0)
    unconditional = adapter.unconditional(anna.id_cond, anna.hidden).detach()
    with adapter.use_tokens(tokens, scale=0.8, num_zero=20, negative=unconditional):
        image = run(pipe, guidance=3.0)
    with adapter.use(anna):
        assert np.array_equal(run(pipe, guidance=3.0), image)


def test_negative_tokens_get_gradient_after_calls_without(pipe, adapter) -> None:
    """As in a guided rollout whose first steps run without gradient."""
    tokens = adapter.encode(anna.id_cond, anna.hidden).detach()
    unconditional = adapter.unconditional(anna.id_cond, anna.hidden).detach().requires_grad_()
    defaults = {"text_embeds": torch.ones(2, 32), "time_ids": torch.ones(2, 6)}
    call = partial(
        pipe.unet, torch.ones(2, 4, 8, 8), 500, torch.ones(2, 5, 64), added_cond_kwargs=defaults
    )
    with adapter.use_tokens(tokens, negative=unconditional, guided=True, pipe=pipe):
        with torch.no_grad():
            call()
        call().sample.square().mean().backward()
    assert unconditional.grad is not None and unconditional.grad.abs().sum() > 0


def test_file_converted_for_comfyui_loads(adapter, tmp_path) -> None:
    """The same tensors under the names of an IP-Adapter."""
    state = adapter.state_dict()
    assert isinstance(adapter.encoder, IDEncoder)
    converted = {
        name.replace("id_adapter_attn_layers.", "ip_adapter.")
        .replace("id_adapter.", "image_proj.")
        .replace(".id_to_k.", ".to_k_ip.")
        .replace(".id_to_v.", ".to_v_ip."): tensor.contiguous()
        for name, tensor in state.items()
    }
    assert "ip_adapter.1.to_k_ip.weight" in converted
    path = tmp_path / "converted.safetensors"
    save_file(converted, path, {"config": json.dumps(adapter.encoder.config)})
    loaded = PuLID.load(path).state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_save_and_load(pipe, adapter, tmp_path) -> None:
    path = adapter.save(tmp_path / "some" / "adapter.safetensors", {"seed": 3})
    again = PuLID.load(path)
    baseline, changed = adapter.state_dict(), again.state_dict()
    assert list(baseline) == list(changed) and all(
        torch.equal(baseline[name], changed[name]) for name in baseline
    )
    half = PuLID.load(path, torch.bfloat16).state_dict()
    assert all(torch.equal(half[name], x.to(torch.bfloat16)) for name, x in baseline.items())
    with adapter.use(anna):
        image = run(pipe)
    again.attach(pipe)
    with again.use(anna):
        assert np.array_equal(run(pipe), image)
    (tmp_path / "broken.safetensors").write_bytes(path.read_bytes()[:100])
    for bad in ("none.safetensors", "broken.safetensors"):
        with pytest.raises(WeightsError):
            PuLID.load(tmp_path / bad)
    state = adapter.state_dict()
    del state["id_adapter.body.0.bias"]
    with pytest.raises(WeightsError, match=r"id_adapter\.body\.0\.bias"):
        PuLID.from_state_dict(state, IDEncoder(12, 64, vit_dim=8, hidden_dim=16))


def test_missing_layers_are_named(pipe, adapter) -> None:
    lost = ("id_adapter_attn_layers.3.", "id_adapter_attn_layers.11.")
    state = {
        name: value for name, value in adapter.state_dict().items() if not name.startswith(lost)
    }
    less = PuLID.from_state_dict(state, IDEncoder(12, 64, vit_dim=8, hidden_dim=16))
    total = len(adapter.id_adapter_attn_layers)
    with pytest.raises(
        WeightsError,
        match=rf"lacks 2 of {total} layers \(id_adapter_attn_layers 3, 11\); download its file",
    ):
        less.attach(pipe)


@pytest.mark.parametrize(
    "more",
    ["x.id_to_k.weight", "id_adapter_attn_layers.x.id_to_k.weight", "extra.1.id_to_k.weight"],
)
def test_unexpected_names_raise(adapter, more: str) -> None:
    for value in (torch.ones(2, 2), torch.ones(2)):
        with pytest.raises(
            WeightsError, match=rf'Unexpected key\(s\) in state_dict: "{re.escape(more)}"'
        ) as error:
            PuLID.from_state_dict(
                {**adapter.state_dict(), more: value}, IDEncoder(12, 64, vit_dim=8, hidden_dim=16)
            )
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("part", ["k", "v"])
def test_incomplete_or_misshaped_layer_raises(adapter, part: str) -> None:
    name = f"id_adapter_attn_layers.3.id_to_{part}.weight"
    state = adapter.state_dict()
    del state[name]
    for wrong, message in (
        (state, "Missing key"),
        ({**state, name: torch.ones(3)}, "size mismatch"),
    ):
        with pytest.raises(WeightsError, match=rf"{message}.*{re.escape(name)}"):
            PuLID.from_state_dict(wrong, IDEncoder(12, 64, vit_dim=8, hidden_dim=16))


def test_parameter_names_are_published_ones(golden, adapter) -> None:
    published = set(golden.manifest["pulid_v1"])
    assert {name for name in adapter.state_dict() if name not in published} == set()


def test_copy_is_not_attached(adapter) -> None:
    twin = copy.deepcopy(adapter)
    with pytest.raises(OptionError, match="attach"), twin.use(anna):
        pass


def test_idformer_with_several_images(pipe) -> None:
    encoder = IDFormer(
        dim=16,
        depth=5,
        dim_head=4,
        heads=4,
        num_queries=6,
        output_dim=64,
        width=12,
        vit_dim=8,
        hidden_dim=16,
    )
    adapter = fresh(pipe, encoder=encoder)
    adapter.attach(pipe)
    without = run(pipe, guidance=2.0)
    for person in (anna, someone(1, photos=3)):
        with adapter.use(person):
            assert distance(run(pipe, guidance=2.0), without) > 1e-4
    with adapter.use(
        [anna, someone(1, photos=3)]
    ):  # the number of tokens does not depend on the number of images
        run(pipe, ["portrait", "film"])


def test_v1_needs_equal_number_of_images_per_identity(pipe, adapter) -> None:
    with adapter.use(someone(1, photos=2)):
        run(pipe, guidance=2.0)
    with (
        pytest.raises(OptionError, match="number of reference images"),
        adapter.use([anna, someone(1, photos=2)]),
    ):
        pass


@same_noise_in_every_precision
def test_half_precision_base_with_a_float32_adapter(pipe, adapter) -> None:
    with adapter.use(anna):
        exact = run(pipe)
    pipe.to(torch.bfloat16)
    with adapter.use(anna):
        rough = pipe(
            "portrait",
            num_inference_steps=STEPS,
            guidance_scale=1.0,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).images
    assert rough.dtype == torch.bfloat16
    np.testing.assert_allclose(rough.float().numpy(), exact, atol=0.3)
