"""`--faces open`: from an image to a trained adapter and its images, on small networks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from openpulid.cli.main import app
from openpulid.data.face_analysis import FaceAnalyzer
from openpulid.data.models import check_models, load_face_models
from openpulid.data.options import Filters, PrepareOptions
from openpulid.data.records import ImageRecord
from openpulid.errors import OptionError, WeightsError
from openpulid.faces.arcface import build_face_embedder
from openpulid.identity.eva_clip import VisionEncoder
from openpulid.identity.identity import Identity
from openpulid.identity.photo_extractor import PhotoExtractor
from openpulid.identity.reference import ReferenceFaces
from openpulid.io import hub
from openpulid.io.checkpoints import sha256
from openpulid.methods.pulid.encoders import IDEncoder
from openpulid.methods.pulid.sdxl import PuLID
from openpulid.pipelines.factory import defer_extractor, load_extractor
from openpulid.pipelines.loading import load
from openpulid.pipelines.presets import Preset, flux, sdxl, sdxl_v1
from openpulid.pipelines.provenance import Provenance
from openpulid.pipelines.request import GenerationRequest, ModelSelection
from openpulid.pipelines.selection import resolve_preset
from openpulid.pipelines.studio import Studio
from openpulid.training.pulid.models import SDXLModel
from openpulid.training.pulid.photo_models import TrainingModels, hash_bases, load_models
from openpulid.training.pulid.recipes import find_recipe
from openpulid.training.pulid.train_photos import train_on_photos
from tests.support import tiny_sdxl as tiny
from tests.support.photo_networks import NOSE_CELL, recognition_file, selfie_file, yunet_file

CPU = torch.device("cpu")
PIXELS = 64
SMALL = {
    "encoder_width": 16,
    "batch": 2,
    "few_step_batch": 1,
    "warmup": 1,
    "validate_every": 100,
    "pixels": PIXELS,
}
EVA = "EVA02_CLIP_L_336_psz14_s6B"


def tiny_vision_encoder(*_: Any) -> VisionEncoder:
    torch.manual_seed(0)
    return VisionEncoder(
        img_size=32, patch_size=8, embed_dim=8, depth=5, num_heads=2, num_classes=4, ref_grid=None
    ).eval()


class SmallRecognition(nn.Module):
    """Embeddings (B, 512) of crops (B, 3, 112, 112), as of the network of the ID loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.AvgPool2d(16), nn.Flatten(), nn.Linear(3 * 49, 512))

    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        return self.layers(crops)


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A weights folder with a small network for every file of the open stack, and antelopev2's."""
    folder = tmp_path / "weights"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv(hub.FOLDER_VARIABLE, str(folder))
    monkeypatch.setattr(VisionEncoder, "from_published", tiny_vision_encoder)
    yunet_file(folder / hub.WEIGHTS["yunet"].file)
    auraface = recognition_file(folder / "auraface" / "glintr100.onnx", dim=12)
    monkeypatch.setitem(hub.SHA256, "auraface", sha256(auraface))
    selfie_file(folder / "selfie-multiclass" / hub.WEIGHTS["selfie-multiclass"].file)
    antelopev2 = recognition_file(folder / "glintr100.onnx", dim=13)
    monkeypatch.setitem(hub.SHA256, "arcface", sha256(antelopev2))
    (folder / f"{EVA}.pt").write_bytes(b"a vision encoder")
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two images with captions, in which the small detector sees a face around a red square."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("anna", "ben"):
        pixels = rng.integers(40, 200, (640, 480, 3)).astype(np.uint8)
        start = 8 * NOSE_CELL
        pixels[start : start + NOSE_CELL, start : start + NOSE_CELL] = (255, 0, 0)
        Image.fromarray(pixels).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("portrait of a person")
    return folder


def open_sdxl() -> Preset:
    return resolve_preset(sdxl(), face_pack="open")


@pytest.mark.parametrize("preset", [sdxl, sdxl_v1, flux])
def test_open_replaces_all_face_models_that_forbid_commercial_use(preset: Any) -> None:
    changed = resolve_preset(preset(), face_pack="open")
    models = changed.models
    assert (models.detector, models.recognition) == ("yunet", "auraface")
    assert models.face_parsing == "selfie-multiclass"
    assert changed.selection.face_pack == "open"
    faces = (models.detector, models.recognition, models.face_parsing, models.vision_encoder)
    assert all(hub.WEIGHTS[name].commercial for name in faces)
    without_recognition = resolve_preset(sdxl(), method="ip-adapter", face_pack="open")
    assert without_recognition.models.detector == "yunet"
    assert without_recognition.models.recognition is None
    with pytest.raises(OptionError, match="uses its own face models; face_pack is only"):
        resolve_preset("mini", face_pack="open")


def test_images_store_the_name_and_restore_it() -> None:
    selection = ModelSelection(preset="sdxl", face_pack="open")
    provenance = Provenance.create(GenerationRequest("portrait", model=selection), {})
    assert provenance.request.model == selection
    assert "model.face_pack" not in provenance.required_files()


def test_files_of_one_name_are_told_apart_by_hash(weights: Path) -> None:
    assert hub.locate("auraface") == weights / "auraface" / "glintr100.onnx"
    assert hub.locate("arcface") == weights / "glintr100.onnx"
    (weights / "glintr100.onnx").replace(weights / "auraface" / "glintr100.onnx")
    with pytest.raises(
        WeightsError,
        match=r"glintr100.onnx is not installed \(.*glintr100.onnx is the file of arcface\); "
        r"`pulid weights get auraface` .* put it into a folder auraface in a folder and set",
    ):
        hub.locate("auraface")
    with pytest.raises(WeightsError, match="`pulid weights get arcface`"):
        hub.locate("arcface")


def test_file_in_the_cache_of_the_hub_is_not_read(weights: Path, tmp_path: Path) -> None:
    """Its link leads to a file that is called by the hash."""
    blob = tmp_path / hub.SHA256["auraface"]
    blob.write_bytes(b"large")
    (tmp_path / "glintr100.onnx").symlink_to(blob)
    assert hub.identify_file(tmp_path / "glintr100.onnx") == "auraface"
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "glintr100.onnx").write_bytes(b"large")
    assert hub.identify_file(tmp_path / "copy" / "glintr100.onnx") is None


def test_download_does_not_replace_the_file_of_the_same_name(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (weights / "auraface" / "glintr100.onnx").unlink()
    targets = []
    monkeypatch.setattr(hub, "_check_connection", lambda entry: [])
    monkeypatch.setattr(hub, "_download", lambda *args: targets.append(args[2]))
    hub.download("auraface", weights, log=lambda text: None)
    hub.download("pulid-v1", weights, log=lambda text: None)
    assert targets == [weights / "auraface", weights]


def test_missing_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv(hub.FOLDER_VARIABLE, raising=False)
    command = "`pulid weights get yunet auraface eva selfie-multiclass` downloads them"
    with pytest.raises(WeightsError, match=command):
        load_extractor(open_sdxl(), CPU)
    with pytest.raises(WeightsError, match=r"selfie-multiclass .*arcface-loss"):
        load_models(find_recipe("sdxl_stage2"), CPU, faces=Path("open"))


def test_base_is_known_by_its_files(tmp_path: Path) -> None:
    """A run continues after its base has moved, and not with another one in its place."""
    for name in ("first", "moved"):
        (tmp_path / name / "unet").mkdir(parents=True)
        (tmp_path / name / "unet" / "model.safetensors").write_bytes(b"weights")
    first, moved = (hash_bases([sdxl(tmp_path / name)]) for name in ("first", "moved"))
    assert first == moved != ""
    (tmp_path / "moved" / "unet" / "model.safetensors").write_bytes(b"others")
    assert hash_bases([sdxl(tmp_path / "moved")]) != first


def test_whole_path(weights: Path, photos: Path, tmp_path: Path) -> None:
    """Detect, align, parse, embed, train two steps, and generate with the trained adapter."""
    extractor = load_extractor(open_sdxl(), CPU)
    assert isinstance(extractor, PhotoExtractor)
    assert list(extractor.models) == ["auraface", EVA]
    references = ReferenceFaces.detect(extractor, photos / "anna.png")
    (face,) = references.images[0].faces
    nose = torch.tensor([8.5 * NOSE_CELL, 8.5 * NOSE_CELL])
    torch.testing.assert_close(face.landmarks[2], nose, atol=0.1, rtol=0)
    crop, gray = extractor.debug_crops(face)
    assert crop.shape == gray.shape == (3, 512, 512)
    # the red nose is skin to the parser; what it does not keep is white
    assert gray.amax() == 1 and (gray[:, 300:330, 250:265] < 0.5).all()
    identity = references.identity()
    assert identity.id_cond.shape == (1, 1, 12 + 4)

    base = SDXLModel(tiny.pipe())
    base.unet.register_to_config(sample_size=PIXELS // base.pipe.vae_scale_factor)
    embedder = build_face_embedder(extractor.detection.detector, SmallRecognition().eval())
    models = TrainingModels(base, extractor, [base], embedder)
    begin = None
    for name in ("sdxl_stage1", "sdxl_stage2"):
        recipe = replace(find_recipe(name), steps=2, **SMALL)
        run_dir = tmp_path / name
        run_dir.mkdir()
        _, result = train_on_photos(recipe, models, photos, run_dir, init_adapter=begin)
        assert result.steps == 2 and np.isfinite(list(result.losses.values())).all()
        begin = run_dir / "adapter.safetensors"

    adapter = PuLID.load(begin)
    assert adapter.models == extractor.models
    for layer in adapter.id_adapter_attn_layers.values():
        nn.init.normal_(layer.id_to_v.weight)  # two steps do not change a pixel of 8 bits
    pipe = tiny.pipe()
    pipe.set_progress_bar_config(disable=True)
    preset = open_sdxl().with_models(use_half_precision=False)
    preset = preset.with_defaults(
        num_inference_steps=2, guidance_scale=2.0, width=16, height=16, negative_prompt=""
    )
    studio = Studio(pipe, adapter, defer_extractor(preset, CPU, adapter), preset)
    image = studio.generate("portrait", photos / "anna.png", seed=1).images[0]
    again = studio.generate("portrait", identity, seed=1).images[0]
    other = studio.generate("portrait", photos / "ben.png", seed=1).images[0]
    assert image.tobytes() == again.tobytes() != other.tobytes()

    # it asks for the same face models
    with pytest.raises(
        OptionError, match=rf"trained with {EVA} and auraface, .*pass --faces open, as in training"
    ):
        adapter.require({"glintr100": "antelopev2's", EVA: extractor.models[EVA]})


def test_published_adapters_refuse_other_packs(weights: Path, tmp_path: Path) -> None:
    adapter = PuLID.for_unet(tiny.pipe().unet, IDEncoder(16, 32, vit_dim=8, hidden_dim=16))
    published = PuLID.load(adapter.save(tmp_path / "published.safetensors"))
    sentence = (
        "this adapter was trained with antelopev2, whose embeddings differ from those of {}; "
        "leave out --faces, or pass an adapter that was trained with these face models."
    )
    pack = tmp_path / "pack"  # the same model in a pack of the user's
    recognition_file(pack / "glintr100.onnx", dim=12)
    yunet_file(pack / "detector.onnx")
    for preset in (open_sdxl(), resolve_preset(sdxl(), face_pack=pack)):
        preset = preset.with_models(face_parsing="selfie-multiclass")
        for function in (load_extractor, defer_extractor):
            with pytest.raises(OptionError) as error:
                function(preset, CPU, published)
            assert str(error.value) == sentence.format(f"{EVA} and auraface")
    with pytest.raises(OptionError) as error:
        published.require({"w600k_r50": "buffalo_l's", EVA: "a"})
    assert str(error.value) == sentence.format(f"{EVA} and w600k_r50")
    models = {"glintr100": "antelopev2's", EVA: "a"}
    published.require(models)
    trained = PuLID.load(
        adapter.save(tmp_path / "trained.safetensors", {"models": json.dumps(models)})
    )
    with pytest.raises(OptionError, match=r"pass the insightface pack used in training \(--faces"):
        trained.require({"auraface": "b", EVA: "a"})


@pytest.mark.parametrize(
    ("arguments", "adapter"),
    [
        (["--preset", "sdxl"], "pulid-v1.1"),
        (["--preset", "flux"], "pulid-flux-v0.9.1"),
        (["--preset", "sdxl", "--method", "faceid"], "faceid"),
    ],
)
def test_command_refuses_before_a_download(
    arguments: list[str], adapter: str, photos: Path, tmp_path: Path
) -> None:
    """Nothing is installed, and nothing needs to be."""
    image = str(photos / "anna.png")
    command = ["generate", "portrait", "--id", image, "-o", str(tmp_path / "out"), *arguments]
    result = CliRunner().invoke(app, [*command, "--faces", "open"])
    assert isinstance(result.exception, OptionError)
    assert str(result.exception) == (
        f"{adapter} was not trained with AuraFace, whose embeddings differ; leave out --faces, or "
        "pass an adapter that was trained with it."
    )


def test_command_extracts_an_identity(weights: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "anna.safetensors"
    command = ["identify", str(photos / "anna.png"), "--preset", "sdxl", "--faces", "open"]
    result = CliRunner().invoke(app, [*command, "--device", "cpu", "-o", str(out)])
    assert result.exit_code == 0, result.stderr
    assert list(Identity.load(out).models) == ["auraface", EVA]


def test_other_methods_refuse_auraface(weights: Path) -> None:
    (weights / hub.WEIGHTS["faceid"].file).write_bytes(b"an adapter")
    preset = resolve_preset(sdxl(), method="faceid", face_pack="open")
    with pytest.raises(OptionError, match="only PuLID can be trained with AuraFace"):
        defer_extractor(preset, CPU, object())


def test_nothing_is_loaded_for_a_wrong_name() -> None:
    with pytest.raises(WeightsError, match="opne is no insightface pack"):
        load("sdxl", face_pack="opne")


def test_datasets_are_prepared_with_the_open_models(weights: Path, photos: Path) -> None:
    options = PrepareOptions(faces="open", filters=Filters(min_face=64, max_occlusion=1))
    hashes = check_models(options, needs_captioner=False)
    assert set(hashes) == {"face_detection_yunet_2026may", "auraface", "model"}
    analyzer = FaceAnalyzer(load_face_models(options, "cpu"), options.filters)
    record = ImageRecord("anna.png", "0")
    analyzer.analyze(record, Image.open(photos / "anna.png"))
    assert record.is_kept and len(record.embedding) == 12
