"""Apply PuLID on Qwen-Image and Z-Image in ComfyUI, which calls patches after their blocks.

There is no diffusers adapter for these models: forward hooks call this package's attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from openpulid.errors import OptionError, WeightsError
from openpulid.methods.pulid.flux import PuLIDFlux
from openpulid.methods.transformer_kinds import select_block_keys
from tests.support import comfyui, comfyui_networks
from tests.support.comfyui import call_network, requires_comfyui, sample
from tests.support.comfyui_networks import NUM_BLOCKS, TEXT_WIDTH
from tests.support.people import anna, ben

pytestmark = requires_comfyui

HEIGHT, WIDTH = 10, 5
ROWS, COLUMNS = 5, 3
NUM_TEXT = 7
SIGMA = 0.7
SCALE = 0.9
LAYOUTS = [[1, 0], [0, 1], [0], [1], [1, 0, 0]]
LEFT = torch.tensor([[1.0, 0.0, 0.0]]).expand(ROWS, COLUMNS).contiguous()
MODELS = ["qwen", "z-image"]


@dataclass
class Network:
    """A model, and where its blocks have the generated tokens."""

    model: Any
    modules: Any
    adapter: PuLIDFlux
    is_qwen: bool
    num_frames: int = 1
    num_padding: int = 1

    def call(self, model: Any, inputs: dict[str, Any], layout: list[int], **options: Any) -> Tensor:
        """Call the network with one row per entry of the layout."""
        rows = [1 - group for group in layout]
        sigma = options.pop("sigma", SIGMA)
        if options.pop("has_reference", False):
            reference = inputs["reference"].repeat(len(rows) if self.is_qwen else 1, 1, 1, 1)
            options["ref_latents"] = [reference[:, :, None] if self.is_qwen else reference]
        latents = inputs["latents"][rows]
        if self.is_qwen:
            latents = latents[:, :, None].repeat(1, 1, self.num_frames, 1, 1)
        else:
            options["num_tokens"] = NUM_TEXT
        time = torch.full((len(rows),), sigma)
        return call_network(model, layout, sigma, latents, time, inputs["text"][rows], **options)

    def call_hooked(self, people: Any, inputs: dict[str, Any], **options: Any) -> Tensor:
        """Call the network for a negative row and a positive one, with this package's hooks."""
        keys = select_block_keys(NUM_BLOCKS, 0, self.adapter.double_interval)
        identity = comfyui_networks.create_identity(self.adapter, keys, people, SCALE)
        outputs = []
        for group in (1, 0):
            call = comfyui_networks.describe_call(identity, group == 1, ROWS, COLUMNS)

            def change(key: Any, output: Any, call: Any = call) -> Any:
                text, image = output if self.is_qwen else (None, output)
                first = 0 if self.is_qwen else self.find_first(image)
                for frame in range(self.num_frames):
                    image = comfyui_networks.add_after(
                        image,
                        first + frame * ROWS * COLUMNS,
                        ROWS * COLUMNS,
                        lambda tokens: identity.add_to(tokens, key, call),
                    )
                return (text, image) if self.is_qwen else image

            modules = {key: self.modules[key[1]] for key in keys}
            with torch.no_grad(), comfyui_networks.changed_outputs(modules, change):
                outputs.append(self.call(self.model, inputs, [group], **options))
        return torch.cat(outputs)

    def find_first(self, tokens: Tensor) -> int:
        """Return the index of Z-Image's first generated token: text, references, image, padding."""
        return tokens.shape[1] - ROWS * COLUMNS - self.num_padding


@pytest.fixture(scope="module")
def networks() -> Callable[[str], Network]:
    comfyui.import_comfyui()
    created: dict[str, Network] = {}

    def get(name: str) -> Network:
        if name == "z-image" and not has_z_image():
            pytest.skip("this version of ComfyUI has no Z-Image")
        if name not in created:
            is_qwen = name == "qwen"
            patcher = (
                comfyui_networks.qwen_patcher() if is_qwen else comfyui_networks.lumina_patcher()
            )
            network = patcher.model.diffusion_model
            adapter = comfyui_networks.create_adapter(
                NUM_BLOCKS, 32 if is_qwen else 256, interval=2 if is_qwen else 3
            )
            modules = network.transformer_blocks if is_qwen else network.layers
            created[name] = Network(patcher, modules, adapter, is_qwen)
        return created[name]

    return get


def has_z_image() -> bool:
    from comfy.ldm.lumina.model import NextDiT

    return "pad_tokens_multiple" in inspect.signature(NextDiT).parameters


@pytest.fixture(params=MODELS)
def network(request, networks) -> Network:
    return networks(request.param)


@pytest.fixture(scope="module")
def adapters() -> Any:
    comfyui.import_comfyui()
    return comfyui.import_pack("adapters")


@pytest.fixture
def apply(adapters, network) -> Callable[..., Any]:
    """Apply an identity to a model."""
    adapter = comfyui_networks.create_adapter(
        NUM_BLOCKS, network.adapter.layers[0].to_q.in_features, network.adapter.double_interval
    )
    loaded = adapters.LoadedAdapter(adapters.wrap_adapter(adapter), "tiny")

    def apply(model: Any, identity: Any, scale: float = SCALE, **options: Any) -> Any:
        options = adapters.ApplyOptions(scale, **options)
        return adapters.apply_adapter(model, loaded, identity, options)

    return apply


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    """Inputs of a negative row, then of a positive one."""
    generator = torch.Generator().manual_seed(2)
    return {
        "latents": torch.randn(2, 16, HEIGHT, WIDTH, generator=generator),
        "text": torch.randn(2, NUM_TEXT, TEXT_WIDTH, generator=generator),
        "reference": torch.randn(1, 16, 4, 4, generator=generator),
    }


def relative_error(ours: Tensor, reference: Tensor) -> float:
    return float((ours - reference).abs().max() / reference.abs().max())


def run(network: Network, model: Any, inputs: dict[str, Tensor], num_images: int = 1) -> Tensor:
    """Sample with guidance, in ComfyUI's own layout."""
    shape = (1, HEIGHT, WIDTH) if network.is_qwen else (HEIGHT, WIDTH)
    negative, positive = ([[inputs["text"][row : row + 1], {}]] for row in (0, 1))
    latent = torch.zeros(num_images, 16, *shape)
    return sample(model, positive, negative, latent, cfg=2.0, scheduler="simple")


@pytest.mark.parametrize("has_reference", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_call_equals_hooks_in_every_layout(
    network, apply, inputs, masked, has_reference, record_property
) -> None:
    mask = LEFT if masked else None
    expected = network.call_hooked([(anna, mask)], inputs, has_reference=has_reference)
    shown = apply(network.model, anna, mask=None if mask is None else mask[None])
    errors = []
    for layout in LAYOUTS:
        rows = [1 - group for group in layout]
        base = network.call(network.model, inputs, layout, has_reference=has_reference)
        ours = network.call(shown, inputs, layout, has_reference=has_reference)
        assert relative_error(expected[rows], base) > 1e-2
        errors.append(relative_error(ours, expected[rows]))
    record_property("relative_error", max(errors))
    assert max(errors) <= 1e-5, errors


def test_two_people_equal_hooks(network, apply, inputs) -> None:
    one = apply(network.model, anna, mask=LEFT[None])
    both = apply(one, ben, mask=1 - LEFT[None])
    for model, people in ((both, [(anna, LEFT), (ben, 1 - LEFT)]), (one, [(anna, LEFT)])):
        expected = network.call_hooked(people, inputs)
        assert relative_error(network.call(model, inputs, [1, 0]), expected) <= 1e-5


def test_identity_acts_between_start_and_end(network, apply, inputs) -> None:
    shown = apply(network.model, anna, start=0.2, end=0.6)
    sigma_of = network.model.get_model_object("model_sampling").percent_to_sigma
    acts = []
    for fraction in (0.0, 0.1, 0.2, 0.4, 0.59, 0.6, 0.9):
        sigma = sigma_of(fraction)
        base = network.call(network.model, inputs, [0], sigma=sigma)
        acts.append(not torch.equal(network.call(shown, inputs, [0], sigma=sigma), base))
    assert acts == [False, False, True, True, True, False, False]


def test_models_do_not_see_each_other(network, apply, inputs) -> None:
    from comfy import model_management

    model = network.model
    base = run(network, model, inputs)
    first, second = apply(model, anna), apply(model, ben)
    shown = run(network, first, inputs)
    assert not torch.equal(shown, base)
    assert not torch.equal(run(network, second, inputs), shown)
    assert not torch.equal(run(network, apply(first, ben), inputs), shown)
    for same in (first, first.clone(), first.clone().clone()):
        assert torch.equal(run(network, same, inputs), shown)
    model_management.unload_all_models()
    assert torch.equal(run(network, first, inputs), shown)
    for unchanged in (model, apply(model, anna, 0.0)):
        assert torch.equal(run(network, unchanged, inputs), base)
    assert not model.model_options["transformer_options"].get("patches")


def test_patches_of_other_packs_keep_their_order(network, apply, inputs) -> None:
    calls = []

    def other(name: str) -> Any:
        def patch(args: Any) -> Any:
            calls.append((name, args["block_index"], args["img"].clone()))
            return {"img": args["img"], "txt": args["txt"]}

        return patch

    model = network.model.clone()
    model.set_model_double_block_patch(other("before"))
    shown = apply(model, anna)
    shown.set_model_double_block_patch(other("after"))
    shown = apply(shown, ben)
    both = apply(apply(network.model, anna), ben)
    expected = network.call(both, inputs, [0])
    assert torch.equal(network.call(shown, inputs, [0]), expected)
    assert [name for name, *_ in calls] == ["before", "after"] * NUM_BLOCKS
    interval = network.adapter.double_interval
    for (_, index, before), (*_, after) in zip(calls[::2], calls[1::2], strict=True):
        assert torch.equal(before, after) is (index % interval != 0)


def test_every_image_of_a_batch_has_its_mask(network, apply, inputs) -> None:
    masks = torch.stack([LEFT, torch.zeros_like(LEFT)])
    both = run(network, apply(network.model, anna, mask=masks), inputs, num_images=2)
    left = run(network, apply(network.model, anna, mask=LEFT[None]), inputs, num_images=2)
    base = run(network, network.model, inputs, num_images=2)
    assert relative_error(both[:1], left[:1]) <= 1e-5
    assert relative_error(both[1:], base[1:]) <= 1e-5
    assert relative_error(left[1:], base[1:]) > 1e-2
    with pytest.raises(OptionError, match="has 2 masks, and the batch has 3 images"):
        run(network, apply(network.model, anna, mask=masks), inputs, num_images=3)


def test_lumina_equals_hooks(adapters, inputs) -> None:
    """It has Z-Image's classes, without padding."""
    if not has_z_image():
        pytest.skip("this version of ComfyUI calls no patches in Lumina 2")
    model = comfyui_networks.lumina_patcher(is_z_image=False)
    modules = model.model.diffusion_model.layers
    adapter = comfyui_networks.create_adapter(NUM_BLOCKS, 256, 2)
    lumina = Network(model, modules, adapter, is_qwen=False, num_padding=0)
    expected = lumina.call_hooked([(anna, LEFT)], inputs)
    wrapped = adapters.wrap_adapter(comfyui_networks.create_adapter(NUM_BLOCKS, 256, 2))
    options = adapters.ApplyOptions(SCALE, mask=LEFT[None])
    loaded = adapters.LoadedAdapter(wrapped, "tiny")
    shown = adapters.apply_adapter(model, loaded, anna, options)
    assert relative_error(lumina.call(shown, inputs, [1, 0]), expected) <= 1e-5


def test_layers_of_an_image_all_show_the_identity(networks, adapters, inputs) -> None:
    """Qwen-Image-Layered has its layers as frames."""
    if not has_z_image():
        pytest.skip("this version of ComfyUI has no Qwen-Image-Layered")
    qwen = networks("qwen")
    layered = Network(qwen.model, qwen.modules, qwen.adapter, is_qwen=True, num_frames=3)
    adapter = comfyui_networks.create_adapter(NUM_BLOCKS, 32, 2)
    loaded = adapters.LoadedAdapter(adapters.wrap_adapter(adapter), "tiny")
    options = adapters.ApplyOptions(SCALE, mask=LEFT[None])
    shown = adapters.apply_adapter(qwen.model, loaded, anna, options)
    expected = layered.call_hooked([(anna, LEFT)], inputs)
    assert relative_error(layered.call(shown, inputs, [1, 0]), expected) <= 1e-5


def test_unsuitable_adapters_raise(network, adapters) -> None:
    width = network.adapter.layers[0].to_q.in_features
    for sizes in ((NUM_BLOCKS + 2, width, 2), (NUM_BLOCKS, 2 * width, 2)):
        other = comfyui_networks.create_adapter(*sizes)
        loaded = adapters.LoadedAdapter(adapters.wrap_adapter(other), "other")
        with pytest.raises(WeightsError, match="trained for another transformer"):
            adapters.apply_adapter(network.model, loaded, anna, adapters.ApplyOptions(SCALE))


def test_version_without_patches_raises(adapters) -> None:
    if has_z_image():
        pytest.skip("this version of ComfyUI calls patches in Lumina 2")
    model = comfyui_networks.lumina_patcher(is_z_image=False)
    adapter = comfyui_networks.create_adapter(NUM_BLOCKS, 256, 2)
    loaded = adapters.LoadedAdapter(adapters.wrap_adapter(adapter), "tiny")
    with pytest.raises(OptionError, match="calls no patches in Lumina 2 and Z-Image models"):
        adapters.apply_adapter(model, loaded, anna, adapters.ApplyOptions(SCALE))
