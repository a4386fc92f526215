"""Settings of a tuning: one flat dataclass, and one function per method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from openpulid.errors import OptionError, suggest
from openpulid.training.limits import COUNT, INDEX, Limit, check_limits
from openpulid.training.schedule import TrainerConfig

Trained = Literal["word", "unet", "lora", "cross-attention"]
"""What is trained: the embeddings of a word, the whole U-Net, low-rank matrices, or keys and values
of the cross-attention together with a word."""

LIMITS = {
    "num_vectors": COUNT,
    "rank": COUNT,
    "num_class_images": INDEX,
    "prior_weight": Limit(),
    "face_loss_weight": Limit(low=1e-6),
    "num_crops": COUNT,
    "batch": COUNT,
}
"""Limits of the settings that are not the trainer's."""


@dataclass(frozen=True)
class TuningRecipe:
    """Settings of one tuning.

    Raises:
        OptionError: a number is out of its limits, or a name is unknown.
    """

    method: str  # of `methods.registry.METHODS`
    trained: Trained
    num_vectors: int = 1  # embeddings of a trained word
    rank: int = 4  # of a LoRA; alpha is the rank
    with_text_encoders: bool = False  # a LoRA of the text encoders as well
    num_class_images: int = 0  # images of the class word by the untuned model; 0: no prior loss
    prior_weight: float = 1.0  # of the loss on the class images
    face_loss_weight: float = 1.0  # of the face; the rest of the image weighs 1
    num_crops: int = 1  # crops of each image, of which the first is the whole square
    gradient_checkpointing: bool = False
    steps: int = 500
    batch: int = 1  # images of the person; as many class images are added
    lr: float = 1e-4
    weight_decay: float = 1e-2
    warmup: int = 0
    decay: float = 0.0  # final share of the steps in which the learning rate falls
    seed: int = 0

    def __post_init__(self) -> None:
        check_limits(self, LIMITS)
        if self.trained not in get_args(Trained):
            raise OptionError(f"cannot train {self.trained!r}.")

    def trainer_config(self, name: str) -> TrainerConfig:
        """Return the trainer's settings.

        Args:
            name: of the run; a run directory belongs to one.
        """
        return TrainerConfig(
            steps=self.steps,
            lr=self.lr,
            name=name,
            warmup=self.warmup,
            decay=self.decay,
            weight_decay=self.weight_decay,
            betas=(0.9, 0.999),
            ema=0.0,
            seed=self.seed,
            validate_every=self.steps,
        )


def textual_inversion() -> TuningRecipe:
    """Return Textual Inversion (arXiv 2208.01618): one word, four vectors instead of one.

    One vector hardly holds a face; the learning rate is that of diffusers' script for one GPU.
    """
    return TuningRecipe("textual-inversion", "word", num_vectors=4, steps=3000, lr=2e-3)


def dreambooth() -> TuningRecipe:
    """Return DreamBooth (arXiv 2208.12242) with all weights of the U-Net and prior preservation."""
    return TuningRecipe("dreambooth", "unet", num_class_images=200, steps=800, lr=2e-6)


def dreambooth_lora() -> TuningRecipe:
    """Return DreamBooth with low-rank matrices instead of all weights."""
    return replace(lora(), num_class_images=200)


def lora() -> TuningRecipe:
    """Return a LoRA (arXiv 2106.09685) of all attention layers, as in diffusers' SDXL script."""
    return TuningRecipe("lora", "lora", rank=4, steps=500, batch=4, lr=1e-4, weight_decay=1e-4)


def custom_diffusion() -> TuningRecipe:
    """Return Custom Diffusion (arXiv 2212.04488) with the learning rate for faces.

    Instance and class images weigh alike. The authors' program sums the error over the channels of
    the instance images and averages it over those of the class images, which weighs the former by
    the number of channels.
    """
    return TuningRecipe(
        "custom-diffusion",
        "cross-attention",
        num_class_images=200,
        steps=1000,
        batch=2,
        lr=2e-5,
    )


TUNING_METHODS: dict[str, Callable[[], TuningRecipe]] = {
    "custom-diffusion": custom_diffusion,
    "dreambooth": dreambooth,
    "dreambooth-lora": dreambooth_lora,
    "lora": lora,
    "textual-inversion": textual_inversion,
}

_MINIATURE: dict[str, dict[str, Any]] = {
    "custom-diffusion": {"steps": 150, "lr": 3e-4, "num_class_images": 64, "face_loss_weight": 200},
    "dreambooth": {"steps": 200, "lr": 3e-4, "num_class_images": 64, "face_loss_weight": 20},
    "dreambooth-lora": {"steps": 250, "lr": 1e-3, "num_class_images": 64, "face_loss_weight": 200},
    "lora": {"steps": 80, "lr": 1e-3, "face_loss_weight": 200},
    "textual-inversion": {"steps": 300, "lr": 2e-3, "face_loss_weight": 20},
}
"""What differs on the miniature, all with a batch of 4; chosen in benchmarks/mini-baselines.md."""


def find_tuning_recipe(name: str, is_miniature: bool = False) -> TuningRecipe:
    """Return the recipe of a method.

    Args:
        name: one of `TUNING_METHODS`.
        is_miniature: whether the base model is the miniature.

    Raises:
        OptionError: there is no such method.
    """
    if name not in TUNING_METHODS:
        raise OptionError(
            f"there is no tuning method {name!r}{suggest(name, TUNING_METHODS)}; choose one of "
            f"{', '.join(TUNING_METHODS)}."
        )
    recipe = TUNING_METHODS[name]()
    return replace(recipe, batch=4, **_MINIATURE[name]) if is_miniature else recipe
