"""Train the miniature on one accelerator, from rendering to adapters, in a given number of seconds.

    python -m openpulid.mini.accelerated --device cuda --seconds 450 -o OUT

Every stage writes its results to OUT at once. A stage that fails is reported, and the stages after it use
the weights that the package has, so that one error does not cost the whole run.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerFast

from openpulid.diffusion.patch_vae import PatchAutoencoderKL
from openpulid.io.image_grid import image_grid, to_pil
from openpulid.mini.accelerated import autoencoder, unet
from openpulid.mini.accelerated.adapter import train_stages
from openpulid.mini.accelerated.evaluation import Evaluation
from openpulid.mini.accelerated.output import Output
from openpulid.mini.accelerated.probe import Probe
from openpulid.mini.accelerated.scenes import CaptionWriter
from openpulid.mini.accelerated.steps import Average
from openpulid.mini.accelerated.world import plan_world, render_world
from openpulid.mini.models.pipeline import TextEncoders, save_folder
from openpulid.mini.train.distill import STUDENT_TIMESTEPS
from openpulid.pipelines.presets import MINIATURE

STAGES = ("autoencoder", "base", "student", "stage1", "stage2", "stage3")
FIRST = "autoencoder,base,student"
SCENES, PORTRAITS = 4, 2
"""Images per person: in any scene, and in studio light with nothing on the head."""


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    people: int = 75_000
    held_out: int = 1024
    render_batch: int = 512
    encode_batch: int = 1024
    autoencoder_batch: int = 64
    batch: int = 512
    rollouts: int = 32_768
    prompts: int = 512
    adapter_batch: int = 192
    fast_batch: int = 64
    most: int | None = None  # steps of each training


SMALL = Sizes(
    people=8, held_out=8, render_batch=16, encode_batch=16, autoencoder_batch=4, batch=4, rollouts=4, prompts=4,
    adapter_batch=4, fast_batch=2, most=2,
)  # fmt: skip
"""A dry run through the same code on a CPU."""


@dataclass
class Run:
    """What the stages share.

    Attributes:
        weights: the miniature that stages read what they do not train from.
        seconds: of the whole run; adapter_seconds: of them, those kept for the adapters.
    """

    device: torch.device
    out: Output
    weights: Path
    seconds: float
    sizes: Sizes
    stages: tuple[str, ...]
    adapter_seconds: float = 0.0
    compile: bool = True
    compile_renderer: bool = False
    work: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="miniature-")))
    network: Any = None
    probe: Probe = field(default_factory=lambda: Probe(None, torch.device("cpu")))
    model: Any = None  # the U-Net that trains
    base: Any = None
    student: Any = None
    vae: Any = None

    @property
    def left(self) -> float:
        return self.seconds - self.out.seconds

    @property
    def main(self) -> float:
        """Seconds for everything but the adapters."""
        return self.seconds - self.adapter_seconds

    # -- what is read --

    def folder(self, cls: Any, *names: str) -> Any:
        """Load a model of diffusers or transformers in float32, frozen."""
        known = {"torch_dtype": torch.float32, "local_files_only": True}
        return (
            cls.from_pretrained(self.weights.joinpath(*names), **known)
            .to(self.device)
            .eval()
            .requires_grad_(False)
        )

    # -- stages --

    def prepare(self) -> None:
        """Load the text encoders, render the world."""
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(
            self.weights / "pipeline" / "tokenizer", local_files_only=True
        )
        first = self.folder(CLIPTextModel, "pipeline", "text_encoder")
        second = self.folder(CLIPTextModelWithProjection, "pipeline", "text_encoder_2")
        self.words = TextEncoders(first, second).to(self.device)
        if (
            self.device.type == "cuda"
            and self.compile
            and {"autoencoder", "base"} & set(self.stages)
        ):
            widths = self.words.width, second.config.projection_dim
            batches = self.sizes.autoencoder_batch, self.sizes.batch
            self.probe = Probe(self.work, self.device, widths, batches)
        self.writer = CaptionWriter(self.tokenizer, self.device)
        self.generator = torch.Generator(self.device).manual_seed(11)
        held_out = torch.Generator(self.device).manual_seed(1_000_003)
        people, scenes = plan_world(self.sizes.people, SCENES, PORTRAITS, self.generator)
        known: dict[str, Any] = {"batch": self.sizes.render_batch, "say": self.out.say}
        known["compiled"] = self.compile_renderer
        strangers = plan_world(self.sizes.held_out, 1, 0, held_out, held_out=True)
        self.held_out = render_world(*strangers, 1, **known)
        self.world = render_world(
            people, scenes, SCENES + PORTRAITS, seconds=0.16 * self.main, **known
        )
        self.out.sheet("world", sheet(self.world.images[:32].float() / 255))
        self.out.figures(
            "world", {"images": len(self.world), "people": len(self.world) // self.world.per_person}
        )
        self.evaluation = Evaluation(
            self.weights, self.words, self.tokenizer, self.held_out, self.sizes.prompts
        )
        self.vae = self.folder(PatchAutoencoderKL, "pipeline", "vae").to(
            memory_format=torch.channels_last
        )

    def shipped(self) -> None:
        """Evaluate the base that the weights hold, for comparison; skipped where it is not there."""
        if not (self.weights / "pipeline" / "unet" / "config.json").exists():
            return
        network = self.folder(UNet2DConditionModel, "pipeline", "unet").to(
            memory_format=torch.channels_last
        )
        self.out.figures("shipped autoencoder", autoencoder.figures(self.vae, self.held_out))
        images = self.evaluation.images(network, self.vae, self.sizes.prompts)
        self.out.figures("shipped base", self.evaluation.figures(images))
        self.base = network

    def autoencoder(self) -> None:
        """Train the autoencoder from nothing."""
        vae = autoencoder.build(self.world)
        steps = autoencoder.fit(
            vae, self.world, 0.12 * self.main, batch=self.sizes.autoencoder_batch, most=self.sizes.most,
            captured=self.compile and self.probe.works("autoencoder"), watch=self._watch("autoencoder", 500),
        )  # fmt: skip
        autoencoder.standardize(vae, self.world)
        figures = {"steps": steps, "images": steps * self.sizes.autoencoder_batch}
        self.out.figures("autoencoder", figures | dict(autoencoder.figures(vae, self.held_out)))
        self.vae = vae
        self._keep("vae", vae, "pipeline/vae")
        own = self.held_out.images[:16].float() / 255
        back = autoencoder.decode(vae, autoencoder.encode(vae, own))
        self.out.sheet(
            "autoencoder: held-out images, then what comes back", sheet(torch.cat([own, back]))
        )

    def encode(self) -> None:
        """Encode all images and captions."""
        self.data = unet.prepare(
            self.vae,
            self.words,
            self.writer,
            self.world,
            self.generator,
            batch=self.sizes.encode_batch,
        )
        self.out.say(f"{len(self.data.latents)} latents")

    def train_base(self) -> None:
        """Train the base from nothing."""
        model = unet.fresh_unet(self.data, self.words)
        if self.probe.works("captured"):
            self.probe.wait(20.0)  # it has still to compile
        self.out.say(f"probe: {self.probe.status}")
        pays = self.compile and self.probe.pays("compiled", "captured")
        network = torch.compile(model, dynamic=False) if pays else None
        captured = self.compile and self.probe.works("captured")
        marks = [0.25, 0.5, 0.7, 0.85]

        def look(step: int, share: float, losses: dict[str, float], average: Average) -> None:
            self._watch("base", 100)(step, share, losses)
            if marks and share >= marks[0]:
                mark = marks.pop(0)
                with average.in_place():
                    model.eval()
                    attempt(self.out, lambda: self._checkpoint(model, step, share))
                    if mark == 0.7:  # for the case that nothing comes after it
                        attempt(self.out, lambda: self._keep("base", model, "pipeline/unet"))
                model.train()

        student = 0.145 if "student" in self.stages else 0.0
        seconds = self.left - self.adapter_seconds - (student + 0.045) * self.main
        steps, self.network = unet.fit_base(
            model, self.data, max(1.0, seconds), network=network, captured=captured, batch=self.sizes.batch,
            most=self.sizes.most, watch=look, say=self.out.say,
        )  # fmt: skip
        self.model, self.base = model, unet.frozen_copy(model)
        self._keep("base", model, "pipeline/unet")
        images = self.evaluation.images(model, self.vae, self.sizes.prompts)
        facts = {
            "steps": steps,
            "seen": steps * self.sizes.batch,
            "parameters": model.num_parameters(),
        }
        self.out.figures("base", facts | self.evaluation.figures(images))
        self.out.sheet("base", sheet(images[:48]))

    def train_student(self) -> None:
        """Train the student from the base."""
        if self.model is None:
            self.model, self.network = unet.frozen_copy(self.base), None
        rest = self.adapter_seconds + 0.02 * self.main
        plain = self.network is None or self.network is self.model
        captured = self.compile and self.probe.works("captured" if plain else "student")
        steps = unet.fit_student(
            self.model, self.data, max(1.0, self.left - rest), network=self.network, captured=captured,
            count=self.sizes.rollouts, batch=self.sizes.batch, most=self.sizes.most,
            watch=self._watch("student", 100), say=self.out.say,
        )  # fmt: skip
        self._keep("student", self.model, "lightning")
        images = self.evaluation.images(
            self.model, self.vae, self.sizes.prompts, STUDENT_TIMESTEPS, 1.0, 1
        )
        facts = {"steps": steps, "seen": steps * self.sizes.batch}
        self.out.figures("student", facts | self.evaluation.figures(images))
        self.out.sheet("student", sheet(images[:48]))
        self.student = unet.frozen_copy(self.model)

    def adapters(self) -> None:
        """Train the adapter's stages with the time that is left."""
        if self.student is None:
            self.student = self.folder(UNet2DConditionModel, "lightning").to(
                memory_format=torch.channels_last
            )
        train_stages(self)

    # -- parts --

    def _checkpoint(self, model: Any, step: int, share: float) -> None:
        images = self.evaluation.images(model, self.vae, min(256, self.sizes.prompts))
        found = self.evaluation.figures(images)
        each = found.pop("each")
        self.out.point("base checkpoints", step=step, share=share, **found)
        self.out.say(
            f"base at {share:.2f}: {found} expression {each['expression']} pose {each['pose']}"
        )

    def _watch(self, curve: str, every: int) -> unet.Watch:
        def watch(step: int, share: float, losses: dict[str, float]) -> None:
            if step % every == 0 or step <= 20:
                self.out.point(curve, step=step, share=share, **losses)
                self.out.say(f"{curve} {step} ({share:.2f}): {losses}")

        return watch

    def _keep(self, name: str, model: Any, place: str) -> None:
        """Write a model's folder, in bfloat16, and its archive."""
        save_folder(model, self.work / place)
        self.out.pack(name, [(self.work / place, place)])
        self.out.write()


def sheet(images: Tensor, size: int = 144) -> Any:
    """Lay out images (B, 3, H, W) in [0, 1], eight per row."""
    pictures = to_pil(images.float().cpu())
    return image_grid([pictures[start : start + 8] for start in range(0, len(pictures), 8)], size)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--seconds", type=float, default=450.0, help="of the whole run, everything included"
    )
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument(
        "--weights", type=Path, default=MINIATURE, help="what is not trained is read from here"
    )
    parser.add_argument("--stages", default=FIRST, help=f"of {', '.join(STAGES)}, in this order")
    parser.add_argument(
        "--adapter-seconds", type=float, default=0.0, help="of them, kept for stage1 to stage3"
    )
    parser.add_argument("--people", type=int, help="how many are rendered, six images each")
    parser.add_argument("--small", action="store_true", help="tiny sizes: a dry run on a CPU")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument(
        "--compile-renderer", action="store_true", help="saves a minute above 500,000 images"
    )
    given = parser.parse_args(arguments)
    sizes = SMALL if given.small else Sizes()
    if given.people:
        sizes = Sizes(**{**vars(sizes), "people": given.people})
    device = torch.device(given.device)
    torch.manual_seed(5)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    stages = tuple(name for name in STAGES if name in given.stages.split(","))
    train(
        Run(
            device,
            Output(given.out),
            given.weights,
            given.seconds,
            sizes,
            stages,
            given.adapter_seconds,
            not given.no_compile,
            given.compile_renderer,
        )
    )


def train(run: Run) -> None:
    """Run the stages in order; a failed one is reported and the next one tried."""
    out = run.out
    out.say(
        f"{run.device}, torch {torch.__version__}, {os.cpu_count()} cores; stages {', '.join(run.stages)}"
    )
    if run.device.type == "cuda":
        out.say(torch.cuda.get_device_name(run.device))
    try:
        run.prepare()
        attempt(out, run.shipped)
        if "autoencoder" in run.stages:
            attempt(out, run.autoencoder)
        run.encode()
        if "base" in run.stages and not attempt(out, run.train_base) and run.left > 0.3 * run.main:
            run.compile = False  # once again, the slow way
            attempt(out, run.train_base)
        if "student" in run.stages and ("base" not in run.stages or run.model is not None):
            attempt(out, run.train_student)
        if any(name.startswith("stage") for name in run.stages) and run.left > 0.08 * run.seconds:
            attempt(out, run.adapters)
    finally:
        run.probe.stop()
        out.report["probe"] = run.probe.status
        if run.device.type == "cuda":
            out.say(f"largest memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
        out.say("done")
        out.write()


def attempt(out: Output, stage: Callable[[], object]) -> bool:
    """Run a stage; report an error instead of raising it. Return whether it succeeded."""
    try:
        stage()
    except Exception:
        out.say(
            f"{getattr(stage, '__name__', 'a stage')} failed:\n{traceback.format_exc()[-3000:]}"
        )
        out.write()
        return False
    return True


if __name__ == "__main__":
    main()
