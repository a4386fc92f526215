"""IP-Adapter and FaceID-PlusV2 by diffusers' own processors: equal to diffusers' way, and nothing of them left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from openpulid.errors import OptionError
from openpulid.identity.identity import fuse_identities
from openpulid.methods.ip_adapter.faceid import FaceIDPlus
from openpulid.methods.ip_adapter.ip_adapter import IPAdapter
from openpulid.methods.registry import Method, find_method
from tests.support.clip_files import FACE, SEEN, embedding, faceid_plus, features, plain, plus
from tests.support.token_files import PROMPTS, WIDTH, drawn, person


@pytest.fixture
def pipe(tiny_pipeline: Any) -> Any:
    return tiny_pipeline()


def theirs(pipe: Any, parts: Any, embeds: torch.Tensor, scale: float, **more: Any) -> torch.Tensor:
    pipe.load_ip_adapter(parts, subfolder="", weight_name="", image_encoder_folder=None)
    pipe.set_ip_adapter_scale(scale)
    return drawn(pipe, ip_adapter_image_embeds=[embeds], **more)


@pytest.mark.parametrize("file", [plain, plus])
def test_it_is_what_diffusers_draws(pipe: Any, file: Any) -> None:
    who, method = features().extract([FACE])[0], IPAdapter(file(pipe.unet))
    method.attach(pipe)
    with method.use(who, scale=0.7):
        ours = drawn(pipe)
    if method.plus:
        embeds = torch.stack([who.hidden[1], who.hidden[0]])
    else:
        embeds = torch.cat([torch.zeros_like(who.id_cond), who.id_cond])
    assert torch.allclose(ours, theirs(pipe, file(pipe.unet), embeds, 0.7), atol=1e-5)


def test_what_the_tower_is_told_is_what_diffusers_tells_it(pipe: Any) -> None:
    """Nothing is a picture of zeros after normalisation, not a black one."""
    reader = features()
    who = reader.extract([FACE])[0]
    pipe.register_modules(image_encoder=reader.vision_encoder)
    pixels = torch.rand(1, 3, 8, 8)
    _, nothing = pipe.encode_image(pixels, "cpu", 1, output_hidden_states=True)
    assert torch.allclose(who.hidden[1], nothing, atol=1e-6)
    assert who.id_cond.shape == (1, 1, SEEN) and who.hidden[0].shape == (1, 5, SEEN)


def test_faceid_plus_is_what_diffusers_draws(pipe: Any) -> None:
    """Its known trap: CLIP's states go to the layer itself, for guidance stacked and for several images repeated."""
    reader = features(clip_input="face", recognition=embedding)
    who, method = reader.extract([FACE])[0], FaceIDPlus(faceid_plus(pipe.unet))
    assert who.id_cond.shape == (1, 1, WIDTH + SEEN)
    method.attach(pipe)
    with method.use(who, scale=0.7):
        alone, both = drawn(pipe), drawn(pipe, PROMPTS)
        unguided = drawn(pipe, guidance=1.0)
    layer = method._built[pipe.unet][1].image_projection_layers[0]
    assert layer.clip_embeds is None, "somebody's features were left in a layer"
    face = torch.nn.functional.normalize(who.id_cond[..., :WIDTH], dim=-1)
    pipe.load_ip_adapter(
        faceid_plus(pipe.unet), subfolder="", weight_name="", image_encoder_folder=None
    )
    layer = pipe.unet.encoder_hid_proj.image_projection_layers[0]
    layer.shortcut = True
    for prompts, ours, guidance in (
        (PROMPTS[:1], alone, 3.0),
        (PROMPTS, both, 3.0),
        (PROMPTS[:1], unguided, 1.0),
    ):
        count = len(prompts)
        seen, nothing = (level[None].repeat_interleave(count, 0) for level in who.hidden)
        layer.clip_embeds = torch.cat([nothing, seen]) if guidance > 1 else seen
        embeds = torch.cat([torch.zeros_like(face), face]) if guidance > 1 else face
        pipe.set_ip_adapter_scale(0.7)
        told = [embeds.repeat_interleave(count, 0)] if guidance == 1 else [embeds]
        assert torch.allclose(
            ours, drawn(pipe, prompts, guidance, ip_adapter_image_embeds=told), atol=1e-5
        )


@pytest.mark.parametrize(
    ("kind", "file"), [(IPAdapter, plain), (IPAdapter, plus), (FaceIDPlus, faceid_plus)]
)
def test_nothing_is_left_behind(pipe: Any, kind: Any, file: Any) -> None:
    before, names = drawn(pipe), [name for name, _ in pipe.unet.named_modules()]
    method = kind(file(pipe.unet))
    assert isinstance(method, Method)
    method.attach(pipe)
    who = features(recognition=embedding if kind is FaceIDPlus else None).extract([FACE])[0]
    for _ in range(2):
        with method.use(who):
            assert not torch.allclose(drawn(pipe), before, atol=1e-3)
        assert torch.equal(drawn(pipe), before)
    method.detach(pipe)
    assert pipe.unet.encoder_hid_proj is None and not getattr(pipe.unet, "peft_config", {})
    assert [name for name, _ in pipe.unet.named_modules()] == names


def test_several_photos_and_people(pipe: Any) -> None:
    one = features().extract([FACE])[0]
    method = IPAdapter(plus(pipe.unet))
    method.attach(pipe)
    with method.use(fuse_identities([one, one])):
        assert drawn(pipe, PROMPTS).shape[0] == 2
    with method.use([one, one]), pytest.raises(OptionError, match="2 identities for 1 images"):
        drawn(pipe)


def test_an_identity_of_another_reader_is_refused(pipe: Any) -> None:
    method = IPAdapter(plain(pipe.unet))
    method.attach(pipe)
    with (
        method.use(person(1)),
        pytest.raises(
            OptionError, match="reads 64 numbers of a picture tower and the identity has 9"
        ),
    ):
        drawn(pipe)
    method = IPAdapter(plus(pipe.unet))
    method.attach(pipe)
    with method.use(person(1)), pytest.raises(OptionError, match="own reader of pictures"):
        drawn(pipe)
    assert find_method("ip-adapter") is IPAdapter and find_method("faceid-plus") is FaceIDPlus


def test_views_of_a_photo() -> None:
    """The whole photo's middle square, or the face where insightface puts it."""
    whole, face = features().debug_crops(FACE)[0], features(clip_input="face").debug_crops(FACE)[0]
    assert whole.shape == face.shape == (3, 8, 8)
    middle = torch.nn.functional.interpolate(
        FACE.image[None, :, 2:22], size=(8, 8), mode="bicubic", antialias=True
    )
    assert torch.allclose(whole, middle[0].clamp(0, 1), atol=1e-6)
    assert not torch.allclose(whole, face, atol=0.05)
