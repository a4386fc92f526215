"""Run the command in this process, with a studio that records its requests."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image

from openpulid.cli import main as cli
from openpulid.errors import PromptError
from openpulid.faces.face import Face
from openpulid.identity.identity import Identity
from openpulid.identity.reference import ReferenceFaces
from openpulid.pipelines.inputs import RequestInputs
from openpulid.pipelines.presets import Preset, mini
from openpulid.pipelines.progress import Callback
from openpulid.pipelines.request import GenerationRequest
from openpulid.pipelines.result import GenerationResult, OnImage


@dataclass
class Output:
    code: int
    out: str
    err: str

    @property
    def is_one_sentence(self) -> bool:
        """Whether the command failed with one sentence on stderr and without a traceback."""
        lines = self.err.strip().splitlines()
        is_error = self.code == 2 and not self.out
        return is_error and len(lines) == 1 and lines[0].startswith("pulid: ")


Run = Callable[..., Output]


@pytest.fixture
def pulid(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command: `pulid("world", "person", ...)`."""

    def run(*arguments: object) -> Output:
        monkeypatch.setattr(sys, "argv", ["pulid", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return Output(code=int(stop.value.code or 0), out=out, err=err)

    return run


class FakeDetection:
    """Detects two faces, the larger one on the right; none in a black image."""

    max_image_size = None
    no_face_hint = "use another preset."
    search_description = "one size"

    def __init__(self) -> None:
        self.count = 0

    def detect(self, image: torch.Tensor) -> list[Face]:
        self.count += 1
        if float(image.max()) == 0:
            return []
        landmarks = torch.zeros(5, 2)
        left = Face(image, torch.tensor([1.0, 1.0, 9.0, 9.0]), landmarks, 0.8)
        right = Face(image, torch.tensor([20.0, 20.0, 60.0, 60.0]), landmarks, 0.9)
        return [right, left]


class FakeExtractor:
    """An extractor whose features are the left side of the face."""

    def __init__(self) -> None:
        self.models = {"vision": "abc"}
        self.detection = FakeDetection()

    def extract(self, faces: Sequence[Face]) -> list[Identity]:
        hidden = tuple(torch.ones(1, 3, 2) for _ in range(5))
        return [Identity(face.box[0] * torch.ones(1, 1, 4), hidden, self.models) for face in faces]

    def debug_crops(self, face: Face) -> list[torch.Tensor]:
        return [face.image]


class FakeStudio:
    """Stands for a loaded studio, and records what it is asked for."""

    def __init__(self) -> None:
        self.requests: list[GenerationRequest] = []
        self.identities: list[Identity | None] = []
        self.masks: list[Image.Image | None] = []
        self.preset = mini()
        self.extractor = FakeExtractor()
        self.stop: BaseException = KeyboardInterrupt()
        self.stop_at: int | None = None

    def load(self, preset: Preset, device: str | None = None) -> FakeStudio:
        self.preset = preset
        return self

    def generate(
        self,
        request: GenerationRequest,
        inputs: RequestInputs,
        on_image: OnImage,
        callback: Callback,
    ) -> GenerationResult:
        if "zebra" in request.prompt:
            raise PromptError("the model does not know 'zebra'.", ["zebra"])
        request = self.preset.resolve(request)
        self.requests.append(request)
        identity = mask = None
        if request.people:
            identity, mask = inputs.people[0].identity, inputs.people[0].mask
            if not isinstance(identity, Identity):
                person = request.people[0]
                reference = ReferenceFaces.detect(self.extractor, identity)
                identity = reference.identity(person.face_index, person.face_order)
        self.identities.append(identity)
        self.masks.append(mask)
        size = (request.width or 32, request.height or 32)
        images = [Image.new("RGB", size, (k, 0, 0)) for k in range(request.num_images)]
        requests = []
        for k, image in enumerate(images):
            if k == self.stop_at:
                raise self.stop
            requests.append(request.for_image(request.seed + k, *image.size))
            on_image(image, requests[-1])
        return GenerationResult(images, requests)


@pytest.fixture
def studio(monkeypatch: pytest.MonkeyPatch) -> FakeStudio:
    fake = FakeStudio()
    monkeypatch.setattr("openpulid.pipelines.loading.load", fake.load)
    monkeypatch.setattr("openpulid.pipelines.factory.check_models", lambda *args: None)
    monkeypatch.setattr(
        "openpulid.pipelines.factory.load_extractor", lambda preset, device: fake.extractor
    )
    return fake


@pytest.fixture
def anna(tmp_path: Path) -> Path:
    path = tmp_path / "anna.png"
    Image.new("RGB", (96, 96), "white").save(path)
    return path
