"""W+ Adapter on the miniature: face latents, errors before it is trained, and its benchmark."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from openpulid.bench.methods import check_weights, load_studios, select_presets
from openpulid.bench.suite import load_suite
from openpulid.cli.main import app
from openpulid.errors import IdentityError, PulidError, WeightsError
from openpulid.identity.extractor import FaceLatentExtractor
from openpulid.identity.face_latents import FaceLatentEncoder
from openpulid.identity.identity import Identity
from openpulid.io.checkpoints import save_module
from openpulid.io.image_grid import to_pil, to_tensor
from openpulid.methods.w_plus.encoders import WPlusNetworks
from openpulid.pipelines.factory import load_extractor, load_pipeline
from openpulid.pipelines.loading import load
from openpulid.pipelines.presets import MINIATURE, find_preset, mini
from openpulid.pipelines.selection import with_method
from openpulid.world import Person, Scene, render

WIDTH = 8
ENCODER, ADAPTER = "face-latents.safetensors", "w-plus.safetensors"


def copy_miniature(folder: Path) -> Path:
    """Return a folder with links to the miniature's weights, without W+ Adapter."""
    folder.mkdir()
    for file in MINIATURE.iterdir():
        if file.name not in (ENCODER, ADAPTER):
            (folder / file.name).symlink_to(file)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of weights with an untrained encoder and adapter."""
    folder = copy_miniature(tmp_path_factory.mktemp("weights") / "mini")
    torch.manual_seed(0)
    encoder = FaceLatentEncoder(latent=WIDTH, stem=8, widths=(8, 8, 8), head=4)
    save_module(encoder, folder / ENCODER)
    unet = load_pipeline(mini(), torch.device("cpu")).unet
    save_file(WPlusNetworks.for_unet(unet, WIDTH).state_dict(), folder / ADAPTER)
    return folder


@pytest.fixture(scope="module")
def portrait(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "person.png"
    to_pil(render([Person.from_seed(3)], [Scene()]).image)[0].save(path)
    return path


def test_studio_shows_the_latents_of_a_face(weights: Path, portrait: Path) -> None:
    studio = load(with_method(find_preset(str(weights)), "w-plus"))
    extractor = studio.extractor
    assert isinstance(extractor, FaceLatentExtractor)
    identity = studio.identify([Image.open(portrait)])
    assert identity.id_cond.shape == (1, 1, 18 * WIDTH) and identity.hidden == ()
    assert list(identity.models) == ["face-latents"]
    options = {"seed": 1, "num_inference_steps": 4}
    without = studio.generate("portrait, photo", **options).images[0]
    image = studio.generate("portrait, photo", identity, **options).images[0]
    assert image.tobytes() != without.tobytes()
    (face,) = extractor.detection.detect(to_tensor([Image.open(portrait)])[0])
    (crop,) = extractor.debug_crops(face)
    assert crop.shape == (3, 64, 64) and (crop[:, 0] == 1).all()
    expected = extractor.network(crop[None]).flatten(1)
    torch.testing.assert_close(identity.id_cond[0], expected)


def test_commands_extract_an_identity_that_pulid_refuses(
    weights: Path, portrait: Path, tmp_path: Path
) -> None:
    out = tmp_path / "anna.safetensors"
    models = ["--preset", str(weights), "--method", "w-plus"]
    result = CliRunner().invoke(app, ["identify", str(portrait), "-o", str(out), *models])
    assert result.exit_code == 0, result.output
    identity = Identity.load(out)
    assert identity.id_cond.shape[-1] == 18 * WIDTH
    call = ["generate", "portrait, photo", "--id", str(out), "-o", str(tmp_path), "--steps", "2"]
    result = CliRunner().invoke(app, [*call, "--start", "0", *models])
    assert result.exit_code == 0, result.output
    with pytest.raises(IdentityError, match="face-latents"):
        load(find_preset(str(weights))).generate("portrait, photo", identity)


def test_errors_name_the_command_that_trains_it(
    weights: Path, portrait: Path, tmp_path: Path
) -> None:
    command = "pulid mini build --method w-plus`"
    folder = copy_miniature(tmp_path / "mini")
    preset = with_method(find_preset(str(folder)), "w-plus")
    with pytest.raises(WeightsError, match=command):
        load(preset)
    call = ["identify", str(portrait), "-o", str(tmp_path / "anna.safetensors")]
    result = CliRunner().invoke(app, [*call, "--preset", str(folder), "--method", "w-plus"])
    assert isinstance(result.exception, PulidError)
    assert ENCODER in str(result.exception) and command in str(result.exception)
    (folder / ADAPTER).symlink_to(weights / ADAPTER)  # the encoder is still missing
    with pytest.raises(WeightsError, match=rf"{ENCODER}.*{command}"):
        load_extractor(preset)
    with pytest.raises(WeightsError, match=rf"{ENCODER}.*{command}"):
        check_weights({"w-plus": preset})


def test_benchmark_loads_its_extractor(weights: Path) -> None:
    suite = load_suite("miniature").with_preset(str(weights))
    presets = select_presets(suite, ["pulid", "faceid", "w-plus"])
    check_weights(presets)
    studios = load_studios(suite, presets, "cpu")
    assert isinstance(studios["w-plus"].extractor, FaceLatentExtractor)
    assert studios["faceid"].extractor is studios["pulid"].extractor
    assert studios["pulid"].extractor is not studios["w-plus"].extractor
