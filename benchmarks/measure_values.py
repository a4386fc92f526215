"""Measure at which stage of the miniature the facial values of a person are lost.

    python benchmarks/measure_values.py --adapter runs/mini/stage3/adapter.safetensors

A ridge regression predicts each facial value from the output of a stage, fitted on images of
training people: the embeddings of the recognition models, the vision encoder's levels, the face
latents of W+ Adapter if it is trained, the tokens of adapters, and embeddings of images that the
autoencoder decoded. The table has the share of the variance that it explains on frontal photos of
held-out people (R2), and the cosine of the embeddings after a change of one value from 0.2 to 0.8.
Images that an adapter generates have the squared correlation of the values that the loss's model
reads from them with the true ones.

The last lines say what an adapter could show that reads the identity's features perfectly: the
facial values that the regression predicts from them are rendered in the scenes of prompts and
compared with the reference image by the benchmark's face recognition model.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from openpulid.bench.measurement import append_measurement, describe_measurement
from openpulid.faces.align import align_faces
from openpulid.faces.miniature import CROP, RECOGNITION_MODELS
from openpulid.io.checkpoints import load_module
from openpulid.io.image_grid import to_pil
from openpulid.methods.pulid import PuLID
from openpulid.mini.data import load_faces
from openpulid.mini.evaluation.evaluate import generate_images
from openpulid.mini.evaluation.prompts import EvalPrompt, render_portraits, sample_prompts
from openpulid.mini.evaluation.scorers import FaceScorer
from openpulid.mini.evaluation.value_probe import ValueRegression, explained_variance
from openpulid.mini.evaluation.value_reader import get_facial_values
from openpulid.mini.train.loss_models import load_face_embedder
from openpulid.mini.train.portraits import find_frontal
from openpulid.mini.train.recognition import (
    FACIAL_COLUMNS,
    RecognitionEvaluator,
    embed_crops,
    render_value_changes,
    to_uint8,
)
from openpulid.pipelines.factory import load_extractor
from openpulid.pipelines.loading import load
from openpulid.pipelines.presets import MINIATURE, mini, mini_lightning
from openpulid.pipelines.selection import with_method
from openpulid.pipelines.studio import Studio
from openpulid.pipelines.weights import missing_weights
from openpulid.world import FACIAL, HELD_OUT_PEOPLE, Person, Scene, WorldDataset, render

PROMPT = "portrait, front view, calm, photo"
Outputs = dict[str, Tensor]


class Stages:
    """Computes the output of each stage for images of a dataset.

    Args:
        weights: folder of the miniature's weights.
        studio: loaded from the same weights.
        adapters: name -> adapter.
    """

    def __init__(self, weights: Path, studio: Studio, adapters: dict[str, PuLID]) -> None:
        self.models = {
            name: load_module(cls, weights / f"recognition-{name}.safetensors")
            for name, cls in RECOGNITION_MODELS.items()
        }
        latents = with_method(mini(weights), "w-plus")
        is_trained = not missing_weights(latents)
        self.latents: Any = load_extractor(latents, "cpu") if is_trained else None
        self.extractor: Any = studio.extractor
        self.vae: Any = studio.pipe.vae
        self.adapters = adapters

    @torch.no_grad()
    def compute(self, data: WorldDataset, rows: np.ndarray) -> tuple[Outputs, Tensor]:
        """Return stage -> (N, D) outputs, and the facial values (N, V)."""
        parts: dict[str, list[Tensor]] = {}
        for chunk in np.array_split(rows, -(-len(rows) // 128)):
            images, masks, landmarks = load_faces(data, chunk, torch.device("cpu"))
            latents = self.vae.encode(2 * images - 1).latent_dist.mode()
            decoded = ((self.vae.decode(latents).sample + 1) / 2).clamp(0, 1)
            for suffix, source in (("", images), (", decoded", decoded)):
                crops = to_uint8(align_faces(source, masks, landmarks, CROP))
                for name, model in self.models.items():
                    parts.setdefault(name + suffix, []).append(embed_crops(model, crops))
            id_cond, hidden = self.extractor.extract_batch(images, masks, landmarks)
            parts.setdefault("identity", []).append(id_cond)
            pooled = [torch.cat([level[:, 0], level[:, 1:].mean(1)], 1) for level in hidden]
            parts.setdefault("vision encoder", []).append(torch.cat(pooled, 1))
            if self.latents is not None:
                codes = self.latents.extract_batch(images, masks, landmarks)
                parts.setdefault("face latents", []).append(codes.flatten(1))
            for name, adapter in self.adapters.items():
                tokens = adapter.encode(id_cond, hidden).flatten(1)
                parts.setdefault(f"tokens of {name}", []).append(tokens)
        values = torch.from_numpy(np.asarray(data.vectors[rows][:, FACIAL_COLUMNS]))
        return {name: torch.cat(chunks).double() for name, chunks in parts.items()}, values.double()


def squared_correlation(predictions: Tensor, values: Tensor) -> Tensor:
    """Compute the squared correlation of each value over the people, (V,), signed."""
    a, b = (x - x.mean(0) for x in (predictions, values))
    correlation = (a * b).sum(0) / (a.square().sum(0) * b.square().sum(0)).sqrt()
    return correlation * correlation.abs()


def read_generated(studio: Studio, embed: Any, regression: ValueRegression, people: int) -> Tensor:
    """Generate one portrait of each held-out person and compare the values it shows, (V,)."""
    portraits = render_portraits(people)
    identities = [studio.identify([image]) for image in to_pil(portraits)]
    prompts = [EvalPrompt(person, PROMPT, person, Scene()) for person in range(people)]
    batches = [prompts[start : start + 16] for start in range(0, people, 16)]
    faces = embed(generate_images(studio, batches, identities))
    names = [str(HELD_OUT_PEOPLE + person) for person in range(people)]
    values = get_facial_values(names).double()[faces.has_face]
    return squared_correlation(regression(faces.embeddings[faces.has_face].double()), values)


@torch.no_grad()
def score_renderings(
    studio: Studio, regression: ValueRegression, scorer: FaceScorer, people: int
) -> dict[str, dict[str, float]]:
    """Render held-out people with predicted and with true values, and score the renderings.

    Args:
        studio: extracts the identities.
        regression: predicts facial values from `id_cond`.
        scorer: the benchmark's face recognition.
        people: number of people, with two prompts each.

    Returns:
        "predicted" and "true" -> face_sim, and rank1 among the people.
    """
    portraits = render_portraits(people)
    features = torch.cat([studio.identify([image]).id_cond[0] for image in to_pil(portraits)])
    names = [str(HELD_OUT_PEOPLE + person) for person in range(people)]
    values = {
        "predicted": regression(features.double()).clamp(0, 1),
        "true": get_facial_values(names).double(),
    }
    prompts = sample_prompts(people, 2)
    own = torch.tensor([prompt.person for prompt in prompts])
    references = normalize(scorer(portraits).embeddings, dim=-1)
    scores = {}
    for name, rows in values.items():
        drawn = [
            Person.from_seed(HELD_OUT_PEOPLE + person).replace(
                **dict(zip(FACIAL, rows[person].tolist(), strict=True))
            )
            for person in own.tolist()
        ]
        faces = scorer(render(drawn, [prompt.scene for prompt in prompts]).image)
        similarity = normalize(faces.embeddings, dim=-1) @ references.T
        similarity, right = similarity[faces.has_face], own[faces.has_face]
        scores[name] = {
            "face_sim": round(similarity[torch.arange(len(right)), right].mean().item(), 3),
            "rank1": round((similarity.argmax(1) == right).float().mean().item(), 3),
        }
    return scores


def main() -> None:
    """Measure all stages, and write and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=MINIATURE)
    parser.add_argument("--runs", type=Path, default=Path("runs/mini"), help="datasets")
    parser.add_argument("--adapter", type=Path, nargs="*", default=[])
    parser.add_argument(
        "--people", type=int, default=128, help="people of generated and of rendered images"
    )
    parser.add_argument("-o", "--out", type=Path)
    options = parser.parse_args()
    cpu = torch.device("cpu")
    studio = load(mini_lightning(options.weights).with_defaults(scale=1.0), device="cpu")
    adapters = {path.stem: PuLID.load(path) for path in options.adapter}
    stages = Stages(options.weights, studio, adapters)
    train = WorldDataset.open(options.runs / "world-portraits")
    held_out = WorldDataset.open(options.runs / "world-held-out")
    outputs, values = stages.compute(train, np.arange(0, len(train), 3))
    other_outputs, other_values = stages.compute(held_out, np.flatnonzero(find_frontal(held_out)))
    columns = {}
    regressions: dict[str, ValueRegression] = {}
    for name in outputs:
        # a model reads decoded images with the regression of plain ones
        plain = name.removesuffix(", decoded")
        if plain not in regressions:
            regressions[plain] = ValueRegression(outputs[plain], values)
        columns[f"R2 {name}"] = explained_variance(
            regressions[plain](other_outputs[name]), other_values
        )
    changes = render_value_changes(16)
    nothing = torch.zeros(0)
    evaluator = RecognitionEvaluator(nothing, nothing, nothing, changes)
    for name, model in stages.models.items():
        cosines = evaluator.sensitivity(model)
        columns[f"cosine {name}"] = torch.tensor([cosines[value] for value in FACIAL])
    embed = load_face_embedder(options.weights, cpu)
    for name, adapter in adapters.items():
        adapted = Studio(studio.pipe, adapter, studio.extractor, studio.preset)
        columns[f"generated {name}"] = read_generated(
            adapted, embed, regressions["loss"], options.people
        )
    rows = {
        value: {name: round(column[i].item(), 3) for name, column in columns.items()}
        for i, value in enumerate(FACIAL)
    }
    rows["mean"] = {name: round(column.mean().item(), 3) for name, column in columns.items()}
    print("| value |", " | ".join(columns), "|")
    print("|---" * (len(columns) + 1) + "|")
    for value, row in rows.items():
        print(f"| {value} |", " | ".join(f"{figure:.2f}" for figure in row.values()), "|")
    scorer = FaceScorer.load(options.weights)
    scores = score_renderings(studio, regressions["identity"], scorer, options.people)
    for name, figures in scores.items():
        print(f"rendered with {name} values:", figures)
    if options.out is not None:
        configuration = {"adapters": list(adapters), "people": options.people}
        measurement = describe_measurement(configuration, {"rows": rows, "rendered": scores}, cpu)
        append_measurement(options.out, "values", measurement)


if __name__ == "__main__":
    main()
