"""The second pass on small faces: which are refined, whose they are, and what stays as it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image, ImageChops

from openpulid.errors import OptionError, WeightsError
from openpulid.identity.identity import Identity
from openpulid.io.image_grid import to_pil
from openpulid.pipelines.inputs import RequestInputs
from openpulid.pipelines.loading import load
from openpulid.pipelines.presets import MINIATURE, Preset, flux, mini, sdxl
from openpulid.pipelines.progress import Progress
from openpulid.pipelines.refinement import FaceRefiner
from openpulid.pipelines.request import FaceRefinement, GenerationRequest
from openpulid.pipelines.request_inputs import Control
from openpulid.pipelines.runner import PipelineRunner
from openpulid.pipelines.selection import with_method
from openpulid.pipelines.studio import Studio
from openpulid.world import HELD_OUT_PEOPLE, Person, Scene, render
from tests.support.people import anna as tiny_anna
from tests.support.people import fresh as fresh_sdxl
from tests.support.tiny_flux import fresh as fresh_flux
from tests.support.tiny_flux import tiny_pipe

PROMPT = "portrait, photo, gray background, smiling"
CANVAS = 128
SMALL = 42

OPTIONS: dict[str, Any] = {"width": CANVAS, "height": CANVAS, "seed": 3}


def render_person(seed: int) -> Image.Image:
    return to_pil(render([Person.from_seed(HELD_OUT_PEOPLE + seed)], [Scene()]).image)[0]


def draw_scene(*places: tuple[int, int, int]) -> Image.Image:
    """Draw people at left, top and side on a gray image."""
    image = Image.new("RGB", (CANVAS, CANVAS), (140, 143, 148))
    for number, (left, top, side) in enumerate(places):
        person = render_person(500 + number).resize((side, side), Image.Resampling.LANCZOS)
        image.paste(person, (left, top))
    return image


@pytest.fixture(scope="module")
def studio() -> Studio:
    return load("mini-lightning", device="cpu")


@pytest.fixture(scope="module")
def anna(studio: Studio) -> Identity:
    return studio.identify(render_person(0))


@pytest.fixture(scope="module")
def ben(studio: Studio) -> Identity:
    return studio.identify(render_person(1))


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An initial image with a small face; the mask mixes, so that the first pass preserves it."""
    folder = tmp_path_factory.mktemp("scene")
    draw_scene((43, CANVAS - SMALL, SMALL)).save(folder / "scene.png")
    Image.new("L", (CANVAS, CANVAS), 90).save(folder / "mask.png")
    return {"image": folder / "scene.png", "mask": folder / "mask.png", "strength": 0.25}


def resolve(preset: Preset, **options: Any) -> GenerationRequest:
    request = GenerationRequest(prompt=PROMPT, refine_faces=True, **options)
    return preset.resolve(request, is_person_shown=True)


def find(people: Any, image: Image.Image, **options: Any) -> list[Any]:
    refiner = FaceRefiner(resolve(mini(), **options), people, RequestInputs(), mini().models)
    return refiner.find_faces(image, 7)


def test_true_stands_for_the_default_refinement() -> None:
    assert GenerationRequest(prompt="a", refine_faces=True).refine_faces == FaceRefinement()
    assert GenerationRequest(prompt="a", refine_faces=False).refine_faces is None
    request = GenerationRequest(prompt="a", refine_faces={"strength": 0.7})
    assert GenerationRequest.model_validate_json(request.model_dump_json()) == request


def test_a_strength_without_a_step_is_refused() -> None:
    request = GenerationRequest(
        prompt="portrait", num_inference_steps=4, refine_faces={"strength": 0.2}
    )
    with pytest.raises(OptionError, match=r"runs none of the 4 steps.* use 0.25 or more"):
        mini().resolve(request)


def test_a_large_face_stays_bit_for_bit(studio, anna) -> None:
    plain = studio.generate(PROMPT, identity=anna, seed=7)
    refined = studio.generate(PROMPT, identity=anna, seed=7, refine_faces=True)
    assert refined.images[0].tobytes() == plain.images[0].tobytes()
    assert refined.requests[0].refine_faces == FaceRefinement()


def test_a_small_face_changes_and_nothing_else(studio, anna, scene) -> None:
    totals: list[tuple[int, int]] = []

    def generate(refine_faces: bool, **options: Any) -> list[Image.Image]:
        return studio.generate(
            PROMPT,
            identity=anna,
            init_image=scene,
            refine_faces=refine_faces,
            **(OPTIONS | options),
        ).images

    plain = generate(False, num_images=2)
    refined = generate(
        True,
        num_images=2,
        callback=lambda step, total, preview: totals.append((step, total)),
    )
    for before, after in zip(plain, refined, strict=True):
        left, top, right, bottom = ImageChops.difference(before, after).getbbox()
        assert (left > 32) and (top > 74) and (right < 96) and (bottom <= CANVAS)
        changed = np.abs(np.asarray(after, int) - np.asarray(before, int))[top:bottom, left:right]
        assert changed.max() > 20
    # one of four steps for each whole image, and two for its face
    assert totals == [(1, 2), (2, 4), (3, 4), (4, 4), (5, 6), (6, 6)]
    # an image is the same on its own, and next to others up to rounding
    alone = generate(True, seed=4)[0]
    assert alone.tobytes() == refined[1].tobytes()
    together = generate(True, num_images=2, batch_size=2)
    for one, other in zip(refined, together, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 2


def test_a_controlnet_acts_in_the_first_pass_alone(studio, anna, scene, tmp_path) -> None:
    torch.manual_seed(0)
    net = ControlNetModel.from_unet(
        studio.pipe.unet, conditioning_embedding_out_channels=(8, 8, 8, 8)
    )
    torch.nn.init.normal_(net.controlnet_mid_block.weight, std=0.1)
    net.save_pretrained(tmp_path / "net")
    noise = np.random.default_rng(0).integers(0, 256, (CANVAS, CANVAS, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    controls = [Control(tmp_path / "net", tmp_path / "noise.png")]

    def generate(**options: Any) -> Image.Image:
        request = {**OPTIONS, "init_image": scene, **options}
        return studio.generate(PROMPT, identity=anna, **request).images[0]

    plain, controlled = generate(), generate(controls=controls)
    assert plain.tobytes() != controlled.tobytes()
    refined = generate(controls=controls, refine_faces=True)
    left, top, right, bottom = ImageChops.difference(controlled, refined).getbbox()
    assert left > 32 and top > 74 and right < 96 and bottom <= CANVAS


def test_an_image_without_a_face_stays(studio, anna, tmp_path, caplog) -> None:
    Image.new("RGB", (CANVAS, CANVAS), "gray").save(tmp_path / "gray.png")
    corner = Image.new("L", (CANVAS, CANVAS))
    corner.paste(255, (0, 0, 16, 16))
    corner.save(tmp_path / "corner.png")
    init_image = {"image": tmp_path / "gray.png", "mask": tmp_path / "corner.png"}
    images = [
        studio.generate(
            PROMPT, identity=anna, init_image=init_image, refine_faces=refine, **OPTIONS
        ).images[0]
        for refine in (None, True)
    ]
    assert images[0].tobytes() == images[1].tobytes()
    assert "seed 3: no face detected, so no face is refined" in caplog.text


def test_each_face_is_that_of_the_person_whose_region_it_is_in(anna, ben) -> None:
    image = draw_scene((5, 10, SMALL), (75, 60, SMALL))
    left, right = torch.zeros(4, 4), torch.zeros(4, 4)
    left[:, :2], right[:, 2:] = 1, 0.5
    faces = find([(anna, left), (ben, right)], image)
    assert [face.request.seed for face in faces] == [7, 8]
    assert torch.equal(faces[0].identity.id_cond, anna.id_cond)
    assert torch.equal(faces[1].identity.id_cond, ben.id_cond)
    assert [face.request.identity.scale for face in faces] == pytest.approx([0.85, 0.425])
    for face, center in zip(faces, (26, 96), strict=True):
        window_left, _, window_right, _ = face.window
        assert abs((window_left + window_right) / 2 - center) < 8
        assert (face.request.width, face.request.people, face.request.controls) == (96, (), ())
    # ben's region is elsewhere: the right face is nobody's
    top = torch.zeros(4, 4)
    top[0, 2:] = 1
    assert len(find([(anna, left), (ben, top)], image)) == 1


def test_one_person_has_one_face(anna, tmp_path) -> None:
    """The largest face is the person's; people in the background stay."""
    large_and_small = draw_scene((0, 44, 84), (88, 4, 38))
    assert find(anna, large_and_small) == []
    two = draw_scene((5, 10, 46), (80, 60, 36))
    (face,) = find(anna, two)
    assert (face.window[0] + face.window[2]) / 2 < 64
    assert len(find(None, two)) == 2
    # a tuned method shows its person in the whole image
    models = with_method(mini(), "lora", tmp_path / "anna.safetensors").models
    refiner = FaceRefiner(resolve(mini()), None, RequestInputs(), models)
    (alone,) = refiner.find_faces(two, 7)
    assert alone.window == face.window


def test_the_identity_acts_in_the_whole_second_pass(anna) -> None:
    request = resolve(mini(), identity={"start": 0.5})
    refiner = FaceRefiner(request, anna, RequestInputs(), mini().models)
    (face,) = refiner.find_faces(draw_scene((43, 80, SMALL)), 2**64 - 1)
    assert (face.request.identity.start, face.request.seed) == (0.0, 2**64 - 1)
    # InstantID draws the landmarks of the face, not those of the reference image
    assert face.identity.landmarks.shape == (1, 1, 5, 2)
    assert 0.3 < float(face.identity.landmarks[..., 0].mean()) < 0.7


def test_outside_of_an_inpaint_mask_nothing_changes(studio, anna, scene, tmp_path) -> None:
    mask = Image.new("L", (CANVAS, CANVAS))
    mask.paste(255, (0, 0, CANVAS, 64))
    mask.save(tmp_path / "mask.png")
    init_image = scene | {"mask": tmp_path / "mask.png"}
    image = studio.generate(
        PROMPT, identity=anna, init_image=init_image, refine_faces=True, **OPTIONS
    ).images[0]
    original = Image.open(scene["image"])
    lower = (0, 64, CANVAS, CANVAS)
    assert image.crop(lower).tobytes() == original.crop(lower).tobytes()


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_tiny_pipelines_run_the_second_pass(family: str, tiny_pipeline: Any) -> None:
    models: dict[str, Any] = {
        "use_half_precision": False,
        "native_side": 32,
        "is_miniature": True,
        "detector": MINIATURE / "detector.safetensors",
        "face_share": 0.66,
    }
    if family == "sdxl":
        pipe = tiny_pipeline()
        adapter: Any = fresh_sdxl(pipe)
        preset = sdxl().with_models(**models, min_side=8, sampler=None)
        preset = preset.with_defaults(guidance_scale=3.0, negative_prompt="")
    else:
        pipe = tiny_pipe()
        adapter = fresh_flux(pipe)
        preset = flux().with_models(**models | {"size_multiple": 4, "min_side": 4})
        preset = preset.with_defaults(max_sequence_length=10)
    preset = preset.with_defaults(num_inference_steps=4, width=CANVAS, height=CANVAS)
    runner = PipelineRunner(pipe, adapter, preset)
    image = draw_scene((43, 80, SMALL))
    request = resolve(preset).model_copy(update={"prompt": "portrait"})
    refiner = FaceRefiner(request, tiny_anna, RequestInputs(), preset.models)
    (face,) = refiner.find_faces(image, 0)
    assert (face.request.width, face.request.height) == (32, 32)
    progress = Progress(None, preset.models, face.request)
    ((_, crop),) = runner.run(face.request, face.identity, face.cut(image), progress)
    refined = face.paste(image, crop)
    left, top, right, bottom = ImageChops.difference(image, refined).getbbox()
    window = face.window
    assert window[0] <= left < right <= window[2]
    assert window[1] <= top < bottom <= window[3]


@pytest.mark.parametrize("method", ["faceid", "instantid", "photomaker"])
def test_other_methods_refine_small_faces(method: str, scene: dict[str, Any]) -> None:
    studio = load("mini-lightning", device="cpu", method=method)
    person = studio.identify(render_person(0))

    def generate(**options: Any) -> Image.Image:
        request = {**OPTIONS, "init_image": scene, "num_inference_steps": 8, **options}
        return studio.generate(PROMPT, identity=person, **request).images[0]

    small, refined = generate(), generate(refine_faces={"strength": 0.75})
    box = ImageChops.difference(small, refined).getbbox()
    assert box is not None and box[0] > 20 and box[1] > 50 and box[2] < 110
    assert refined.tobytes() != generate(refine_faces={"strength": 0.75}, scale=0.2).tobytes()


def test_a_missing_detector_is_reported_before_the_first_image(studio, tmp_path) -> None:
    """A tuned method needs no face models but for this."""
    preset = studio.preset.with_models(detector=tmp_path / "detector.safetensors")
    runner = PipelineRunner(studio.pipe, studio.adapter, preset)
    images = runner.run(
        resolve(preset), None, RequestInputs(), Progress(None, preset.models, resolve(preset))
    )
    steps = len(studio.pipe.scheduler.timesteps)
    studio.pipe.scheduler.set_timesteps(1)
    with pytest.raises(WeightsError, match="detector"):
        next(images)
    assert len(studio.pipe.scheduler.timesteps) == 1 != steps  # nothing was generated
