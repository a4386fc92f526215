"""The training task of a tuning: the diffusion loss, with prior preservation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor, nn

from openpulid.training.pulid import (
    DiffusionLoss,
    SDXLModel,
    TextConditioning,
    diffusion_branch,
)
from openpulid.training.rng import StepRNG
from openpulid.training.tuning.images import TuningImages
from openpulid.training.tuning.recipes import TuningRecipe
from openpulid.training.tuning.trained import TrainedPart


class TuningTask:
    """Tunes on images of one person; a `training.trainer.Task`.

    Args:
        recipe: the settings.
        model: the frozen base model.
        part: what is trained.
        images: of the person.
        prompts: captions with the word for the person.
        class_images: images of the class word by the untuned model; None for no prior preservation.
        class_prompts: their captions, image k has the caption k modulo their number.
    """

    def __init__(
        self,
        recipe: TuningRecipe,
        model: SDXLModel,
        part: TrainedPart,
        images: TuningImages,
        prompts: Sequence[str],
        class_images: TuningImages | None = None,
        class_prompts: Sequence[str] = (),
    ) -> None:
        self.recipe = recipe
        self.model = model
        self.part = part
        self.images = images
        self.class_images = class_images
        self.num_prompts = len(prompts)
        self.num_class_prompts = len(class_prompts)
        self.captions = [*prompts, *class_prompts]
        self.text = None if part.trains_text else model.encode_text(self.captions)
        self.loss = DiffusionLoss(model.schedule, face_weight=recipe.face_loss_weight)

    def modules(self) -> Mapping[str, nn.Module]:
        """Return what is trained."""
        return self.part.modules

    def losses(self, rng: StepRNG) -> Mapping[str, Tensor]:
        """Compute the diffusion loss of a batch, and that of as many class images.

        L = L_person + prior_weight * L_class (DreamBooth, arXiv 2208.12242, equation 2).
        """
        rows = rng.indices(len(self.images), self.recipe.batch)
        size = len(rows)  # the share of this process
        captions = rng.randint(self.num_prompts, rows.shape, "captions")
        latents = self.images.latents[rows]
        if self.class_images is not None:
            class_rows = rng.indices(len(self.class_images), self.recipe.batch, "class")
            latents = torch.cat([latents, self.class_images.latents[class_rows].to(latents)])
            class_captions = self.num_prompts + class_rows % self.num_class_prompts
            captions = torch.cat([captions, class_captions])
        step = diffusion_branch(self.model, rng, latents, self._encode(captions))
        masks = self.images.masks
        if masks is not None:
            weights = torch.ones(len(latents), *masks.shape[1:]).to(masks)
            weights[:size] = masks[rows]  # a mask of ones weighs all positions alike
            masks = weights
        errors = self.loss.per_sample(step, masks)
        losses = {"person": errors[:size].mean()}
        if self.class_images is not None:
            losses["class"] = self.recipe.prior_weight * errors[size:].mean()
        return losses

    def validate(self) -> Mapping[str, float]:
        """Return no figures: a handful of images leaves none to hold out."""
        return {}

    def sheet(self) -> Image.Image | None:
        """Draw nothing."""
        return None

    def _encode(self, captions: Tensor) -> TextConditioning:
        """Encode the captions with these numbers, again only if the text encoders are trained."""
        if self.text is None:
            return self.model.encode_text_with_gradient([self.captions[k] for k in captions])
        time_ids = None if self.text.time_ids is None else self.text.time_ids[captions]
        return TextConditioning(self.text.embeds[captions], self.text.pooled[captions], time_ids)
