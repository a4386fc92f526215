"""Evaluation of PuLID adapters on held-out people, on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from openpulid.identity.extractor import MiniExtractor
from openpulid.io.image_grid import image_grid, to_pil
from openpulid.methods.pulid import PuLID
from openpulid.mini.accelerated.autoencoder import decode
from openpulid.mini.accelerated.evaluation import match_attributes, requested_classes, seeded_noise
from openpulid.mini.accelerated.face_detection import embed_faces
from openpulid.mini.accelerated.rollouts import rollout
from openpulid.mini.accelerated.state import RunState
from openpulid.mini.accelerated.train_set import time_ids
from openpulid.mini.data import token_ids
from openpulid.mini.evaluation.prompts import sample_prompts
from openpulid.training.pulid import TextConditioning
from openpulid.world import HELD_OUT_PEOPLE, Person, Scene, render


class AdapterEvaluation:
    """Neutral portraits of held-out people, and prompts for each.

    Args:
        run: its metric models, base and prompts are used.
        extractor: extracts the identities.
        people: number of people.
        prompts: prompts per person.
    """

    def __init__(
        self, run: RunState, extractor: MiniExtractor, people: int = 64, prompts: int = 4
    ) -> None:
        self.run = run
        device = run.device
        people = min(people, max(2, run.sizes.prompts // prompts))
        portraits = render(
            [Person.from_seed(HELD_OUT_PEOPLE + k) for k in range(people)],
            [Scene()] * people,
            device=device,
        )
        self.portraits = portraits.image
        with torch.no_grad():
            self.id_cond, self.hidden = extractor.extract_batch(
                portraits.image, portraits.face, portraits.landmarks
            )
        self.prompts = sample_prompts(people, prompts)
        tokens = token_ids(run.tokenizer, [prompt.prompt for prompt in self.prompts])
        self.text = run.text_encoders(tokens.to(device))
        self.person = torch.tensor([prompt.person for prompt in self.prompts], device=device)
        self.requested = requested_classes(self.prompts, device)
        self.gallery, _ = embed_faces(
            run.evaluation.detector, run.evaluation.recognition, self.portraits
        )

    @torch.no_grad()
    def measure(
        self, adapter: PuLID, pipe: Any, name: str, scales: Sequence[float] = (0.7, 1.0)
    ) -> dict[str, Any]:
        """Generate and measure images with an adapter, and add a contact sheet.

        Args:
            adapter: the adapter, attached to `pipe`.
            pipe: the base's pipeline.
            name: of the adapter, for the sheet.
            scales: identity scales.

        Returns:
            For each scale `face_sim` and `rank1` of the evaluator's recognition model,
            `attributes` and `face_found`.
        """
        run = self.run
        noise = seeded_noise(self.prompts, pipe.unet).to(run.device)
        ids = time_ids(run.evaluation.size, len(noise), run.device)
        text = TextConditioning(self.text.embeds, self.text.pooled, ids)
        hidden = [level[self.person] for level in self.hidden]
        tokens = adapter.encode(self.id_cond[self.person], hidden)
        negative = adapter.unconditional(self.id_cond[:1], [level[:1] for level in self.hidden])
        metrics = {}
        for scale in scales:
            with adapter.use_tokens(
                tokens,
                scale=scale,
                projection="none",
                negative=negative,
                guided=True,
                pipe=pipe,
            ):
                latents = rollout(pipe.unet, noise, text, every=20)[:, -1]
            images = decode(run.vae, latents)
            metrics[f"scale {scale}"] = self._score(images)
        title = f"{name}: reference image, then four prompts, scale {scales[-1]}"
        run.out.add_sheet(title, self._draw_sheet(images))
        return metrics

    def _score(self, images: Tensor) -> dict[str, float]:
        evaluation = self.run.evaluation
        embeddings, has_face = embed_faces(evaluation.detector, evaluation.recognition, images)
        matches = match_attributes(evaluation.classifier, images, self.requested)
        metrics = {
            "attributes": matches.nanmean(1).nanmean().item(),
            "face_found": has_face.float().mean().item(),
        }
        if len(embeddings):
            cosine = normalize(embeddings, dim=-1) @ normalize(self.gallery, dim=-1).T
            person = self.person[has_face]
            metrics["face_sim"] = cosine.gather(1, person[:, None]).mean().item()
            metrics["rank1"] = (cosine.argmax(1) == person).float().mean().item()
        return metrics

    def _draw_sheet(self, images: Tensor, people: int = 10) -> Image.Image:
        prompts = len(images) // len(self.portraits)
        rows = []
        for k in range(min(people, len(self.portraits))):
            generated = images[k * prompts : (k + 1) * prompts]
            rows.append(to_pil(torch.cat([self.portraits[k : k + 1], generated]).float().cpu()))
        return image_grid(rows, 144)
