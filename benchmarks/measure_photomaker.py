"""Measure which facial values PhotoMaker's vision encoder reads on the miniature.

    python benchmarks/measure_photomaker.py -o benchmarks/mini-baselines.json

As in `measure_values.py`, a ridge regression predicts each facial value: from class tokens of CLIP,
from those of PhotoMaker's vision encoder, whose shipped weights started as that CLIP, and from its
identity tokens.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from measure_values import Outputs
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from openpulid.bench.measurement import append_measurement, describe_measurement
from openpulid.identity.eva_clip import normalize_for_clip
from openpulid.methods.photomaker.photomaker import PhotoMaker
from openpulid.mini.data import load_faces
from openpulid.mini.evaluation.value_probe import ValueRegression, explained_variance
from openpulid.mini.train.portraits import find_frontal
from openpulid.mini.train.recognition import FACIAL_COLUMNS
from openpulid.pipelines.presets import MINIATURE
from openpulid.world import FACIAL, WorldDataset


@torch.no_grad()
def compute(
    clip: CLIPVisionModelWithProjection, method: PhotoMaker, data: WorldDataset, rows: np.ndarray
) -> tuple[Outputs, Tensor]:
    """Return output -> (N, D), and the facial values (N, V)."""
    parts: dict[str, list[Tensor]] = {}
    for chunk in np.array_split(rows, -(-len(rows) // 128)):
        images, _, _ = load_faces(data, chunk, torch.device("cpu"))
        pixels = normalize_for_clip(images)
        states = method.encoder.vision_model(pixel_values=pixels).last_hidden_state
        outputs = {
            "class token of CLIP": clip.vision_model(pixel_values=pixels).last_hidden_state[:, 0],
            "class token of PhotoMaker": states[:, 0],
            "identity token": method.encoder.encode(states, None)[:, 0],
        }
        for name, output in outputs.items():
            parts.setdefault(name, []).append(output)
    values = torch.from_numpy(np.asarray(data.vectors[rows][:, FACIAL_COLUMNS]))
    return {name: torch.cat(chunks).double() for name, chunks in parts.items()}, values.double()


def main() -> None:
    """Fit on portraits of training people, measure on held-out people, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=MINIATURE)
    parser.add_argument("--runs", type=Path, default=Path("runs/mini"), help="datasets")
    parser.add_argument("-o", "--out", type=Path)
    options = parser.parse_args()
    clip = CLIPVisionModelWithProjection.from_pretrained(options.weights / "clip")
    method = PhotoMaker.load(options.weights / "photomaker.safetensors")
    train = WorldDataset.open(options.runs / "world-portraits")
    held_out = WorldDataset.open(options.runs / "world-held-out")
    outputs, values = compute(clip, method, train, np.arange(0, len(train), 3))
    others, other_values = compute(clip, method, held_out, np.flatnonzero(find_frontal(held_out)))
    columns = {
        name: explained_variance(ValueRegression(outputs[name], values)(others[name]), other_values)
        for name in outputs
    }
    rows = {
        value: {name: round(column[i].item(), 3) for name, column in columns.items()}
        for i, value in enumerate(FACIAL)
    }
    rows["mean"] = {name: round(column.mean().item(), 3) for name, column in columns.items()}
    for value, row in rows.items():
        print(value, *(f"{name} {figure:.2f}" for name, figure in row.items()), sep=" | ")
    if options.out is not None:
        measurement = describe_measurement({}, {"rows": rows}, torch.device("cpu"))
        append_measurement(options.out, "PhotoMaker's facial values", measurement)


if __name__ == "__main__":
    main()
