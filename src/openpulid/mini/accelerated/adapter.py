"""Train PuLID's three stages on the device, on the rendered world and with two face recognition models in the ID loss."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from openpulid.diffusion.noise_schedule import NoiseSchedule
from openpulid.faces.align import (
    TEMPLATE,
    align_faces,
    mask_background,
    similarity_transform,
    warp_images,
)
from openpulid.faces.embed import FaceEmbeddings
from openpulid.faces.mini_detector import MiniFaceDetector
from openpulid.faces.mini_recognition import CROP, RECOGNITION_MODELS
from openpulid.identity.extractor import MiniExtractor
from openpulid.io.checkpoints import load_module
from openpulid.io.image_grid import image_grid, to_pil
from openpulid.methods.pulid.sdxl import PuLID
from openpulid.mini.accelerated.autoencoder import decode
from openpulid.mini.accelerated.evaluation import detect, embed
from openpulid.mini.accelerated.scenes import COLUMNS, JITTER, Scenes, stage_of
from openpulid.mini.accelerated.steps import Average, DeviceMuon, TimedSchedule
from openpulid.mini.accelerated.unet import TrainSet, for_guidance, rollout, time_ids
from openpulid.mini.accelerated.world import World
from openpulid.mini.data.augment import augment, color_jitter, compose_affine, dilate, random_affine
from openpulid.mini.data.captions import token_ids
from openpulid.mini.evaluation.evaluate import sample_prompts
from openpulid.mini.models.pipeline import build_pipeline
from openpulid.mini.train.pulid import WORN, fresh_adapter
from openpulid.training.precision import fp32_attention
from openpulid.training.pulid.export import save_adapter
from openpulid.training.pulid.models import SDXLModel, TextConditioning
from openpulid.training.pulid.recipes import Recipe, find_recipe
from openpulid.training.pulid.task import Batch, PuLIDTask
from openpulid.training.rng import StepRNG
from openpulid.training.trainer import TrainingResult, microlosses
from openpulid.world import ATTRIBUTES, HELD_OUT_PEOPLE, Person, Scene
from openpulid.world.render import render_stage

SHARES = {"stage1": 0.3, "stage2": 0.3, "stage3": 0.4}
"""Of the time that is left, per stage."""


class TableSchedule(NoiseSchedule):
    """`NoiseSchedule` with its tables on the device: a step does not wait for the CPU."""

    def __init__(self, alphas: Tensor, prediction: str, device: torch.device) -> None:
        super().__init__(alphas, prediction)
        self.signal, self.sigma = (
            self.alphas.sqrt().float().to(device),
            (1 - self.alphas).sqrt().float().to(device),
        )
        self.ratio = (self.alphas / (1 - self.alphas)).float().to(device)
        self.logs = self._sigmas().log().to(device)

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, *[1] * (like.ndim - 1))
        return self.signal[t].view(shape), self.sigma[t].view(shape)

    def time(self, sigma: Tensor) -> Tensor:
        wanted = sigma.detach().to(self.logs).log().clamp(self.logs[0], self.logs[-1])
        above = torch.searchsorted(self.logs, wanted).clamp(min=1)
        low, high = self.logs[above - 1], self.logs[above]
        return above - 1 + (wanted - low) / (high - low)

    def snr(self, t: Tensor) -> Tensor:
        return self.ratio[t]


class DeviceBase(SDXLModel):
    """A base whose prompts are numbers of captions in a `TrainSet`, read by the text encoders beforehand."""

    def __init__(self, pipe: Any, data: TrainSet) -> None:
        super().__init__(pipe)
        self.data = data
        self.schedule = TableSchedule(
            pipe.scheduler.alphas_cumprod, pipe.scheduler.config.prediction_type, self.device
        )

    def encode_text(
        self, prompts: Any, *, pixels: int | None = None, guided: bool = False
    ) -> TextConditioning:
        """Return the text of captions: number = row * captions per image + variant."""
        numbers = torch.stack(list(prompts))
        variants = self.data.tokens.shape[1]
        text = self.data.text(numbers // variants, numbers % variants)
        return for_guidance(text) if guided else text


class DevicePortraits:
    """Images, captions, and the features of a portrait of the same person: a `training.task.Source`.

    Args:
        portraits: the last so many images of each person are portraits; features are of another one of them.
        batch: images per step.
    """

    def __init__(
        self, world: World, data: TrainSet, extractor: MiniExtractor, portraits: int, batch: int
    ) -> None:
        self.world, self.data, self.extractor, self.size = world, data, extractor, batch
        self.portraits = portraits
        columns = [
            world.scenes.attributes[:, COLUMNS[name]] != ATTRIBUTES[name].index("none")
            for name in WORN
        ]
        self.worn = torch.stack(columns).any(0)

    @torch.no_grad()
    def batch(self, draw: StepRNG) -> Batch:
        device, each = self.data.latents.device, self.world.per_person
        rows = draw.randint(len(self.data.latents), (self.size,), "rows").to(device)
        mates = rows // each * each + each - self.portraits
        mates = mates + draw.randint(self.portraits, (self.size,), "mates").to(device)
        again = mates == rows  # the other portrait, not the image itself
        first = rows // each * each + each - self.portraits
        mates = torch.where(again, first + (mates - first + 1) % self.portraits, mates)
        variants = draw.randint(self.data.tokens.shape[1], (self.size,), "variants").to(device)
        id_cond, hidden = self.extractor.features(*self.world.rows(mates))
        wanted = torch.where(self.worn[rows], rows, mates)
        images, _, _ = self.world.rows(wanted)
        landmarks = self.world.landmarks[rows] / self.world.images.shape[-1]
        latents, faces = self.data.latents[rows].float(), self.data.faces[rows].float()
        numbers: Any = list(
            (rows * self.data.tokens.shape[1] + variants).unbind()
        )  # tensors in place of prompts
        return Batch(
            latents, faces, numbers, id_cond, [level.float() for level in hidden], images, landmarks
        )


class SeveralEmbedders:
    """Several face recognition models as one for the ID loss: the cosine of its embeddings is the mean of theirs.

    Images with gradient are damaged at random before each model looks: a texture that deceives one model in
    one crop is worth nothing in the next.
    """

    def __init__(
        self, detector: MiniFaceDetector, models: Sequence[nn.Module], seed: int = 0
    ) -> None:
        self.detector, self.models = (
            detector,
            [model.eval().requires_grad_(False) for model in models],
        )
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, images: Tensor) -> FaceEmbeddings:
        """(B, 3, 96, 96), clamped to [0, 1]."""
        images = images.clamp(0, 1)
        faces = detect(self.detector, images.detach())
        embeddings = []
        for model in self.models:
            if torch.is_grad_enabled():
                crops = self._damaged(images, faces.masks, faces.landmarks)
            else:
                crops = align_faces(images, faces.masks, faces.landmarks, CROP)
            embeddings.append(normalize(model(crops).float(), dim=-1))
        joined = torch.cat(embeddings, 1)
        return FaceEmbeddings(
            faces.found, torch.where(faces.found[:, None], joined, 0.0), faces.masks
        )

    def _damaged(self, images: Tensor, masks: Tensor, landmarks: Tensor) -> Tensor:
        generator = self.generator
        with torch.autocast(images.device.type, enabled=False):
            jitter = random_affine(len(images), CROP, generator, turn=0.10, grow=0.08, shift=0.03)
            matrix = compose_affine(similarity_transform(landmarks, TEMPLATE * CROP), jitter)
            crops = warp_images(torch.cat([images, masks], 1), matrix, CROP)
            faces = augment(
                color_jitter(crops[:, :3], generator, strength=0.6, gray=0.2), generator
            )
            return mask_background(faces, dilate(crops[:, 3:], generator))


def recipe_of(name: str, batch: int, fast_batch: int) -> Recipe:
    """Return the miniature's recipe for larger batches."""
    recipe = find_recipe(f"mini_{name}")
    return replace(recipe, batch=batch, fast_batch=fast_batch if recipe.fast_batch else 0)


def train_stages(run: Any) -> None:
    """Train the stages that the run names, one on top of the other, and write each of them."""
    chosen = [name for name in SHARES if name in run.stages]
    weights: Path = run.weights
    device = run.device
    detector = run.evaluation.detector
    finder, encoder, vision = (
        weights / f"{name}.safetensors"
        for name in ("detector", "recognition-encoder", "vision-encoder")
    )
    extractor = MiniExtractor.load(finder, encoder, vision, device)
    files = {name: weights / f"recognition-{name}.safetensors" for name in ("loss", "encoder")}
    models = [load_module(RECOGNITION_MODELS[name], file, device) for name, file in files.items()]
    pipes = [
        build_pipeline(unet, run.vae, run.words, run.tokenizer) for unet in (run.base, run.student)
    ]
    base, student = (DeviceBase(pipe, run.data) for pipe in pipes)
    torch.manual_seed(21)
    adapter = fresh_adapter(pipes[0], extractor, find_recipe("mini_stage1")).to(device)
    subjects = Subjects(run, extractor)
    total = sum(SHARES[name] for name in chosen)
    for index, name in enumerate(chosen):
        recipe = recipe_of(name, run.sizes.adapter_batch, run.sizes.fast_batch)
        if recipe.fast_batch:
            recipe = replace(recipe, batch=max(2, recipe.batch // 2))
        if index == 0 and recipe.begin:
            begun = weights / f"pulid-{recipe.begin.removeprefix('mini_')}.safetensors"
            adapter.load_state_dict(PuLID.load(begun).state_dict())
        source = DevicePortraits(run.world, run.data, extractor, 2, recipe.batch)
        more: dict[str, Any] = (
            {"fast": [student], "faces": SeveralEmbedders(detector, models)}
            if recipe.fast_batch
            else {}
        )
        task = PuLIDTask(recipe, base, adapter, source, **more)
        seconds = max(1.0, (run.left - 0.03 * run.seconds) * SHARES[name] / total)
        total -= SHARES[name]
        steps = fit(task, recipe, adapter, seconds, run, name)
        path = run.work / f"pulid-{name}.safetensors"
        _save(adapter, path, recipe, steps)
        made = sorted(run.work.glob("pulid-*.safetensors"))
        run.out.pack("adapters", [(file, file.name) for file in made])
        run.out.figures(
            name,
            {"steps": steps, "batch": recipe.batch, **subjects.figures(adapter, pipes[0], name)},
        )


def fit(
    task: PuLIDTask, recipe: Recipe, adapter: PuLID, seconds: float, run: Any, name: str
) -> int:
    """Train for so many seconds; afterwards the adapter holds its averaged weights. Return the steps."""
    device = run.device
    adapter.train()
    optimizer = DeviceMuon(adapter.parameters(), weight_decay=recipe.weight_decay)
    average = Average(adapter, 0.99)
    schedule = TimedSchedule(seconds, recipe.lr, recipe.warmup, max(0.5, recipe.decay))
    step, share = 0, 0.0
    while share < 1 and (run.sizes.most is None or step < run.sizes.most):
        optimizer.lr.fill_(schedule.rate(step, share))
        optimizer.zero_grad()
        draw = StepRNG(recipe.seed, step)
        losses: dict[str, Tensor] = {}
        for part in microlosses(task, draw, device, recipe.bf16):
            with fp32_attention(device, recipe.bf16):
                torch.stack(list(part.values())).sum().backward()
            losses |= {key: value.detach() for key, value in part.items()}
        optimizer.step()
        average.update(step)
        step += 1
        if step % 10 == 0 or step == run.sizes.most:
            seen = {key: round(float(value), 5) for key, value in (losses | draw.figures).items()}
            if any(value != value for value in seen.values()):
                raise FloatingPointError(f"{name}, step {step}: {seen}")
            share = schedule.share
            if step % 100 == 0 or step <= 20:
                run.out.point(name, step=step, share=share, **seen)
                run.out.say(f"{name} {step} ({share:.2f}): {seen}")
    optimizer.zero_grad()
    average.apply()
    adapter.eval()
    return step


def _save(adapter: PuLID, path: Path, recipe: Recipe, steps: int) -> None:
    save_adapter(
        deepcopy(adapter).bfloat16(), path, recipe, TrainingResult(steps, 0.0, {}, {}, path.parent)
    )


class Subjects:
    """Held-out people for the evaluation of adapters: a neutral portrait each, and prompts."""

    def __init__(
        self, run: Any, extractor: MiniExtractor, people: int = 64, prompts: int = 4
    ) -> None:
        self.run = run
        people = min(people, max(2, run.sizes.prompts // prompts))
        device = run.device
        values = [Person.from_seed(HELD_OUT_PEOPLE + k).vector() for k in range(people)]
        neutral = Scenes(
            self._neutral(people).to(device), torch.zeros(people, JITTER, device=device)
        )
        made = render_stage(torch.tensor(values, device=device), stage_of(neutral))
        self.portraits = made.image
        with torch.no_grad():
            self.id_cond, self.hidden = extractor.features(made.image, made.face, made.landmarks)
        self.requests = sample_prompts(people, prompts)
        tokens = token_ids(run.tokenizer, [request.prompt for request in self.requests]).to(device)
        self.text = run.words(tokens)
        self.person = torch.tensor([request.person for request in self.requests], device=device)
        rows = [[request.wanted.get(name, -1) for name in ATTRIBUTES] for request in self.requests]
        self.wanted = torch.tensor(rows, device=device)
        self.gallery, _ = embed(run.evaluation.detector, run.evaluation.recognition, self.portraits)

    @staticmethod
    def _neutral(count: int) -> Tensor:
        scene = Scene()
        row = [classes.index(getattr(scene, name)) for name, classes in ATTRIBUTES.items()]
        return torch.tensor([row] * count)

    @torch.no_grad()
    def figures(
        self, adapter: PuLID, pipe: Any, name: str, scales: Sequence[float] = (0.7, 1.0)
    ) -> dict[str, Any]:
        """Return `face_sim` and `rank1` of the evaluator's recognition model, and `attributes`, for each scale."""
        run, found = self.run, {}
        unet, config = pipe.unet, pipe.unet.config
        shape = (config.in_channels, config.sample_size, config.sample_size)
        noise = torch.stack(
            [
                torch.randn(shape, generator=torch.Generator().manual_seed(request.seed))
                for request in self.requests
            ]
        ).to(run.device)
        tokens = adapter.encode(
            self.id_cond[self.person], [level[self.person] for level in self.hidden]
        )
        nobody = adapter.unconditional(self.id_cond[:1], [level[:1] for level in self.hidden])
        text = TextConditioning(
            self.text.embeds, self.text.pooled, time_ids(96, len(noise), run.device)
        )
        for scale in scales:
            known: dict[str, Any] = {
                "scale": scale,
                "projection": "none",
                "negative": nobody,
                "guided": True,
                "pipe": pipe,
            }
            with adapter.use_tokens(tokens, **known):
                latents = rollout(unet, noise, text, every=20)[:, -1]
            images = decode(run.vae, latents)
            found[f"scale {scale}"] = self._scores(images)
        run.out.sheet(f"{name}: given, then four prompts, scale {scales[-1]}", self._sheet(images))
        return found

    def _scores(self, images: Tensor) -> dict[str, float]:
        evaluation = self.run.evaluation
        embeddings, detected = embed(evaluation.detector, evaluation.recognition, images)
        seen = torch.stack([evaluation.reader(images)[name].argmax(-1) for name in ATTRIBUTES], 1)
        right = torch.where(self.wanted >= 0, (seen == self.wanted).float(), torch.nan).nanmean(1)
        if not len(embeddings):
            return {"attributes": right.nanmean().item(), "face_found": 0.0}
        cosine = normalize(embeddings, dim=-1) @ normalize(self.gallery, dim=-1).T
        own = self.person[detected]
        return {
            "face_sim": cosine.gather(1, own[:, None]).mean().item(),
            "rank1": (cosine.argmax(1) == own).float().mean().item(),
            "attributes": right.nanmean().item(),
            "face_found": detected.float().mean().item(),
        }

    def _sheet(self, images: Tensor, people: int = 10) -> Any:
        each = len(images) // len(self.portraits)
        rows = []
        for k in range(min(people, len(self.portraits))):
            some = torch.cat([self.portraits[k : k + 1], images[k * each : (k + 1) * each]])
            rows.append(to_pil(some.float().cpu()))
        return image_grid(rows, 144)
