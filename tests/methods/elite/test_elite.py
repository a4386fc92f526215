"""ELITE in a stock SDXL pipeline: a word that means an image, and local attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from openpulid.errors import IdentityError, OptionError, WeightsError
from openpulid.identity.identity import Identity, fuse_identities
from openpulid.methods.elite.attention import find_layers
from openpulid.methods.elite.elite import ELITE
from openpulid.methods.elite.encoders import Mapper, Mappers
from openpulid.methods.registry import find_method
from openpulid.methods.tuned import CustomDiffusion, encoder_words, read_words
from tests.support.method_checks import check_bfloat16, check_lora_of_user_stays
from tests.support.token_files import CROSS, PROMPTS, generate, person

STATES_DIM = 8
PATCHES = 4
EQUAL_PROMPTS = ["portrait of a person"] * 2
LORA_LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"


def create_identity(seed: int) -> Identity:
    generator = torch.Generator().manual_seed(seed)
    levels = [torch.randn(1, 1 + PATCHES, STATES_DIM, generator=generator) for _ in range(5)]
    return Identity(torch.zeros(1, 1, 3), tuple(levels))


ANNA = create_identity(1)
BEN = create_identity(2)


@pytest.fixture
def pipe(tiny_pipeline: Any) -> Any:
    return tiny_pipeline()


def create_mapper(pipe: Any, seed: int) -> Mapper:
    torch.manual_seed(seed)
    sizes = {name: layer.to_k.out_features for name, layer in find_layers(pipe.unet).items()}
    return Mapper(STATES_DIM, 12, CROSS, sizes).eval().requires_grad_(False)


@pytest.fixture
def method(pipe: Any) -> ELITE:
    created = ELITE(Mappers(create_mapper(pipe, 5), create_mapper(pipe, 6)))
    created.attach(pipe)
    return created


@pytest.mark.parametrize("num_words", [1, 5])
def test_word_and_matrices_of_the_global_mapper(pipe: Any, method: ELITE, num_words: int) -> None:
    """As a word of Textual Inversion and matrices of Custom Diffusion, whatever the noun."""
    mappers = method.encoder
    mappers.num_words = num_words
    with method.use(ANNA, scale=0.5, local_scale=0.0):
        ours = generate(pipe, negative_prompt=["red person"])
    vectors = mappers.encode_words([ANNA])[0]
    assert vectors.shape == (num_words, CROSS)
    named = encoder_words(pipe, "person", {"clip_l": vectors[:, :32], "clip_g": vectors[:, 32:]})
    with read_words(named):
        states, _, pooled, _ = pipe.encode_prompt(PROMPTS[0], do_classifier_free_guidance=False)
    _, negative, _, negative_pooled = pipe.encode_prompt("", negative_prompt="red person")
    matrices = {}
    for processor in pipe.unet.attn_processors:
        name = processor.removesuffix(".processor")
        if name.endswith("attn2"):
            for kind in "kv":
                matrix = mappers.global_mapper.matrix(name.replace(".", "_"), kind)
                matrices[f"{name}.to_{kind}.weight"] = matrix.weight
    tuned = CustomDiffusion(matrices)
    tuned.attach(pipe)
    with tuned.use(scale=0.5):
        theirs = pipe(
            prompt_embeds=states,
            pooled_prompt_embeds=pooled,
            negative_prompt_embeds=negative,
            negative_pooled_prompt_embeds=negative_pooled,
            num_inference_steps=2,
            guidance_scale=3.0,
            output_type="latent",
            generator=[torch.Generator().manual_seed(0)],
        ).images
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_local_attention_changes_the_image(pipe: Any, method: ELITE) -> None:
    images = []
    for local_scale, masks in ((0.0, None), (0.8, None), (0.8, [torch.tensor([[1.0, 0.0]])])):
        with method.use(ANNA, local_scale=local_scale, masks=masks):
            images.append(generate(pipe))
    assert not torch.allclose(images[0], images[1], atol=1e-4)
    assert not torch.allclose(images[1], images[2], atol=1e-5)
    with method.use(ANNA, masks=[torch.ones(4, 4)]):
        assert torch.equal(generate(pipe), images[1])


def test_batch_equals_single_images(pipe: Any, method: ELITE) -> None:
    """Two people, also in two equal prompts, and an image does not depend on its batch."""
    for prompts in (["portrait of a person", "red person"], EQUAL_PROMPTS):
        for guidance in (1.0, 3.0):
            with method.use([ANNA, BEN]):
                together = generate(pipe, prompts, guidance)
            for k, identity in enumerate((ANNA, BEN)):
                with method.use(identity):
                    alone = pipe(
                        prompts[k],
                        num_inference_steps=2,
                        guidance_scale=guidance,
                        output_type="latent",
                        generator=[torch.Generator().manual_seed(k)],
                    ).images
                assert torch.allclose(together[k : k + 1], alone, atol=1e-5)
    with (
        method.use([ANNA, BEN, ANNA]),
        pytest.raises(OptionError, match="3 identities do not fit 2 images"),
    ):
        generate(pipe, prompts)


def test_identities_of_several_images_of_one_prompt(pipe: Any, method: ELITE) -> None:
    """One prompt, one identity per image."""
    options = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    with method.use([ANNA, BEN]):
        images = pipe(PROMPTS[0], num_images_per_prompt=2, latents=latents, **options).images
    with method.use(BEN):
        second = pipe(PROMPTS[0], latents=latents[1:], **options).images
    assert torch.allclose(images[1:], second, atol=1e-5)


def test_images_of_one_person(pipe: Any, method: ELITE) -> None:
    """Words are averaged; local tokens of all images are attended to."""
    both = fuse_identities([ANNA, BEN])
    mappers = method.encoder
    words = mappers.encode_words([ANNA, BEN])
    assert torch.allclose(words[1], mappers.encode_words([BEN])[0], atol=1e-6)
    assert torch.allclose(mappers.encode_words([both])[0], words.mean(0), atol=1e-6)
    patches = mappers.encode_patches([both])
    assert patches is not None and patches.shape == (1, 2 * PATCHES, CROSS)
    with method.use(fuse_identities([ANNA, ANNA])):
        twice = generate(pipe)
    with method.use(ANNA):
        assert torch.allclose(generate(pipe), twice, atol=1e-5)


def test_plain_text_is_used_until_start(pipe: Any, method: ELITE) -> None:
    """Bit for bit: the text, its keys and values, and no local attention."""
    baseline = generate(pipe)
    with method.use(ANNA, start=0.5):  # the second of two steps begins there
        assert torch.equal(generate(pipe), baseline)
    with method.use(ANNA, start=0.4):
        late = generate(pipe)
    with method.use(ANNA):
        assert not torch.allclose(generate(pipe), late, atol=1e-4)
    assert not torch.allclose(late, baseline, atol=1e-4)


def test_pipeline_is_restored(pipe: Any, method: ELITE) -> None:
    check_lora_of_user_stays(pipe, method, ANNA, LORA_LAYER)
    method.detach(pipe)
    encoders = (pipe.text_encoder, pipe.text_encoder_2)
    embeddings = [encoder.get_input_embeddings() for encoder in encoders]
    for module in (*pipe.unet.modules(), *encoders, *embeddings):
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_bfloat16(pipe: Any, method: ELITE) -> None:
    check_bfloat16(pipe, method, ANNA)


def test_files_are_read(pipe: Any, tmp_path: Path) -> None:
    states = {
        name: create_mapper(pipe, seed).state_dict()
        for name, seed in (("global_mapper", 5), ("local_mapper", 6))
    }
    tensors = {
        f"{part}.{name}": x.clone() for part, state in states.items() for name, x in state.items()
    }
    save_file(tensors, tmp_path / "elite.safetensors")
    torch.save(states["global_mapper"], tmp_path / "global_mapper.pt")  # as they are published
    words_alone = ELITE.load(tmp_path / "global_mapper.pt")
    assert words_alone.encoder.local_mapper is None
    words_alone.attach(pipe)
    with words_alone.use(ANNA):
        generate(pipe)
    torch.save(states["local_mapper"], tmp_path / "local_mapper.pt")
    for name in ("elite.safetensors", "global_mapper.pt"):
        loaded = ELITE.load(tmp_path / name).encoder.state_dict()
        assert loaded.keys() == tensors.keys()
        assert all(torch.equal(x, tensors[key]) for key, x in loaded.items())

    with pytest.raises(WeightsError, match=r"is the local mapper; pass global_mapper\.pt"):
        ELITE.load(tmp_path / "local_mapper.pt")
    for changes, message in (
        ({"local_mapper.mapping_1.3.weight": None}, r"ELITE's mapper: .*mapping_1\.3\.weight"),
        ({"global_mapper.mapping_0.0.weight": torch.ones(3)}, "not weights of ELITE's mapper"),
        ({"other.weight": torch.ones(1)}, "it has other"),
    ):
        damaged = {name: x for name, x in {**tensors, **changes}.items() if x is not None}
        save_file(damaged, tmp_path / "damaged.safetensors")
        with pytest.raises(WeightsError, match=message):
            ELITE.load(tmp_path / "damaged.safetensors")
    assert find_method("elite") is ELITE


def test_late_word_stops_only_prompts_that_show_somebody(pipe: Any, method: ELITE) -> None:
    late = " ".join(["red"] * 6) + " person"
    method.encoder.num_words = 5
    with method.use(ANNA):
        with pytest.raises(OptionError, match="too late in the prompt"):
            generate(pipe, [late])
        generate(pipe, negative_prompt=[late])


def test_run_that_failed_does_not_stop_the_next_one(pipe: Any, method: ELITE) -> None:
    with method.use(ANNA):
        expected = generate(pipe, PROMPTS)

        def fail(*args: Any) -> None:
            raise RuntimeError

        handle = pipe.text_encoder_2.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError):
            generate(pipe)
        handle.remove()
        assert torch.equal(generate(pipe, PROMPTS), expected)


def test_invalid_inputs_raise(pipe: Any, method: ELITE) -> None:
    with (
        pytest.raises(IdentityError, match="five levels of a vision encoder of width 8"),
        method.use(person(1)),
    ):
        pass
    with pytest.raises(OptionError, match="pass 1 masks"), method.use(ANNA, masks=[None, None]):
        pass
    with (
        pytest.raises(OptionError, match="ELITE shows one identity per prompt"),
        method.use([(ANNA, None), (BEN, None)]),
    ):
        pass
    for layers in ({"mid_block_attn2": 32}, {}):
        other = ELITE(Mappers(Mapper(STATES_DIM, 12, 24, layers)))
        with pytest.raises(WeightsError, match=r"for text of width 24 .*this pipeline has 64 and"):
            other.attach(pipe)


def test_gradient_reaches_the_mappers(pipe: Any, method: ELITE) -> None:
    """Through the text encoders to the word, and through keys, values and local tokens."""
    method.encoder.requires_grad_(True)
    for module in (pipe.unet, pipe.text_encoder, pipe.text_encoder_2):
        module.requires_grad_(False)
    with method.use(ANNA):
        states, _, pooled, _ = pipe.encode_prompt(PROMPTS[0], do_classifier_free_guidance=False)
        conditions = {"text_embeds": pooled, "time_ids": torch.ones(1, 6)}
        output: Tensor = pipe.unet(
            torch.ones(1, 4, 8, 8), 500, states, added_cond_kwargs=conditions
        ).sample
        output.square().mean().backward()
    layer = next(iter(find_layers(pipe.unet)))
    for mapper in (method.encoder.global_mapper, method.encoder.local_mapper):
        assert mapper is not None
        for name in ("mapping_0.0.weight", f"{layer}_to_k.weight", f"{layer}_to_v.weight"):
            gradient = mapper.get_parameter(name).grad
            assert gradient is not None and gradient.abs().sum() > 0
