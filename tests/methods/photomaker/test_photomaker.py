"""PhotoMaker in a stock pipeline: fused prompt and LoRA, both fully removed afterwards."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel
from tokenizers import Tokenizer

from openpulid.errors import OptionError, WeightsError
from openpulid.identity.identity import Identity, fuse_identities
from openpulid.methods import prompt_fusion
from openpulid.methods.adapter import Adapter
from openpulid.methods.controlnet import ControlNet
from openpulid.methods.photomaker.encoders import PhotoMakerEncoder
from openpulid.methods.photomaker.photomaker import PhotoMaker
from openpulid.methods.prompt_fusion import remove_trigger_word, repeat_class_word
from openpulid.methods.registry import find_method
from openpulid.mini.models.tokenizer import build_tokenizer
from tests.support.clip_files import FACE, Faces, config, embedding
from tests.support.token_files import CROSS, PROMPTS, WIDTH, generate, person

LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"


def file(pipe: Any, version: int) -> dict[str, dict[str, torch.Tensor]]:
    """Create a small file in the published format, with a LoRA in diffusers' old names."""
    torch.manual_seed(version)
    width = pipe.unet.config.cross_attention_dim
    small = config()
    small.projection_dim = width // 2
    encoder = PhotoMakerEncoder(small, width, *((WIDTH, 2) if version == 2 else ()))
    attention = pipe.unet.get_submodule(LAYER)
    inner = attention.to_q.in_features
    lora = {f"unet.{LAYER}.processor.to_q_lora.down.weight": torch.randn(2, inner) / inner**0.5}
    lora |= {
        f"unet.{LAYER}.processor.to_q_lora.up.weight": torch.randn(attention.to_q.out_features, 2)
    }
    lora |= {f"unet.{LAYER}.processor.to_out_lora.down.weight": torch.randn(2, inner) / inner**0.5}
    lora |= {f"unet.{LAYER}.processor.to_out_lora.up.weight": torch.randn(inner, 2)}
    return {"id_encoder": encoder.state_dict(), "lora_weights": lora}


@pytest.fixture
def pipe(tiny_pipeline: Any) -> Any:
    return tiny_pipeline()


@pytest.fixture(params=[1, 2])
def method(request: Any, pipe: Any, tmp_path: Any) -> PhotoMaker:
    torch.save(file(pipe, request.param), tmp_path / "photomaker.bin")  # as it is published
    created = PhotoMaker.load(tmp_path / "photomaker.bin")
    created.attach(pipe)
    return created


def create_identity(method: PhotoMaker) -> Identity:
    return method.create_extractor(Faces(), embedding).extract([FACE])[0]


def encode_repeated(pipe: Any, prompt: str, count: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Encode a prompt with "person" repeated: states, pooled embedding, index of the word."""
    longer = prompt.replace("person", " ".join(["person"] * count))
    states, _, pooled, _ = pipe.encode_prompt(longer, do_classifier_free_guidance=False)
    ids = pipe.tokenizer(prompt).input_ids
    return states, pooled, ids.index(pipe.tokenizer.convert_tokens_to_ids("person"))


@pytest.mark.parametrize("photos", [1, 2])
def test_matches_diffusers_with_fused_prompt(pipe: Any, method: PhotoMaker, photos: int) -> None:
    identity = fuse_identities([create_identity(method)] * photos)
    method.lora = {}
    with method.use(identity, start=0.0):
        ours = generate(pipe)
    encoder = method.encoder
    faces = identity.id_cond[0, :, :WIDTH] if encoder.face_dim else None
    with torch.no_grad():
        tokens = encoder.encode(identity.hidden[0][0].unflatten(0, (photos, -1)), faces).flatten(
            0, 1
        )
        count = encoder.qformer_perceiver.num_tokens if encoder.face_dim else 1
        assert tokens.shape == (photos * count, CROSS)
        states, pooled, index = encode_repeated(pipe, PROMPTS[0], len(tokens))
        where = slice(index, index + len(tokens))
        states[0, where] = encoder.fuse_module(states[0, where], tokens)
    generator = torch.Generator().manual_seed(0)
    options = {
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "output_type": "latent",
        "generator": [generator],
    }
    theirs = pipe(
        prompt_embeds=states, pooled_prompt_embeds=pooled, **negatives(pipe), **options
    ).images
    assert torch.allclose(ours, theirs, atol=1e-5)


def negatives(pipe: Any) -> dict[str, torch.Tensor]:
    _, negative, _, pooled = pipe.encode_prompt(PROMPTS[0], do_classifier_free_guidance=True)
    return {"negative_prompt_embeds": negative, "negative_pooled_prompt_embeds": pooled}


def test_lora_matches_diffusers(pipe: Any, method: PhotoMaker) -> None:
    pytest.importorskip("peft")
    identity = create_identity(method)
    with method.use(
        identity, scale=0.5, start=0.99
    ):  # the plain prompt stays: 0.99 is after the last step
        ours = generate(pipe)
    tensors = file(pipe, 1 if not method.encoder.face_dim else 2)["lora_weights"]
    pipe.load_lora_weights(tensors, adapter_name="photomaker")
    pipe.set_adapters("photomaker", 0.5)
    assert torch.allclose(ours, generate(pipe), atol=1e-5)


def test_plain_prompt_is_used_until_start(pipe: Any, method: PhotoMaker) -> None:
    """Until `start` the plain prompt fixes the layout, pooled embedding included."""
    method.lora = {}
    baseline, captured = generate(pipe), []
    hook = pipe.unet.register_forward_pre_hook(
        lambda module, args, named: captured.append(named), with_kwargs=True
    )
    with method.use(
        fuse_identities([create_identity(method)] * 2), start=0.4
    ):  # two tokens: with one the pooled embedding would not change
        pipe.unet.register_forward_pre_hook(
            lambda module, args, named: captured.append(named), with_kwargs=True
        )
        late = generate(pipe)
    hook.remove()
    outputs = [
        (step["encoder_hidden_states"], step["added_cond_kwargs"]["text_embeds"])
        for step in (captured[1], captured[3])
    ]
    for first, second in zip(
        *outputs, strict=True
    ):  # the output of the method's own hook in each of two steps
        assert torch.equal(first[0], second[0]), "the negative half is told nothing"
        assert not torch.equal(first[1], second[1])
    assert not torch.allclose(late, baseline, atol=1e-4)


def test_step_at_start_has_plain_prompt(pipe: Any, method: PhotoMaker) -> None:
    """As in the authors' code, fusion begins after step int(start * n)."""
    method.lora = {}
    baseline = generate(pipe)
    with method.use(create_identity(method), start=0.5):  # the second of two steps begins there
        assert torch.equal(generate(pipe), baseline)


def test_controlnet_reads_fused_prompt(pipe: Any, method: PhotoMaker) -> None:
    """The order in which both are opened does not matter."""
    method.lora = {}
    net = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 32))
    control, read, outputs = ControlNet(net), [], []
    control.attach(pipe)
    net.register_forward_pre_hook(
        lambda _, args, named: read.append(named["encoder_hidden_states"]), with_kwargs=True
    )
    with control.use(torch.rand(3, 16, 16)), method.use(create_identity(method), start=0.0):
        pipe.unet.register_forward_pre_hook(
            lambda _, args, named: outputs.append(named["encoder_hidden_states"]), with_kwargs=True
        )
        generate(pipe)
    plain = pipe.encode_prompt(PROMPTS[0])[0]
    assert len(read) == len(outputs) == 2 and all(
        torch.equal(a, b) for a, b in zip(read, outputs, strict=True)
    )
    assert not torch.equal(read[0][1:], plain)


def test_pipeline_is_restored(pipe: Any, method: PhotoMaker) -> None:
    method.detach()
    baseline, names = generate(pipe), [name for name, _ in pipe.unet.named_modules()]
    method.attach(pipe)
    assert isinstance(method, Adapter) and torch.equal(generate(pipe), baseline)
    for _ in range(2):
        with method.use(create_identity(method)):
            assert not torch.allclose(generate(pipe), baseline, atol=1e-4)
        assert torch.equal(generate(pipe), baseline)
    with method.use(create_identity(method), scale=0):
        assert torch.equal(generate(pipe), baseline)
    method.detach(pipe)
    assert [name for name, _ in pipe.unet.named_modules()] == names and not getattr(
        pipe.unet, "peft_config", {}
    )
    for module in (pipe.unet, pipe.text_encoder, pipe.text_encoder_2):
        assert not module._forward_hooks and not module._forward_pre_hooks
    with pytest.raises(OptionError, match="attach"), method.use(create_identity(method)):
        pass


def test_encoded_prompts_are_dropped_between_runs(
    pipe: Any, method: PhotoMaker, monkeypatch: Any
) -> None:
    opened: list[Any] = []
    begin = prompt_fusion.PromptFusion.__init__

    def record_instance(self: Any, *args: Any) -> None:
        opened.append(self)
        begin(self, *args)

    monkeypatch.setattr(prompt_fusion.PromptFusion, "__init__", record_instance)
    with method.use(create_identity(method), start=0.0):
        first = generate(pipe)
        length = len(opened[0].prompts[0])
        again = generate(pipe)
    assert torch.equal(first, again) and len(opened[0].prompts[0]) == length


def test_batches_and_guidance(pipe: Any, method: PhotoMaker) -> None:
    """Two identities in one batch equal single images, with and without a negative half."""
    one = create_identity(method)
    second = Identity(one.id_cond.flip(-1), tuple(level.flip(-1) for level in one.hidden))
    prompts = ["portrait of a person", "a person smiling"]
    for guidance in (1.0, 3.0):
        alone = []
        for k, identity in enumerate((one, second)):
            with method.use(identity, start=0.0):
                options = {
                    "num_inference_steps": 2,
                    "guidance_scale": guidance,
                    "output_type": "latent",
                }
                alone.append(
                    pipe(prompts[k], generator=[torch.Generator().manual_seed(k)], **options).images
                )
        with method.use([one, second], start=0.0):
            assert torch.allclose(generate(pipe, prompts, guidance), torch.cat(alone), atol=1e-5)
    with (
        method.use([one, one, one]),
        pytest.raises(OptionError, match="3 identities do not fit 2 images"),
    ):
        generate(pipe, prompts)


def test_class_word_is_repeated_and_end_token_stays(pipe: Any) -> None:
    words = pipe.tokenizer
    person_id, end = words.convert_tokens_to_ids("person"), words.eos_token_id
    ids = words(
        ["portrait of a person", "film noir"], padding="max_length", return_tensors="pt"
    ).input_ids
    again, places = repeat_class_word(ids, words, 3)
    assert again.shape == ids.shape
    assert places == [4, 1], "where nobody is named somebody is put in front"
    assert again[0, 4:8].tolist() == [person_id] * 3 + [end] and (again[0] == person_id).sum() == 3
    assert again[1, 1:5].tolist() == [person_id] * 3 + [words.convert_tokens_to_ids("film")]
    full = torch.tensor(
        [
            [
                words.bos_token_id,
                person_id,
                *[words.convert_tokens_to_ids("red")] * (ids.shape[1] - 3),
                end,
            ]
        ]
    )
    assert repeat_class_word(full, words, 3)[0][0, -1] == end


@pytest.mark.parametrize(
    ("prompt", "repeated", "plain"),
    [
        (
            "a woman img wearing a hat",
            "a woman woman wearing a hat",
            "a woman wearing a hat",
        ),
        ("two women", "two women women", "two women"),
        ("a baby img", "a baby baby", "a baby"),
        ("a man and a woman img", "a man and a woman woman", "a man and a woman"),
        # not in the list of reports
        ("a wizard img, red hat", "a wizard wizard, red hat", "a wizard, red hat"),
        ("a woman, img", "a woman woman,", "a woman,"),
        ("img of a man", "of a man man", "of a man"),
        ("a woman img and a man img", "a woman woman and a man", "a woman and a man"),
        ("red hat", "person person red hat", "red hat"),
    ],
)
def test_trigger_word_marks_the_class_word(prompt: str, repeated: str, plain: str) -> None:
    words = [
        "a",
        "an",
        "and",
        "baby",
        "hat",
        "img",
        "man",
        "of",
        "person",
        "red",
        "two",
        "wearing",
        "wizard",
        "woman",
        "women",
        ",",
    ]
    tokenizer = build_tokenizer(words, 16)

    def encode(text: str) -> Any:
        return tokenizer([text], padding="max_length", return_tensors="pt").input_ids

    ids, [position] = repeat_class_word(encode(prompt), tokenizer, 2)
    assert torch.equal(ids, encode(repeated))
    assert ids[0, position] == ids[0, position + 1]
    assert torch.equal(remove_trigger_word(encode(prompt), tokenizer), encode(plain))


def test_trigger_word_gives_the_image_without_it(tiny_pipeline: Any, tmp_path: Any) -> None:
    """It is not read either in the steps before the identity acts."""
    pipe = tiny_pipeline()
    for name in ("tokenizer", "tokenizer_2"):
        words = {"img": 3}  # replaces "portrait"
        tokenizer = getattr(pipe, name)
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        vocabulary = backend["model"]["vocab"]
        vocabulary["img"] = vocabulary.pop("portrait")
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(backend))
        assert tokenizer("img", add_special_tokens=False).input_ids == [words["img"]]
    torch.save(file(pipe, 1), tmp_path / "photomaker.bin")
    method = PhotoMaker.load(tmp_path / "photomaker.bin")
    method.attach(pipe)
    identity = create_identity(method)
    for start in (0.0, 0.5):
        with method.use(identity, start=start):
            with_trigger = generate(pipe, ["a person img red hat"])
            without = generate(pipe, ["a person red hat"])
        assert torch.allclose(with_trigger, without, atol=1e-6)
    assert not torch.allclose(generate(pipe, ["a person img red hat"]), without, atol=1e-3)


def test_late_class_word_raises(pipe: Any, method: PhotoMaker) -> None:
    """The repeated word would push the end token out. Negative prompts may have it late."""
    late = " ".join(["red"] * 9) + " person"
    identity = fuse_identities([create_identity(method)] * 2)
    with method.use(identity, start=0.0):
        with pytest.raises(OptionError, match="too late in the prompt"):
            generate(pipe, [late])
        generate(pipe, negative_prompt=[late])
    with (
        method.use(create_identity(method)),
        pytest.raises(OptionError, match="already in use"),
        method.use(identity),
    ):
        pass


def test_invalid_inputs_raise(pipe: Any, method: PhotoMaker, tmp_path: Any) -> None:
    with pytest.raises(OptionError, match="PhotoMaker's vision encoder"), method.use(person(1)):
        pass
    states, _, pooled, _ = pipe.encode_prompt(PROMPTS[0], do_classifier_free_guidance=False)
    with (
        method.use(create_identity(method), start=0.0),
        pytest.raises(OptionError, match="pass prompts instead of prompt embeddings"),
    ):
        pipe(
            prompt_embeds=states + 1,
            pooled_prompt_embeds=pooled,
            num_inference_steps=1,
            guidance_scale=1.0,
        )
    torch.save(
        {"id_encoder": {"weight": torch.zeros(1)}, "lora_weights": {}}, tmp_path / "other.bin"
    )
    with pytest.raises(WeightsError, match="PhotoMaker"):
        PhotoMaker.load(tmp_path / "other.bin")
    if method.encoder.face_dim:
        with pytest.raises(OptionError, match="face recognition model"):
            method.create_extractor(Faces())
    assert find_method("photomaker") is PhotoMaker
