"""Training recipes by name: one flat dataclass, and one function per variant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

from openpulid.diffusion.sampling import SAMPLERS
from openpulid.errors import OptionError, suggest
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
    "few_step_batch": INDEX,
    "rollout_steps": COUNT,
    "grad_steps": COUNT,
    "guidance_scale": Limit(),
    "pixels": COUNT,
    "batch": COUNT,
}
"""Limits of the settings that are not the trainer's."""


@dataclass(frozen=True)
class Recipe:
    """Settings of one training.

    "Choice" marks what the paper (PuLID, arXiv 2404.16022) does not disclose.

    Raises:
        OptionError: a number is out of its limits, or a name is unknown.
    """

    name: str
    base: str  # "mini", "mini-flux", "sdxl", "flux" or "flux2-klein"

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

    # FLUX and FLUX.2 alone
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
    id_prompt: str | None = ID_PROMPT  # None: the caption of each image
    align_prompts: tuple[str, ...] = ALIGN_PROMPTS  # empty: the caption of each image
    few_step_batch: int = 0  # images of the ID loss and of the alignment, over all processes
    rollout_steps: int = 4
    grad_steps: int = 1  # final steps of the rollout that carry gradients
    rollout_on_base: bool = False  # also on the base, alternating with the few-step models: choice
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
        return self.base in ("flux", "flux2-klein", "mini-flux")

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


def mini_stage1() -> Recipe:
    """Return the paper's stage 1 (L_diff alone) for the miniature.

    - Learning rate and batch are higher than at full size, because the adapter is three orders of
      magnitude smaller. The optimizer is the one of its base: under AdamW the keys grew until every
      position attended to a single token.
    - The face gets more weight, because it covers a third of the image and carries all identity.
    - No min-SNR: with v-prediction it would neglect high noise, where the shape of a face is
      decided. Timesteps of high noise are drawn more often instead.
    - Features come from another image of the same person. Features of the training image itself
      also describe its light, pose and expression, which change more of the image than the identity
      does. An adapter trained that way on 137,000 images had learned nothing else
      (benchmarks/mini-build.md).
    """
    return Recipe(
        "mini_stage1",
        base="mini",
        encoder_width=96,
        face_loss_weight=3.0,
        landmark_loss_weight=4.0,
        paired=True,
        timestep_bias=1.0,
        batch=48,
        steps=12_000,
        optimizer="muon",
        lr=3e-3,
        warmup=100,
        decay=0.4,
        weight_decay=0.1,
        validate_every=1000,
    )


def mini_naive() -> Recipe:
    """Return the ablation: L_diff and the ID loss on x_0 predicted in one step from x_t."""
    return replace(_continue_mini("mini_naive", init_from="mini_stage1"), id_loss="naive")


def mini_stage2() -> Recipe:
    """Return stage 2: L_diff and the ID loss on images of the lightning branch."""
    return replace(_continue_mini("mini_stage2", init_from="mini_stage1"), id_loss="accurate")


def mini_stage3() -> Recipe:
    """Return stage 3: stage 2 with alignment to the lightning branch without an identity.

    The weights are twice the paper's, at its ratio. The paper does not say how it reduces its
    norms, and with its own weights stage 3 preserved no more of the image than stage 2 at a scale
    of the same identity similarity (benchmarks/mini-ablation.md). Three times its weights left
    CLIP-I .02 above the target and cost similarity (benchmarks/mini-build.md). Every second rollout
    is on the base: a stage 3 with rollouts on the student alone kept three fifths of stage 2's
    similarity on the base at the same four timesteps.
    """
    recipe = _continue_mini("mini_stage3", init_from="mini_stage2")
    return replace(
        recipe,
        id_loss="accurate",
        semantic_weight=1.2,
        layout_weight=0.2,
        rollout_on_base=True,
    )


def _continue_mini(name: str, init_from: str) -> Recipe:
    """Return the common settings of the miniature's later stages.

    - Gradients flow through the last three of four steps. The features of a face are decided
      between t = 700 and 400, and the second step begins at 749 (benchmarks/mini-build.md).
    - The prompts are the captions of the images. An adapter trained with a single face prompt
      reached a similarity of .61 with it and .28 with other prompts: seventy layers may generalize
      from one prompt to the next, ten do not (benchmarks/mini-ablation.md).
    - The diffusion branch takes a third of a step's time and only preserves what stage 1 learned,
      so half of its images suffice.
    - Two recognition models in random views see each face. With a single model in a fixed view the
      ID loss is also satisfied by textures that the eye sees as blotches.
    - Timesteps are uniform, as in the paper. The ID loss is easiest to satisfy in the last step, at
      t = 250, with patterns that no later layer corrects, and the bias of stage 1 leaves L_diff a
      single image there.
    """
    return replace(
        mini_stage1(),
        name=name,
        init_from=init_from,
        timestep_bias=0.0,
        batch=24,
        lr=1e-3,
        steps=6_000,
        id_prompt=None,
        align_prompts=(),
        augment_faces=True,
        id_ensemble=True,
        few_step_batch=16,
        grad_steps=3,
        warmup=30,
        decay=0.5,
        validate_every=200,
    )


def on_mini_flux(recipe: Recipe) -> Recipe:
    """Return a recipe of the miniature for the one with FLUX's architecture.

    - It has 2 double and 6 single blocks, and identity attention follows each of them: at FLUX's
      intervals there would be three places.
    - Stage 1 has the density t ** 1 of timesteps on SDXL. Here a mean of the logit above zero draws
      more high noise, in which the shape of a face is decided.
    """
    init_from = recipe.init_from and recipe.init_from.replace("mini", "mini_flux")
    return replace(
        recipe,
        name=recipe.name.replace("mini", "mini_flux"),
        init_from=init_from,
        base="mini-flux",
        encoder="IDFormer",
        encoder_width=128,
        attention_heads=8,
        attention_head_dim=32,
        double_interval=1,
        single_interval=1,
        logit_mean=0.5 * recipe.timestep_bias,
        timestep_bias=0.0,
        text_tokens=48,
    )


def sdxl_stage1() -> Recipe:
    """Return the paper's stage 1 at full size.

    The paper discloses 1.5 million images and 8 A100. Learning rate, batch and steps are those of
    IP-Adapter-FaceID on SDXL, the nearest system with public settings.
    """
    return Recipe(
        "sdxl_stage1",
        base="sdxl",
        batch=64,
        steps=100_000,
        lr=1e-4,
        warmup=1000,
        gradient_checkpointing=True,
    )


def sdxl_stage2() -> Recipe:
    """Return the paper's stage 2: 768 pixels, four steps, fewer than 30,000 iterations.

    Gradients flow through all four steps, the most expensive of the published variants (3.3
    seconds, against 2.6 for the last step alone). The last step begins at t = 249, and the identity
    is decided earlier (`_continue_mini`).
    """
    return replace(
        sdxl_stage1(),
        name="sdxl_stage2",
        init_from="sdxl_stage1",
        batch=32,
        steps=30_000,
        lr=1e-5,
        id_loss="accurate",
        few_step_batch=8,
        grad_steps=4,
        pixels=768,
    )


def sdxl_stage3() -> Recipe:
    """Return the paper's stage 3: weights 1.0, 0.6 and 0.1 of L_id, L_sem and L_layout.

    The alignment covers all layers and all four steps.
    """
    return replace(
        sdxl_stage2(),
        name="sdxl_stage3",
        init_from="sdxl_stage2",
        semantic_weight=0.6,
        layout_weight=0.1,
    )


def flux_stage1() -> Recipe:
    """Return stage 1 (L_diff alone) on FLUX.1-dev.

    Nobody has published how PuLID was trained on FLUX. Encoder, places and sizes of the attention
    are those of the published adapter (v0.9.1), which `--begin` can continue; everything else is a
    choice. Batch, rate and steps are those of SDXL's stage 1. 512 pixels are a quarter of the
    tokens of 1024, and a face in a portrait has enough of them.
    """
    return replace(sdxl_stage1(), name="flux_stage1", base="flux", encoder="IDFormer", pixels=512)


def flux_naive() -> Recipe:
    """Return the ablation on FLUX: L_diff and the ID loss on x_0 predicted in one step."""
    return replace(
        flux_stage1(),
        name="flux_naive",
        init_from="flux_stage1",
        steps=30_000,
        lr=1e-5,
        id_loss="naive",
        augment_faces=True,
        few_step_batch=8,
    )


def flux_stage2() -> Recipe:
    """Return stage 2 on FLUX: also the ID loss on images that FLUX.1-schnell generates.

    Gradients flow through the last two of four steps: all four need twice the memory. With
    schnell's schedule, which has no shift, the last two begin at noise levels of 0.5 and 0.25.
    """
    return replace(
        sdxl_stage2(),
        name="flux_stage2",
        base="flux",
        init_from="flux_stage1",
        encoder="IDFormer",
        augment_faces=True,
        grad_steps=2,
        pixels=512,
    )


def flux_stage3() -> Recipe:
    """Return stage 3 on FLUX, with the weights of the alignment losses on SDXL."""
    return replace(
        flux_stage2(),
        name="flux_stage3",
        init_from="flux_stage2",
        semantic_weight=0.6,
        layout_weight=0.1,
    )


def on_flux2_klein(recipe: Recipe) -> Recipe:
    """Return a recipe of FLUX.1 for FLUX.2 klein 4B; the base's distilled model has the four steps.

    Nobody has published a PuLID for FLUX.2. Encoder and attention have the sizes of PuLID 0.9.1 for
    FLUX.1, which `--begin` can start from; the attention follows every second of 5 double and
    every fourth of 20 single blocks. The prompt has as many tokens as in the pipeline, which
    attends to its padding too. The four steps begin at noise levels of 1, 0.96, 0.88 and 0.72 at
    512 pixels, and gradients flow through the last two.
    """
    init_from = recipe.init_from and recipe.init_from.replace("flux", "flux2_klein")
    name = recipe.name.replace("flux", "flux2_klein")
    return replace(recipe, name=name, init_from=init_from, base="flux2-klein", text_tokens=512)


def with_v11_encoder(recipe: Recipe) -> Recipe:
    """Return the recipe with the encoder of v1.1, `IDFormer`."""
    init_from = recipe.init_from and f"{recipe.init_from}_v11"
    return replace(recipe, name=f"{recipe.name}_v11", init_from=init_from, encoder="IDFormer")


def _derive(
    derive: Callable[[Recipe], Recipe], variant: Callable[[], Recipe]
) -> Callable[[], Recipe]:
    return lambda: derive(variant())


_MINI_VARIANTS = (mini_stage1, mini_naive, mini_stage2, mini_stage3)

_VARIANTS = (*_MINI_VARIANTS, sdxl_stage1, sdxl_stage2, sdxl_stage3)

_FLUX_VARIANTS = (flux_stage1, flux_naive, flux_stage2, flux_stage3)

RECIPES: dict[str, Callable[[], Recipe]] = {
    **{variant.__name__: variant for variant in (*_VARIANTS, *_FLUX_VARIANTS)},
    **{f"{variant.__name__}_v11": _derive(with_v11_encoder, variant) for variant in _VARIANTS},
    **{
        variant.__name__.replace("mini", "mini_flux"): _derive(on_mini_flux, variant)
        for variant in _MINI_VARIANTS
    },
    **{
        variant.__name__.replace("flux", "flux2_klein"): _derive(on_flux2_klein, variant)
        for variant in _FLUX_VARIANTS
    },
}


def find_recipe(name: str) -> Recipe:
    """Return the recipe called `name`.

    Raises:
        OptionError: there is no such recipe; the message lists all.
    """
    if name not in RECIPES:
        raise OptionError(
            f"unknown recipe {name!r}{suggest(name, RECIPES)}: "
            f"choose one of {', '.join(sorted(RECIPES))}."
        )
    return RECIPES[name]()
