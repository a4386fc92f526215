"""Prompts of the ID loss and of the alignment losses (PuLID, arXiv 2404.16022, appendix)."""

from __future__ import annotations

ID_PROMPT = "portrait, color, cinematic"
ALIGN_PROMPTS = (
    "portrait, color, cinematic",
    "portrait, anime artwork",
    "portrait, comic art, graphic novel art",
    "portrait, digital artwork, illustrative, painterly, matte painting",
    "portrait, magnificent, celestial, ethereal, painterly, epic, majestic, magical, fantasy art, "
    "cover art, dreamy",
    "portrait, vibrant, professional, sleek, modern, minimalist, graphic, line art, "
    "vector graphics",
    "portrait, cyberpunk, vaporwave, neon, vibes, vibrant, stunningly beautiful, crisp, detailed, "
    "sleek, ultramodern, magenta highlights, dark purple shadows, high contrast, cinematic, "
    "ultra detailed, intricate, professional",
    "portrait, energetic brushwork, bold colors, abstract forms, expressive, emotional",
    "portrait, film noir style, monochrome, high contrast, dramatic shadows, 1940s style, "
    "mysterious, cinematic",
    "portrait, papercut, mixed media, textured paper, overlapping, asymmetrical, abstract, vibrant",
    "portrait, paper mache representation, 3D, sculptural, textured, handmade, vibrant, fun",
    "portrait, vaporwave style, retro aesthetic, cyberpunk, vibrant, neon colors, "
    "vintage 80s and 90s style, highly detailed",
    "portrait, watercolor painting, vibrant, beautiful, painterly, detailed, textural, artistic",
    "portrait, impressionist painting, loose brushwork, vibrant color, light and shadow play",
    "portrait, expressionist, raw, emotional, dynamic, distortion for emotional effect, vibrant, "
    "use of unusual colors, detailed",
)
"""The alignment draws one of them for each step."""
