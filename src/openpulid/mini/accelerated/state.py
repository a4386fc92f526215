"""State of an accelerated training run, shared by its stages."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from openpulid.mini.accelerated.evaluation import Evaluation
from openpulid.mini.accelerated.output import Output
from openpulid.mini.accelerated.probe import Probe
from openpulid.mini.accelerated.scenes import CaptionWriter
from openpulid.mini.accelerated.steps import OnProgress
from openpulid.mini.accelerated.train_set import TrainSet
from openpulid.mini.accelerated.world import World
from openpulid.mini.models import TextEncoders, save_folder


@dataclass(frozen=True)
class Sizes:
    """Sizes of datasets and batches.

    Attributes:
        people: people who are rendered.
        held_out: people of the evaluation.
        render_batch: images per call of the renderer.
        encode_batch: images per call of the encoders.
        autoencoder_batch: images per step of the autoencoder.
        batch: images per step of base and student.
        rollouts: rollouts of the teacher.
        prompts: prompts of the evaluation.
        adapter_batch: images per step of the adapter's diffusion branch.
        few_step_batch: images per step of the adapter's lightning branch.
        max_steps: maximum number of steps of each training.
    """

    people: int = 75_000
    held_out: int = 1024
    render_batch: int = 512
    encode_batch: int = 1024
    autoencoder_batch: int = 64
    batch: int = 512
    rollouts: int = 32_768
    prompts: int = 512
    adapter_batch: int = 192
    few_step_batch: int = 64
    max_steps: int | None = None


SMALL = Sizes(
    people=8,
    held_out=8,
    render_batch=16,
    encode_batch=16,
    autoencoder_batch=4,
    batch=4,
    rollouts=4,
    prompts=4,
    adapter_batch=4,
    few_step_batch=2,
    max_steps=2,
)
"""Sizes of a dry run on a CPU."""


@dataclass
class RunState:
    """Settings, data and models of a run.

    Attributes:
        device: where to compute.
        out: where to write results.
        weights: the miniature's folder, from which all models are read that are not trained.
        seconds: duration of the run.
        sizes: sizes of datasets and batches.
        stages: names of the stages to run.
        adapter_seconds: part of `seconds` that is reserved for the adapters.
        is_compiled: compile and capture the training steps where the probe succeeded.
        compile_renderer: compile the renderer.
        work_dir: folder of models before they are packed.
        probe: reports what can be compiled and captured.
        unet: the U-Net that is trained: the base, and then the student.
        compiled_unet: the same U-Net, compiled, or None.
        base: frozen base, or None.
        student: frozen student, or None.
        vae: the autoencoder.
    """

    device: torch.device
    out: Output
    weights: Path
    seconds: float
    sizes: Sizes
    stages: tuple[str, ...]
    adapter_seconds: float = 0.0
    is_compiled: bool = True
    compile_renderer: bool = False
    work_dir: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="miniature-")))
    probe: Probe = field(default_factory=lambda: Probe(None, torch.device("cpu")))
    unet: Any = None
    compiled_unet: Any = None
    base: Any = None
    student: Any = None
    vae: Any = None
    tokenizer: Any = field(init=False)
    text_encoders: TextEncoders = field(init=False)
    writer: CaptionWriter = field(init=False)
    generator: torch.Generator = field(init=False)
    world: World = field(init=False)
    held_out: World = field(init=False)
    evaluation: Evaluation = field(init=False)
    data: TrainSet = field(init=False)

    @property
    def seconds_left(self) -> float:
        """Seconds until the end of the run."""
        return self.seconds - self.out.seconds

    @property
    def main_seconds(self) -> float:
        """Seconds of the run without those reserved for the adapters."""
        return self.seconds - self.adapter_seconds

    def is_captured(self, part: str) -> bool:
        """Return whether a step should be captured, see `Probe.works`."""
        return self.is_compiled and self.probe.works(part)

    def load_model(self, cls: Any, *names: str) -> Any:
        """Load a frozen diffusers or transformers model in float32 from a folder of `weights`."""
        model = cls.from_pretrained(
            self.weights.joinpath(*names), torch_dtype=torch.float32, local_files_only=True
        )
        return model.to(self.device).eval().requires_grad_(False)

    def save_model(self, name: str, model: Any, folder: str) -> None:
        """Save a model's folder in bfloat16, and pack it."""
        save_folder(model, self.work_dir / folder)
        self.out.pack(name, [(self.work_dir / folder, folder)])
        self.out.write()

    def progress_logger(self, curve: str, every: int) -> OnProgress:
        """Return a callback that logs the first 20 steps and then every `every` steps."""

        def log_progress(step: int, fraction: float, losses: dict[str, float]) -> None:
            if step % every == 0 or step <= 20:
                self.out.add_point(curve, step=step, share=fraction, **losses)
                self.out.log(f"{curve} {step} ({fraction:.2f}): {losses}")

        return log_progress
