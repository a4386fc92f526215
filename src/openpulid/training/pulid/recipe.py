"""The settings of one training, in one flat dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from openpulid.diffusion.sampling import SAMPLERS
from openpulid.errors import OptionError
from openpulid.methods.pulid import ENCODERS, Projection
from openpulid.training.limits import COUNT, FRACTION, INDEX, Limit, check_limits
from openpulid.training.pulid.prompts import ALIGN_PROMPTS, ID_PROMPT
from openpulid.training.schedule import OptimizerKind, TrainerConfig

IDLossKind = Literal["none", "naive", "accurate"]
"""Naive: on x_0 predicted in one step from x_t. Accurate: on the images of the lightning branch."""

LIMITS = {
    "encoder_width": COUNT,
    "attention_heads": COUNT,
    "attention_head_dim": COUNT,
    "double_interval": COUNT,
    "single_interval": COUNT,
    "logit_std": Limit(low=1e-6),
    "guidance_embedding": Limit(),
    "few_step_guidance_embedding": Limit(),
    "text_tokens": COUNT,
    "num_zero": INDEX,
    "drop_identity": FRACTION,
    "drop_caption": FRACTION,
    "min_snr_gamma": Limit(),
    "face_loss_weight": Limit(),
    "landmark_loss_weight": Limit(),
    "timestep_bias": Limit(),
    "id_weight": Limit(low=1e-6),
    "semantic_weight": Limit(),
    "layout_weight": Limit(),
    "outside_weight": Limit(),
    "few_step_batch": INDEX,
    "rollout_steps": COUNT,
    "grad_steps": COUNT,
    "guidance_scale": Limit(),
    "base_guidance_scale": Limit(),
    "pixels": COUNT,
    "batch": COUNT,
}
"""Limits of the settings that are not the trainer's."""

DEFAULT_PIXELS = 1024
"""Width and height of the images of every base of full size, if the recipe has none."""


@dataclass(frozen=True)
class Recipe:
    """Settings of one training.

    "Choice" marks what the paper (PuLID, arXiv 2404.16022) does not disclose.

    Raises:
        OptionError: a number is out of its limits, or a name is unknown.
    """

    name: str
    base: str  # "mini", "mini-flux", "sdxl", "flux", "flux2-klein", "z-image" or "qwen-image"

    # the adapter
    encoder: str = "IDEncoder"  # of v1; "IDFormer" is that of v1.1
    encoder_width: int = 1024  # hidden width of the encoder's MLPs; published 1024
    projection: Projection = "none"  # in training: choice; at inference ortho_v2
    num_zero: int = 0  # zero tokens in training: choice

    # the diffusion branch
    paired: bool = False  # features of another image of the same person: choice
    drop_identity: float = (
        0.1  # probability of zero features, for the unconditional identity: choice
    )
    aspect_buckets: bool = False  # photos: several aspect ratios instead of squares: choice
    drop_caption: float = 0.0  # probability of an empty prompt, for guidance: choice
    min_snr_gamma: float | None = None  # choice
    face_loss_weight: float = 1.0  # of the face; the rest of the image weighs 1: choice
    landmark_loss_weight: float = 1.0  # factor on a face weight above 1, around landmarks: choice
    timestep_bias: float = 0.0  # timesteps are drawn with density t ** bias; 0 is uniform: choice

    # FLUX and its relatives alone
    attention_heads: int = 16  # of the identity attention; published 16
    attention_head_dim: int = 128  # published 128
    double_interval: int = 2  # identity attention follows every n-th double block; published 2
    single_interval: int = 4  # and every n-th single block; published 4
    zero_output: bool = True  # identity attention starts without effect: choice
    logit_mean: float = 0.0  # of the noise levels before their shift, see `FlowSchedule`: choice
    logit_std: float = 1.0  # choice
    guidance_embedding: float = 1.0  # in the diffusion branch: choice
    few_step_guidance_embedding: float = 1.0  # in the lightning branch; schnell has none: choice
    text_tokens: int = 128  # of T5, as in PuLID's program

    # the lightning branch (stages 2 and 3)
    init_from: str | None = None  # the recipe whose adapter this one continues
    id_loss: IDLossKind = "none"
    id_weight: float = 1.0
    augment_faces: bool = False  # random views of the generated faces in the ID loss: choice
    id_ensemble: bool = False  # miniature: also the identity encoder's recognition model: choice
    semantic_weight: float = 0.0  # of L_sem, lambda_align-sem
    layout_weight: float = 0.0  # of L_layout, lambda_align-layout
    outside_weight: float = 0.0  # miniature: of `OutsideLoss`, which the paper does not have
    id_prompt: str | None = ID_PROMPT  # None: the caption of each image
    align_prompts: tuple[str, ...] = ALIGN_PROMPTS  # empty: the caption of each image
    few_step_batch: int = 0  # images of the ID loss and of the alignment, over all processes
    rollout_steps: int = 4
    grad_steps: int = 1  # final steps of the rollout that carry gradients
    rollout_on_base: bool = False  # also on the base, alternating with the few-step models: choice
    base_guidance_scale: float = (
        1.0  # of rollouts on the base; above 1 they have no alignment: choice
    )
    guidance_scale: float = 1.0
    sampler: str = "euler"  # choice
    gradient_checkpointing: bool = False  # in the rollout, and in the U-Net at full size
    align_one_step: bool = False  # align one random step instead of all that carry gradients
    pixels: int | None = None  # width of the rollout's images; None is the base's own width

    # the optimizer: all choices
    batch: int = 32  # over all processes
    accumulate: int = 1  # micro-batches per step and process
    steps: int = 100_000
    optimizer: OptimizerKind = "adamw"
    lr: float = 1e-4
    warmup: int = 500
    decay: float = 0.2
    weight_decay: float = 0.01
    ema: float = 0.999
    seed: int = 0
    bf16: bool = True
    validate_every: int = 1000

    def __post_init__(self) -> None:
        check_limits(self, LIMITS)
        self.trainer_config()  # checks the rest
        choices = {
            "encoder": tuple(ENCODERS),
            "projection": get_args(Projection),
            "id_loss": get_args(IDLossKind),
            "sampler": tuple(SAMPLERS),
        }
        for name, values in choices.items():
            if getattr(self, name) not in values:
                raise OptionError(
                    f"{name} must be one of {', '.join(values)}, got {getattr(self, name)!r}."
                )
        if self.id_ensemble and not self.is_miniature:
            raise OptionError(
                "id_ensemble is available for the miniature only: gradients do not pass through "
                "the recognition model that reads photos."
            )
        if self.outside_weight and not (self.is_miniature and self.shares_rollout):
            raise OptionError(
                "outside_weight is available for the miniature's stage 3 only: it needs masks of "
                "the faces, and the same images for the ID loss and the alignment."
            )
        if self.base_guidance_scale != 1 and not (self.rollout_on_base and self.shares_rollout):
            raise OptionError(
                "base_guidance_scale needs rollout_on_base, and the same images for ID loss and "
                "alignment: set id_prompt to None and align_prompts to nothing."
            )
        if self.is_flow:
            self._check_flow()
        if self.grad_steps > self.rollout_steps:
            raise OptionError(
                f"grad_steps ({self.grad_steps}) must not exceed rollout_steps "
                f"({self.rollout_steps})."
            )

    @property
    def is_flow(self) -> bool:
        """Whether the base is a flow model of FLUX's kind."""
        return self.base in ("flux", "flux2-klein", "z-image", "qwen-image", "mini-flux")

    @property
    def is_miniature(self) -> bool:
        """Whether the base is the miniature's, which trains on the synthetic world."""
        return self.base in ("mini", "mini-flux")

    def _check_flow(self) -> None:
        """Raise OptionError if a setting has no meaning for a flow model."""
        values = {
            "encoder": (self.encoder, "IDFormer"),
            "projection": (self.projection, "none"),
            "num_zero": (self.num_zero, 0),
            "sampler": (self.sampler, "euler"),
            "guidance_scale": (self.guidance_scale, 1.0),
            "base_guidance_scale": (self.base_guidance_scale, 1.0),
            "timestep_bias": (self.timestep_bias, 0.0),
            "min_snr_gamma": (self.min_snr_gamma, None),
        }
        for name, (value, only) in values.items():
            if value != only:
                raise OptionError(f"FLUX trains with {name} {only!r} alone, got {value!r}.")

    @property
    def has_alignment(self) -> bool:
        """Whether the recipe has an alignment loss."""
        return self.semantic_weight > 0 or self.layout_weight > 0

    @property
    def shares_rollout(self) -> bool:
        """Whether one rollout, with the captions as prompts, serves ID loss and alignment.

        The paper has different prompts for the two, and so a rollout for each.
        """
        has_captions = self.id_prompt is None and not self.align_prompts
        is_whole = self.guidance_scale == 1 and not self.align_one_step
        return self.id_loss == "accurate" and self.has_alignment and has_captions and is_whole

    def trainer_config(self) -> TrainerConfig:
        """Return the trainer's part of the recipe."""
        return TrainerConfig(
            steps=self.steps,
            lr=self.lr,
            name=self.name,
            optimizer=self.optimizer,
            warmup=self.warmup,
            decay=self.decay,
            weight_decay=self.weight_decay,
            ema=self.ema,
            accumulate=self.accumulate,
            seed=self.seed,
            bf16=self.bf16,
            validate_every=self.validate_every,
        )
