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
        prompts: captions with the word that stands for the person.
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
        self.prompts = list(prompts)
        self.class_images = class_images
        self.class_prompts = list(class_prompts)
        self.loss = DiffusionLoss(model.schedule, face_weight=recipe.face_loss_weight)
        self._encoded: dict[str, TextConditioning] = {}

    def modules(self) -> Mapping[str, nn.Module]:
        """Return what is trained."""
        return self.part.modules

    def losses(self, rng: StepRNG) -> Mapping[str, Tensor]:
        """Compute the diffusion loss of a batch, and that of as many class images.

        L = L_person + prior_weight * L_class (DreamBooth, arXiv 2208.12242, equation 2).
        """
        size = self.recipe.batch
        rows = rng.indices(len(self.images), size)
        captions = rng.randint(len(self.prompts), rows.shape, "captions")
        latents = self.images.latents[rows]
        prompts = [self.prompts[k] for k in captions]
        if self.class_images is not None:
            class_rows = rng.indices(len(self.class_images), size, "class")
            latents = torch.cat([latents, self.class_images.latents[class_rows].to(latents)])
            prompts += [self.class_prompts[k % len(self.class_prompts)] for k in class_rows]
        step = diffusion_branch(self.model, rng, latents, self._encode(prompts))
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

    def _encode(self, prompts: Sequence[str]) -> TextConditioning:
        """Encode prompts, once per prompt unless the text encoders are trained."""
        if self.part.trains_text:
            return self.model.encode_text_with_gradient(prompts)
        for prompt in prompts:
            if prompt not in self._encoded:
                self._encoded[prompt] = self.model.encode_text([prompt])
        encoded = [self._encoded[prompt] for prompt in prompts]
        time_ids = [text.time_ids for text in encoded if text.time_ids is not None]
        return TextConditioning(
            torch.cat([text.embeds for text in encoded]),
            torch.cat([text.pooled for text in encoded]),
            torch.cat(time_ids),
        )
