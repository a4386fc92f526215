"""IP-Adapter and FaceID-PlusV2: equal to diffusers, and fully removed afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from openpulid.errors import OptionError
from openpulid.identity.identity import fuse_identities
from openpulid.methods.adapter import Adapter
from openpulid.methods.ip_adapter.faceid import FaceIDPlus
from openpulid.methods.ip_adapter.ip_adapter import IPAdapter
from openpulid.methods.registry import find_method
from tests.support.clip_files import FACE, SEEN, embedding, faceid_plus, features, plain, plus
from tests.support.token_files import PROMPTS, WIDTH, generate, person


@pytest.fixture
def pipe(tiny_pipeline: Any) -> Any:
    return tiny_pipeline()


def theirs(pipe: Any, parts: Any, embeds: torch.Tensor, scale: float, **more: Any) -> torch.Tensor:
    pipe.load_ip_adapter(parts, subfolder="", weight_name="", image_encoder_folder=None)
    pipe.set_ip_adapter_scale(scale)
    return generate(pipe, ip_adapter_image_embeds=[embeds], **more)


@pytest.mark.parametrize("file", [plain, plus])
def test_matches_diffusers_ip_adapter(pipe: Any, file: Any) -> None:
    identity, method = features().extract([FACE])[0], IPAdapter(file(pipe.unet))
    method.attach(pipe)
    with method.use(identity, scale=0.7):
        ours = generate(pipe)
    if method.plus:
        embeds = torch.stack([identity.hidden[1], identity.hidden[0]])
    else:
        embeds = torch.cat([torch.zeros_like(identity.id_cond), identity.id_cond])
    assert torch.allclose(ours, theirs(pipe, file(pipe.unet), embeds, 0.7), atol=1e-5)


def test_unconditional_states_match_diffusers(pipe: Any) -> None:
    """The empty image is zero after normalization, not black."""
    reader = features()
    identity = reader.extract([FACE])[0]
    pipe.register_modules(image_encoder=reader.vision_encoder)
    pixels = torch.rand(1, 3, 8, 8)
    _, negative = pipe.encode_image(pixels, "cpu", 1, output_hidden_states=True)
    assert torch.allclose(identity.hidden[1], negative, atol=1e-6)
    assert identity.id_cond.shape == (1, 1, SEEN) and identity.hidden[0].shape == (1, 5, SEEN)


def test_faceid_plus_matches_diffusers(pipe: Any) -> None:
    """CLIP's states are set in the layer, stacked for guidance and repeated for several images."""
    reader = features(clip_input="face", recognition=embedding)
    identity, method = reader.extract([FACE])[0], FaceIDPlus(faceid_plus(pipe.unet))
    assert identity.id_cond.shape == (1, 1, WIDTH + SEEN)
    method.attach(pipe)
    with method.use(identity, scale=0.7):
        alone, both = generate(pipe), generate(pipe, PROMPTS)
        unguided = generate(pipe, guidance=1.0)
    layer = method.layers_for(pipe).image_projection
    assert layer.clip_embeds is None, "somebody's features were left in a layer"
    face = torch.nn.functional.normalize(identity.id_cond[..., :WIDTH], dim=-1)
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
        captured, negative = (level[None].repeat_interleave(count, 0) for level in identity.hidden)
        layer.clip_embeds = torch.cat([negative, captured]) if guidance > 1 else captured
        embeds = torch.cat([torch.zeros_like(face), face]) if guidance > 1 else face
        pipe.set_ip_adapter_scale(0.7)
        outputs = [embeds.repeat_interleave(count, 0)] if guidance == 1 else [embeds]
        assert torch.allclose(
            ours, generate(pipe, prompts, guidance, ip_adapter_image_embeds=outputs), atol=1e-5
        )


@pytest.mark.parametrize("file", [plain, plus])
def test_a_users_own_adapter_and_processors_stay(pipe: Any, file: Any) -> None:
    """A Resampler of the user has attention of its own, which is no layer of the U-Net."""
    own = {
        "ip_adapter_image_embeds": [
            torch.ones(2, 1, 5, SEEN) if file is plus else torch.ones(2, 1, SEEN)
        ]
    }
    pipe.load_ip_adapter(file(pipe.unet), subfolder="", weight_name="", image_encoder_folder=None)
    baseline, projection = generate(pipe, **own), pipe.unet.encoder_hid_proj
    method = IPAdapter(plus(pipe.unet))
    method.attach(pipe)
    with method.use(features().extract([FACE])[0]):
        assert not torch.allclose(generate(pipe), baseline, atol=1e-3)
    assert torch.equal(generate(pipe, **own), baseline)
    assert pipe.unet.encoder_hid_proj is projection


def test_processors_of_the_user_run_next_to_the_method(pipe: Any) -> None:
    pipe.enable_attention_slicing(1)
    method = IPAdapter(plain(pipe.unet))
    method.attach(pipe)
    calls = []

    class Counting(AttnProcessor2_0):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return super().__call__(*args, **kwargs)

    pipe.unet.set_attn_processor(Counting())
    generate(pipe)
    everywhere = len(calls)
    with method.use(features().extract([FACE])[0]):
        generate(pipe)
    # the method replaces those of the cross-attention
    assert len(calls) == 1.5 * everywhere


@pytest.mark.parametrize(
    ("kind", "file"), [(IPAdapter, plain), (IPAdapter, plus), (FaceIDPlus, faceid_plus)]
)
def test_pipeline_is_restored(pipe: Any, kind: Any, file: Any) -> None:
    baseline, names = generate(pipe), [name for name, _ in pipe.unet.named_modules()]
    method = kind(file(pipe.unet))
    assert isinstance(method, Adapter)
    method.attach(pipe)
    identity = features(recognition=embedding if kind is FaceIDPlus else None).extract([FACE])[0]
    for _ in range(2):
        with method.use(identity):
            assert not torch.allclose(generate(pipe), baseline, atol=1e-3)
        assert torch.equal(generate(pipe), baseline)
    method.detach(pipe)
    assert pipe.unet.encoder_hid_proj is None and not getattr(pipe.unet, "peft_config", {})
    assert [name for name, _ in pipe.unet.named_modules()] == names


def test_several_reference_images_and_identities(pipe: Any) -> None:
    one = features().extract([FACE])[0]
    method = IPAdapter(plus(pipe.unet))
    method.attach(pipe)
    with method.use(fuse_identities([one, one])):
        assert generate(pipe, PROMPTS).shape[0] == 2
    with (
        method.use([one, one]),
        pytest.raises(OptionError, match="2 identities do not fit 1 images"),
    ):
        generate(pipe)


def test_people_who_cannot_be_shown_are_refused(pipe: Any) -> None:
    one = features().extract([FACE])[0]
    method = IPAdapter(plain(pipe.unet))
    method.attach(pipe)
    two_images = fuse_identities([one, one])
    for people, message in (
        ([(one, None)], "pass an identity, or one per prompt"),
        ([], "pass an identity, or one per prompt"),
        ([one, two_images], "need the same number of reference images"),
    ):
        with pytest.raises(OptionError, match=message), method.use(people):
            pass


def test_compiled_unet_is_refused(pipe: Any) -> None:
    method = IPAdapter(plain(pipe.unet))
    method.attach(pipe)
    pipe.unet.compile(backend="eager")
    with (
        pytest.raises(OptionError, match="compiled code ignores hooks"),
        method.use(features().extract([FACE])[0]),
    ):
        pass


def test_identity_of_another_extractor_raises(pipe: Any) -> None:
    method = IPAdapter(plain(pipe.unet))
    method.attach(pipe)
    message = "reads CLIP features of width 64, the identity has 9"
    with pytest.raises(OptionError, match=message), method.use(person(1)):
        pass
    method = IPAdapter(plus(pipe.unet))
    method.attach(pipe)
    with pytest.raises(OptionError, match="no CLIP image features"), method.use(person(1)):
        pass
    assert find_method("ip-adapter") is IPAdapter and find_method("faceid-plus") is FaceIDPlus


def test_extractor_crops_center_or_face() -> None:
    """The crop is the center square of the image, or the face aligned as by insightface."""
    full, face = features().debug_crops(FACE)[0], features(clip_input="face").debug_crops(FACE)[0]
    assert full.shape == face.shape == (3, 8, 8)
    middle = torch.nn.functional.interpolate(
        FACE.image[None, :, 2:22], size=(8, 8), mode="bicubic", antialias=True
    )
    assert torch.allclose(full, middle[0].clamp(0, 1), atol=1e-6)
    assert not torch.allclose(full, face, atol=0.05)
