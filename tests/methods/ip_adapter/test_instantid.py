"""InstantID: equal to diffusers' ControlNet pipeline with IdentityNet, and fully removed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionXLControlNetPipeline

from openpulid.errors import OptionError, WeightsError
from openpulid.identity.identity import Identity
from openpulid.methods.adapter import Adapter
from openpulid.methods.ip_adapter.instantid import InstantID, draw_landmarks
from openpulid.methods.registry import find_method
from tests.support.token_files import PROMPTS, WIDTH, controlnet, generate, person, resampler


@pytest.fixture
def pipe(tiny_pipeline: Any) -> Any:
    return tiny_pipeline()


@pytest.fixture
def method(pipe: Any) -> InstantID:
    return InstantID(resampler(pipe.unet), controlnet(pipe.unet))


class TokenIdentityNet(ControlNetModel):
    """IdentityNet that reads identity tokens instead of the prompt in diffusers' pipeline."""

    def forward(
        self, sample: Any, timestep: Any, encoder_hidden_states: Any, *args: Any, **named: Any
    ) -> Any:
        return super().forward(sample, timestep, self.tokens, *args, **named)


def test_matches_diffusers_controlnet_pipeline(pipe: Any, method: InstantID) -> None:
    identity = person(1)
    method.attach(pipe)
    method.control_scale = 0.8
    with method.use(identity, scale=0.6):
        ours = generate(pipe)
    net = TokenIdentityNet.from_unet(
        pipe.unet, conditioning_embedding_out_channels=(16, 32), load_weights_from_unet=False
    )
    net.load_state_dict(method.identity_net.state_dict())
    stock = StableDiffusionXLControlNetPipeline.from_pipe(pipe, controlnet=net)
    stock.set_progress_bar_config(disable=True)
    stock.load_ip_adapter(
        resampler(pipe.unet), subfolder="", weight_name="", image_encoder_folder=None
    )
    stock.set_ip_adapter_scale(0.6)
    embedding = identity.id_cond[:, :, None, :WIDTH]
    both = torch.cat([torch.zeros_like(embedding), embedding])
    net.tokens = stock.unet.encoder_hid_proj([both])[0].flatten(1, 2).detach()
    picture = draw_landmarks(identity, (16, 16))
    options = {
        "ip_adapter_image_embeds": [both],
        "image": picture,
        "controlnet_conditioning_scale": 0.8,
    }
    theirs = generate(stock, **options)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_scale_applies_to_tokens_and_identity_net(pipe: Any, method: InstantID) -> None:
    method.attach(pipe)
    with method.use(person(1), scale=0.6):
        ours = generate(pipe)
    method.control_scale = 0.6
    with method.use(person(1), scale=0.6):
        assert torch.equal(generate(pipe), ours)
    method.control_scale = 0.0
    with method.use(person(1), scale=0.6):
        assert not torch.allclose(generate(pipe), ours, atol=1e-3)


def test_identity_net_does_not_read_prompt(pipe: Any, method: InstantID) -> None:
    method.attach(pipe)
    calls: list[Any] = []
    hook = method.identity_net.register_forward_pre_hook(
        lambda module, args, named: calls.append(named["encoder_hidden_states"]), with_kwargs=True
    )
    for prompt in PROMPTS:
        with method.use(person(1)):
            generate(pipe, [prompt])
    hook.remove()
    assert (
        len(calls) == 4 and calls[0].shape[1] == 3 and all(torch.equal(calls[0], x) for x in calls)
    )


def test_pipeline_is_restored(pipe: Any, method: InstantID) -> None:
    baseline = generate(pipe)
    assert isinstance(method, Adapter) and find_method("instantid") is InstantID
    method.attach(pipe)
    with method.use(person(1)):
        changed = generate(pipe)
    assert not torch.allclose(changed, baseline, atol=1e-3) and torch.equal(
        generate(pipe), baseline
    )
    with method.use(person(1), start=0.5):  # one of two steps
        assert not torch.allclose(generate(pipe), changed, atol=1e-3)
    method.detach()
    assert pipe.unet.encoder_hid_proj is None and not pipe.unet._forward_pre_hooks


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_batches_match_single_images(pipe: Any, method: InstantID, guidance: float) -> None:
    """Two identities in one batch equal single images, with and without guidance."""
    method.attach(pipe)
    alone = []
    for k in range(2):
        with method.use(person(k + 1)):
            options = {
                "num_inference_steps": 2,
                "guidance_scale": guidance,
                "output_type": "latent",
            }
            alone.append(
                pipe(PROMPTS[k], generator=torch.Generator().manual_seed(k), **options).images
            )
    with method.use([person(1), person(2)]):
        assert torch.allclose(generate(pipe, PROMPTS, guidance), torch.cat(alone), atol=1e-4)


def test_several_reference_images_are_averaged(pipe: Any, method: InstantID) -> None:
    identity = person(1, photos=3)
    marks = (
        None if identity.landmarks is None else identity.landmarks[:, :1]
    )  # the first photo's are generate
    method.attach(pipe)
    outputs = []
    for features in (identity.id_cond.mean(1, keepdim=True), identity.id_cond[:, :1]):
        with method.use(Identity(features, (torch.zeros(1, 1, 2),) * 5, landmarks=marks)):
            outputs.append(generate(pipe))
    with method.use(identity):
        ours = generate(pipe)
    assert torch.allclose(ours, outputs[0], atol=1e-5) and not torch.allclose(
        ours, outputs[1], atol=1e-3
    )


def test_landmarks_are_drawn_at_their_positions() -> None:
    marks = torch.tensor([[[[0.3, 0.4], [0.7, 0.4], [0.5, 0.5], [0.35, 0.7], [0.65, 0.7]]]])
    identity = Identity(torch.zeros(1, 1, WIDTH), (torch.zeros(1, 1, 2),) * 5, landmarks=marks)
    page = draw_landmarks(identity, (1024, 512))[0]  # the square of the reference image is centered
    assert page.shape == (3, 512, 1024)
    assert page[:, 205, 256 + 154].tolist() == [1, 0, 0] and page[:, 205, 256 + 358].tolist() == [
        0,
        1,
        0,
    ]
    assert page[:, 256, 512].tolist() == [0, 0, 1] and page[:, :, :200].max() == 0
    between = page[:, 230, 256 + 205]  # on the line from the left eye to the nose
    assert between.tolist() == pytest.approx([0.6, 0, 0], abs=0.01)
    with pytest.raises(OptionError, match="landmarks"):
        draw_landmarks(Identity(torch.zeros(1, 1, WIDTH), (torch.zeros(1, 1, 2),) * 5), (64, 64))


def test_published_folder_loads(pipe: Any, method: InstantID, tmp_path: Any) -> None:
    with pytest.raises(WeightsError, match="ControlNetModel"):
        InstantID.load(tmp_path)
    parts = resampler(pipe.unet)
    torch.save(parts, tmp_path / "ip-adapter.bin")
    method.identity_net.save_pretrained(tmp_path / "ControlNetModel")
    loaded = InstantID.load(tmp_path)
    loaded.attach(pipe)
    method.attach(pipe)
    with loaded.use(person(1)):
        ours = generate(pipe)
    with method.use(person(1)):
        assert torch.equal(generate(pipe), ours)
    twice = {part: {name: 2 * x for name, x in tensors.items()} for part, tensors in parts.items()}
    torch.save(
        twice, tmp_path / "finetuned.bin"
    )  # an explicit file is used instead of the default one
    named = InstantID.load(tmp_path / "finetuned.bin")
    for name, x in named.parts["image_proj"].items():
        assert torch.equal(x, 2 * loaded.parts["image_proj"][name])
