"""InfiniteYou through presets, studio and command line: wired like PuLID on FLUX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from facexlib.recognition.arcface_arch import Backbone
from safetensors.torch import save_file

from openpulid.bench.configuration import describe_configuration
from openpulid.doctor import presets as doctor_presets
from openpulid.errors import OptionError, WeightsError
from openpulid.identity.identity import hash_models
from openpulid.io.hub import FOLDER_VARIABLE, WEIGHTS
from openpulid.methods.infiniteyou.flux import InfiniteYou
from openpulid.pipelines import factory
from openpulid.pipelines.factory import (
    check_models,
    hash_extractor_models,
    load_adapter,
    load_extractor,
    load_pipeline,
)
from openpulid.pipelines.memory_levels import FLUX_LEVELS
from openpulid.pipelines.presets import Preset, flux
from openpulid.pipelines.request import GenerationRequest
from openpulid.pipelines.request_inputs import Person
from openpulid.pipelines.selection import resolve_preset, with_method
from openpulid.pipelines.studio import Studio
from openpulid.pipelines.weights import find_installed_methods
from tests.support.infinite_you import face, save_method, tiny_method
from tests.support.photo_networks import yunet_file
from tests.support.tiny_flux import run, tiny_pipe

CPU = torch.device("cpu")
SIDE = 32
anna, ben = face(1), face(2)


class UnusedExtractor:
    """Extractor of a studio that receives identities alone."""

    models = anna.models


@pytest.fixture(scope="module")
def studio() -> Studio:
    pipe = tiny_pipe()
    preset = with_method(flux(), "infiniteyou")
    preset = preset.with_models(use_half_precision=False, size_multiple=4, min_side=4)
    preset = preset.with_models(native_side=SIDE).with_defaults(
        num_inference_steps=4, width=SIDE, height=SIDE, max_sequence_length=10
    )
    return Studio(pipe, tiny_method(pipe), UnusedExtractor(), preset)


def pixels(studio: Studio, identity: Any = anna, **options: Any) -> bytes:
    return studio.generate("portrait", identity, seed=1, **options).images[0].tobytes()


# --- requests


def test_options_reach_the_image(studio: Studio) -> None:
    plain = pixels(studio)
    nobody = pixels(studio, None)
    guided = {"true_cfg_scale": 3.0, "negative_prompt": "a person"}
    different = [
        pixels(studio, scale=0.3),
        pixels(studio, start=0.5),
        pixels(studio, end=0.5),
        pixels(studio, **guided),
        pixels(studio, **guided, timestep_to_start_cfg=3),
    ]
    assert len({plain, nobody, *different}) == 7
    assert pixels(studio, scale=0.0) == nobody
    assert pixels(studio, end=0.6) == pixels(studio, end=0.5)  # the third step ends at .75
    parts = studio.pipe.transformer.modules()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in parts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"end": 0.2}, "none of the 4 steps is between start 0 and end 0.2"),
        ({"start": 0.3, "end": 0.7}, "none of the 4 steps"),  # the step from .5 ends at .75
        ({"start_step": 1}, "with infiniteyou does not support: start_step"),
        ({"num_zero": 1}, "does not support: num_zero"),
        ({"pose_from_prompt": True}, "does not support: pose_from_prompt"),
    ],
)
def test_options_without_effect_are_refused(
    studio: Studio, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError) as error:
        studio.generate("portrait", anna, **options)
    assert message in str(error.value)


def test_people_of_a_request_have_regions(studio: Studio, tmp_path: Path) -> None:
    anna.save(tmp_path / "anna.safetensors")
    ben.save(tmp_path / "ben.safetensors")
    request = GenerationRequest(
        "portrait",
        seed=1,
        people=[
            Person(identity=tmp_path / "anna.safetensors", box=(0, 0, 0.5, 1), scale=0.5),
            Person(identity=tmp_path / "ben.safetensors", box=(0.5, 0, 1, 1)),
        ],
    )
    left = torch.zeros(SIDE, SIDE)
    left[:, : SIDE // 2] = 1
    both = studio.generate(request).images[0].tobytes()
    assert both == pixels(studio, [(anna, 0.5 * left), (ben, 1 - left)])
    one = request.model_copy(update={"people": request.people[:1]})
    assert both != studio.generate(one).images[0].tobytes()


def test_seeds_and_batches(studio: Studio) -> None:
    both = studio.generate("portrait", anna, seed=4, num_images=2)
    alone = studio.generate("portrait", anna, seed=5)
    assert both.images[1].tobytes() == alone.images[0].tobytes()
    together = studio.generate("portrait", anna, seed=4, num_images=2, batch_size=2)
    for one, other in zip(both.images, together.images, strict=True):
        assert np.abs(np.array(one).astype(int) - np.array(other).astype(int)).max() <= 2


# --- files


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny FLUX and InfiniteYou, and empty files of the other networks."""
    folder = tmp_path_factory.mktemp("weights")
    pipe = tiny_pipe()
    pipe.save_pretrained(folder / "FLUX.1-dev")
    save_method(tiny_method(pipe), folder / "infu_flux_v1.0" / "aes_stage2")
    for name in ("pulid-flux-v0.9.1", "detector", "arcface", "arcface-loss", "eva", "parsing"):
        (folder / WEIGHTS[name].file).touch()
    return folder


@pytest.fixture
def installed(weights: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv(FOLDER_VARIABLE, str(weights))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return weights


def preset_at(level: str) -> Preset:
    return resolve_preset("flux", method="infiniteyou", memory=level)


def test_installed_method_is_listed(installed: Path) -> None:
    assert find_installed_methods(flux()) == ["pulid", "infiniteyou"]
    rows = {row[0]: row[1] for row in doctor_presets.check().rows}
    assert rows["flux"] == "complete: pulid, infiniteyou"


def test_missing_files_are_named_with_one_command(installed: Path) -> None:
    check_models(with_method(flux(), "infiniteyou"))
    message = (
        r"^preset 'flux' with infiniteyou-sim needs weights that are not installed: "
        r"infiniteyou-sim \(infu_flux_v1\.0/sim_stage1/image_proj_model\.bin\), "
        r"infusenet-sim \(ByteDance/InfiniteYou/infu_flux_v1\.0/sim_stage1/InfuseNetModel\); "
        r"`pulid weights get infiniteyou-sim infusenet-sim` downloads them \(about 12290 MB\)"
    )
    with pytest.raises(WeightsError, match=message):
        check_models(with_method(flux(), "infiniteyou-sim"))
    adapter = installed / WEIGHTS["pulid-flux-v0.9.1"].file
    with pytest.raises(WeightsError, match="contains no InfiniteYou; it needs image_proj_model"):
        check_models(with_method(flux(), "infiniteyou", adapter))


@pytest.mark.parametrize("level", FLUX_LEVELS)
def test_adapter_acts_at_every_memory_level(installed: Path, level: str) -> None:
    preset = preset_at(level)
    pipe = load_pipeline(preset, CPU)
    pipe.set_progress_bar_config(disable=True)
    adapter = load_adapter(preset, CPU)
    assert isinstance(adapter, InfiniteYou) and adapter.infusenet.is_placed is (level != "full")
    stored = {x.dtype for x in adapter.infusenet.model.parameters()}
    assert (torch.float8_e4m3fn in stored) is (level == "24gb") and torch.bfloat16 in stored
    adapter.attach(pipe)
    plain = run(pipe, steps=2)
    with adapter.use(anna):
        assert np.abs(run(pipe, steps=2) - plain).max() > 1e-2
    assert np.array_equal(run(pipe, steps=2), plain)


def test_configuration_has_the_hashes_of_both_networks(installed: Path) -> None:
    preset = with_method(flux(), "infiniteyou")
    adapter = describe_configuration("infiniteyou", preset, {})["weights"]["adapter"]
    shards = list((installed / "infu_flux_v1.0/aes_stage2/InfuseNetModel").glob("*.safetensors"))
    assert len(adapter) == 1 + len(shards) > 2


# --- identities


def test_identity_of_a_photo(tmp_path: Path) -> None:
    """A detector, and facexlib's ArcFace: the features are the embedding alone."""
    torch.manual_seed(0)
    recognition = tmp_path / "recognition_arcface_ir_se50.pth"
    torch.save(Backbone(num_layers=50, drop_ratio=0.6, mode="ir_se").state_dict(), recognition)
    preset = with_method(flux(), "infiniteyou").with_models(
        detector=yunet_file(tmp_path / "face_detection_yunet_2026may.onnx"),
        recognition=recognition,
    )
    extractor = load_extractor(preset, CPU)
    image = torch.full((3, 320, 320), 0.5)
    image[:, 128:160, 128:160] = torch.tensor([1.0, 0.0, 0.0])[:, None, None]
    faces = extractor.detection.detect(image)
    (identity,) = extractor.extract(faces[:1])
    assert identity.id_cond.shape == (1, 1, 512) and identity.hidden == ()
    assert identity.id_cond.norm() == pytest.approx(1, abs=1e-4)
    assert identity.landmarks is not None
    assert dict(identity.models) == hash_models([recognition])
    assert hash_extractor_models(preset.models) == dict(identity.models)
    assert set(identity.models) == {"recognition_arcface_ir_se50"}


@pytest.mark.parametrize(("level", "device"), [("24gb", "meta"), ("16gb", "cpu")])
def test_faces_are_read_where_the_memory_level_says(
    level: str, device: str, installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factory.ClipExtractor, "load", lambda *given, **options: given)
    *_, chosen, _ = load_extractor(preset_at(level), torch.device("meta"))
    assert chosen.type == device


def test_open_face_models_keep_the_recognition_of_the_method(tmp_path: Path) -> None:
    opened = resolve_preset("flux", method="infiniteyou", face_pack="open")
    assert opened.models.detector == "yunet"
    assert opened.models.recognition == "arcface-loss"
    assert resolve_preset("flux", face_pack="open").models.recognition == "auraface"


def test_adapter_of_another_kind_is_named(installed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    (folder / "InfuseNetModel").mkdir(parents=True)
    file = folder / "image_proj_model.safetensors"
    save_file({"pulid_encoder.a": torch.ones(1), "pulid_ca.0.b": torch.ones(1)}, file)
    with pytest.raises(WeightsError, match=r"is not InfiniteYou's projection: it is PuLID's"):
        check_models(with_method(flux(), "infiniteyou", file))
