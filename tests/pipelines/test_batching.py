"""Batches of different requests: every image equals the one that its request gives alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from openpulid.errors import OptionError, Stopped
from openpulid.io.image_grid import to_pil
from openpulid.pipelines.batching import batch_key
from openpulid.pipelines.inputs import open_inputs
from openpulid.pipelines.loading import load
from openpulid.pipelines.request import GenerationRequest, IdentityOptions
from openpulid.pipelines.request_inputs import InitImage, Person
from openpulid.pipelines.studio import Studio
from openpulid.world import Person as DrawnPerson
from openpulid.world import Scene, render
from tests.support.people import anna, ben, someone
from tests.support.studios import flux_studio, pixels, sdxl_studio
from tests.support.tiny_flux import tiny_pipe

LONG = "portrait of a person, red hat, blue background, film noir, smiling, green hat"
"""More tokens than the tiny pipeline's CLIP reads at once."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    people = {"anna": anna, "ben": ben, "pair": someone(3, photos=2)}
    for name, identity in people.items():
        identity.save(folder / f"{name}.safetensors")
    Image.new("RGB", (32, 32), "red").save(folder / "red.png")
    return folder


@pytest.fixture(scope="module")
def sdxl(tiny_pipeline: Any) -> Studio:
    return sdxl_studio(tiny_pipeline())


@pytest.fixture(scope="module")
def flux() -> Studio:
    return flux_studio(tiny_pipe())


@pytest.fixture
def show(files: Path) -> Callable[..., Person]:
    return lambda name, **options: Person(identity=files / f"{name}.safetensors", **options)


def assert_equals_single_runs(studio: Studio, requests: list[GenerationRequest]) -> None:
    together = studio.generate_batch(requests)
    single = [studio.generate(request) for request in requests]
    for one, alone in zip(together, single, strict=True):
        difference = np.abs(pixels(one.images[0]) - pixels(alone.images[0])).max()
        assert difference <= 1
        assert one.requests == alone.requests and one.fingerprints == alone.fingerprints
    for k, one in enumerate(single):
        for other in single[:k]:
            assert np.abs(pixels(one.images[0]) - pixels(other.images[0])).max() > 3


def test_prompts_seeds_and_people_differ_on_sdxl(sdxl: Studio, show: Any) -> None:
    requests = [
        GenerationRequest("portrait", seed=1, people=[show("anna")]),
        GenerationRequest("film noir", seed=9, people=[show("ben")], negative_prompt="red"),
        GenerationRequest("portrait", seed=1, people=[show("ben")]),
    ]
    assert_equals_single_runs(sdxl, requests)


def test_prompts_seeds_and_people_differ_on_flux(flux: Studio, show: Any) -> None:
    options: dict[str, Any] = {"true_cfg_scale": 2.0, "negative_prompt": "person"}
    requests = [
        GenerationRequest("portrait", seed=1, people=[show("anna")], **options),
        GenerationRequest("person", seed=9, people=[show("ben")], **options),
        GenerationRequest("portrait", seed=1, people=[show("ben")], **options),
    ]
    assert_equals_single_runs(flux, requests)


def test_requests_without_people_share_a_batch(sdxl: Studio) -> None:
    assert_equals_single_runs(
        sdxl, [GenerationRequest("portrait", seed=3), GenerationRequest("film noir", seed=4)]
    )


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_several_people_share_an_image(
    family: str, request: pytest.FixtureRequest, show: Any
) -> None:
    left, right = (0, 0, 0.5, 1), (0.5, 0, 1, 1)
    both = [show("anna", box=left), show("ben", box=right)]
    requests = [
        GenerationRequest("portrait", seed=1, people=both),
        GenerationRequest(
            "portrait", seed=1, people=[show("anna", box=right), show("ben", box=left)]
        ),
        # a person whose scale is 0 is left out, so this image has one person less
        GenerationRequest(
            "portrait", seed=1, people=[both[0], both[1].model_copy(update={"scale": 0})]
        ),
    ]
    assert_equals_single_runs(request.getfixturevalue(family), requests)


def test_long_prompts_are_run_apart(sdxl: Studio, show: Any) -> None:
    """They have embeddings of other sizes; the previews still show the right images."""
    requests = [
        GenerationRequest("portrait", seed=1, people=[show("anna")]),
        GenerationRequest(LONG, seed=2, people=[show("ben")]),
        GenerationRequest("film noir", seed=3, people=[show("ben")]),
    ]
    assert_equals_single_runs(sdxl, requests)
    previews: dict[int, Image.Image] = {}

    def keep(step: int, total: int, preview: Any) -> None:
        assert total == 12
        for k in range(3):
            try:
                previews[k] = preview(k)
            except IndexError:
                continue

    results = sdxl.generate_batch(requests, callback=keep)
    # the last preview is the image itself
    for k, result in enumerate(results):
        assert np.abs(pixels(previews[k]) - pixels(result.images[0])).max() <= 1


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_batch_in_bfloat16(family: str, tiny_pipeline: Any, show: Any) -> None:
    """Rounding is coarser, and depends on the processor; people still differ by far more."""
    pipe = (tiny_pipeline() if family == "sdxl" else tiny_pipe()).to(torch.bfloat16)
    studio = sdxl_studio(pipe) if family == "sdxl" else flux_studio(pipe)
    studio.adapter.to(torch.bfloat16)
    requests = [
        GenerationRequest("portrait", seed=1, people=[show(name)]) for name in ("anna", "ben")
    ]
    anna_image, ben_image = (pixels(result.images[0]) for result in studio.generate_batch(requests))
    for image, request in ((anna_image, requests[0]), (ben_image, requests[1])):
        single = pixels(studio.generate(request).images[0])
        assert np.abs(image - single).max() <= 8
    assert np.abs(anna_image - ben_image).max() > 16


@pytest.mark.parametrize("method", ["faceid", "instantid", "photomaker"])
def test_other_methods_share_a_batch(method: str, tmp_path: Path) -> None:
    studio = load("mini", method=method)
    requests = []
    for seed in (3, 4):
        portrait = render([DrawnPerson.from_seed(seed)], [Scene()]).image
        to_pil(portrait)[0].save(tmp_path / f"{seed}.png")
        person = Person(images=[tmp_path / f"{seed}.png"])
        requests.append(
            GenerationRequest("portrait, photo", seed=1, num_inference_steps=3, people=[person])
        )
    assert_equals_single_runs(studio, requests)


def test_stopped_batch_has_no_images(sdxl: Studio) -> None:
    def stop(*_: Any) -> None:
        raise Stopped

    requests = [GenerationRequest("portrait", seed=3), GenerationRequest("film noir", seed=4)]
    results = sdxl.generate_batch(requests, callback=stop)
    assert [result.images for result in results] == [[], []]


def key(studio: Studio, request: GenerationRequest) -> str | None:
    resolved = studio.preset.resolve(request)
    return batch_key(resolved, open_inputs(resolved, studio.preset.models))


def test_keys_of_requests_that_can_share_a_batch(sdxl: Studio, show: Any) -> None:
    request = GenerationRequest("portrait", people=[show("anna")])
    same = [
        request.model_copy(update={"prompt": "film noir", "seed": 7, "people": (show("ben"),)}),
        request.model_copy(update={"negative_prompt": "hat"}),
        request.model_copy(update={"num_images": 3}),
        request.model_copy(update={"num_inference_steps": 4}),  # the preset's own
    ]
    assert {key(sdxl, one) for one in same} == {key(sdxl, request)}


def test_keys_of_requests_that_cannot_share_a_batch(sdxl: Studio, show: Any) -> None:
    left = (0, 0, 0.5, 1)
    changes: list[dict[str, Any]] = [
        {},
        {"num_inference_steps": 3},
        {"guidance_scale": 2.0},
        {"width": 40},
        {"identity": IdentityOptions(scale=0.5)},
        {"identity": IdentityOptions(num_zero=3)},
        {"people": ()},
        {"people": (show("pair"),)},  # two reference images
        {"people": (show("anna", scale=0.3),)},
        {"people": (show("anna", box=left),)},
        {"people": (show("anna", box=left), show("ben", box=left))},
    ]
    request = GenerationRequest("portrait", people=[show("anna")])
    keys = [key(sdxl, request.model_copy(update=change)) for change in changes]
    assert len(set(keys)) == len(changes) and None not in keys


def test_one_identity_for_a_batch_equals_single_runs(sdxl: Studio, show: Any) -> None:
    rows = [("portrait", 1), ("film noir", 9)]
    requests = [GenerationRequest(prompt, seed=seed) for prompt, seed in rows]
    together = sdxl.generate_batch(requests, anna)
    for one, (prompt, seed) in zip(together, rows, strict=True):
        alone = sdxl.generate(prompt, anna, seed=seed)
        assert np.abs(pixels(one.images[0]) - pixels(alone.images[0])).max() <= 1
        assert one.requests == alone.requests and one.fingerprints == alone.fingerprints
        base = sdxl.generate(prompt, seed=seed)
        assert np.abs(pixels(one.images[0]) - pixels(base.images[0])).max() > 3
    with pytest.raises(OptionError, match="pass an identity or people, not both"):
        sdxl.generate_batch([GenerationRequest("portrait", people=[show("ben")])], anna)


def test_requests_that_are_generated_alone(sdxl: Studio, show: Any, files: Path) -> None:
    request = GenerationRequest("portrait", people=[show("anna")])
    init_image = InitImage(image=files / "red.png")
    for change in ({"init_image": init_image}, {"refine_faces": True}):
        alone = GenerationRequest(**{**request.model_dump(), **change})
        assert key(sdxl, alone) is None
        with pytest.raises(OptionError, match="cannot share a batch: only prompts, seeds and"):
            sdxl.generate_batch([alone, alone])


def test_batches_that_are_refused(sdxl: Studio, show: Any) -> None:
    request = GenerationRequest("portrait", people=[show("anna")])
    with pytest.raises(OptionError, match="a batch needs one request or more"):
        sdxl.generate_batch([])
    with pytest.raises(OptionError, match="one image each; set num_images to 1"):
        sdxl.generate_batch([request, request.model_copy(update={"num_images": 2})])
    with pytest.raises(OptionError, match="cannot share a batch"):
        sdxl.generate_batch([request, request.without_people()])
