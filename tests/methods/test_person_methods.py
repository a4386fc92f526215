"""Face0, PhotoVerse and W+ Adapter in a stock pipeline: nothing is left, files are checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from openpulid.errors import IdentityError, OptionError, WeightsError
from openpulid.identity.identity import Identity
from openpulid.io.image_grid import to_pil
from openpulid.methods.face0 import Face0
from openpulid.methods.face0.encoders import FaceMLP
from openpulid.methods.photoverse import PhotoVerse
from openpulid.methods.photoverse.encoders import PhotoVerseNetworks
from openpulid.methods.registry import find_method
from openpulid.methods.tuned.words import EncoderWord, read_words
from openpulid.methods.w_plus import WPlusAdapter
from openpulid.methods.w_plus.encoders import WPlusNetworks
from openpulid.pipelines.loading import load
from openpulid.pipelines.presets import mini
from openpulid.pipelines.selection import with_method
from openpulid.world import Person, Scene, render
from tests.support.method_checks import check_bfloat16, check_lora_of_user_stays
from tests.support.token_files import PROMPTS, generate

FACE, STATES, LATENT = 6, 8, 16
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lora(pipe: Any) -> dict[str, Tensor]:
    layer = pipe.unet.get_submodule(LAYER)
    down = random(2, layer.in_features) / layer.in_features**0.5
    up = random(layer.out_features, 2)
    return {f"unet.{LAYER}.lora_A.weight": down, f"unet.{LAYER}.lora_B.weight": up}


def write(name: str, pipe: Any, path: Path, states: int = STATES) -> Path:
    """Write a small file with random weights.

    Args:
        name: of the method.
        pipe: the pipeline.
        path: of the file.
        states: width of the vision encoder.
    """
    cross = pipe.unet.config.cross_attention_dim
    torch.manual_seed(4)
    if name == "face0":
        state = {f"face_mlp.{key}": x for key, x in FaceMLP(FACE, 16, cross).state_dict().items()}
        state |= {f"lora_weights.{key}": x for key, x in lora(pipe).items()}
    elif name == "photoverse":
        networks = PhotoVerseNetworks.for_pipeline(pipe, states, hidden=16, rank=2)
        state = networks.state_dict()
        state = {key: x if x.any() else 0.3 * torch.randn_like(x) for key, x in state.items()}
    else:
        state = WPlusNetworks.for_unet(pipe.unet, LATENT).state_dict()
    save_file({key: x.clone() for key, x in state.items()}, path)
    return path


def person(name: str, seed: int = 0, photos: int = 1) -> Identity:
    if name == "w-plus":
        return Identity(random(1, photos, 18 * LATENT, seed=seed), ())
    hidden = tuple(random(1, photos * 5, STATES, seed=seed + level) for level in range(5))
    return Identity(5 * random(1, photos, FACE + 2, seed=seed), hidden)


@pytest.fixture
def pipe(tiny_pipeline: Any) -> Any:
    return tiny_pipeline()


@pytest.fixture(params=["face0", "photoverse", "w-plus"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def method(name: str, pipe: Any, tmp_path: Path) -> Any:
    created: Any = find_method(name).load(write(name, pipe, tmp_path / f"{name}.safetensors"))
    created.attach(pipe)
    return created


def test_image_changes_only_while_open(name: str, pipe: Any, method: Any) -> None:
    base = generate(pipe)
    processors = dict(pipe.unet.attn_processors)
    with method.use(person(name), start=0.0):
        shown = generate(pipe)
        assert pipe.unet.attn_processors == processors
    with method.use(person(name, seed=9), start=0.0):
        other = generate(pipe)
    for one, two in ((base, shown), (shown, other)):
        assert not torch.allclose(one, two, atol=1e-3)
    with method.use(person(name), scale=0.0):
        assert torch.equal(generate(pipe), base)
    assert torch.equal(generate(pipe), base)
    method.detach(pipe)
    with pytest.raises(OptionError, match="not attached"), method.use(person(name)):
        pass
    assert torch.equal(generate(pipe), base)


@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_steps_before_start_are_the_bases(
    name: str, pipe: Any, method: Any, guidance: float
) -> None:
    outputs: list[Tensor] = []
    pipe.unet.register_forward_hook(lambda *call: outputs.append(call[2][0].clone()))
    generate(pipe, guidance=guidance)
    with method.use(person(name), start=0.4):
        generate(pipe, guidance=guidance)
    base, changed = outputs[:2], outputs[2:]
    assert torch.equal(changed[0], base[0])
    assert not torch.allclose(changed[1], base[1], atol=1e-3)


@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_batch_equals_single_images(name: str, pipe: Any, method: Any, guidance: float) -> None:
    people = [person(name, 1), person(name, 2)]
    prompts = ["portrait of a person", "film noir"]
    with method.use(people, start=0.0):
        batch = generate(pipe, prompts, guidance)
    for index, prompt in enumerate(prompts):
        with method.use(people[index], start=0.0):
            generator = torch.Generator().manual_seed(index)
            single = pipe(
                prompt,
                num_inference_steps=2,
                guidance_scale=guidance,
                output_type="latent",
                generator=generator,
            ).images
        torch.testing.assert_close(batch[index : index + 1], single, atol=1e-4, rtol=1e-4)
    with method.use([*people, people[0]]), pytest.raises(OptionError, match="3 identities do not"):
        generate(pipe, prompts, guidance)


def test_two_people_with_the_same_prompt(name: str, pipe: Any, method: Any) -> None:
    with method.use([person(name, 1), person(name, 2)], start=0.0):
        both = generate(pipe, [PROMPTS[0]] * 2)
    with method.use(person(name, 1), start=0.0):
        first, second = generate(pipe, [PROMPTS[0]] * 2)
    torch.testing.assert_close(both[0], first, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(both[1], second, atol=1e-3)


def test_lora_of_the_user_stays(name: str, pipe: Any, method: Any) -> None:
    check_lora_of_user_stays(pipe, method, person(name), LAYER)


def test_bfloat16(name: str, pipe: Any, method: Any) -> None:
    check_bfloat16(pipe, method, person(name))


def test_published_suffix_and_half_precision(
    name: str, pipe: Any, method: Any, tmp_path: Path
) -> None:
    state = load_file(tmp_path / f"{name}.safetensors")
    torch.save(state, tmp_path / "file.bin")
    again: Any = find_method(name).load(tmp_path / "file.bin").to(torch.device("cpu"), torch.half)
    with method.use(person(name), start=0.0):
        expected = generate(pipe)
    again.attach(pipe)
    with again.use(person(name), start=0.0):
        torch.testing.assert_close(generate(pipe), expected, atol=0.1, rtol=0.05)


def drop(state: dict[str, Tensor], key: str) -> None:
    del state[key]


def empty(state: dict[str, Tensor], key: str) -> None:
    state[key] = state[key][:0]


def flatten(state: dict[str, Tensor], key: str) -> None:
    if state[key].ndim > 1:
        state[key] = state[key].flatten()
    else:
        del state[key]


def rename(state: dict[str, Tensor], key: str) -> None:
    state[f"{key}s"] = state.pop(key)


@pytest.mark.parametrize("damage", [drop, empty, flatten, rename])
def test_damaged_file_is_one_sentence(
    name: str,
    pipe: Any,
    method: Any,
    tmp_path: Path,
    damage: Callable[[dict[str, Tensor], str], None],
) -> None:
    state = load_file(tmp_path / f"{name}.safetensors")
    for key in list(state)[:: max(1, len(state) // 8)]:
        if damage is rename and key.startswith("lora_weights."):
            continue  # what follows lora_A does not matter
        changed = dict(state)
        damage(changed, key)
        save_file(changed, tmp_path / "damaged.safetensors")
        with pytest.raises(WeightsError) as error:
            find_method(name).load(tmp_path / "damaged.safetensors").attach(pipe)
        assert str(error.value).isprintable() and len(str(error.value)) < 900, key


def test_file_for_another_base_is_refused(
    name: str, pipe: Any, method: Any, tmp_path: Path, golden: Any
) -> None:
    from diffusers import UNet2DConditionModel

    config = {**golden.manifest["tiny_sdxl_unet_config"], "cross_attention_dim": 32}
    pipe.unet = UNet2DConditionModel(**config)
    with pytest.raises(WeightsError, match=r"trained (for|on) (another|this) base model"):
        method.attach(pipe)


def test_identity_of_another_method_is_refused(name: str, pipe: Any, method: Any) -> None:
    other = Identity(random(1, 1, 5), (random(1, 3, 3),) * 2)
    with (
        pytest.raises(IdentityError, match=f"`pulid identify --method {name} --adapter FILE`"),
        method.use(other),
    ):
        pass
    with (
        pytest.raises(IdentityError, match="not finite"),
        method.use(Identity(torch.full((1, 1, 18 * LATENT), float("nan")), ())),
    ):
        pass
    with pytest.raises(OptionError, match="one per prompt"), method.use([]):
        pass


# --- single methods


def test_methods_of_the_prompt_exclude_each_other(pipe: Any, tmp_path: Path) -> None:
    face0 = Face0.load(write("face0", pipe, tmp_path / "one.safetensors"))
    photoverse = PhotoVerse.load(write("photoverse", pipe, tmp_path / "two.safetensors"))
    w_plus = WPlusAdapter.load(write("w-plus", pipe, tmp_path / "three.safetensors"))
    for created in (face0, photoverse, w_plus):
        created.attach(pipe)
    with face0.use(person("face0")), w_plus.use(person("w-plus")):
        assert torch.isfinite(generate(pipe)).all()
        with pytest.raises(OptionError, match="already in use"):
            photoverse.use(person("photoverse")).__enter__()


@pytest.mark.parametrize("count", [1, 3])
@torch.no_grad()
def test_words_of_photoverse_are_read_by_the_text_encoders(
    pipe: Any, tmp_path: Path, count: int
) -> None:
    method = PhotoVerse.load(write("photoverse", pipe, tmp_path / "file.safetensors"))
    method.attach(pipe)
    identity = person("photoverse")
    words = method.encode([identity])[0][0, :count]
    read = []
    token = pipe.tokenizer.convert_tokens_to_ids("person")
    vectors = words.split(32, dim=-1)
    pairs = zip((pipe.text_encoder, pipe.text_encoder_2), vectors, strict=True)
    with read_words([EncoderWord(encoder, token, 1, vector) for encoder, vector in pairs]):
        states, _, pooled, _ = pipe.encode_prompt("portrait of a person")
    plain, negative, _, _ = pipe.encode_prompt("portrait of a person")
    with method.use(identity, num_words=count):
        pipe.unet.register_forward_pre_hook(
            lambda module, args, kwargs: read.append(kwargs), with_kwargs=True
        )
        generate(pipe)
    torch.testing.assert_close(read[0]["encoder_hidden_states"], torch.cat([negative, states]))
    torch.testing.assert_close(read[0]["added_cond_kwargs"]["text_embeds"][1:], pooled)
    assert not torch.allclose(states, plain, atol=1e-3)
    with method.use(identity, num_words=5), pytest.raises(OptionError, match="move it forward"):
        generate(pipe, [" ".join(["red"] * 8 + ["person"])])
    with pytest.raises(OptionError, match="between 1 and 5"), method.use(identity, num_words=6):
        pass


def test_photoverse_needs_a_pipeline_with_two_text_encoders(pipe: Any, tmp_path: Path) -> None:
    method = PhotoVerse.load(write("photoverse", pipe, tmp_path / "file.safetensors"))
    with pytest.raises(OptionError, match="two text encoders"):
        method.attach(pipe.unet)


def test_negative_prompt_of_w_plus_has_the_tokens_of_zero_latents(
    pipe: Any, tmp_path: Path
) -> None:
    """So an identity of zeros gives the image without guidance of the identity."""
    method = WPlusAdapter.load(write("w-plus", pipe, tmp_path / "file.safetensors"))
    method.attach(pipe)
    zero = Identity(torch.zeros(1, 1, 18 * LATENT), ())
    negative, positive = method.encode([zero])
    torch.testing.assert_close(negative, positive)
    assert negative.abs().max() == 0  # an untrained layer norm has no bias


@pytest.mark.parametrize("name", ["face0", "photoverse"])
def test_miniature_generates_with_a_file_of_the_user(name: str, tmp_path: Path) -> None:
    plain = load("mini")
    portrait = to_pil(render([Person.from_seed(3)], [Scene()]).image)[0]
    states = plain.identify(portrait).hidden[0].shape[-1]
    file = write(name, plain.pipe, tmp_path / "own.safetensors", states)
    studio = load(with_method(mini(), name, file))
    identity = studio.identify(portrait)
    options: dict[str, Any] = {"seed": 1, "num_inference_steps": 2}
    without = studio.generate("portrait of a person", **options).images[0]
    shown = studio.generate("portrait of a person", identity, **options).images[0]
    assert shown.tobytes() != without.tobytes()
    assert (
        without.tobytes() == plain.generate("portrait of a person", **options).images[0].tobytes()
    )
