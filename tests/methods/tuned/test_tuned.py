"""Files and contexts of the tuned methods, on a tiny pipeline."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from openpulid.errors import OptionError, WeightsError
from openpulid.methods.tuned import (
    CustomDiffusion,
    DreamBooth,
    TextualInversion,
    Trigger,
    TunedLora,
)
from openpulid.pipelines.embeddings import open_embedding, use_embeddings
from openpulid.pipelines.memory_levels import store_in_fp8
from openpulid.pipelines.request_inputs import Embedding
from tests.support import tiny_sdxl

TRIGGER = Trigger("noir", "person")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def low_rank(layer, scale: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    return random(2, layer.in_features), scale * random(layer.out_features, 2, seed=1)


@pytest.fixture
def pipe():
    pipe = tiny_sdxl.pipe()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def methods(pipe):
    """One of each kind, with random values."""
    names = [name for name, _ in pipe.unet.named_modules() if name.endswith("attn2.to_k")]
    unet_layers = {name: low_rank(pipe.unet.get_submodule(name)) for name in names}
    text_layers = {
        name: low_rank(layer)
        for name, layer in pipe.text_encoder.named_modules()
        if name.endswith(("q_proj", "out_proj"))
    }
    matrices = {
        f"{name}.weight": random(*pipe.unet.get_submodule(name).weight.shape) for name in names
    }
    weights = {
        f"{name}.{kind}": random(*pipe.unet.get_parameter(f"{name}.{kind}").shape)
        for name in ("conv_in", "down_blocks.0.resnets.0.conv1")
        for kind in ("weight", "bias")
    }
    vectors = {"clip_l": random(2, 16), "clip_g": random(2, 16, seed=1)}
    words = {"clip_l": random(1, 16), "clip_g": random(1, 16, seed=1)}
    return {
        "lora": TunedLora({"unet": unet_layers, "text_encoder": text_layers}, TRIGGER),
        "dreambooth": DreamBooth(weights, TRIGGER),
        "custom-diffusion": CustomDiffusion(matrices, words, TRIGGER),
        "textual-inversion": TextualInversion(vectors, TRIGGER),
    }


KINDS = ["lora", "dreambooth", "custom-diffusion", "textual-inversion"]


def generate(pipe, prompt: str = "a noir person", **options) -> torch.Tensor:
    images = pipe(
        prompt,
        generator=torch.Generator().manual_seed(0),
        num_inference_steps=2,
        output_type="pt",
        **options,
    ).images
    return images


@pytest.mark.parametrize("kind", KINDS)
def test_method_changes_images_only_while_open(pipe, methods, kind):
    method = methods[kind]
    base = generate(pipe)
    method.attach(pipe)
    with method.use():
        assert not torch.allclose(generate(pipe), base, atol=1e-4)
    assert torch.equal(generate(pipe), base)
    with method.use(scale=0):
        assert torch.equal(generate(pipe), base)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_unet_is_refused(pipe, methods, kind):
    methods[kind].attach(pipe)
    pipe.unet.compile(backend="eager")
    with pytest.raises(OptionError, match="compiled code ignores hooks"), methods[kind].use():
        pass


def test_compressed_file_of_the_authors_gives_the_image_of_its_matrices(pipe, tmp_path):
    names = [name for name, _ in pipe.unet.named_modules() if name.endswith("attn2.to_k")]
    layers = {f"{name}.weight": pipe.unet.get_submodule(name) for name in names}
    factors = {name: low_rank(layer)[::-1] for name, layer in layers.items()}
    whole = {name: layers[name].weight.detach() + u @ v for name, (u, v) in factors.items()}
    path = tmp_path / "delta.bin"
    entries = {name: {"u": u, "v": v} for name, (u, v) in factors.items()}
    torch.save({"unet": entries, "modifier_token": {"<new1>": random(16)}}, path)
    images = []
    for method in (CustomDiffusion(whole), CustomDiffusion.load(path)):
        method.attach(pipe)
        with method.use():
            images.append(generate(pipe))
        method.detach(pipe)
    torch.testing.assert_close(images[1], images[0], atol=1e-4, rtol=0)
    assert not torch.allclose(generate(pipe), images[0], atol=1e-3)
    method.vectors = {"clip_l": random(1, 16), "clip_g": random(1, 16)}
    method.save(tmp_path / "delta.safetensors")
    assert CustomDiffusion.load(tmp_path / "delta.safetensors").factors.keys() == factors.keys()
    entries[next(iter(entries))]["v"] = random(3, 4)
    torch.save({"unet": entries, "modifier_token": {"<new1>": random(16)}}, path)
    with pytest.raises(WeightsError, match="damaged"):
        CustomDiffusion.load(path)


def test_authors_biases_and_incomplete_words(pipe, methods, tmp_path):
    """The authors' variant `crossattn` changes all layers of the attention."""
    matrices = methods["custom-diffusion"].matrices
    key = next(iter(matrices))
    bias = key.replace("to_k.weight", "to_out.0.bias")
    parameter = pipe.unet.get_parameter(bias)
    tuned = parameter.detach() + 1
    same = pipe.unet.get_parameter(key).detach()
    torch.save({"unet": {key: same, bias: tuned}}, tmp_path / "delta.bin")
    method = CustomDiffusion.load(tmp_path / "delta.bin")
    method.attach(pipe)
    with method.use():
        ours = generate(pipe)
    parameter.data += 1
    torch.testing.assert_close(ours, generate(pipe), atol=1e-4, rtol=0)
    parameter.data -= 1
    torch.save({"unet": matrices, "modifier_token.clip_l": random(16)}, tmp_path / "delta.bin")
    with pytest.raises(WeightsError, match="lacks the word of one text encoder"):
        CustomDiffusion.load(tmp_path / "delta.bin")


@pytest.mark.parametrize("kind", KINDS)
def test_fused_projections_are_refused(pipe, methods, kind):
    """They ignore hooks and weights of the layers that they join, but read the prompt's words."""
    methods[kind].attach(pipe)
    pipe.fuse_qkv_projections()
    if kind == "textual-inversion":
        base = generate(pipe)
        with methods[kind].use():
            assert not torch.allclose(generate(pipe), base, atol=1e-4)
        return
    with pytest.raises(OptionError, match="has fused projections"), methods[kind].use():
        pass


def test_offloaded_weights_are_refused(pipe, methods):
    for kind in ("dreambooth", "custom-diffusion"):
        methods[kind].attach(pipe)
    pipe.unet.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(OptionError, match="group offloading"), methods["dreambooth"].use():
        pass
    other = tiny_sdxl.pipe()
    for kind in ("dreambooth", "custom-diffusion"):
        methods[kind].attach(other)
    cpu_offload(other.unet, torch.device("cpu"))
    for kind in ("dreambooth", "custom-diffusion"):
        with (
            pytest.raises(OptionError, match="sequential offloading removes"),
            methods[kind].use(pipe=other),
        ):
            pass


def test_small_changes_of_a_float8_unet_are_not_rounded(pipe, methods):
    """The change is added in the precision of the computation."""
    method = methods["custom-diffusion"]
    small = {
        name: pipe.unet.get_parameter(name).detach() + 0.003 * tensor
        for name, tensor in method.matrices.items()
    }
    factors = {
        name: (0.003 * random(len(x), 2), random(2, x.shape[1], seed=1))
        for name, x in small.items()
    }
    for changed in (CustomDiffusion({}, factors=factors), DreamBooth(small)):
        outputs = []
        for is_float8 in (False, True):
            copied = tiny_sdxl.pipe()
            copied.unet.load_state_dict(pipe.unet.state_dict())
            if is_float8:
                store_in_fp8(copied.unet)
            changed.attach(copied)
            base = generate(copied)
            with changed.use(scale=0.5, pipe=copied):
                outputs.append(generate(copied) - base)
        if isinstance(changed, CustomDiffusion):  # the other one stores its weights in float8
            cosine = torch.cosine_similarity(*(x.flatten() for x in outputs), dim=0)
            assert cosine > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_file_gives_the_same_image(pipe, methods, kind, tmp_path):
    method = methods[kind]
    method.attach(pipe)
    with method.use():
        expected = generate(pipe)
    method.detach(pipe)
    path = tmp_path / "anna.safetensors"
    method.save(path, {"steps": 3})
    loaded = type(method).load(path)
    assert loaded.trigger is not None and loaded.trigger.word == "noir"
    loaded.attach(pipe)
    with loaded.use():
        # stored in half precision
        torch.testing.assert_close(generate(pipe), expected, atol=0.02, rtol=0)


def test_custom_diffusion_without_a_word_is_loaded(pipe, methods, tmp_path):
    path = tmp_path / "matrices.safetensors"
    CustomDiffusion(methods["custom-diffusion"].matrices).save(path)
    loaded = CustomDiffusion.load(path)
    assert loaded.matrices.keys() == methods["custom-diffusion"].matrices.keys()
    assert not loaded.vectors


def test_diffusers_opens_the_lora_file(pipe, methods, tmp_path):
    path = tmp_path / "anna-lora.safetensors"
    methods["lora"].save(path)
    loaded = TunedLora.load(path)
    loaded.attach(pipe)
    with loaded.use(scale=0.5):
        expected = generate(pipe)
    pipe.load_lora_weights(str(tmp_path), weight_name=path.name, adapter_name="anna")
    pipe.set_adapters("anna", 0.5)
    torch.testing.assert_close(generate(pipe), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_diffusers_opens_the_embedding_file(pipe, methods, tmp_path):
    """Two tokens that diffusers adds give the text that the hooks give."""
    path = tmp_path / "anna.safetensors"
    method = methods["textual-inversion"]
    method.save(path)
    options = {"device": "cpu", "do_classifier_free_guidance": False}
    method.attach(pipe)
    with method.use():
        expected = pipe.encode_prompt("a noir person", **options)
    file = open_embedding(Embedding(file=str(path), token="<anna>"))
    with use_embeddings(pipe, [file]):
        embeds = pipe.encode_prompt("a <anna> person", **options)
    torch.testing.assert_close(embeds[0], expected[0])
    torch.testing.assert_close(embeds[2], expected[2])  # pooled


def test_alpha_scales_the_change(methods, tmp_path):
    """kohya's files scale each layer by alpha over the rank, here 2."""
    path = tmp_path / "anna.safetensors"
    methods["lora"].save(path)
    tensors = load_file(path)
    expected = TunedLora.load(path).layers
    halved = {name: x / 2 if name.endswith(".alpha") else x for name, x in tensors.items()}
    save_file(halved, path)
    for part, layers in TunedLora.load(path).layers.items():
        for name, (down, up) in layers.items():
            old_down, old_up = expected[part][name]
            torch.testing.assert_close(up @ down, 0.5 * (old_up @ old_down))


def test_alpha_in_the_metadata_of_peft_scales_the_change(pipe, tmp_path):
    names = list(_names(pipe))[:2]
    config = LoraConfig(
        r=2,
        lora_alpha=8,
        alpha_pattern={names[1]: 4},
        target_modules=names,
        init_lora_weights=False,
    )
    pipe.unet.add_adapter(config)
    pipe.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(pipe.unet),
        unet_lora_adapter_metadata=config.to_dict(),
    )
    expected = generate(pipe)
    pipe.unload_lora_weights()
    loaded = TunedLora.load(tmp_path / "pytorch_lora_weights.safetensors")
    loaded.attach(pipe)
    with loaded.use():
        torch.testing.assert_close(generate(pipe), expected, atol=1e-4, rtol=0)


def test_lora_of_convolutions_is_refused(pipe):
    layers = {"conv_in": (random(2, 4, 3, 3), random(8, 2, 1, 1))}
    with pytest.raises(WeightsError, match="changes convolutions, which this method does not"):
        TunedLora({"unet": layers}).attach(pipe)


def test_dora_is_refused(tmp_path):
    """Without its scale it would be another LoRA."""
    layer = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    matrices = {"lora_down.weight": torch.ones(2, 8), "lora_up.weight": torch.ones(8, 2)}
    tensors = {**matrices, "dora_scale": torch.ones(8, 1)}
    path = tmp_path / "dora.safetensors"
    save_file({f"{layer}.{name}": tensor for name, tensor in tensors.items()}, path)
    with pytest.raises(WeightsError, match="is a DoRA"):
        TunedLora.load(path)


def test_blocks_in_the_names_of_kohya(tmp_path):
    """kohya's trainer counts the blocks of SDXL as Stability's code does."""
    path = tmp_path / "anna.safetensors"
    layer = "1_transformer_blocks_0_attn1_to_q"
    matrices = {"lora_down.weight": torch.ones(2, 8), "lora_up.weight": torch.ones(8, 2)}
    blocks = {
        "input_blocks_4": "down_blocks.1.attentions.0",
        "middle_block": "mid_block.attentions.0",
    }
    blocks["output_blocks_3"] = "up_blocks.1.attentions.0"
    save_file(
        {
            f"lora_unet_{block}_{layer}.{name}": tensor.clone()
            for block in blocks
            for name, tensor in {**matrices, "alpha": torch.tensor(1.0)}.items()
        },
        path,
    )
    layers = TunedLora.load(path).layers["unet"]
    assert set(layers) == {f"{block}.transformer_blocks.0.attn1.to_q" for block in blocks.values()}
    assert all(torch.equal(down, torch.full((2, 8), 0.5)) for down, _ in layers.values())


def test_file_of_diffusers_names_no_word(methods, tmp_path):
    pairs = methods["lora"].layers["unet"]
    state = {f"{name}.lora.down.weight": down for name, (down, up) in pairs.items()}
    state |= {f"{name}.lora.up.weight": up for name, (down, up) in pairs.items()}
    StableDiffusionXLPipeline.save_lora_weights(tmp_path, unet_lora_layers=state)
    loaded = TunedLora.load(tmp_path / "pytorch_lora_weights.safetensors")
    name, (_, up) = next(iter(pairs.items()))
    torch.testing.assert_close(loaded.layers["unet"][name][1], up)
    assert loaded.trigger is None
    assert loaded.insert_trigger("a person") == "a person"


def test_a_users_lora_stays(pipe, methods, tmp_path):
    """A LoRA of the pipeline and one of the method are added."""
    own = TunedLora({"unet": {n: low_rank(pipe.unet.get_submodule(n), 0.1) for n in _names(pipe)}})
    own.save(tmp_path / "own.safetensors")
    pipe.load_lora_weights(str(tmp_path), weight_name="own.safetensors", adapter_name="own")
    with_own = generate(pipe)
    method = methods["lora"]
    method.attach(pipe)
    with method.use():
        both = generate(pipe)
    assert not torch.allclose(both, with_own, atol=1e-4)
    assert torch.equal(generate(pipe), with_own)
    assert pipe.get_active_adapters() == ["own"]


def test_whole_unet_replaces_layers_that_peft_has_wrapped(pipe, methods, tmp_path):
    own = TunedLora({"unet": {n: low_rank(pipe.unet.get_submodule(n), 0.1) for n in _names(pipe)}})
    own.save(tmp_path / "own.safetensors")
    name = _names(pipe)[0]
    weight = random(*pipe.unet.get_submodule(name).weight.shape)
    pipe.load_lora_weights(str(tmp_path), weight_name="own.safetensors", adapter_name="own")
    base = generate(pipe)
    method = DreamBooth({f"{name}.weight": weight})
    method.attach(pipe)
    with method.use():
        assert torch.equal(pipe.unet.get_submodule(name).base_layer.weight, weight)
    assert torch.equal(generate(pipe), base)


def _names(pipe) -> list[str]:
    return [name for name, _ in pipe.unet.named_modules() if name.endswith("attn2.to_v")]


def test_start_and_end_limit_the_change_of_the_unet(pipe, methods):
    method = methods["custom-diffusion"]
    method.vectors = {}  # the prompt is read before the first step
    base = generate(pipe)
    method.attach(pipe)
    with method.use():
        whole = generate(pipe)
    with method.use(start=0.5):
        late = generate(pipe)
    for other in (base, whole):
        assert not torch.allclose(late, other, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("dreambooth", {"start": 0.5}),
        ("textual-inversion", {"scale": 0.5}),
        ("textual-inversion", {"end": 0.5}),
    ],
)
def test_options_without_effect_are_refused(pipe, methods, kind, options):
    method = methods[kind]
    method.attach(pipe)
    base = generate(pipe)
    with pytest.raises(OptionError, match=r"leave out|has no scale"), method.use(**options):
        pass
    assert torch.equal(generate(pipe), base)


def test_an_identity_is_refused(pipe, methods):
    methods["lora"].attach(pipe)
    with (
        pytest.raises(OptionError, match="the person it was tuned on"),
        methods["lora"].use("anna"),
    ):
        pass


@pytest.mark.parametrize("kind", KINDS)
def test_file_of_another_base_is_refused(methods, kind, tiny_pipeline):
    with pytest.raises((WeightsError, OptionError), match=r"another base|not fit|not one token"):
        methods[kind].attach(tiny_pipeline())


@pytest.mark.parametrize("kind", KINDS)
def test_other_files_are_refused(methods, kind, tmp_path):
    other = "lora" if kind != "lora" else "dreambooth"
    methods[other].save(tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=r"other\.safetensors is not"):
        type(methods[kind]).load(tmp_path / "other.safetensors")
