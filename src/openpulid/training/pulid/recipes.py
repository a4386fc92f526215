"""What is trained, by name: one flat dataclass, and a plain function per variant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from openpulid.errors import OptionError
from openpulid.methods.pulid.projection import Projection
from openpulid.training.config import OptimizerKind, TrainerConfig

IDLossKind = Literal["none", "naive", "accurate"]
"""Naive: on x_0 in one step from x_t. Accurate: on what the lightning branch ends with."""

ID_PROMPT = "portrait, color, cinematic"
ALIGN_PROMPTS = (
    "portrait, color, cinematic",
    "portrait, anime artwork",
    "portrait, comic art, graphic novel art",
    "portrait, digital artwork, illustrative, painterly, matte painting",
    "portrait, magnificent, celestial, ethereal, painterly, epic, majestic, magical, fantasy art, cover art, dreamy",
    "portrait, vibrant, professional, sleek, modern, minimalist, graphic, line art, vector graphics",
    "portrait, cyberpunk, vaporwave, neon, vibes, vibrant, stunningly beautiful, crisp, detailed, sleek, ultramodern, "
    "magenta highlights, dark purple shadows, high contrast, cinematic, ultra detailed, intricate, professional",
    "portrait, energetic brushwork, bold colors, abstract forms, expressive, emotional",
    "portrait, film noir style, monochrome, high contrast, dramatic shadows, 1940s style, mysterious, cinematic",
    "portrait, papercut, mixed media, textured paper, overlapping, asymmetrical, abstract, vibrant",
    "portrait, paper mache representation, 3D, sculptural, textured, handmade, vibrant, fun",
    "portrait, vaporwave style, retro aesthetic, cyberpunk, vibrant, neon colors, vintage 80s and 90s style, highly detailed",
    "portrait, watercolor painting, vibrant, beautiful, painterly, detailed, textural, artistic",
    "portrait, impressionist painting, loose brushwork, vibrant color, light and shadow play",
    "portrait, expressionist, raw, emotional, dynamic, distortion for emotional effect, vibrant, use of unusual colors, "
    "detailed",
)
"""The prompts of the ID loss and of the alignment (PuLID, appendix)."""


@dataclass(frozen=True)
class Recipe:
    """Figures of one training. What the paper (arXiv 2404.16022) does not disclose is a choice, and marked
    so."""

    name: str
    base: str  # "mini" or "sdxl"

    # the adapter
    encoder: str = "IDEncoder"  # v1; "IDFormer" is v1.1
    encoder_width: int = 1024  # hidden width of the encoder's MLPs; published 1024
    projection: Projection = "none"  # while training: choice; at inference ortho_v2
    num_zero: int = 0  # zero tokens while training: choice

    # the diffusion branch
    paired: bool = False  # features of another picture of the same person (the miniature's data alone has one): choice
    drop_identity: float = 0.1  # features zeroed, so that guidance has a "nobody": choice
    gamma: float | None = None  # min-SNR-gamma: choice
    inside: float = 1.0  # weight of the face over the rest: choice
    features: float = 1.0  # times what the face has above 1, around the landmarks: with inside 3, 4 makes 9 of 3: choice
    late: float = 0.0  # density of the drawn times is t to this power; 0 is even: choice

    # the lightning branch (stages 2 and 3)
    begin: str | None = None  # the recipe whose adapter this one starts from
    id_loss: IDLossKind = "none"
    id_weight: float = 1.0
    semantic: float = 0.0  # weight of L_sem, lambda_align-sem
    layout: float = 0.0  # weight of L_layout
    id_prompt: str | None = ID_PROMPT  # None: each picture's own sentence
    align_prompts: tuple[str, ...] = ALIGN_PROMPTS  # none: each picture's own sentence
    fast_batch: int = 0  # pictures of each pair, over all processes
    fast_steps: int = 4
    last: int = 1  # of them, those that carry gradient
    walk_base: bool = (
        False  # the lightning branch walks on the base too, by turns with the fast ones: choice
    )
    guidance: float = 1.0
    sampler: str = "euler"  # the paper names none for training: choice
    checkpoint: bool = False  # activations are computed again in the backward pass: of the walk, at full size of the U-Net too
    align_one_step: bool = False  # queries of one random step instead of all that carry gradient
    pixels: int | None = None  # width of the lightning branch's pictures; None is the base's own

    # the optimizer: all choices
    batch: int = 32  # over all processes
    accumulate: int = (
        1  # parts in which each process makes its share of a step, one after the other
    )
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

    def schedule(self) -> TrainerConfig:
        """The loop's part of the recipe."""
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
    """The paper's stage 1, L_diff alone, on the miniature.

    The rate is higher and the batch larger than at full size because the adapter is three orders smaller, and the optimizer
    is the one that its base was trained with: under AdamW the keys grew until every position asked one token. A face is
    a third of the picture and the only part that says who it is, hence its weight. No min-SNR: with the v-prediction
    it would forget high noise, where the shape of a face is decided; and times of high noise are drawn more often.

    Features are of another picture of the person. Those of the picture itself tell its light, pose and expression too, which
    move more of the picture than who it is: an adapter of 137,000 pictures had learned nothing else (benchmarks/mini-build.md).
    """
    return Recipe(
        "mini_stage1",
        base="mini",
        encoder_width=96,
        inside=3.0,
        features=4.0,
        paired=True,
        late=1.0,
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
    """The ablation: the ID loss on x_0 predicted in one step from x_t, on top of L_diff."""
    return replace(_mini_continued("mini_naive", begin="mini_stage1"), id_loss="naive")


def mini_stage2() -> Recipe:
    """The most identity: L_diff and the ID loss at the end of the lightning branch."""
    return replace(_mini_continued("mini_stage2", begin="mini_stage1"), id_loss="accurate")


def mini_stage3() -> Recipe:
    """PuLID: stage 2 and the alignment of the lightning branch with itself without an identity.

    Three times the paper's weights, at its ratio: how it reduces its norms it does not say, and at the weights themselves
    stage 3 kept no more of the picture than stage 2 at a scale of the same likeness (benchmarks/mini-ablation.md). Every
    other walk is on the base: a stage 3 that only walked on the student kept three fifths of stage 2's likeness on the base at
    the same four times.
    """
    begun = _mini_continued("mini_stage3", begin="mini_stage2")
    return replace(begun, id_loss="accurate", semantic=1.8, layout=0.3, walk_base=True)


def _mini_continued(name: str, begin: str) -> Recipe:
    """Gradients go through the last three of four steps: a face's features are decided between t = 700 and 400, and the second
    step begins at 749 (benchmarks/mini-build.md).

    Prompts are the pictures' own sentences. An adapter that was asked for faces under one prompt alone had a likeness of .61
    there and of .28 under others: seventy layers may carry over from one sentence to the next, ten do not
    (benchmarks/mini-ablation.md). The diffusion branch, a third of a step's time, only has to keep what stage 1 taught: half
    of its pictures. Their times are drawn evenly, as in the paper: the ID loss is cheapest to please in the last step, at
    t = 250, with patterns that no later layer asks about, and with stage 1's late times L_diff saw one picture there.
    """
    return replace(
        mini_stage1(),
        name=name,
        begin=begin,
        late=0.0,
        batch=24,
        lr=1e-3,
        steps=6_000,
        id_prompt=None,
        align_prompts=(),
        fast_batch=16,
        last=3,
        warmup=30,
        decay=0.5,
        validate_every=200,
    )


def sdxl_stage1() -> Recipe:
    """The paper's stage 1 at full size.

    1.5 million pictures and 8 A100 are disclosed; rate, batch and steps are those of IP-Adapter-FaceID on SDXL, the nearest
    system whose figures are public.
    """
    return Recipe(
        "sdxl_stage1", base="sdxl", batch=64, steps=100_000, lr=1e-4, warmup=1000, checkpoint=True
    )


def sdxl_stage2() -> Recipe:
    """The paper's stage 2: 768 pixels, four steps, less than 30,000 iterations. Gradients go through all four, the dearest of
    its published forms (3.3 seconds for the last step's 2.6): that one begins at t = 249, and who is seen is decided before
    (`_mini_continued`)."""
    return replace(
        sdxl_stage1(),
        name="sdxl_stage2",
        begin="sdxl_stage1",
        batch=32,
        steps=30_000,
        lr=1e-5,
        id_loss="accurate",
        fast_batch=8,
        last=4,
        pixels=768,
    )


def sdxl_stage3() -> Recipe:
    """The paper's stage 3: weights 1.0 for L_id, 0.6 for L_sem, 0.1 for L_layout, over all layers and all four steps."""
    return replace(sdxl_stage2(), name="sdxl_stage3", begin="sdxl_stage2", semantic=0.6, layout=0.1)


def v11(recipe: Recipe) -> Recipe:
    """The same with the encoder of v1.1, `IDFormer`."""
    begin = recipe.begin and f"{recipe.begin}_v11"
    return replace(recipe, name=f"{recipe.name}_v11", begin=begin, encoder="IDFormer")


_NAMED = (mini_stage1, mini_naive, mini_stage2, mini_stage3, sdxl_stage1, sdxl_stage2, sdxl_stage3)

RECIPES: dict[str, Callable[[], Recipe]] = {
    **{f.__name__: f for f in _NAMED},
    **{f"{f.__name__}_v11": lambda f=f: v11(f()) for f in _NAMED},  # type: ignore[misc]
}


def find_recipe(name: str) -> Recipe:
    """The recipe called `name`. Raises OptionError that lists what there is."""
    if name not in RECIPES:
        raise OptionError(
            f"there is no recipe {name!r}; the known ones are {', '.join(sorted(RECIPES))}"
        )
    return RECIPES[name]()
