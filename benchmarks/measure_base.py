"""Measure base models of the miniature on the prompts of held-out scenes.

    python benchmarks/measure_base.py src/openpulid/mini/weights/pipeline OTHER

Each folder has the subfolders `unet` and `vae`. Everything else is that of the installed miniature.
The figures are those of `pulid mini build base`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from openpulid.bench.measurement import append_measurement, describe_measurement
from openpulid.diffusion.patch_vae import PatchAutoencoderKL
from openpulid.mini.evaluation.image_evaluator import GUIDANCE, ImageEvaluator
from openpulid.mini.models import build_pipeline
from openpulid.mini.train.build_context import BuildContext
from openpulid.pipelines.presets import MINIATURE


def main() -> None:
    """Measure each folder at each guidance scale, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="+")
    parser.add_argument("--guidance", type=float, nargs="+", default=[GUIDANCE])
    parser.add_argument("--prompts", type=int, help="by default all 512")
    parser.add_argument("-o", "--out", type=Path)
    arguments = parser.parse_args()
    cpu = torch.device("cpu")
    context = BuildContext(Path(), MINIATURE, cpu)
    rows = []
    for folder in arguments.folder:
        unet = UNet2DConditionModel.from_pretrained(folder / "unet").eval()
        vae = PatchAutoencoderKL.from_pretrained(folder / "vae").eval()
        tokenizer = context.load_tokenizer()
        pipe = build_pipeline(unet, vae, context.load_text_encoders(), tokenizer)
        for guidance in arguments.guidance:
            evaluator = ImageEvaluator.load(MINIATURE, cpu, pipe=pipe, guidance=guidance)
            figures = evaluator.evaluate(arguments.prompts)
            rows.append({"folder": str(folder), "guidance": guidance, **figures})
            print(json.dumps(rows[-1]), flush=True)
    if arguments.out is not None:
        configuration = {"prompts": arguments.prompts or "all"}
        measurement = describe_measurement(configuration, {"rows": rows}, cpu)
        append_measurement(arguments.out, "bases", measurement)


if __name__ == "__main__":
    main()
