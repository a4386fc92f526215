"""InfiniteYou against the figures of its official code, on seeded weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.models.controlnets.controlnet_flux import FluxControlNetModel
from diffusers.models.embeddings import IPAdapterPlusImageProjection
from facexlib.recognition.arcface_arch import Backbone
from torch import Tensor
from torch.nn.functional import normalize

from openpulid.faces.arcface import ARCFACE_TEMPLATE, FacexlibRecognition, load_recognition
from openpulid.faces.face import Face
from openpulid.identity.identity import Identity
from openpulid.methods.infiniteyou.encoders import FaceProjection
from openpulid.methods.infiniteyou.flux import InfiniteYou
from openpulid.methods.infiniteyou.infusenet import InfuseNet
from openpulid.methods.ip_adapter.export import projection_state
from openpulid.methods.ip_adapter.resampler import build_resampler
from tests.support.other_methods import TOLERANCE, OtherMethods, needs_figures
from tests.support.tiny_flux import tiny_pipe

pytestmark = needs_figures

GRID = 6
SIDE = 4 * GRID
"""Of the image in pixels: a token is 2 x 2 latents of 2 x 2 pixels."""


@pytest.fixture(scope="module")
def figures() -> OtherMethods:
    return OtherMethods()


@pytest.fixture(scope="module")
def method(figures: OtherMethods) -> InfiniteYou:
    """Create InfiniteYou with the weights of the figures, under their published names."""
    shapes = projection_state(IPAdapterPlusImageProjection(32, 40, 64, 2, 16, 4, 8))
    tensors = {
        name: figures.weight(f"infu.image_proj.{name}", x.shape) for name, x in shapes.items()
    }
    config = figures.manifest["tiny_flux_diffusers_config"]
    net = FluxControlNetModel(**{**config, "num_layers": 2, "num_single_layers": 3})
    figures.fill(net, "infu.infusenet.")
    return InfiniteYou(FaceProjection(build_resampler(tensors, dim_head=16)), InfuseNet(net))


@pytest.fixture(scope="module")
def pipe(figures: OtherMethods) -> FluxPipeline:
    """Create a pipeline with the transformer of the figures; it gets embedded prompts alone."""
    config = figures.manifest["tiny_flux_diffusers_config"]
    transformer = figures.fill(FluxTransformer2DModel(**config), "infu.transformer.")
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    vae = tiny_pipe().vae
    pipe = FluxPipeline(scheduler, vae, None, None, None, None, transformer.requires_grad_(False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(autouse=True)
def attached(method: InfiniteYou, pipe: FluxPipeline) -> Any:
    method.attach(pipe)
    yield
    method.detach()


def tokens_of(figures: OtherMethods, method: InfiniteYou) -> Tensor:
    embeddings = figures.input("infu.id", 2, 1, 32)
    return torch.cat([method.projection.encode(Identity(x[None], ())) for x in embeddings])


def test_face_is_read_in_bgr(figures: OtherMethods, tmp_path: Path) -> None:
    """From the file of the network; a face that is aligned already is cropped as it is."""
    file = tmp_path / "recognition_arcface_ir_se50.pth"
    network = figures.fill(Backbone(num_layers=50, drop_ratio=0.6, mode="ir_se"), "arcface.")
    torch.save(network.state_dict(), file)
    recognition = load_recognition(file)
    assert isinstance(recognition, FacexlibRecognition)
    aligned = figures.input("arcface.face_rgb", 1, 3, 112, 112).tanh()
    with torch.no_grad():
        for name, pixels in (("bgr", aligned.flip(1)), ("rgb", aligned)):
            embedding = normalize(recognition.network(pixels), dim=-1)
            assert figures.error(f"infu.arcface.{name}", embedding) < TOLERANCE
    box = torch.tensor([0.0, 0.0, 112.0, 112.0])
    embedding = recognition(Face((aligned[0] + 1) / 2, box, ARCFACE_TEMPLATE + 0.5, 1.0))
    assert embedding.shape == (1, recognition.dim)
    # pixels of photos have 256 values
    assert figures.error("infu.arcface.bgr", embedding) < 0.02
    assert figures.error("infu.arcface.rgb", embedding) > 0.5


def call(figures: OtherMethods, transformer: Any) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    ids = torch.stack([torch.zeros(GRID, GRID), rows, columns], -1).reshape(GRID**2, 3)
    with torch.no_grad():
        (output,) = transformer(
            hidden_states=figures.input("flux.img", 1, 36, 16),
            encoder_hidden_states=figures.input("flux.txt", 1, 8, 40),
            pooled_projections=figures.input("flux.vec", 1, 24),
            timestep=torch.tensor([0.7]),
            img_ids=ids,
            txt_ids=torch.zeros(8, 3),
            guidance=torch.tensor([3.5]),
            return_dict=False,
        )
    return output


def denoise(figures: OtherMethods, pipe: FluxPipeline, **options: Any) -> Tensor:
    return pipe(
        prompt_embeds=figures.input("flux.txt", 1, 8, 40),
        pooled_prompt_embeds=figures.input("flux.vec", 1, 24),
        latents=figures.input("flux.img", 1, 36, 16),
        num_inference_steps=4,
        guidance_scale=3.5,
        height=SIDE,
        width=SIDE,
        output_type="latent",
        **options,
    ).images


def test_tokens(figures: OtherMethods, method: InfiniteYou) -> None:
    assert figures.error("infu.tokens", tokens_of(figures, method)) < TOLERANCE


def test_residuals_and_output(
    figures: OtherMethods, method: InfiniteYou, pipe: FluxPipeline
) -> None:
    tokens = tokens_of(figures, method)[:1]
    control = figures.input("infu.control", 1, 36, 16)
    base = call(figures, pipe.transformer)
    assert figures.error("infu.base", base) < TOLERANCE
    arguments: dict[str, Any] = {}
    for scale in (1.0, 0.6):
        with method.use_tokens(tokens, control, scale=scale):
            record = pipe.transformer.register_forward_pre_hook(
                lambda module, args, kwargs: arguments.update(kwargs), with_kwargs=True
            )
            output = call(figures, pipe.transformer)
            record.remove()
        assert figures.error(f"infu.out.scale_{scale}", output) < TOLERANCE
        if scale == 1.0:
            # each residual serves three of the transformer's five double and nine single blocks
            double = torch.stack(arguments["controlnet_block_samples"][::3])
            single = torch.stack(arguments["controlnet_single_block_samples"][::3])
            assert figures.error("infu.residuals.double", double) < TOLERANCE
            assert figures.error("infu.residuals.single", single) < TOLERANCE
    with method.use_tokens(tokens, control, scale=0):
        assert torch.equal(call(figures, pipe.transformer), base)


def test_denoising_loops(figures: OtherMethods, method: InfiniteYou, pipe: FluxPipeline) -> None:
    tokens = tokens_of(figures, method)[:1]
    control = figures.input("infu.control", 1, 36, 16)
    base = denoise(figures, pipe)
    assert figures.error("infu.sigmas", pipe.scheduler.sigmas) < TOLERANCE
    assert figures.error("infu.denoise.base", base) < TOLERANCE
    for name, options in (
        ("infu.denoise", {}),
        ("infu.denoise.start_0.3", {"start": 0.3}),
        ("infu.denoise.end_0.6", {"end": 0.6}),
    ):
        with method.use_tokens(tokens, control, **options):
            assert figures.error(name, denoise(figures, pipe)) < TOLERANCE
    assert torch.equal(denoise(figures, pipe), base)


def test_negative_prompt_gets_no_residuals(
    figures: OtherMethods, method: InfiniteYou, pipe: FluxPipeline
) -> None:
    negative = {
        "negative_prompt_embeds": figures.input("flux.neg_txt", 1, 8, 40),
        "negative_pooled_prompt_embeds": figures.input("flux.neg_vec", 1, 24),
        "true_cfg_scale": 2.0,
    }
    control = figures.input("infu.control", 1, 36, 16)
    with method.use_tokens(tokens_of(figures, method)[:1], control):
        output = denoise(figures, pipe, **negative)
    assert figures.error("infu.denoise.true_cfg_2", output) < TOLERANCE
