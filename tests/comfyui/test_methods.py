"""InstantID, FaceID and PhotoMaker in ComfyUI, against the same methods in diffusers."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import openpulid as pulid
from openpulid.errors import OptionError, WeightsError
from openpulid.pipelines.studio import Studio
from tests.support import comfyui, tiny_flux
from tests.support.comfyui import requires_comfyui, sample, sdxl_conditioning

pytestmark = requires_comfyui

SIDE = 96
LATENT = 12
PROMPT = "portrait of a person"
START = 0.225
"""Of PhotoMaker's fused prompt; between the fractions of two steps."""


@pytest.fixture(scope="module")
def methods() -> Any:
    comfyui.import_comfyui()
    return comfyui.import_pack("methods")


@pytest.fixture(scope="module")
def options() -> Any:
    return comfyui.import_pack("adapters").ApplyOptions


@pytest.fixture(scope="module", params=["faceid", "instantid", "photomaker"])
def studio(request) -> Studio:
    return pulid.load("mini", method=request.param, device="cpu")


@pytest.fixture(scope="module")
def model(studio, methods) -> Any:
    return comfyui.load_miniature(studio.pipe)


class TextEncoders:
    """The miniature's text encoders as ComfyUI's CLIP object."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.tokenizer = SimpleNamespace(
            clip_l=SimpleNamespace(tokenizer=pipe.tokenizer),
            clip_g=SimpleNamespace(tokenizer=pipe.tokenizer_2),
        )

    def tokenize(self, text: str) -> dict[str, Any]:
        tokens = {}
        for name, tokenizer in (("l", self.pipe.tokenizer), ("g", self.pipe.tokenizer_2)):
            ids = tokenizer(text, padding="max_length").input_ids
            rows = [ids[start : start + 77] for start in range(0, len(ids), 77)]
            tokens[name] = [[(token, 1.0) for token in row] for row in rows]
        return tokens

    @torch.no_grad()
    def encode_from_tokens(self, tokens: Any, return_pooled: bool) -> Any:
        states = []
        for name, encoder in (("l", self.pipe.text_encoder), ("g", self.pipe.text_encoder_2)):
            ids = torch.tensor([[token for token, _ in tokens[name][0]]])
            output = encoder(ids, output_hidden_states=True)
            states.append(output.hidden_states[-2])
        return torch.cat(states, -1), output[0]

    def conditioning(self, text: str) -> Any:
        return sdxl_conditioning(*self.encode_from_tokens(self.tokenize(text), True), SIDE)


def decode(studio: Studio, latents: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        image = studio.pipe.vae.decode(latents).sample[0].permute(1, 2, 0)
    return ((image / 2 + 0.5).clamp(0, 1) * 255).round().numpy()


def test_image_equals_diffusers(studio, model, methods, options, record_property) -> None:
    name = studio.preset.models.method
    loaded = methods.load_method(name, comfyui.import_pack("folders").MINIATURE)
    face_models = methods.load_face_models(loaded, None)
    faces = comfyui.import_pack("nodes_identity").read_faces(
        face_models, [comfyui.read_image("examples/anna.png")]
    )
    identity = faces.identity()
    start = START if name == "photomaker" else 0.0
    images = [
        studio.generate(
            PROMPT, seed=7, negative_prompt="", identity=identity, scale=scale, start=start
        ).images[0]
        for scale in (0.7, 0.0)
    ]
    expected, base = (np.asarray(image, dtype=float) for image in images)
    assert np.abs(expected - base).max() > 20

    clip = TextEncoders(studio.pipe)
    positive, negative = clip.conditioning(PROMPT), clip.conditioning("")
    latent = torch.zeros(1, 20, LATENT, LATENT)
    strength = options(0.7)
    shown = methods.apply_method(model, loaded, identity, strength)
    if name == "photomaker":
        positive = methods.encode_prompt(clip, loaded, identity, PROMPT, START)
        positive = [
            [states, values | {"width": SIDE, "height": SIDE}] for states, values in positive
        ]
    if name == "instantid":
        positive, negative = methods.apply_identity_net(
            loaded,
            identity,
            identity,
            comfyui.controlnet(studio.adapter.identity_net),
            (positive, negative),
            {"samples": latent},
            strength,
        )
    schedule: dict[str, Any] = {"sampler": "dpmpp_2m", "scheduler": "sgm_uniform"}
    ours = decode(studio, sample(shown, positive, negative, latent, steps=20, **schedule))
    difference = np.abs(ours - expected)
    record_property("largest_difference_of_255", difference.max())
    # InstantID's two networks add up two roundings
    assert difference.max() <= (2 if name == "instantid" else 1)
    # the model itself is as before
    plain = sample(
        model, clip.conditioning(PROMPT), clip.conditioning(""), latent, steps=20, **schedule
    )
    assert np.abs(decode(studio, plain) - base).max() <= 1


@pytest.fixture(scope="module")
def faceid(methods) -> SimpleNamespace:
    """FaceID, applied to a model for one person."""
    studio = pulid.load("mini", method="faceid", device="cpu")
    loaded = methods.load_method("faceid", comfyui.import_pack("folders").MINIATURE)
    model = comfyui.load_miniature(studio.pipe)
    clip = TextEncoders(studio.pipe)
    return SimpleNamespace(
        loaded=loaded,
        model=model,
        clip=clip,
        identity=studio.identify("examples/anna.png"),
        other=studio.identify("examples/ben.png"),
        conditioning=(clip.conditioning(PROMPT), clip.conditioning("")),
    )


def run(faceid: SimpleNamespace, model: Any) -> torch.Tensor:
    return sample(model, *faceid.conditioning, torch.zeros(1, 20, LATENT, LATENT))


def test_models_do_not_see_each_other(faceid, methods, options) -> None:
    base = run(faceid, faceid.model)

    def show(identity: Any, **values: Any) -> Any:
        return methods.apply_method(faceid.model, faceid.loaded, identity, options(**values))

    anna, ben = (show(identity, scale=0.7) for identity in (faceid.identity, faceid.other))
    image = run(faceid, anna)
    assert not torch.equal(image, base) and not torch.equal(run(faceid, ben), image)
    assert torch.equal(run(faceid, anna), image) and torch.equal(run(faceid, faceid.model), base)
    assert torch.equal(run(faceid, show(faceid.identity, scale=0.0)), base)
    assert not faceid.model.patches and not faceid.model.wrappers.get("diffusion_model")
    # a mask and a span change the image
    left = torch.zeros(1, LATENT, LATENT)
    left[..., : LATENT // 2] = 1
    for values in ({"mask": left}, {"end": 0.5}):
        changed = run(faceid, show(faceid.identity, scale=0.7, **values))
        assert not torch.equal(changed, image) and not torch.equal(changed, base)


def test_identities_of_two_methods_add_up(faceid, methods, options) -> None:
    """PuLID and FaceID in one model, in either order."""
    adapters = comfyui.import_pack("adapters")
    studio = pulid.load("mini", device="cpu")
    loaded = adapters.load_adapter(str(studio.preset.models.adapter), "miniature")

    def pulid_on(model: Any) -> Any:
        values = options(0.7, projection="none", num_zero=0)
        return adapters.apply_adapter(model, loaded, faceid.identity, values)

    def faceid_on(model: Any) -> Any:
        return methods.apply_method(model, faceid.loaded, faceid.identity, options(0.5))

    one = run(faceid, faceid_on(pulid_on(faceid.model)))
    other = run(faceid, pulid_on(faceid_on(faceid.model)))
    assert relative_difference(one, other) < 1e-4
    for model in (faceid_on(faceid.model), pulid_on(faceid.model)):
        assert relative_difference(one, run(faceid, model)) > 0.01


def relative_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / one.abs().max())


def test_unsuitable_parts_raise(faceid, methods, options) -> None:
    with pytest.raises(OptionError, match="does not change the prompt; only PhotoMaker does"):
        methods.encode_prompt(faceid.clip, faceid.loaded, faceid.identity, PROMPT, 0.2)
    with pytest.raises(OptionError, match="has no IdentityNet; only InstantID has"):
        methods.apply_identity_net(
            faceid.loaded, faceid.identity, faceid.identity, None, (), {}, options(1.0)
        )
    with pytest.raises(OptionError, match="scale must be"):
        methods.apply_method(faceid.model, faceid.loaded, faceid.identity, options(-1.0))
    flux = comfyui.flux_patcher(tiny_flux.tiny_transformer(in_channels=64))
    with pytest.raises(OptionError, match="faceid acts in SDXL models; this one is Flux"):
        methods.apply_method(flux, faceid.loaded, faceid.identity, options(1.0))
    photomaker = methods.load_method("photomaker", comfyui.import_pack("folders").MINIATURE)
    for unused in ({"start": 0.2}, {"end": 0.8}, {"mask": torch.ones(1, 8, 8)}):
        with pytest.raises(OptionError, match="photomaker acts in all steps and in the whole"):
            methods.apply_method(faceid.model, photomaker, faceid.identity, options(1.0, **unused))
    for values in ({"start": 0.8, "end": 0.2}, {"start": 1.5}):
        with pytest.raises(OptionError, match=r"would have no effect|fractions of the schedule"):
            methods.apply_method(
                faceid.model, faceid.loaded, faceid.identity, options(1.0, **values)
            )
    stranger = replace(faceid.identity, models={"glintr100": "0"})
    with pytest.raises(OptionError, match=r"embeddings of recognition-encoder, .* those of glintr"):
        methods.apply_method(faceid.model, faceid.loaded, stranger, options(1.0))
    with pytest.raises(OptionError, match="no face pack auraface in models/insightface"):
        methods.find_preset(replace(faceid.loaded, is_miniature=False), "auraface")
    save = comfyui.import_pack("nodes_identity").SaveIdentity.execute
    for name in ("../x", "/x", "a\\b", " "):  # an input from another node
        with pytest.raises(OptionError, match="must be a file name without a folder"):
            save(faceid.identity, name)
    with pytest.raises(OptionError, match="no features of PhotoMaker's vision encoder"):
        methods.encode_prompt(faceid.clip, photomaker, faceid.identity, PROMPT, 0.2)
    with pytest.raises(OptionError, match="at most 75 tokens"):
        methods.encode_text(faceid.clip, "a very long prompt of a person " * 20, None)
    path = str(photomaker.path)
    with pytest.raises(WeightsError):
        type(faceid.loaded.adapter).load(path)
    lora = {"middle_block.9.nothing": (torch.zeros(2, 4), torch.zeros(4, 2))}
    with pytest.raises(WeightsError, match="another base model"):
        methods.patch_weights(faceid.model, lora, 1.0)
