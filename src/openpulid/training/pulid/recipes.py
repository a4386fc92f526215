"""Training recipes by name, one function per variant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from openpulid.errors import OptionError, suggest
from openpulid.training.pulid.recipe import Recipe


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

    - Every second rollout is on the base: a stage 3 with rollouts on the student alone kept three
      fifths of stage 2's similarity on the base at the same four timesteps. These rollouts have the
      guidance of the preset, which amplifies an identity that was trained without it.
    - A loss outside the face preserves more of the image than the alignment, and next to it the
      weights of the alignment hardly matter: they are half of the paper's
      (benchmarks/mini-build.md).
    """
    recipe = _continue_mini("mini_stage3", init_from="mini_stage2")
    return replace(
        recipe,
        id_loss="accurate",
        semantic_weight=0.3,
        layout_weight=0.05,
        outside_weight=2.0,
        rollout_on_base=True,
        base_guidance_scale=3.0,
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
      more high noise, in which the shape of a face is decided. A mean of .5, and SDXL's rate, learn
      less than half as much in 300 steps (benchmarks/flux-training.md).
    - Rollouts on the base have no guidance.
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
        logit_mean=recipe.timestep_bias,
        timestep_bias=0.0,
        lr=1e-3,
        base_guidance_scale=1.0,
        text_tokens=32,
    )


def mini_flux_stage3() -> Recipe:
    """Return stage 3 for the miniature with FLUX's architecture.

    Next to the ID loss the alignment has a third of the weight that it has on SDXL: with more,
    stage 3 loses a fifth of stage 2's similarity (benchmarks/mini-build.md).
    """
    return replace(
        on_mini_flux(mini_stage3()), id_weight=2.0, semantic_weight=0.2, layout_weight=0.04
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
    return _rename(recipe, "flux2_klein", base="flux2-klein", text_tokens=512)


def on_z_image(recipe: Recipe) -> Recipe:
    """Return a recipe of FLUX.1 for Z-Image; Z-Image-Turbo is the few-step model, of eight steps.

    Nobody has published a PuLID for Z-Image. The encoder has the sizes of PuLID 0.9.1 for FLUX.1,
    and the attention has its heads; it follows every second of the 30 blocks that see image and
    text. No adapter of another base fits, whose blocks have another width.
    """
    return _rename(recipe, "z_image", base="z-image", text_tokens=512, rollout_steps=8)


def on_qwen_image(recipe: Recipe) -> Recipe:
    """Return a recipe of FLUX.1 for Qwen-Image.

    Nobody has published a PuLID for Qwen-Image. Encoder and attention have the sizes of PuLID 0.9.1
    for FLUX.1, which `--begin` can start from; the attention follows every third of 60 blocks, as
    many as in FLUX.1. There is stage 1 alone: no few-step model of the base is published as a
    pipeline.
    """
    return _rename(recipe, "qwen_image", base="qwen-image", text_tokens=512, double_interval=3)


def _rename(recipe: Recipe, base_name: str, **changes: Any) -> Recipe:
    """Return a recipe of FLUX.1 with another base in its name, and other changes."""
    name = recipe.name.replace("flux", base_name)
    init_from = recipe.init_from and recipe.init_from.replace("flux", base_name)
    return replace(recipe, name=name, init_from=init_from, **changes)


def with_v11_encoder(recipe: Recipe) -> Recipe:
    """Return the recipe with the encoder of v1.1, `IDFormer`."""
    init_from = recipe.init_from and f"{recipe.init_from}_v11"
    return replace(recipe, name=f"{recipe.name}_v11", init_from=init_from, encoder="IDFormer")


def _derive(
    derive: Callable[[Recipe], Recipe], variant: Callable[[], Recipe]
) -> Callable[[], Recipe]:
    return lambda: derive(variant())


_MINI_VARIANTS = (mini_stage1, mini_naive, mini_stage2)

_VARIANTS = (*_MINI_VARIANTS, mini_stage3, sdxl_stage1, sdxl_stage2, sdxl_stage3)

_FLUX_VARIANTS = (flux_stage1, flux_naive, flux_stage2, flux_stage3)

_FLUX_RELATIVES = {"flux2_klein": on_flux2_klein, "z_image": on_z_image}

RECIPES: dict[str, Callable[[], Recipe]] = {
    **{variant.__name__: variant for variant in (*_VARIANTS, mini_flux_stage3, *_FLUX_VARIANTS)},
    **{f"{variant.__name__}_v11": _derive(with_v11_encoder, variant) for variant in _VARIANTS},
    **{
        variant.__name__.replace("mini", "mini_flux"): _derive(on_mini_flux, variant)
        for variant in _MINI_VARIANTS
    },
    **{
        variant.__name__.replace("flux", base): _derive(derive, variant)
        for base, derive in _FLUX_RELATIVES.items()
        for variant in _FLUX_VARIANTS
    },
    "qwen_image_stage1": _derive(on_qwen_image, flux_stage1),
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
