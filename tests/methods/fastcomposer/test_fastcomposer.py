"""FastComposer in a stock SDXL pipeline: several people by their words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from openpulid.errors import OptionError, WeightsError
from openpulid.identity.identity import Identity, fuse_identities
from openpulid.methods.fastcomposer.encoders import FastComposerEncoder
from openpulid.methods.fastcomposer.fastcomposer import FastComposer
from openpulid.methods.prompt_fusion import _class_word_ids, mark_class_words
from openpulid.methods.registry import find_method
from openpulid.mini.models.tokenizer import build_tokenizer
from tests.support.clip_files import FACE, Faces, config
from tests.support.method_checks import check_bfloat16, check_lora_of_user_stays
from tests.support.token_files import CROSS, PROMPTS, generate, person

LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q"
TWO_PEOPLE = "red person , blue person hat"
"""Without its commas: a prompt with two words for people, at the positions 2 and 5."""


def tensors(pipe: Any) -> dict[str, Tensor]:
    """Create a small file for SDXL, with a LoRA of one layer."""
    torch.manual_seed(3)
    small = config()
    small.projection_dim = CROSS
    layer = pipe.unet.get_submodule(LAYER)
    lora = {
        f"unet.{LAYER}.lora_A.weight": torch.randn(2, layer.in_features) / 8,
        f"unet.{LAYER}.lora_B.weight": torch.randn(layer.out_features, 2),
    }
    return {**FastComposerEncoder(small).state_dict(), **lora}


@pytest.fixture
def pipe(tiny_pipeline: Any) -> Any:
    return tiny_pipeline()


@pytest.fixture
def method(pipe: Any, tmp_path: Path) -> FastComposer:
    metadata = {"tower": json.dumps(config().to_diff_dict() | {"projection_dim": CROSS})}
    save_file(tensors(pipe), tmp_path / "fastcomposer.safetensors", metadata)
    created = FastComposer.load(tmp_path / "fastcomposer.safetensors")
    created.attach(pipe)
    return created


@pytest.fixture
def anna(method: FastComposer) -> Identity:
    return method.create_extractor(Faces()).extract([FACE])[0]


@pytest.fixture
def ben(anna: Identity) -> Identity:
    return Identity(anna.id_cond.flip(-1), tuple(level.flip(-1) for level in anna.hidden))


def run_embedded(pipe: Any, states: Tensor, pooled: Tensor) -> Tensor:
    """Generate with text states, as `generate` does with a prompt."""
    _, negative, _, negative_pooled = pipe.encode_prompt(PROMPTS[0])
    return pipe(
        prompt_embeds=states,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=negative,
        negative_pooled_prompt_embeds=negative_pooled,
        num_inference_steps=2,
        guidance_scale=3.0,
        output_type="latent",
        generator=[torch.Generator().manual_seed(0)],
    ).images


def test_several_people_are_fused_with_their_words(
    pipe: Any, method: FastComposer, anna: Identity, ben: Identity
) -> None:
    method.lora = {}
    with method.use([(anna, None), (ben, None)], start=0.0):
        ours = generate(pipe, [TWO_PEOPLE])
    with method.use([(ben, None), (anna, None)], start=0.0):
        assert not torch.allclose(generate(pipe, [TWO_PEOPLE]), ours, atol=1e-4)
    states, _, pooled, _ = pipe.encode_prompt(TWO_PEOPLE, do_classifier_free_guidance=False)
    encoder = method.encoder
    with torch.no_grad():
        tokens = torch.cat([encoder.encode(x.hidden[0]) for x in (anna, ben)])
        places = [2, 5]
        states[0, places] = encoder.postfuse_module(states[0, places], tokens)
    assert torch.allclose(run_embedded(pipe, states, pooled), ours, atol=1e-5)


def test_batch_of_prompts_equals_single_images(
    pipe: Any, method: FastComposer, anna: Identity, ben: Identity
) -> None:
    """Prompts may show different numbers of people."""
    people = [[(anna, None), (ben, None)], ben]
    prompts = [TWO_PEOPLE, "portrait of a person"]
    for guidance in (1.0, 3.0):
        with method.use(people, start=0.0):
            together = generate(pipe, prompts, guidance)
        for k, shown in enumerate(people):
            generator = torch.Generator().manual_seed(k)
            with method.use([shown], start=0.0):
                alone = pipe(
                    prompts[k],
                    num_inference_steps=2,
                    guidance_scale=guidance,
                    output_type="latent",
                    generator=[generator],
                ).images
            assert torch.allclose(together[k : k + 1], alone, atol=1e-5)


def test_images_of_one_person_are_averaged(
    pipe: Any, method: FastComposer, anna: Identity, ben: Identity
) -> None:
    """As in a batch of two prompts, a second photo is no second person."""
    two = fuse_identities([anna, anna])
    with method.use(two):
        twice = generate(pipe)
    with method.use(anna):
        assert torch.allclose(generate(pipe), twice, atol=1e-6)
    with method.use(fuse_identities([anna, ben])):
        assert not torch.allclose(generate(pipe), twice, atol=1e-4)


def test_plain_text_is_used_until_start(pipe: Any, method: FastComposer, anna: Identity) -> None:
    """Bit for bit, without the low-rank change, which acts in every step."""
    lora = method.lora
    method.lora = {}
    baseline = generate(pipe)
    with method.use(anna, start=0.5):  # the second of two steps begins there
        assert torch.equal(generate(pipe), baseline)
    with method.use(anna, start=0.4):
        assert not torch.equal(generate(pipe), baseline)
    method.lora = lora
    with method.use(anna, start=0.5):
        assert not torch.equal(generate(pipe), baseline)


def test_pipeline_is_restored(pipe: Any, method: FastComposer, anna: Identity) -> None:
    check_lora_of_user_stays(pipe, method, anna, LAYER)
    method.detach(pipe)
    for module in (pipe.unet, pipe.text_encoder, pipe.text_encoder_2):
        assert not module._forward_hooks and not module._forward_pre_hooks
    with pytest.raises(OptionError, match="attach"), method.use(anna):
        pass


def test_bfloat16(pipe: Any, method: FastComposer, anna: Identity) -> None:
    check_bfloat16(pipe, method, anna)


@pytest.mark.parametrize(
    ("prompt", "plain", "positions"),
    [
        ("a man and a woman", "a man and a woman", [2, 5]),
        ("a man img and a woman img", "a man and a woman", [2, 5]),
        ("a man and a woman img", "a man and a woman", [5]),
        ("a wizard img, red hat", "a wizard, red hat", [2]),
        ("red hat", "person red hat", [1]),
    ],
)
def test_words_for_people_are_marked(prompt: str, plain: str, positions: list[int]) -> None:
    words = ["a", "and", "hat", "img", "man", "person", "red", "wizard", "woman", ","]
    tokenizer = build_tokenizer(words, 16)

    def encode(text: str) -> Tensor:
        return tokenizer([text], padding="max_length", return_tensors="pt").input_ids

    ids, places = mark_class_words(encode(prompt), tokenizer)
    assert torch.equal(ids, encode(plain))
    assert places == [positions]


def test_part_of_a_longer_word_is_no_class_word() -> None:
    """CLIP marks the end of a word; without the mark, `man` begins one, such as "mandarin"."""

    class Tokenizer:
        unk_token_id = 0
        vocabulary: ClassVar = {"man": 1, "man</w>": 2, "darin</w>": 3, "woman</w>": 4}

        def convert_tokens_to_ids(self, token: str) -> int:
            return self.vocabulary.get(token, 0)

    assert _class_word_ids(Tokenizer()) == {2, 4}


def test_invalid_inputs_raise(
    pipe: Any, method: FastComposer, anna: Identity, tmp_path: Path
) -> None:
    with (
        method.use([(anna, None), (anna, None)], start=0.0),
        pytest.raises(OptionError, match="the prompt names 1 of 2 people; write one word"),
    ):
        generate(pipe)
    with (
        pytest.raises(OptionError, match="FastComposer has no masks"),
        method.use([(anna, torch.ones(8, 8))]),
    ):
        pass
    with (
        pytest.raises(OptionError, match="encoder; create it again with `pulid identify --m"),
        method.use(person(1)),
    ):
        pass
    published = {name: x for name, x in tensors(pipe).items() if not name.startswith("unet")}
    cut = {name: x for name, x in published.items() if name != "postfuse_module.mlp1.fc1.bias"}
    for state, message in (
        (cut, r"not weights of FastComposer: .*postfuse_module\.mlp1\.fc1\.bias"),
        ({**published, "id_encoder_2.weight": torch.ones(1)}, "it has id_encoder_2.weight"),
    ):
        torch.save(state, tmp_path / "pytorch_model.bin")
        with pytest.raises(WeightsError, match=message):
            FastComposer.load(tmp_path / "pytorch_model.bin")
    assert find_method("fastcomposer") is FastComposer


def test_file_for_another_text_encoder_is_refused(pipe: Any) -> None:
    small = config()
    small.projection_dim = 24
    with pytest.raises(WeightsError, match=r"for text of width 24 .*, and this pipeline's has 64"):
        FastComposer(FastComposerEncoder(small), {}).attach(pipe)


def test_the_whole_of_a_tall_image_is_read(method: FastComposer) -> None:
    """The authors pad to a square; the center square of a standing person is the shirt."""
    image = torch.zeros(3, 60, 20)
    image[:, :10] = 1.0
    (crop,) = method.create_extractor(Faces()).debug_crops(replace(FACE, image=image))
    side = crop.shape[-1]
    assert crop[:, : side // 8, side * 3 // 8 : side * 5 // 8].mean() > 0.9
    assert crop[:, :, : side // 4].max() == 0 and crop[:, :, side * 3 // 4 :].max() == 0
