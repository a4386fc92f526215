"""Face0: figures of the paper's formulas on seeded weights, and its guidance in a pipeline."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from openpulid.errors import OptionError
from openpulid.methods.face0.encoders import FaceMLP, combine_predictions, overwrite_text
from openpulid.methods.face0.face0 import Face0
from openpulid.methods.face0.guidance import FaceGuidance
from tests.support.token_files import CROSS, PROMPTS, generate, person

TOLERANCE = 2e-5
GUIDANCE = [(1.0, 0.0), (0.5, 0.0), (1.4, 1.0)]


@torch.no_grad()
def test_tokens_and_text(golden: Any) -> None:
    mlp = golden.fill(FaceMLP(20, 32, 32), "face0.mlp.")
    tokens = mlp(golden.input("face0.embedding", 2, 20))
    assert golden.error("face0.tokens", tokens) < TOLERANCE
    text = golden.input("face0.text", 2, 12, 32)
    assert golden.error("face0.context", overwrite_text(text, tokens)) < TOLERANCE
    without = overwrite_text(text, torch.zeros_like(tokens))
    assert golden.error("face0.context_no_face", without) < TOLERANCE
    assert torch.equal(overwrite_text(text, tokens, 0.0), text)


@pytest.mark.parametrize(("joint", "share"), GUIDANCE)
def test_guidance_formula(golden: Any, joint: float, share: float) -> None:
    both, text, face, none = (
        golden.input(f"face0.eps.{name}", 1, 4, 8, 8) for name in ("both", "text", "face", "none")
    )
    positive = combine_predictions(both, text, face, joint, share)
    guided = none + 7.5 * (positive - none)
    assert golden.error(f"face0.guided.c_{joint}.a_{share}", guided) < TOLERANCE


@pytest.fixture
def pipe(tiny_pipeline: Any) -> Any:
    return tiny_pipeline()


@pytest.fixture
def method(pipe: Any) -> Face0:
    torch.manual_seed(3)
    created = Face0(FaceMLP(6, 16, CROSS).eval().requires_grad_(False))
    created.attach(pipe)
    return created


class Recorder:
    """The first call of a U-Net: its arguments before other hooks, and what it returned."""

    def __init__(self, unet: Any) -> None:
        self.inputs: tuple[Any, ...] = ()
        self.output: Any = None
        unet.register_forward_pre_hook(self.before, with_kwargs=True, prepend=True)
        unet.register_forward_hook(self.after)

    def before(self, module: Any, args: Any, kwargs: Any) -> None:
        self.inputs = self.inputs or (args, dict(kwargs))

    def after(self, module: Any, args: Any, output: Any) -> None:
        self.output = output[0]  # the last call is that of the pipeline


@pytest.mark.parametrize(("joint", "share"), [*GUIDANCE, (0.5, 0.3)])
@torch.no_grad()
def test_prediction_is_that_of_the_paper(
    pipe: Any, method: Face0, joint: float, share: float
) -> None:
    """Each part of the formula is predicted by the plain U-Net with the text of that part."""
    identity = person(1)
    tokens = method.encode([identity])
    with method.use(identity, guidance=FaceGuidance(joint, share)):
        recorder = Recorder(pipe.unet)
        options = {"num_inference_steps": 1, "guidance_scale": 3.0, "output_type": "latent"}
        pipe(PROMPTS[0], negative_prompt="noir", **options)
    args, kwargs = recorder.inputs
    combined = recorder.output
    text = kwargs["encoder_hidden_states"]
    negative, positive = text.chunk(2)
    zero = torch.zeros_like(tokens)

    def predict(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows = torch.cat([first, second])
        return pipe.unet(*args, **{**kwargs, "encoder_hidden_states": rows})[0].chunk(2)

    none, both = predict(overwrite_text(negative, zero), overwrite_text(positive, tokens))
    face, alone = predict(overwrite_text(negative, tokens), overwrite_text(positive, zero))
    expected = joint * both + (1 - joint) * (share * face + (1 - share) * alone)
    torch.testing.assert_close(combined, torch.cat([none, expected]))


def test_without_a_negative_prompt_the_face_alone_is_refused(pipe: Any, method: Face0) -> None:
    with method.use(person(1), guidance=FaceGuidance(0.5, 0.0)):
        assert torch.isfinite(generate(pipe, guidance=1.0)).all()
    with (
        method.use(person(1), guidance=FaceGuidance(1.4, 1.0)),
        pytest.raises(OptionError, match="use a guidance scale above 1"),
    ):
        generate(pipe, guidance=1.0)


def test_embeddings_of_several_images_are_averaged(method: Face0) -> None:
    identity = person(2, photos=2)
    mean = identity.id_cond[..., :6].mean(1)
    torch.testing.assert_close(method.encode([identity]), method.networks(mean))
