"""InfiniteYou on a tiny FLUX: equal to diffusers' ControlNet pipeline, and every guarantee."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    ChromaTransformer2DModel,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
    FluxMultiControlNetModel,
    FluxPipeline,
)

from openpulid.errors import IdentityError, OptionError, WeightsError
from openpulid.methods.controlnet_flux import FluxControlNet
from openpulid.methods.infiniteyou.encoders import FaceProjection
from openpulid.methods.infiniteyou.flux import InfiniteYou
from openpulid.methods.infiniteyou.infusenet import InfuseNet
from openpulid.methods.ip_adapter.instantid import draw_landmarks
from tests.support import people
from tests.support.infinite_you import face, save_method, tiny_method, tiny_resampler
from tests.support.tiny_flux import fresh, run, tiny_controlnet, tiny_pipe

SIDE = 32
NOISE = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(5))
BLACK = -torch.ones(1, 3, SIDE, SIDE)
"""diffusers' pipelines take tensors from -1 to 1 as they are."""
anna, ben = face(1), face(2)
LEFT = torch.zeros(SIDE, SIDE)
LEFT[:, : SIDE // 2] = 1


class TokenInfuseNet(FluxControlNetModel):
    """A ControlNet that diffusers' pipeline calls, and that reads identity tokens."""

    def forward(self, *args: Any, **named: Any) -> Any:
        named["encoder_hidden_states"] = self.tokens
        named["txt_ids"] = torch.zeros(self.tokens.shape[1], 3)
        named["guidance"] = torch.ones(1)
        return super().forward(*args, **named)


@pytest.fixture(scope="module")
def pipe() -> FluxPipeline:
    """Return a pipeline whose autoencoder predicts a mean without variance.

    diffusers' pipelines sample the latents of control images.
    """
    created = tiny_pipe()
    last = created.vae.encoder.conv_out
    with torch.no_grad():
        last.weight[len(last.weight) // 2 :] = 0
        last.bias[len(last.bias) // 2 :] = -30
    return created


@pytest.fixture
def method(pipe: FluxPipeline) -> Iterator[InfiniteYou]:
    created = tiny_method(pipe)
    yield created
    created.detach()
    assert not pipe.transformer._forward_pre_hooks and not pipe.transformer._forward_hooks
    assert not [name for name in vars(pipe.transformer) if name.startswith("_openpulid")]


def within(pipe: FluxPipeline, kind: type, **parts: Any) -> Any:
    """Create a pipeline of another kind from the components."""
    names = ("image_encoder", "feature_extractor")
    components = {name: part for name, part in pipe.components.items() if name not in names}
    second = kind(**components, **parts)
    second.set_progress_bar_config(disable=True)
    return second


def stock_net(method: InfiniteYou) -> TokenInfuseNet:
    """Return InfuseNet as a network for diffusers' own pipeline."""
    net = TokenInfuseNet.from_config(method.infusenet.model.config).eval()
    net.load_state_dict(method.infusenet.model.state_dict())
    net.tokens = method.projection.encode(anna)
    return net


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return people.distance(one, other)


@contextmanager
def recorded(pipe: Any) -> Iterator[list[dict[str, Any]]]:
    """Record the arguments of the transformer while this is open, after the hooks of a method."""
    calls: list[dict[str, Any]] = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(dict(kwargs)), with_kwargs=True
    )
    try:
        yield calls
    finally:
        handle.remove()


def is_infused(calls: list[dict[str, Any]]) -> list[bool]:
    return [call.get("controlnet_block_samples") is not None for call in calls]


# --- against diffusers


def test_matches_diffusers_controlnet_pipeline(pipe: FluxPipeline, method: InfiniteYou) -> None:
    theirs = within(pipe, FluxControlNetPipeline, controlnet=stock_net(method))
    control = {"control_image": BLACK, "controlnet_conditioning_scale": 0.7}
    expected = run(theirs, guidance_scale=4.0, latents=NOISE, **control)
    plain = run(pipe, guidance_scale=4.0, latents=NOISE)
    with method.use(anna, scale=0.7):
        ours = run(pipe, guidance_scale=4.0, latents=NOISE)
    assert distance(ours, expected) < 1e-5 < 1e-2 < distance(ours, plain)


def test_landmarks_are_the_control_image(pipe: FluxPipeline, method: InfiniteYou) -> None:
    theirs = within(pipe, FluxControlNetPipeline, controlnet=stock_net(method))
    control = {"control_image": 2 * draw_landmarks(ben, (SIDE, SIDE)) - 1}
    control |= {"controlnet_conditioning_scale": 1.0}
    expected = run(theirs, guidance_scale=4.0, latents=NOISE, **control)
    with method.use(anna, landmarks=ben):
        ours = run(pipe, guidance_scale=4.0, latents=NOISE)
    with method.use(anna):
        black = run(pipe, guidance_scale=4.0, latents=NOISE)
    assert distance(ours, expected) < 1e-5 < 1e-3 < distance(ours, black)
    with (
        method.use(anna, landmarks=replace(ben, landmarks=None)),
        pytest.raises(OptionError, match="no landmarks to draw"),
    ):
        run(pipe)


def test_user_controlnet_adds_up(pipe: FluxPipeline, method: InfiniteYou) -> None:
    """The project's own, opened before or after; and that of diffusers' pipeline."""
    net = tiny_controlnet(seed=3)
    image = torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    both = within(
        pipe,
        FluxControlNetPipeline,
        controlnet=FluxMultiControlNetModel([stock_net(method), net]),
    )
    control = {"control_image": [BLACK, 2 * image[None] - 1]}
    control |= {"controlnet_conditioning_scale": [0.7, 0.4]}
    expected = run(both, guidance_scale=4.0, latents=NOISE, **control)
    controlnet = FluxControlNet(net)
    controlnet.attach(pipe)
    with method.use(anna, scale=0.7), controlnet.use(image, scale=0.4):
        first = run(pipe, guidance_scale=4.0, latents=NOISE)
    with controlnet.use(image, scale=0.4), method.use(anna, scale=0.7):
        second = run(pipe, guidance_scale=4.0, latents=NOISE)
    stock = within(pipe, FluxControlNetPipeline, controlnet=net)
    method.detach()
    method.attach(stock)
    with method.use(anna, scale=0.7):
        third = run(
            stock,
            guidance_scale=4.0,
            latents=NOISE,
            control_image=2 * image[None] - 1,
            controlnet_conditioning_scale=0.4,
        )
    for output in (first, second, third):
        assert distance(output, expected) < 1e-5


def test_combines_with_pulid(pipe: FluxPipeline, method: InfiniteYou) -> None:
    """Also with true guidance, where both leave out the negative prompt."""
    theirs = within(pipe, FluxControlNetPipeline, controlnet=stock_net(method))
    adapter = fresh(pipe)
    adapter.attach(theirs)
    control = {"control_image": BLACK, "controlnet_conditioning_scale": 1.0}
    with adapter.use(people.anna, pipe=theirs):
        expected = run(theirs, guidance_scale=4.0, latents=NOISE, **control)
    with method.use(anna), adapter.use(people.anna, pipe=pipe):
        ours = run(pipe, guidance_scale=4.0, latents=NOISE)
    with adapter.use(people.anna, pipe=pipe):
        alone = run(pipe, guidance_scale=4.0, latents=NOISE)
        with method.use(anna), recorded(pipe) as calls:
            run(pipe, True, steps=2)
    assert distance(ours, expected) < 1e-5 < 1e-2 < distance(ours, alone)
    assert is_infused(calls) == [True, False] * 2
    # guidance that begins later belongs to neither of them
    with adapter.use(people.anna, pipe=pipe), method.use(anna, timestep_to_start_cfg=1):
        later = run(pipe, True, latents=NOISE)
    with method.use(anna, timestep_to_start_cfg=1), adapter.use(people.anna, pipe=pipe):
        assert np.array_equal(run(pipe, True, latents=NOISE), later)
    adapter.detach()


# --- what InfuseNet gets, and when


def test_infusenet_reads_the_identity_and_its_own_guidance(
    pipe: FluxPipeline, method: InfiniteYou
) -> None:
    seen: list[dict[str, Any]] = []
    handle = method.infusenet.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    with method.use(anna), recorded(pipe) as calls:
        run(pipe, guidance_scale=4.0, steps=2)
    handle.remove()
    assert len(seen) == len(calls) == 2
    for own, base in zip(seen, calls, strict=True):
        assert torch.equal(own["encoder_hidden_states"], method.projection.encode(anna))
        assert own["txt_ids"].shape == (3, 3) and not own["txt_ids"].any()
        assert own["guidance"].tolist() == [1.0] and base["guidance"].tolist() == [4.0]
        assert torch.equal(own["pooled_projections"], base["pooled_projections"])


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [0, 1, 2, 3]),
        ({"start": 0.3}, [2, 3]),
        ({"end": 0.6}, [0, 1]),  # the third step ends at .75
        ({"start": 0.25, "end": 0.75}, [1, 2]),
    ],
)
def test_spans_count_whole_steps_without_negative_prompts(
    pipe: FluxPipeline, method: InfiniteYou, options: dict[str, float], steps: list[int]
) -> None:
    with method.use(anna, **options), recorded(pipe) as calls:
        run(pipe, True)
    positive, negative = is_infused(calls)[::2], is_infused(calls)[1::2]
    assert [step for step in range(4) if positive[step]] == steps and not any(negative)


def test_nothing_is_left_and_zero_is_the_base(
    pipe: FluxPipeline, method: InfiniteYou, caplog: pytest.LogCaptureFixture
) -> None:
    plain = run(pipe, True)
    for options in ({"scale": 0.0}, {"start": 0.5, "end": 0.5}, {"end": 0.1}):
        with method.use(anna, **options):
            assert np.array_equal(run(pipe, True), plain)
    assert "no step was between start 0 and end 0.1" in caplog.text
    with method.use(anna):
        changed = run(pipe, True)
    assert distance(changed, plain) > 1e-2
    assert np.array_equal(run(pipe, True), plain)


def test_guidance_starts_at_a_step_with_and_without_residuals(
    pipe: FluxPipeline, method: InfiniteYou
) -> None:
    for scale in (0.0, 1.0):
        with method.use(anna, scale=scale):
            unguided = run(pipe)
            guided = run(pipe, True)
        with method.use(anna, scale=scale, timestep_to_start_cfg=4):
            assert distance(run(pipe, True), unguided) < 1e-5 < 1e-2 < distance(guided, unguided)


# --- pipelines


def test_every_pipeline_works(pipe: FluxPipeline, method: InfiniteYou) -> None:
    image = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(7))
    mask = LEFT[None, None]
    wide = tiny_pipe(in_channels=16 + 16 + 16, out_channels=16)
    for edit, options in (
        (within(pipe, FluxImg2ImgPipeline), {"image": image, "strength": 0.75}),
        (
            within(pipe, FluxInpaintPipeline),
            {"image": image, "mask_image": mask, "strength": 0.75},
        ),
        (within(wide, FluxFillPipeline), {"image": image, "mask_image": mask}),
    ):
        method.attach(edit)
        plain = run(edit, **options)
        with method.use(anna, pipe=edit):
            assert distance(run(edit, **options), plain) > 1e-3
        assert np.array_equal(run(edit, **options), plain)


def test_reference_images_of_kontext_get_no_residuals(
    pipe: FluxPipeline, method: InfiniteYou
) -> None:
    kontext = within(pipe, FluxKontextPipeline)
    image = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(7))
    options = {"image": image, "_auto_resize": False, "max_area": SIDE * SIDE, "steps": 1}
    method.attach(kontext)
    plain = run(kontext, **options)
    with method.use(anna, pipe=kontext), recorded(kontext) as calls:
        assert distance(run(kontext, **options), plain) > 1e-3
    (call,) = calls
    assert call["hidden_states"].shape[1] == 128
    for residual in (
        *call["controlnet_block_samples"],
        *call["controlnet_single_block_samples"],
    ):
        assert residual.shape[1] == 128 and residual[:, :64].any() and not residual[:, 64:].any()


def test_transformer_without_guidance_fits(method: InfiniteYou) -> None:
    """As in FLUX.1-schnell; InfuseNet has its own."""
    schnell = tiny_pipe(guidance_embeds=False)
    method.attach(schnell)
    plain = run(schnell, steps=1)
    with method.use(anna, pipe=schnell):
        assert distance(run(schnell, steps=1), plain) > 1e-3


def test_streamed_infusenet_gives_the_same_image(pipe: FluxPipeline, method: InfiniteYou) -> None:
    """As in the lower memory levels, with the CPU at both ends."""
    with method.use(anna):
        expected = run(pipe, steps=2)
    cpu = torch.device("cpu")
    options = {"offload_type": "block_level", "num_blocks_per_group": 1}
    method.infusenet.model.enable_group_offload(onload_device=cpu, offload_device=cpu, **options)
    method.infusenet.is_placed = True
    with method.use(anna):
        assert np.array_equal(run(pipe, steps=2), expected)


# --- people


def test_batches_match_single_images(pipe: FluxPipeline, method: InfiniteYou) -> None:
    latents = torch.cat([NOISE, NOISE.flip(1)])
    with method.use([anna, ben]):
        both = run(pipe, count=2, latents=latents)
    with method.use(anna):
        first = run(pipe, count=2, latents=latents)
    with method.use(ben):
        second = run(pipe, count=2, latents=latents)
    assert distance(both[0], first[0]) < 1e-5 and distance(both[1], second[1]) < 1e-5
    assert distance(first[1], second[1]) > 1e-3
    with method.use([anna, ben]), pytest.raises(OptionError, match="2 identities do not fit 1"):
        run(pipe)


def test_masks_restrict_people(pipe: FluxPipeline, method: InfiniteYou) -> None:
    """In one call: the residuals of each person are those of the person alone in its region."""
    left = LEFT.reshape(8, 4, 8, 4)[:, 0, :, 0].flatten().bool()  # per token

    def residuals(shown: Any) -> torch.Tensor:
        with method.use(shown), recorded(pipe) as calls:
            run(pipe, steps=1)
        return calls[0]["controlnet_block_samples"][0][0]

    alone_anna, alone_ben = residuals(anna), residuals(ben)
    together = residuals([(anna, LEFT), (ben, 1 - LEFT)])
    assert torch.allclose(together[left], alone_anna[left], atol=1e-5)
    assert torch.allclose(together[~left], alone_ben[~left], atol=1e-5)
    assert not torch.allclose(alone_anna, alone_ben, atol=1e-3)
    half = residuals([(anna, 0.5 * LEFT)])
    assert torch.allclose(half[left], 0.5 * alone_anna[left], atol=1e-5) and not half[~left].any()


def test_several_reference_images_are_averaged(method: InfiniteYou) -> None:
    """The directions of their embeddings are, so that none counts more by its length."""
    three = face(3, photos=3)
    directions = torch.nn.functional.normalize(three.id_cond, dim=-1)
    expected = method.projection.encode(replace(anna, id_cond=directions.mean(1, keepdim=True)))
    longer = three.id_cond * torch.tensor([1.0, 5.0, 0.1])[:, None]
    for features in (three.id_cond, longer):
        tokens = method.projection.encode(replace(three, id_cond=features))
        torch.testing.assert_close(tokens, expected)
    assert not torch.allclose(expected, method.projection.encode(anna), atol=1e-3)


# --- files and errors


def test_published_folder_loads(pipe: FluxPipeline, method: InfiniteYou, tmp_path: Path) -> None:
    folder = save_method(method, tmp_path / "aes_stage2")
    names = {path.name for path in (folder / "InfuseNetModel").iterdir()}
    assert "diffusion_pytorch_model.safetensors.index.json" in names and len(names) > 3
    with method.use(anna):
        expected = run(pipe)
    method.detach()
    for path in (folder, folder / "image_proj_model.bin"):
        loaded = InfiniteYou.load(path, torch.float32)
        loaded.attach(pipe)
        with loaded.use(anna):
            assert distance(run(pipe), expected) < 1e-5
        loaded.detach()
    reduced = InfiniteYou.load(folder)
    assert reduced.infusenet.model.dtype == torch.bfloat16
    assert reduced.projection.resampler.latents.dtype == torch.bfloat16
    assert reduced.to(torch.device("cpu"), torch.float32).projection.encode(anna).isfinite().all()


def test_missing_and_other_files_are_one_sentence(method: InfiniteYou, tmp_path: Path) -> None:
    message = r"contains no InfiniteYou; it needs image_proj_model\.bin and InfuseNetModel/"
    with pytest.raises(WeightsError, match=message):
        InfiniteYou.load(tmp_path)
    folder = save_method(method, tmp_path / "files")
    file = folder / "image_proj_model.bin"
    tensors = torch.load(file, weights_only=True)["image_proj"]
    for changed, reason in (
        ({name: x for name, x in tensors.items() if name != "norm_out.bias"}, "norm_out.bias"),
        ({**tensors, "more": tensors["latents"]}, "other tensors, such as more"),
        ({**tensors, "norm_out.bias": tensors["latents"]}, "norm_out.bias"),
    ):
        torch.save({"image_proj": changed}, file)
        with pytest.raises(WeightsError, match=reason) as error:
            InfiniteYou.load(folder)
        assert "\n" not in str(error.value)
    torch.save({"image_proj": tensors, "ip_adapter": {"1.to_k_ip.weight": torch.ones(1)}}, file)
    with pytest.raises(WeightsError, match=r"it is an IP-Adapter-Plus .* infiniteyou"):
        InfiniteYou.load(folder)
    torch.save({"image_proj": tensors}, file)
    (folder / "InfuseNetModel" / "config.json").unlink()
    with pytest.raises(WeightsError, match="contains no diffusers ControlNet"):
        InfiniteYou.load(folder)


def test_unsuitable_models_and_identities_are_refused(
    pipe: FluxPipeline, method: InfiniteYou
) -> None:
    chroma = ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, axes_dims_rope=(4, 6, 6),
        approximator_num_channels=8, approximator_hidden_dim=8, approximator_layers=1,
    )  # fmt: skip
    with pytest.raises(OptionError, match="does not act in Chroma; attach it to FLUX"):
        method.attach(chroma)
    with pytest.raises(OptionError, match="another base model; attach it to FLUX"):
        method.attach(tiny_pipe(joint_attention_dim=32))
    projection = FaceProjection(tiny_resampler(output_dims=32))
    with pytest.raises(WeightsError, match=r"tokens of width 32, and InfuseNet reads .* width 24"):
        InfiniteYou(projection, InfuseNet(tiny_controlnet()))
    for identity in (people.anna, replace(anna, hidden=people.anna.hidden)):
        with (
            pytest.raises(IdentityError, match="features for another method"),
            method.use(identity),
        ):
            pass
    with pytest.raises(OptionError, match="scale must be"), method.use(anna, scale=-1):
        pass
    with method.use(anna), pytest.raises(OptionError, match="already in use"), method.use(ben):
        pass
    method.detach()
    with pytest.raises(OptionError, match="InfiniteYou is not attached"), method.use(anna):
        pass
    method.attach(pipe.transformer)
    with method.use(anna), pytest.raises(OptionError, match="attach to a FLUX pipeline"):
        run(pipe)


def test_compiled_transformer_is_refused() -> None:
    """Compiled code ignores hooks that are added later."""
    pipe = tiny_pipe()
    pipe.transformer.compile(backend="eager")
    method = tiny_method(pipe)
    with pytest.raises(OptionError, match="compile_repeated_blocks"), method.use(anna):
        pass
    torch.compiler.reset()
