"""PuLID for SDXL together with other features of diffusers.

Other SDXL pipelines, ControlNet, LoRA, IP-Adapter and other schedulers. In each case the identity
acts, the other feature stays active, and the pipeline is restored.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)
from diffusers.models.attention import BasicTransformerBlock
from PIL import Image
from torch import nn

from openpulid.diffusion.schedulers import KarrasScheduler
from openpulid.errors import OptionError, WeightsError
from openpulid.methods.pulid.encoders import IDEncoder, IDFormer
from openpulid.methods.pulid.flux import PuLIDFlux
from openpulid.methods.pulid.sdxl import LAYER_KEYS, PuLID
from openpulid.methods.pulid.sdxl_attention import IdentityLayer
from tests.support.people import anna, ben, distance, fresh, someone

Runs = Callable[..., np.ndarray]


def picture(seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 255, (16, 16, 3))
    return Image.fromarray(values.astype(np.uint8))


def runner(pipe: Any, **defaults: Any) -> Runs:
    """Return a function that runs a pipeline with default arguments."""
    pipe.set_progress_bar_config(disable=True)

    def run(prompt: Any = "portrait", **more: Any) -> np.ndarray:
        count = 1 if isinstance(prompt, str) else len(prompt)
        generator = [torch.Generator().manual_seed(k) for k in range(count)]
        options = {
            "num_inference_steps": 4,
            "guidance_scale": 3.0,
            "generator": generator,
            **defaults,
            **more,
        }
        return pipe(prompt, output_type="latent", **options).images.numpy()

    return run


def check_identity(pipe: Any, run: Runs) -> None:
    """Check that two identities differ, and that the pipeline is restored bit for bit."""
    adapter = fresh(pipe)
    baseline = run()
    adapter.attach(pipe)
    images = []
    for person in (anna, ben):
        with adapter.use(person, num_zero=2):
            images.append(run())
    assert min(distance(baseline, image) for image in images) > 1e-3 and distance(*images) > 1e-3
    assert np.array_equal(run(), baseline)
    adapter.detach(pipe)
    assert np.array_equal(run(), baseline)


def test_image_to_image(tiny_pipeline) -> None:
    pipe = StableDiffusionXLImg2ImgPipeline(**tiny_pipeline().components)
    check_identity(pipe, runner(pipe, image=picture(), strength=0.8))


def test_pipelines_sharing_a_unet_must_be_named(tiny_pipeline) -> None:
    """Guidance is read from the pipeline that runs, so it must be named or be the only one."""
    pipe = tiny_pipeline()
    second = StableDiffusionXLImg2ImgPipeline(**pipe.components, requires_aesthetics_score=False)
    alone = fresh(pipe)
    alone.attach(pipe)
    run, again = runner(pipe), runner(second, image=picture(), strength=0.7)
    with alone.use(anna):
        expected = run()
    alone.detach(pipe)
    adapter = fresh(pipe)
    for one in (pipe, second):  # the second has no guidance before it has run
        adapter.attach(one)
    with (
        pytest.raises(OptionError, match="share one network; name the one that runs"),
        adapter.use(anna),
    ):
        pass
    with adapter.use(anna, pipe=pipe):
        assert np.array_equal(run(), expected)
    adapter.detach(pipe)
    with adapter.use(anna):
        image = again()
    with adapter.use(anna, pipe=second):
        assert np.array_equal(again(), image)
    adapter.detach(second)
    adapter.attach(pipe.unet)
    with adapter.use(anna, guided=True):
        assert np.array_equal(run(), expected)


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler, KarrasScheduler])
def test_image_to_image_fractions_count_its_own_steps(tiny_pipeline, kind: type) -> None:
    """With strength 0.5 the last half of the steps run; DDIM has no index of the first."""
    pipe = tiny_pipeline()
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    pipe = StableDiffusionXLImg2ImgPipeline(**pipe.components, requires_aesthetics_score=False)
    run = runner(pipe, image=picture(), strength=0.5, num_inference_steps=8)
    adapter, acted = fresh(pipe), []
    adapter.attach(pipe)
    run()  # previous runs, with the same options and with others, must not matter
    runner(pipe, image=picture(), strength=1.0, num_inference_steps=3)()
    for span in ({"end": 0.5}, {"start": 0.5}):
        steps: list[bool] = []
        with adapter.use(anna, **span):
            (baseline,) = pipe.unet._forward_pre_hooks.values()
            injection = baseline.__self__
            hook = pipe.unet.register_forward_hook(
                lambda *call, injection=injection, steps=steps: steps.append(
                    injection.calls[len(call[1][0])].is_active
                )
            )
            run()
            hook.remove()
        acted.append(steps)
    assert acted == [[True, True, False, False], [False, False, True, True]]


def test_inpainting(tiny_pipeline) -> None:
    pipe = StableDiffusionXLInpaintPipeline(**tiny_pipeline().components)
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 8, 16))
    check_identity(
        pipe, runner(pipe, image=picture(), mask_image=mask, strength=0.9, width=16, height=16)
    )


def test_controlnet_stays_active(tiny_pipeline) -> None:
    base = tiny_pipeline()
    torch.manual_seed(1)
    net = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(16, 32))
    for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block):
        torch.nn.init.normal_(layer.weight, std=0.2)
    pipe = StableDiffusionXLControlNetPipeline(**base.components, controlnet=net)
    run = runner(pipe, image=picture())
    check_identity(pipe, run)
    assert distance(run(), run(controlnet_conditioning_scale=0.0)) > 1e-4


def test_lora_stays_active(tiny_pipeline) -> None:
    from peft import LoraConfig

    pipe = tiny_pipeline()
    run = runner(pipe)
    plain = run()
    torch.manual_seed(1)
    pipe.unet.add_adapter(
        LoraConfig(r=2, target_modules=["to_q", "to_v", "to_out.0"], init_lora_weights=False),
        "style",
    )
    assert distance(run(), plain) > 1e-4
    check_identity(pipe, run)
    adapter = fresh(pipe)
    adapter.attach(pipe)
    with adapter.use(anna):
        with_both = run()
        pipe.unet.disable_adapters()
        without_style = run()
    assert distance(with_both, without_style) > 1e-4


def test_lora_file_loaded_after_attach(tiny_pipeline, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model_state_dict

    pipe, second = tiny_pipeline(), tiny_pipeline()
    torch.manual_seed(1)
    lora = LoraConfig(
        r=2, lora_alpha=2, target_modules=["to_q", "to_v", "to_out.0"], init_lora_weights=False
    )
    second.unet.add_adapter(lora)
    second.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(second.unet))
    adapter, run = fresh(pipe), runner(pipe)
    adapter.attach(pipe)
    with adapter.use(anna):
        alone = run()
    pipe.load_lora_weights(tmp_path, adapter_name="style")
    with adapter.use(anna):
        both = run()
    other_adapter = fresh(second)
    other_adapter.attach(second)
    with other_adapter.use(anna):
        assert np.array_equal(runner(second)(), both) and distance(both, alone) > 1e-4
    pipe.unload_lora_weights()
    with adapter.use(anna):
        assert np.array_equal(run(), alone)


def ip_adapter(unet: Any, seed: int = 1) -> dict[str, dict[str, torch.Tensor]]:
    """Create random IP-Adapter weights in the published format: four tokens, embedding width 16."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(shape, generator=generator)

    width = unet.config.cross_attention_dim
    image = {
        "proj.weight": noise(4 * width, 16),
        "proj.bias": noise(4 * width),
        "norm.weight": torch.ones(width),
    }
    layers = {}
    for index, name in enumerate(unet.attn_processors):
        if name.endswith("attn2.processor"):
            inner = unet.get_submodule(name.removesuffix(".processor")).inner_dim
            layers |= {
                f"{index}.to_k_ip.weight": noise(inner, width),
                f"{index}.to_v_ip.weight": noise(inner, width),
            }
    return {"image_proj": {**image, "norm.bias": torch.zeros(width)}, "ip_adapter": layers}


def test_ip_adapter_stays_active(tiny_pipeline) -> None:
    pipe = tiny_pipeline()
    plain = runner(pipe)()
    pipe.load_ip_adapter(
        ip_adapter(pipe.unet), subfolder="", weight_name="", image_encoder_folder=None
    )
    embeds = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(2))
    run = runner(pipe, ip_adapter_image_embeds=[embeds])
    pipe.set_ip_adapter_scale(1.0)
    assert distance(run(), plain) > 1e-4
    check_identity(pipe, run)
    adapter = fresh(pipe)
    adapter.attach(pipe)
    with adapter.use(anna):
        both = run()
        pipe.set_ip_adapter_scale(0.0)
        alone = run()
    assert distance(both, alone) > 1e-4


@pytest.mark.parametrize("algorithm", ["dpmpp_2m", "dpmpp_sde"])
def test_karras_samplers_and_independent_images(tiny_pipeline, algorithm: str) -> None:
    pipe = tiny_pipeline()
    pipe.scheduler = KarrasScheduler(algorithm=algorithm)
    run = runner(pipe)
    check_identity(pipe, run)
    both = run(["portrait", "portrait"])
    assert distance(both[:1], run()) < 1e-4 and distance(both[:1], both[1:]) > 1e-2
    picture_pipe = StableDiffusionXLImg2ImgPipeline(
        **{**tiny_pipeline().components, "scheduler": pipe.scheduler}
    )
    check_identity(picture_pipe, runner(picture_pipe, image=picture(), strength=0.6))


def test_second_order_sampler_splits_by_fraction(tiny_pipeline) -> None:
    """start and end are fractions of the run, also if a sampler calls the U-Net in between."""
    pipe = tiny_pipeline()
    pipe.scheduler = KarrasScheduler(algorithm="dpmpp_sde")
    adapter, run = fresh(pipe), runner(pipe)
    adapter.attach(pipe)
    images = {}
    for start, end in ((0.0, 1.0), (0.0, 0.5), (0.5, 1.0)):
        with adapter.use(anna, start=start, end=end):
            images[start, end] = run()
    assert len({image.tobytes() for image in images.values()}) == 3


def test_published_variants_load(tmp_path) -> None:
    small = {"width": 12, "vit_dim": 8, "hidden_dim": 16}
    former = IDFormer(dim=16, depth=5, dim_head=8, heads=2, output_dim=64, ff_mult=1, **small)
    layers = nn.ModuleDict({index: IdentityLayer(8, 64) for index in LAYER_KEYS})
    PuLID(former, layers).save(tmp_path / "pulid_v1.1.safetensors")
    # a .bin file has no configuration: the published sizes are assumed, which do not fit
    torch.save(
        PuLID(IDEncoder(context_dim=64, **small), layers).state_dict(), tmp_path / "pulid_v1.bin"
    )
    loaded = PuLID.from_pretrained(tmp_path)
    assert isinstance(loaded.id_adapter, IDFormer) and loaded.id_adapter.config["dim"] == 16
    less = PuLID(
        former,
        nn.ModuleDict({index: IdentityLayer(8, 64) for index in LAYER_KEYS if index != "71"}),
    )
    file = less.save(tmp_path / "less" / "pulid_v1.1.safetensors")
    assert len(PuLID.load(file).id_adapter_attn_layers) == 69
    with pytest.raises(
        WeightsError,
        match=r"safetensors lacks 1 of 70 layers \(id_adapter_attn_layers 71\); download its file",
    ):
        PuLID.from_pretrained(file.parent)
    with pytest.raises(WeightsError, match="size mismatch"):
        PuLID.from_pretrained(tmp_path, variant="v1")
    with pytest.raises(OptionError, match=r"v1, v1\.1, flux-v0"):
        PuLID.from_pretrained(tmp_path, variant="v2")
    with pytest.raises(WeightsError, match=r"pulid_flux_v0\.9\.1\.safetensors does not exist"):
        PuLID.from_pretrained(tmp_path, variant="flux-v0.9.1")
    with pytest.raises(WeightsError, match="guozinan/PuLID"):
        PuLID.from_pretrained("somebody/else")


def test_published_names_at_full_size(golden, tmp_path) -> None:
    """Published names and shapes load strictly, in half precision as in published files."""
    names = golden.manifest["pulid_v1"]
    for variant in ("pulid_v1", "pulid_v1.1"):
        served = {
            name.split(".")[1]
            for name in golden.manifest[variant]
            if name.startswith("id_adapter_attn_layers")
        }
        assert sorted(served, key=int) == LAYER_KEYS
    captured = {
        name: shape
        for name, shape in names.items()
        if not name.startswith("id_adapter_attn_layers") or ".1." in name
    }
    state = {
        name: torch.zeros(1, dtype=torch.float16).expand(shape) for name, shape in captured.items()
    }
    adapter = PuLID.from_state_dict(state, _empty(IDEncoder))
    assert {name: list(value.shape) for name, value in adapter.state_dict().items()} == captured
    with pytest.raises(WeightsError, match="Unexpected key"):
        PuLID.from_state_dict({**state, "id_adapter.extra": torch.zeros(1)}, _empty(IDEncoder))


def test_missing_flux_weights_are_named(golden) -> None:
    state = {
        name: torch.zeros(1).expand(shape) for name, shape in golden.manifest["pulid_flux"].items()
    }
    for lost in ("pulid_ca.3.to_q.weight", "pulid_ca.0.to_kv.weight"):
        with pytest.raises(
            WeightsError, match=rf'name its own file: Missing key\(s\) in state_dict: "{lost}"\.$'
        ) as error:
            PuLIDFlux.from_state_dict(
                {name: x for name, x in state.items() if name != lost}, _empty(IDFormer)
            )
        assert "\n" not in str(error.value)


def _empty(cls: Any) -> Any:
    with torch.device("meta"):
        return cls()


def test_mix_adds_all_tokens_of_further_images(tiny_pipeline) -> None:
    pipe = tiny_pipeline()
    adapter, run = fresh(pipe), runner(pipe)
    adapter.attach(pipe)
    two = someone(3, photos=2)
    images = []
    for mix in (False, True):
        with adapter.use(two, mix=mix):
            images.append(run())
    assert distance(*images) > 1e-4
    assert adapter.encode(two.id_cond, two.hidden).shape[1] == 15
    assert adapter.encode(two.id_cond, two.hidden, mix=True).shape[1] == 20
    former = fresh(
        pipe,
        encoder=IDFormer(
            dim=16, depth=5, dim_head=8, heads=2, output_dim=64, width=12, vit_dim=8, hidden_dim=16
        ),
    )
    with pytest.raises(OptionError, match=r"v1\.1"):
        former.encode(two.id_cond, two.hidden, mix=True)


def test_compiled_parts_beside_the_cross_attention_need_no_hook_guards(tiny_pipeline) -> None:
    pipe = tiny_pipeline()
    adapter, run = fresh(pipe), runner(pipe, num_inference_steps=1)
    adapter.attach(pipe)
    baseline = run()
    with adapter.use(anna):
        expected = run()
    blocks = [part for part in pipe.unet.modules() if isinstance(part, BasicTransformerBlock)]
    for block in blocks:
        block.attn1.compile(backend="eager")
        block.ff.compile(backend="eager")
    for _ in range(2):
        assert distance(run(), baseline) < 1e-5
        with adapter.use(anna):
            assert distance(run(), expected) < 1e-5
    for part in (blocks[0], blocks[0].attn2, blocks[0].attn2.to_out[0], pipe.unet.mid_block):
        part.compile(backend="eager")
        with pytest.raises(OptionError, match="skip_nnmodule_hook_guards"), adapter.use(anna):
            pass
        part._compiled_call_impl = None
    torch.compiler.reset()


def test_compiled_unet_is_refused_without_hook_guards(tiny_pipeline) -> None:
    """Compiled code ignores changes of hooks, unless dynamo's hook guards are enabled."""
    pipe = tiny_pipeline()
    adapter, run = fresh(pipe), runner(pipe, num_inference_steps=1)
    adapter.attach(pipe)
    baseline = run()
    with adapter.use(anna):
        expected = run()
    pipe.unet.forward = torch.compile(pipe.unet.forward, backend="eager")
    with pytest.raises(OptionError, match="skip_nnmodule_hook_guards"), adapter.use(anna):
        pass
    del pipe.unet.forward
    pipe.unet.compile(backend="eager")
    with pytest.raises(OptionError, match="skip_nnmodule_hook_guards"), adapter.use(anna):
        pass
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        assert distance(run(), baseline) < 1e-5
        with adapter.use(anna):
            assert distance(run(), expected) < 1e-5
        assert distance(run(), baseline) < 1e-5
    torch.compiler.reset()
