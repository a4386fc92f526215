"""PuLID's training task: an adapter, the base models it is attached to, and a source of batches."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from PIL import Image
from torch import Generator, Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.utils.checkpoint import checkpoint

from openpulid.diffusion.sampling import SAMPLERS
from openpulid.errors import OptionError
from openpulid.faces.embed import FaceEmbedder, FaceEmbeddings, copy_paste
from openpulid.methods.pulid import PuLID, PuLIDFlux
from openpulid.training.distributed import DistributedContext
from openpulid.training.pulid.batch import (
    Batch,
    BatchSource,
    drop_captions,
    drop_identity,
    evenly_spaced,
    loss_weight_map,
    swap_identities,
)
from openpulid.training.pulid.branches import (
    DiffusionStep,
    Rollout,
    RolloutConfig,
    denoise_until,
    diffusion_branch,
    lightning_branch,
    queries_at_step,
)
from openpulid.training.pulid.held_out import (
    HELD_OUT_BATCHES,
    HELD_OUT_SEED,
    HeldOutLosses,
    count_parts,
    summarize_held_out,
)
from openpulid.training.pulid.losses import (
    DiffusionLoss,
    IDLoss,
    LayoutAlignment,
    OutsideLoss,
    SemanticAlignment,
)
from openpulid.training.pulid.models import BaseModel
from openpulid.training.pulid.recipe import Recipe
from openpulid.training.rng import StepRNG, check_shared, microbatch_rngs
from openpulid.training.trainer import Backward


@dataclass(frozen=True)
class Validation:
    """What a training measures on people who are not in its data.

    Attributes:
        data: batches of these people; None measures nothing.
        scorer: embeds faces with a recognition model that no loss contains.
        make_sheet: draws the sample sheet.
    """

    data: BatchSource | None = None
    scorer: FaceEmbedder | None = None
    make_sheet: Callable[[], Image.Image] | None = None


class PuLIDTask:
    """Trains the adapter alone (PuLID, section 3): L_diff, and the losses of the lightning branch.

    A `trainer.MultiPassTask`: each loss has its own backward pass, inside the block in which the
    adapter uses the identities.

    Args:
        recipe: losses, weights and rates.
        base: frozen model of the diffusion branch.
        adapter: in float32, on the base's device; it is attached to every model.
        data: batches to train on.
        validation: what to measure; nothing by default.
        few_step_models: frozen models of the lightning branch. Steps and ranks take them in
            round-robin order, so that the adapter works on all of them. `base` is the last of them
            if the recipe sets `rollout_on_base`.
        face_embedder: embeds faces for the ID loss, with another recognition model than the
            encoder's.
        is_sharded: whether the processes share the frozen models. They then take the same few-step
            model in a step.

    Raises:
        OptionError: the recipe needs a lightning branch or an ID loss and its parts are missing.
    """

    def __init__(
        self,
        recipe: Recipe,
        base: BaseModel,
        adapter: PuLID | PuLIDFlux,
        data: BatchSource,
        *,
        validation: Validation | None = None,
        few_step_models: Sequence[BaseModel] = (),
        face_embedder: FaceEmbedder | None = None,
        is_sharded: bool = False,
    ) -> None:
        needs_rollout = recipe.id_loss == "accurate" or recipe.has_alignment
        if needs_rollout and not (few_step_models and recipe.few_step_batch):
            raise OptionError(
                f"{recipe.name} needs a lightning branch: pass few_step_models and set "
                "few_step_batch."
            )
        if recipe.id_loss != "none" and not (face_embedder and recipe.few_step_batch):
            raise OptionError(
                f"{recipe.name} has an ID loss: pass face_embedder and set few_step_batch."
            )
        self.recipe = recipe
        self.base = base
        self.adapter = adapter
        self.data = data
        self.validation = validation or Validation()
        self.few_step_models = list(few_step_models)
        if few_step_models and recipe.rollout_on_base:
            self.few_step_models.append(base)
        self.face_embedder = face_embedder
        self.is_sharded = is_sharded
        self.rollout = RolloutConfig(
            recipe.rollout_steps,
            recipe.grad_steps,
            recipe.guidance_scale,
            SAMPLERS[recipe.sampler],
            gradient_checkpointing=recipe.gradient_checkpointing and not base.checkpoints_blocks,
        )
        self.diffusion_loss = DiffusionLoss(
            base.schedule, recipe.min_snr_gamma, recipe.face_loss_weight
        )
        self.id_loss = IDLoss()
        self.semantic_loss = SemanticAlignment()
        self.layout_loss = LayoutAlignment()
        self.outside_loss = OutsideLoss()
        for pipe in {id(m.pipe): m.pipe for m in (base, *self.few_step_models)}.values():
            adapter.attach(pipe)

    def with_rollout(self, rollout: RolloutConfig) -> PuLIDTask:
        """Return the same task, sharing adapter and models, with another rollout."""
        task = copy.copy(self)
        task.rollout = rollout
        return task

    def modules(self) -> Mapping[str, nn.Module]:
        """Return the adapter, the only module that trains."""
        return {"adapter": self.adapter}

    def backward_losses(self, rng: StepRNG, backward: Backward) -> None:
        """Compute "diffusion", "id", and "semantic" with "layout", each with its own backward pass.

        "id" joins the alignment's pass if both read the same rollout (`Recipe.shares_rollout`).
        The metric "faces" is the fraction of images that count in the ID loss.
        """
        check_shared(self.recipe.few_step_batch, rng.world_size, "few_step_batch")
        count = self.recipe.few_step_batch // rng.world_size
        batch = self.data.batch(rng).to(self.base.device)
        rng.record("latents", batch.latents)
        rng.record("id_cond", batch.id_cond)
        self._backward_diffusion(rng, batch, backward)
        if not self.few_step_models:
            return
        turn = rng.step if self.is_sharded else rng.step + rng.rank
        model = self.few_step_models[turn % len(self.few_step_models)]
        subset = batch.subset(count)
        if self.recipe.id_loss == "accurate" and not self.recipe.shares_rollout:
            self._backward_id(rng, model, subset, backward)
        if self.recipe.has_alignment:
            self._backward_alignment(rng, model, subset, backward)

    @torch.no_grad()
    def validate(self) -> Mapping[str, float]:
        """Measure the losses on held-out people.

        Returns:
            `held_out_own`, `held_out_other`, `held_out_none`: L_diff with the image's own identity,
            another one and none, from the same noise at uniform timesteps. The gains
            `held_out_over_none` and `held_out_over_other` are by how much the own identity lowers
            it, with their standard errors over people (`_se`). With a lightning branch
            and an ID loss also `held_out_face_sim`, the mean cosine of face embeddings,
            `held_out_faces`, the fraction of images with a face, with a scorer
            `held_out_scorer_sim`, and with paired images `held_out_copy_paste`, see
            `faces.embed.copy_paste`. A similarity that rises without the scorer's is a texture that
            only the models of the ID loss see.
        """
        data = self.validation.data
        if data is None:
            return {}
        metrics = summarize_held_out(self.held_out_losses(data))
        if self.few_step_models and self.recipe.id_loss != "none":
            metrics |= self._validate_id(data)
        return metrics

    @torch.no_grad()
    def held_out_losses(
        self,
        data: BatchSource,
        num_batches: int = HELD_OUT_BATCHES,
        names: Sequence[str] = ("own", "other", "none"),
    ) -> HeldOutLosses:
        """Compute L_diff of held-out images with their own identity, another one and none.

        Args:
            data: batches of people who are not in the training data.
            num_batches: number of batches.
            names: which identities to show.
        """
        losses: dict[str, list[Tensor]] = defaultdict(list)
        people: list[Tensor] = []
        parts = count_parts(self.recipe, DistributedContext(self.base.device).world_size)
        for step, part in product(range(num_batches), range(parts)):
            batch = data.batch(StepRNG(HELD_OUT_SEED, step, part, parts)).to(self.base.device)
            all_rows = torch.ones(len(batch.latents), dtype=torch.bool)
            conditions = {
                "own": batch,
                "other": swap_identities(batch),
                "none": drop_identity(batch, all_rows),
            }
            first = sum(map(len, people))
            people.append(
                first + torch.arange(len(all_rows)) if batch.people is None else batch.people.cpu()
            )
            for name in names:
                condition = conditions[name]
                if condition is None:
                    losses[name].append(torch.full(all_rows.shape, float("nan")))
                    continue
                rng = StepRNG(HELD_OUT_SEED, step, part, parts)
                with self._use_identities(self.base, condition):
                    predicted = self._predict(rng, batch, timestep_bias=None)
                losses[name].append(self._per_image(predicted, batch).cpu())
        per_image = {name: torch.cat(values) for name, values in losses.items()}
        return HeldOutLosses(per_image, torch.cat(people))

    def sheet(self) -> Image.Image | None:
        """Draw the sample sheet, if there is a function for it."""
        make_sheet = self.validation.make_sheet
        return None if make_sheet is None else make_sheet()

    # -- one backward pass each --

    def _backward_diffusion(self, rng: StepRNG, batch: Batch, backward: Backward) -> None:
        dropped = rng.rand(batch.latents.shape[:1], "drop") < self.recipe.drop_identity
        if self.recipe.drop_caption:
            untold = rng.rand(batch.latents.shape[:1], "drop.caption") < self.recipe.drop_caption
            batch = drop_captions(batch, untold)
        with self._use_identities(self.base, drop_identity(batch, dropped)):
            loss, step = self._diffusion(rng, batch, self.recipe.timestep_bias)
            losses = {"diffusion": loss}
            metrics = {}
            if self.recipe.id_loss == "naive":
                rows = evenly_spaced(len(dropped), self.recipe.few_step_batch // rng.world_size)
                latents = self.base.schedule.predict_x0(
                    step.output[rows], step.x_t[rows], step.t[rows]
                )
                images = self._decode(self.base, latents)
                losses["id"], metrics["faces"], _ = self._id_loss(
                    images, batch.subset(len(rows)), self._views(rng), ~dropped[rows]
                )
            backward(losses, metrics)

    def _backward_id(
        self, rng: StepRNG, model: BaseModel, batch: Batch, backward: Backward
    ) -> None:
        with self._use_identities(model, batch, self.rollout.is_guided):
            images = self._decode(model, self._generate(rng, model, batch).latents)
            loss, face_fraction, _ = self._id_loss(images, batch, self._views(rng))
            backward({"id": loss}, {"faces": face_fraction})

    def _backward_alignment(
        self, rng: StepRNG, model: BaseModel, batch: Batch, backward: Backward
    ) -> None:
        is_guided = model is self.base and self.recipe.base_guidance_scale != 1
        capture = self._attention_capture(rng, model, batch, is_guided)
        with torch.no_grad():
            target = capture()
        losses, metrics = {}, {}
        with self._use_identities(model, batch, is_guided):
            rollout = capture()
            if not is_guided:
                semantic = self.semantic_loss(rollout.layers, target.layers)
                layout = self.layout_loss(rollout.layers, target.layers)
                losses["semantic"] = self.recipe.semantic_weight * semantic
                losses["layout"] = self.recipe.layout_weight * layout
            if self.recipe.shares_rollout:
                images = self._decode(model, rollout.latents)
                losses["id"], metrics["faces"], masks = self._id_loss(
                    images, batch, self._views(rng)
                )
                if self.recipe.outside_weight:
                    losses["outside"] = self._outside_loss(model, images, masks, target.latents)
            elif self.is_sharded:
                # a block is gathered for the backward pass when a gradient reaches its output
                losses["layout"] = losses["layout"] + 0 * rollout.latents.sum()
            backward(losses, metrics)

    # -- losses --

    def _diffusion(
        self, rng: StepRNG, batch: Batch, timestep_bias: float
    ) -> tuple[Tensor, DiffusionStep]:
        """Compute L_diff of a batch; also return the step behind it."""
        step = self._predict(rng, batch, timestep_bias)
        return self._per_image(step, batch).mean(), step

    def _predict(self, rng: StepRNG, batch: Batch, timestep_bias: float | None) -> DiffusionStep:
        """Predict from the noised images of a batch, see `diffusion_branch`."""
        # the size conditioning is that of these images, which can differ from the base's own size
        height, width = (x * self.base.pipe.vae_scale_factor for x in batch.latents.shape[-2:])
        text = self.base.encode_text(batch.prompts, pixels=(height, width))
        return diffusion_branch(self.base, rng, batch.latents, text, timestep_bias)

    def _per_image(self, step: DiffusionStep, batch: Batch) -> Tensor:
        """Compute L_diff of each image, (B,)."""
        weights = loss_weight_map(batch, self.recipe.landmark_loss_weight)
        return self.diffusion_loss.per_image(step, weights)

    def _views(self, rng: StepRNG) -> Generator | None:
        """Return the generator of random views of faces, if the recipe wants them."""
        if not self.recipe.augment_faces:
            return None
        return rng.generator(f"id.views.{rng.rank}")

    def _generate(self, rng: StepRNG, model: BaseModel, batch: Batch) -> Rollout:
        """Generate one image per sample, with gradient."""
        noise = self._noise(rng, model, batch)
        prompts = self._prompts(self.recipe.id_prompt, batch)
        text = self._encode_text(model, prompts, self.rollout.is_guided)
        return lightning_branch(model, noise, text, self.rollout)

    def _decode(self, model: BaseModel, latents: Tensor) -> Tensor:
        """Decode latents with gradient; its activations are recomputed if the recipe says so."""
        if self.recipe.gradient_checkpointing:
            images: Tensor = checkpoint(model.decode, latents, use_reentrant=False)
            return images
        return model.decode(latents)

    def _id_loss(
        self,
        images: Tensor,
        batch: Batch,
        views: Generator | None = None,
        has_identity: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the weighted ID loss of generated images.

        Args:
            images: (B, 3, H, W).
            batch: whose images are the references.
            views: of random views of the generated faces.
            has_identity: (B,) bool, the samples that count; all by default.

        Returns:
            The loss, the fraction of samples that count and show a face, and masks of the faces.
        """
        target = self._embed_images(batch)
        assert self.face_embedder is not None
        faces = self.face_embedder(images, views)
        has_face = target.has_face & faces.has_face
        if has_identity is not None:
            has_face = has_face & has_identity.to(has_face.device)
        loss = self.id_loss(target.embeddings, faces.embeddings, has_face)
        return self.recipe.id_weight * loss, has_face.float().mean(), faces.masks

    def _outside_loss(
        self, model: BaseModel, images: Tensor, masks: Tensor, target_latents: Tensor
    ) -> Tensor:
        """Compute the weighted loss outside the faces, of images and latents without identity."""
        assert self.face_embedder is not None
        with torch.no_grad():
            target = model.decode(target_latents)
            target_masks = self.face_embedder(target).masks
        faces = torch.maximum(masks, target_masks)
        return self.recipe.outside_weight * self.outside_loss(images, target, faces)

    @torch.no_grad()
    def _embed_images(self, batch: Batch) -> FaceEmbeddings:
        """Embed the faces of a batch's images, the targets of the ID loss."""
        if self.face_embedder is None or batch.images is None:
            raise OptionError(
                "an ID loss needs the images of the batch and a face_embedder: use a dataset that "
                "returns images."
            )
        return self.face_embedder(batch.images)

    def _attention_capture(
        self, rng: StepRNG, model: BaseModel, batch: Batch, is_guided: bool
    ) -> Callable[[], Rollout]:
        """Return a function that runs one rollout; without guidance it captures the attention."""
        noise = self._noise(rng, model, batch)
        prompts = self._prompts(self._align_prompt(rng), batch)
        text = self._encode_text(model, prompts, is_guided)
        if is_guided:
            config = replace(self.rollout, guidance_scale=self.recipe.base_guidance_scale)
            return partial(lightning_branch, model, noise, text, config)
        if not self.recipe.align_one_step:
            return partial(
                lightning_branch, model, noise, text, self.rollout, capture_attention=True
            )
        step = int(torch.randint(self.rollout.steps, (), generator=rng.generator("align.step")))
        rollout_text = text
        if self.rollout.is_guided:
            rollout_text = self._encode_text(model, prompts, guided=True)
        x, sigma = denoise_until(model, noise, rollout_text, self.rollout, step)
        return partial(queries_at_step, model, x, sigma, text)

    # -- inputs --

    def _noise(self, rng: StepRNG, model: BaseModel, batch: Batch) -> Tensor:
        """Draw the noise of a rollout, the same for the ID loss and the alignment."""
        shape = (len(batch.id_cond), *model.latent_shape(self.recipe.pixels))
        return rng.randn(shape, "rollout.noise").to(model.device)

    def _align_prompt(self, rng: StepRNG) -> str | None:
        """Choose the alignment prompt of a step, the same on all ranks; None for the captions."""
        prompts = self.recipe.align_prompts
        if not prompts:
            return None
        return prompts[
            int(torch.randint(len(prompts), (), generator=rng.generator("align.prompt")))
        ]

    def _prompts(self, prompt: str | None, batch: Batch) -> list[str]:
        """Return one prompt for each sample: `prompt`, or the caption of each."""
        return list(batch.prompts) if prompt is None else [prompt] * len(batch.id_cond)

    def _encode_text(self, model: BaseModel, prompts: list[str], guided: bool = False) -> Any:
        return model.encode_text(prompts, pixels=self.recipe.pixels, guided=guided)

    def _use_identities(
        self, model: BaseModel, batch: Batch, guided: bool = False
    ) -> AbstractContextManager[PuLID | PuLIDFlux]:
        """Open the adapter with the identities of a batch on a model."""
        tokens = self.adapter.encode(batch.id_cond, batch.hidden)
        if isinstance(self.adapter, PuLIDFlux):
            return self.adapter.use_tokens(tokens, pipe=model.pipe)
        negative = None
        if guided:
            hidden = [level[:1] for level in batch.hidden]
            negative = self.adapter.unconditional(batch.id_cond[:1], hidden)
        return self.adapter.use_tokens(
            tokens,
            projection=self.recipe.projection,
            num_zero=self.recipe.num_zero,
            negative=negative,
            guided=guided,
            pipe=model.pipe,
        )

    # -- validation --

    def _validate_id(self, data: BatchSource) -> dict[str, float]:
        assert self.face_embedder is not None
        model = self.few_step_models[0]
        scorer = self.validation.scorer
        parts = count_parts(self.recipe, DistributedContext(self.base.device).world_size)
        columns: dict[str, list[Tensor]] = defaultdict(list)
        for rng in microbatch_rngs(HELD_OUT_SEED, 0, 0, 1, parts):
            batch = data.batch(rng).subset(self.recipe.few_step_batch // parts)
            batch = batch.to(self.base.device)
            with self._use_identities(model, batch, self.rollout.is_guided):
                images = model.decode(self._generate(rng, model, batch).latents)
            faces = self.face_embedder(images)
            target = self._embed_images(batch)
            has_face = faces.has_face & target.has_face
            columns["faces"].append(has_face.float())
            columns["face_sim"].append(_cosines(faces, target))
            if scorer is not None:
                assert batch.images is not None
                columns["scorer_sim"].append(_cosines(scorer(images), scorer(batch.images)))
            if batch.references is not None:
                reference = self.face_embedder(batch.references)
                copied = copy_paste(faces.embeddings, target.embeddings, reference.embeddings)
                columns["copy_paste"].append(copied[has_face & reference.has_face])
        metrics = {"held_out_face_sim": 0.0, "held_out_faces": 0.0}
        for name, values in columns.items():
            if len(joined := torch.cat(values)):
                metrics[f"held_out_{name}"] = joined.mean().item()
        return metrics


def _cosines(faces: FaceEmbeddings, target: FaceEmbeddings) -> Tensor:
    """Compute the cosines of the pairs in which both images show a face."""
    has_face = faces.has_face & target.has_face
    return cosine_similarity(faces.embeddings, target.embeddings)[has_face]
