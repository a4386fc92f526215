"""FaceID: equal to diffusers, and fully removed afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from safetensors.torch import save_file

from openpulid.errors import OptionError, WeightsError
from openpulid.identity.identity import Identity
from openpulid.methods.adapter import Adapter
from openpulid.methods.ip_adapter.faceid import FaceID
from openpulid.methods.ip_adapter.instantid import InstantID
from openpulid.methods.registry import find_method
from tests.support.token_files import (
    PROMPTS,
    WIDTH,
    controlnet,
    generate,
    person,
    published,
    resampler,
)


@pytest.fixture
def pipe(tiny_pipeline: Any) -> Any:
    return tiny_pipeline()


def test_matches_diffusers_ip_adapter(pipe: Any) -> None:
    parts, identity = published(pipe.unet), person(1)
    method = FaceID(parts)
    method.attach(pipe)
    with method.use(identity, scale=0.7):
        ours = generate(pipe)
    pipe.load_ip_adapter(
        published(pipe.unet), subfolder="", weight_name="", image_encoder_folder=None
    )
    pipe.set_ip_adapter_scale(0.7)
    embedding = torch.nn.functional.normalize(identity.id_cond[..., :WIDTH], dim=-1)
    theirs = generate(
        pipe, ip_adapter_image_embeds=[torch.cat([torch.zeros_like(embedding), embedding])]
    )
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_pipeline_is_restored(pipe: Any) -> None:
    baseline, names = generate(pipe), [name for name, _ in pipe.unet.named_modules()]
    processors = dict(pipe.unet.attn_processors)
    method = FaceID(published(pipe.unet))
    assert isinstance(method, Adapter)
    method.attach(pipe)
    assert torch.equal(generate(pipe), baseline)
    for _ in range(2):  # layers are built, then installed again
        with method.use(person(1)):
            assert not torch.allclose(generate(pipe), baseline, atol=1e-3)
        assert torch.equal(generate(pipe), baseline)
    method.detach(pipe)
    assert pipe.unet.attn_processors == processors and pipe.unet.encoder_hid_proj is None
    assert [name for name, _ in pipe.unet.named_modules()] == names and not getattr(
        pipe.unet, "peft_config", {}
    )
    with pytest.raises(OptionError, match="attach"), method.use(person(1)):
        pass


def test_second_method_in_same_slot_raises(pipe: Any) -> None:
    """Nested identities, another method of the same slot, and two pipelines with one U-Net."""
    method, another = (
        FaceID(published(pipe.unet)),
        InstantID(resampler(pipe.unet), controlnet(pipe.unet)),
    )
    method.attach(pipe)
    another.attach(pipe)
    with method.use(person(1)):
        alone = generate(pipe)
        for second in (method, another):
            with pytest.raises(OptionError, match="already in use"), second.use(person(2)):
                pass
        assert torch.equal(generate(pipe), alone)
    image_to_image = StableDiffusionXLImg2ImgPipeline(
        **pipe.components, requires_aesthetics_score=False
    )
    method.attach(image_to_image)
    with (
        pytest.raises(OptionError, match="share one network; name the one that runs"),
        method.use(person(1)),
    ):
        pass
    with method.use(person(1), pipe=pipe):
        assert torch.equal(generate(pipe), alone)


def test_raw_embeddings_are_normalized(pipe: Any) -> None:
    method, identity = FaceID(published(pipe.unet)), person(1)
    method.attach(pipe)
    larger = Identity(7 * identity.id_cond, identity.hidden)
    with method.use(identity):
        once = generate(pipe)
    with method.use(larger):
        assert torch.allclose(generate(pipe), once, atol=1e-5)


def test_batches_guidance_and_spans(pipe: Any) -> None:
    method = FaceID(published(pipe.unet))
    method.attach(pipe)
    alone = []
    for identity, k in ((person(1), 0), (person(2), 1)):
        with method.use(identity):
            generator = torch.Generator().manual_seed(k)
            options = {
                "num_inference_steps": 2,
                "guidance_scale": 1.0,
                "output_type": "latent",
                "generator": generator,
            }
            alone.append(pipe(PROMPTS[k], **options).images)
    with method.use([person(1), person(2)]):
        assert torch.allclose(generate(pipe, PROMPTS, guidance=1.0), torch.cat(alone), atol=1e-5)
    with method.use(person(1, photos=3)):
        assert generate(pipe, PROMPTS).shape == torch.cat(alone).shape
    baseline = generate(pipe)
    with method.use(person(1), scale=0):
        assert torch.equal(generate(pipe), baseline)
    with (
        method.use([person(1), person(2), person(3)]),
        pytest.raises(OptionError, match="3 identities do not fit 2 images"),
    ):
        generate(pipe, PROMPTS)
    with pytest.raises(OptionError, match="fractions"), method.use(person(1), start=2):
        pass


def test_nothing_acts_outside_span(pipe: Any) -> None:
    """The LoRA does not act either; and the layers are reused after attaching again."""
    method = FaceID(published(pipe.unet))
    method.attach(pipe)
    baseline = generate(pipe)
    with method.use(person(1)):
        full, built = generate(pipe), method.layers_for(pipe)
    method.attach(pipe)
    with method.use(person(1), start=0.5):  # one of two steps
        late = generate(pipe)
    assert not torch.allclose(late, full, atol=1e-3) and not torch.allclose(
        late, baseline, atol=1e-3
    )
    assert method.layers_for(pipe) is built
    with method.use(person(1), start=0.99):  # after the last
        assert torch.equal(generate(pipe), baseline)


def test_works_with_sequential_offloading(pipe: Any) -> None:
    """Weights are on the meta device between calls, as with `enable_sequential_cpu_offload`."""
    from accelerate import cpu_offload

    method = FaceID(published(pipe.unet))
    method.attach(pipe)
    with method.use(person(1)):
        expected = generate(pipe)
    cpu_offload(pipe.unet, torch.device("cpu"))
    for _ in range(2):
        with method.use(person(1)):
            assert torch.allclose(generate(pipe), expected, atol=1e-5)
    with pytest.raises(OptionError, match="before enable_sequential_cpu_offload"):
        FaceID(published(pipe.unet)).attach(pipe)


def test_user_lora_stays_active(pipe: Any) -> None:
    """diffusers' own loading would deactivate every other LoRA."""
    peft = pytest.importorskip("peft")
    pipe.unet.add_adapter(
        peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), adapter_name="style"
    )
    styled = generate(pipe)
    method = FaceID(published(pipe.unet))
    method.attach(pipe)
    with method.use(person(1)):
        assert pipe.get_active_adapters() == ["style"]
        generate(pipe)
    assert torch.equal(generate(pipe), styled)


def test_file_formats_load_and_other_files_raise(pipe: Any, tmp_path: Any) -> None:
    parts = published(pipe.unet)
    flat = {f"{part}.{name}": x for part, tensors in parts.items() for name, x in tensors.items()}
    save_file(flat, tmp_path / "faceid.safetensors")
    loaded = FaceID.load(tmp_path / "faceid.safetensors")
    assert (
        isinstance(loaded, FaceID)
        and loaded.width == WIDTH
        and len(loaded.lora) == 8 * len(pipe.unet.attn_processors)
    )
    torch.save(parts, tmp_path / "faceid.bin")  # as it is published
    assert FaceID.load(tmp_path / "faceid.bin").lora.keys() == loaded.lora.keys()
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=r"other\.safetensors is not .* such as weight"):
        FaceID.load(tmp_path / "other.safetensors")
    assert find_method("faceid") is FaceID
