"""PhotoMaker in a stock pipeline: the rewritten prompt, the low-rank change, and nothing of them left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import ControlNetModel

from openpulid.errors import OptionError, WeightsError
from openpulid.identity.identity import Identity, fuse_identities
from openpulid.methods.controlnet import ControlNet
from openpulid.methods.photomaker.adapter import PhotoMaker, repeated
from openpulid.methods.photomaker.encoder import PhotoMakerEncoder
from openpulid.methods.registry import Method, find_method
from tests.support.clip_files import FACE, Faces, config, embedding
from tests.support.token_files import CROSS, PROMPTS, WIDTH, drawn, person

LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"


def file(pipe: Any, version: int) -> dict[str, dict[str, torch.Tensor]]:
    """A small file in the published layout, with a LoRA in diffusers' old names."""
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
    made = PhotoMaker.load(tmp_path / "photomaker.bin")
    made.attach(pipe)
    return made


def somebody(method: PhotoMaker) -> Identity:
    return method.features(Faces(), embedding).extract([FACE])[0]


def said(pipe: Any, prompt: str, count: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """A prompt with the word "person" `count` times, as SDXL's two encoders say it: states, pooled, the word's place."""
    longer = prompt.replace("person", " ".join(["person"] * count))
    states, _, pooled, _ = pipe.encode_prompt(longer, do_classifier_free_guidance=False)
    ids = pipe.tokenizer(prompt).input_ids
    return states, pooled, ids.index(pipe.tokenizer.convert_tokens_to_ids("person"))


@pytest.mark.parametrize("photos", [1, 2])
def test_it_is_the_stock_pipeline_with_melted_words(
    pipe: Any, method: PhotoMaker, photos: int
) -> None:
    who = fuse_identities([somebody(method)] * photos)
    method.lora = {}
    with method.use(who, start=0.0):
        ours = drawn(pipe)
    encoder = method.encoder
    faces = who.id_cond[0, :, :WIDTH] if encoder.face else None
    with torch.no_grad():
        tokens = encoder.people(who.hidden[0][0].unflatten(0, (photos, -1)), faces).flatten(0, 1)
        assert tokens.shape == (photos * encoder.tokens_per_photo, CROSS)
        states, pooled, place = said(pipe, PROMPTS[0], len(tokens))
        where = slice(place, place + len(tokens))
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


def test_the_low_rank_change_is_diffusers_own(pipe: Any, method: PhotoMaker) -> None:
    pytest.importorskip("peft")
    who = somebody(method)
    with method.use(who, scale=0.5, start=0.99):  # the words stay: 0.99 is after the last step
        ours = drawn(pipe)
    tensors = file(pipe, 1 if not method.encoder.face else 2)["lora_weights"]
    pipe.load_lora_weights(tensors, adapter_name="photomaker")
    pipe.set_adapters("photomaker", 0.5)
    assert torch.allclose(ours, drawn(pipe), atol=1e-5)


def test_words_alone_until_it_starts(pipe: Any, method: PhotoMaker) -> None:
    """Its known trap: the layout is the words' until `start`, pooled embedding included."""
    method.lora = {}
    before, seen = drawn(pipe), []
    hook = pipe.unet.register_forward_pre_hook(
        lambda module, args, named: seen.append(named), with_kwargs=True
    )
    with method.use(
        fuse_identities([somebody(method)] * 2), start=0.4
    ):  # of one token the pooled embedding stays
        pipe.unet.register_forward_pre_hook(
            lambda module, args, named: seen.append(named), with_kwargs=True
        )
        late = drawn(pipe)
    hook.remove()
    told = [
        (step["encoder_hidden_states"], step["added_cond_kwargs"]["text_embeds"])
        for step in (seen[1], seen[3])
    ]
    for first, second in zip(
        *told, strict=True
    ):  # of each of two steps, what came out of the method's own hook
        assert torch.equal(first[0], second[0]), "the negative half is told nothing"
        assert not torch.equal(first[1], second[1])
    assert not torch.allclose(late, before, atol=1e-4)


def test_the_step_at_its_start_is_the_words_own(pipe: Any, method: PhotoMaker) -> None:
    """The authors begin after step int(start * n)."""
    method.lora = {}
    before = drawn(pipe)
    with method.use(somebody(method), start=0.5):  # the second of two steps begins there
        assert torch.equal(drawn(pipe), before)


def test_a_controlnet_reads_the_melted_words(pipe: Any, method: PhotoMaker) -> None:
    """Whichever of the two was opened first."""
    method.lora = {}
    net = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 32))
    control, read, told = ControlNet(net), [], []
    control.attach(pipe)
    net.register_forward_pre_hook(
        lambda _, args, named: read.append(named["encoder_hidden_states"]), with_kwargs=True
    )
    with control.use(torch.rand(3, 16, 16)), method.use(somebody(method), start=0.0):
        pipe.unet.register_forward_pre_hook(
            lambda _, args, named: told.append(named["encoder_hidden_states"]), with_kwargs=True
        )
        drawn(pipe)
    plain = pipe.encode_prompt(PROMPTS[0])[0]
    assert len(read) == len(told) == 2 and all(
        torch.equal(a, b) for a, b in zip(read, told, strict=True)
    )
    assert not torch.equal(read[0][1:], plain)


def test_nothing_is_left_behind(pipe: Any, method: PhotoMaker) -> None:
    method.detach()
    before, names = drawn(pipe), [name for name, _ in pipe.unet.named_modules()]
    method.attach(pipe)
    assert isinstance(method, Method) and torch.equal(drawn(pipe), before)
    for _ in range(2):
        with method.use(somebody(method)):
            assert not torch.allclose(drawn(pipe), before, atol=1e-4)
        assert torch.equal(drawn(pipe), before)
    with method.use(somebody(method), scale=0):
        assert torch.equal(drawn(pipe), before)
    method.detach(pipe)
    assert [name for name, _ in pipe.unet.named_modules()] == names and not getattr(
        pipe.unet, "peft_config", {}
    )
    for module in (pipe.unet, pipe.text_encoder, pipe.text_encoder_2):
        assert not module._forward_hooks and not module._forward_pre_hooks
    with pytest.raises(OptionError, match="attach"), method.use(somebody(method)):
        pass


def test_what_was_said_for_one_run_is_not_kept_for_the_next(
    pipe: Any, method: PhotoMaker, monkeypatch: Any
) -> None:
    from openpulid.methods.photomaker import adapter

    opened: list[Any] = []
    begin = adapter._Opened.__init__

    def noted(self: Any, *args: Any) -> None:
        opened.append(self)
        begin(self, *args)

    monkeypatch.setattr(adapter._Opened, "__init__", noted)
    with method.use(somebody(method), start=0.0):
        first = drawn(pipe)
        length = len(opened[0].said[0])
        again = drawn(pipe)
    assert torch.equal(first, again) and len(opened[0].said[0]) == length


def test_batches_and_guidance(pipe: Any, method: PhotoMaker) -> None:
    """Two people in one batch are what each is alone; without guidance there is no negative half to skip."""
    one = somebody(method)
    other = Identity(one.id_cond.flip(-1), tuple(level.flip(-1) for level in one.hidden))
    prompts = ["portrait of a person", "a person smiling"]
    for guidance in (1.0, 3.0):
        alone = []
        for k, who in enumerate((one, other)):
            with method.use(who, start=0.0):
                options = {
                    "num_inference_steps": 2,
                    "guidance_scale": guidance,
                    "output_type": "latent",
                }
                alone.append(
                    pipe(prompts[k], generator=[torch.Generator().manual_seed(k)], **options).images
                )
        with method.use([one, other], start=0.0):
            assert torch.allclose(drawn(pipe, prompts, guidance), torch.cat(alone), atol=1e-5)
    with method.use([one, one, one]), pytest.raises(OptionError, match="3 identities for 2 images"):
        drawn(pipe, prompts)


def test_the_word_is_repeated_and_the_end_stays(pipe: Any) -> None:
    words = pipe.tokenizer
    person_id, end = words.convert_tokens_to_ids("person"), words.eos_token_id
    ids = words(
        ["portrait of a person", "film noir"], padding="max_length", return_tensors="pt"
    ).input_ids
    again, places = repeated(ids, words, 3)
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
    assert repeated(full, words, 3)[0][0, -1] == end


def test_a_person_who_is_named_too_late_is_said(pipe: Any, method: PhotoMaker) -> None:
    """Twelve places: the word's repetitions would push the end out. What is not to be seen may name somebody late."""
    late = " ".join(["red"] * 9) + " person"
    who = fuse_identities([somebody(method)] * 2)
    with method.use(who, start=0.0):
        with pytest.raises(OptionError, match="stands too late in the prompt"):
            drawn(pipe, [late])
        drawn(pipe, negative_prompt=[late])
    with (
        method.use(somebody(method)),
        pytest.raises(OptionError, match="already in use"),
        method.use(who),
    ):
        pass


def test_what_does_not_fit_is_said(pipe: Any, method: PhotoMaker, tmp_path: Any) -> None:
    with pytest.raises(OptionError, match="own picture tower"), method.use(person(1)):
        pass
    states, _, pooled, _ = pipe.encode_prompt(PROMPTS[0], do_classifier_free_guidance=False)
    with (
        method.use(somebody(method), start=0.0),
        pytest.raises(OptionError, match="give the pipeline words"),
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
    if method.encoder.face:
        with pytest.raises(OptionError, match="face recognition model"):
            method.features(Faces())
    assert find_method("photomaker") is PhotoMaker
