"""Names of the options that have an effect with the models of a preset, and a negative prompt."""

from __future__ import annotations

NEGATIVE_PROMPT = (
    "flaws in the eyes, flaws in the face, flaws, lowres, non-HDRi, low quality, worst quality, "
    "artifacts noise, text, watermark, glitch, deformed, mutated, ugly, disfigured, hands, "
    "low resolution, partially rendered objects, deformed or partially rendered eyes, deformed, "
    "deformed eyeballs, cross-eyed, blurry"
)
"""Negative prompt of PuLID's published SDXL demo."""

SAMPLING_OPTIONS = frozenset(
    ("negative_prompt", "width", "height", "num_inference_steps", "guidance_scale")
)
SDXL_OPTIONS = SAMPLING_OPTIONS | {"scale", "start", "end", "controls", "loras", "embeddings"}
PULID_SDXL_OPTIONS = SDXL_OPTIONS | {
    *("projection", "num_zero", "compiled"),
    *("style_image", "pose_from_prompt"),
}
PULID_FLUX_OPTIONS = SAMPLING_OPTIONS | {
    "scale",
    "start",
    "end",
    "start_step",
    "pose_from_prompt",
    "style_image",
    "true_cfg_scale",
    "timestep_to_start_cfg",
    "max_sequence_length",
    "controls",
    "memory",
    "loras",
    "embeddings",
}

PULID_CHROMA_OPTIONS = PULID_FLUX_OPTIONS - {
    *("true_cfg_scale", "timestep_to_start_cfg"),  # its guidance is classifier-free
    *("controls", "style_image", "embeddings"),  # those of FLUX do not fit
}

PULID_FLUX2_OPTIONS = PULID_CHROMA_OPTIONS - {
    *("guidance_scale", "negative_prompt"),  # distilled without guidance
}

PULID_MINI_FLUX_OPTIONS = PULID_FLUX_OPTIONS - {
    *("guidance_scale", "memory"),  # no guidance embedding; small enough for any memory
    *("controls", "style_image", "embeddings"),  # those of FLUX do not fit
}
