"""PuLID's training as a `Task` of the loop: an adapter, the bases it is attached to, and a source of batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import product
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openpulid.diffusion.sampling import SAMPLERS
from openpulid.errors import OptionError
from openpulid.faces.embed import FaceEmbedder
from openpulid.methods.pulid.sdxl import PuLID
from openpulid.training.distributed import DistributedContext
from openpulid.training.pulid.branches import (
    DiffusionStep,
    RolloutConfig,
    denoise_until,
    diffusion_branch,
    lightning_branch,
    queries_at_step,
)
from openpulid.training.pulid.losses import (
    DiffusionLoss,
    IDLoss,
    LayoutAlignment,
    SemanticAlignment,
)
from openpulid.training.pulid.models import AttentionQK, BaseModel
from openpulid.training.pulid.recipes import Recipe
from openpulid.training.rng import StepRNG, microbatch_rngs
from openpulid.training.trainer import Losses

HELD_OUT_BATCHES = 4


class Batch(NamedTuple):
    """B pictures and who is in them. Features are of the face cropped from the picture itself (PuLID, section
    3.2)."""

    latents: Tensor  # (B, c, h, w) as the base wants them
    masks: Tensor | None  # (B, 1, h, w), 1 inside the face
    prompts: Sequence[str]
    id_cond: Tensor  # (B, C)
    hidden: Sequence[Tensor]  # five times (B, 1 + N, D)
    pictures: Tensor | None = None  # (B, 3, H, W) in [0, 1], of whom an ID loss wants to see
    landmarks: Tensor | None = (
        None  # (B, 5, 2) from 0 to 1 across the picture, for methods that are shown them
    )

    def to(self, device: torch.device) -> Batch:
        moved: dict[str, Any] = {
            name: x.to(device) for name, x in self._asdict().items() if isinstance(x, Tensor)
        }
        return self._replace(**moved, hidden=[level.to(device) for level in self.hidden])

    def some(self, count: int) -> Batch:
        """`count` of them at equal distances: those that the parts of several processes would give together."""
        rows = evenly_spaced(len(self.latents), count)
        kept: dict[str, Any] = {
            name: x[rows] for name, x in self._asdict().items() if isinstance(x, Tensor)
        }
        return self._replace(
            **kept,
            prompts=[self.prompts[k] for k in rows],
            hidden=[level[rows] for level in self.hidden],
        )


def loss_weight_map(batch: Batch, features: float) -> Tensor | None:
    """The masks (B, 1, h, w) with up to `features` times the weight around eyes, nose and corners of the mouth.

    A face's skin and outline are most of its area and nearly all of its loss; who it is, is in a few positions of the latents.
    """
    if batch.masks is None or batch.landmarks is None or features == 1.0:
        return batch.masks
    height, width = batch.masks.shape[-2:]
    places = batch.landmarks.float()
    ys = (torch.arange(height, device=places.device) + 0.5) / height
    xs = (torch.arange(width, device=places.device) + 0.5) / width
    apart = (
        (places[:, 0] - places[:, 1]).norm(dim=-1).clamp(min=0.05)
    )  # the eyes: from the side they seem closer
    away = (xs[None, None, None] - places[..., 0, None, None]).square() + (
        ys[:, None] - places[..., 1, None, None]
    ).square()
    near = torch.exp(-away / (2 * (0.35 * apart[:, None, None, None]).square())).amax(
        1, keepdim=True
    )
    return batch.masks * (1.0 + (features - 1.0) * near.to(batch.masks))


def evenly_spaced(length: int, count: int) -> list[int]:
    """`count` rows of `length` at equal distances from the first on, or all; the same rows whether found in the whole or in
    each of its equal parts."""
    count = min(count, length)
    return [k * length // count for k in range(count)]


class Source(Protocol):
    """Where batches come from. The batch size is the source's; everything random is drawn from `draw`."""

    def batch(self, draw: StepRNG) -> Batch:
        """The rank's part of the global batch."""


class PuLIDTask:
    """The adapter alone trains (PuLID, section 3): on L_diff, and in the later stages on what the lightning branch shows.

    Args:
        recipe: what to do; its weights and rates.
        base: frozen; of the diffusion branch.
        adapter: in float32, on the base's device; it is attached to every base here.
        data: batches to train on.
        held_out: batches of people who are not trained on; without it nothing is validated.
        picture: makes the contact sheet of a validation.
        fast: frozen bases of the lightning branch, taken by turns (and by the ranks of a run), with `base` last where the
            recipe says so: an adapter that learned on several serves others too.
        faces: sees faces for the ID loss, with a recogniser other than the encoder's.

    Raises:
        OptionError: the recipe asks for a lightning branch or an ID loss and what they need is not given.
    """

    def __init__(
        self,
        recipe: Recipe,
        base: BaseModel,
        adapter: PuLID,
        data: Source,
        held_out: Source | None = None,
        picture: Callable[[], Image.Image] | None = None,
        fast: Sequence[BaseModel] = (),
        faces: FaceEmbedder | None = None,
    ) -> None:
        self.recipe, self.base, self.adapter = recipe, base, adapter
        self.data, self.held_out, self.picture = data, held_out, picture
        self.fast, self.faces = [*fast, base] if fast and recipe.walk_base else list(fast), faces
        aligned = recipe.semantic > 0 or recipe.layout > 0
        if (recipe.id_loss == "accurate" or aligned) and not (fast and recipe.fast_batch):
            raise OptionError(
                f"{recipe.name} needs a lightning branch: give fast=[base, ...] and a fast_batch"
            )
        if recipe.id_loss != "none" and not (faces and recipe.fast_batch):
            raise OptionError(
                f"{recipe.name} has an ID loss: give faces=FaceEmbedder(...) and a fast_batch"
            )
        self.aligned = aligned
        self.walk = RolloutConfig(
            recipe.fast_steps,
            recipe.last,
            recipe.guidance,
            SAMPLERS[recipe.sampler],
            checkpoint=recipe.checkpoint,
        )
        self.diffusion = DiffusionLoss(base.schedule, recipe.gamma, recipe.inside)
        self.likeness, self.semantic, self.layout = IDLoss(), SemanticAlignment(), LayoutAlignment()
        for pipe in {id(one.pipe): one.pipe for one in (base, *self.fast)}.values():
            adapter.attach(pipe)

    def modules(self) -> Mapping[str, nn.Module]:
        return {"adapter": self.adapter}

    def losses(self, draw: StepRNG) -> Iterator[Losses]:
        """{"diffusion"}, then {"id"}, then {"semantic", "layout"}, as far as the recipe has them; the figure `faces` is
        the share of pictures that count in the ID loss."""
        batch = self.data.batch(draw).to(self.base.device)
        draw.note("latents", batch.latents)
        draw.note("id_cond", batch.id_cond)
        kept = draw.rand(batch.latents.shape[:1], "drop") >= self.recipe.drop_identity
        yield from self._diffusion_losses(draw, batch, kept)
        if not self.fast:
            return
        if self.recipe.fast_batch % draw.world:
            raise OptionError(
                f"a fast_batch of {self.recipe.fast_batch} cannot be shared by {draw.world} processes or parts"
            )
        fast = self.fast[(draw.step + draw.rank) % len(self.fast)]
        few = batch.some(self.recipe.fast_batch // draw.world)
        if self.recipe.id_loss == "accurate":
            yield from self._id_losses(draw, fast, few)
        if self.aligned:
            yield from self._alignment_losses(draw, fast, few)

    @torch.no_grad()
    def validate(self) -> Mapping[str, float]:
        """L_diff on held-out people with their own identity, with another's, and with none, same noise in all three,
        at even times; with a lightning branch also `held_out_likeness`, the cosine of its pictures, and `held_out_faces`."""
        if self.held_out is None:
            return {}
        sums = dict.fromkeys(("own", "other", "none"), 0.0)
        parts = self._parts()
        for step, part in product(range(HELD_OUT_BATCHES), range(parts)):
            batch = self.held_out.batch(StepRNG(self.recipe.seed, step, part, parts)).to(
                self.base.device
            )
            everyone = torch.ones(len(batch.latents), dtype=torch.bool)
            people = {
                "own": batch,
                "other": swap_identities(batch),
                "none": drop_identity(batch, everyone),
            }
            for name, shown in people.items():
                with self._shown(self.base, shown):
                    loss, _ = self._diffusion(
                        StepRNG(self.recipe.seed, step, part, parts), batch, late=0.0
                    )
                sums[name] += loss.item() / HELD_OUT_BATCHES / parts
        found = {f"held_out_{name}": value for name, value in sums.items()}
        if self.fast and self.recipe.id_loss != "none":
            faces = lost = 0.0
            for draw in microbatch_rngs(self.recipe.seed, 0, 0, 1, parts):
                few = (
                    self.held_out.batch(draw)
                    .some(self.recipe.fast_batch // parts)
                    .to(self.base.device)
                )
                (losses,) = self._id_losses(draw, self.fast[0], few)
                faces += draw.figures["faces"].item() / parts
                lost += losses["id"].item() / self.recipe.id_weight / parts
            found |= {"held_out_likeness": 1 - lost / max(faces, 1e-6), "held_out_faces": faces}
        return found

    def _parts(self) -> int:
        """In how many parts a held-out batch is read: as a step's by all processes, because one alone validates and has memory
        for a share; with two people in each at least, for another's identity."""
        batch, fast = self.recipe.batch, self.recipe.fast_batch
        most = self.recipe.accumulate * DistributedContext(self.base.device).world
        fit = (n for n in range(most, 1, -1) if not (batch % n or fast % n) and batch // n > 1)
        return next(fit, 1)

    def sheet(self) -> Image.Image | None:
        return None if self.picture is None else self.picture()

    # -- one branch each --

    def _diffusion_losses(self, draw: StepRNG, batch: Batch, kept: Tensor) -> Iterator[Losses]:
        with self._shown(self.base, drop_identity(batch, ~kept)):
            loss, step = self._diffusion(draw, batch, self.recipe.late)
            losses = {"diffusion": loss}
            if self.recipe.id_loss == "naive":
                count = self.recipe.fast_batch // draw.world
                few = evenly_spaced(len(kept), count)
                latents = self.base.schedule.predict_x0(step.output[few], step.x_t[few], step.t[few])
                losses["id"] = self._unlike(draw, self.base, latents, batch.some(count), kept[few])
            yield losses

    def _diffusion(self, draw: StepRNG, batch: Batch, late: float) -> tuple[Tensor, DiffusionStep]:
        # SDXL is told the size that these pictures have, which is not always its own
        pixels = batch.latents.shape[-1] * self.base.pipe.vae_scale_factor
        step = diffusion_branch(
            self.base,
            draw,
            batch.latents,
            self.base.encode_text(batch.prompts, pixels=pixels),
            late,
        )
        return self.diffusion(step, loss_weight_map(batch, self.recipe.features)), step

    def _id_losses(self, draw: StepRNG, fast: BaseModel, few: Batch) -> Iterator[Losses]:
        noise = self._noise(draw, fast, few, "id.noise")
        guided = self.walk.guidance != 1
        text = self._text(fast, self._said(self.recipe.id_prompt, few), guided)
        with self._shown(fast, few, guided):
            walked = lightning_branch(fast, noise, text, self.walk)
            everyone = torch.ones(len(noise), dtype=torch.bool)
            yield {"id": self._unlike(draw, fast, walked.latents, few, everyone)}

    def _alignment_losses(self, draw: StepRNG, fast: BaseModel, few: Batch) -> Iterator[Losses]:
        noise = self._noise(draw, fast, few, "align.noise")
        prompts = self.recipe.align_prompts or (None,)
        chosen = int(
            torch.randint(len(prompts), (), generator=draw.generator("align.prompt"))
        )  # one for all ranks
        said = self._said(prompts[chosen], few)
        text = self._text(fast, said)
        if self.recipe.align_one_step:
            step = int(torch.randint(self.walk.steps, (), generator=draw.generator("align.step")))
            spoken = text
            if self.walk.guidance != 1:
                spoken = self._text(fast, said, guided=True)
            x, sigma = denoise_until(fast, noise, spoken, self.walk, step)
            asked = partial(queries_at_step, fast, x, sigma, text)
        else:
            asked = partial(self._asked_on_the_way, fast, noise, text)
        with torch.no_grad():
            target = asked()
        with self._shown(fast, few):
            own = asked()
            losses = {
                "semantic": self.recipe.semantic * self.semantic(own, target),
                "layout": self.recipe.layout * self.layout(own, target),
            }
            yield losses

    def _asked_on_the_way(self, fast: BaseModel, noise: Tensor, text: Any) -> list[AttentionQK]:
        walked = lightning_branch(fast, noise, text, self.walk, watch=True)
        return [layer for step in walked.attended for layer in step]

    # -- parts --

    def _unlike(
        self, draw: StepRNG, base: BaseModel, latents: Tensor, few: Batch, counted: Tensor
    ) -> Tensor:
        """The weighted ID loss of the pictures that these latents mean."""
        if self.faces is None or few.pictures is None:
            raise OptionError(
                "an ID loss needs the pictures of the batch, and somebody who sees faces in them"
            )
        with torch.no_grad():
            wanted = self.faces(few.pictures)
        decode = (
            partial(checkpoint, base.decode, use_reentrant=False)
            if self.walk.checkpoint
            else base.decode
        )
        shown = self.faces(decode(latents))
        found = wanted.has_face & shown.has_face & counted.to(shown.has_face.device)
        draw.figure("faces", found.float().mean())
        return self.recipe.id_weight * self.likeness(wanted.embeddings, shown.embeddings, found)

    def _noise(self, draw: StepRNG, fast: BaseModel, few: Batch, name: str) -> Tensor:
        return draw.randn((len(few.id_cond), *fast.shape(self.recipe.pixels)), name).to(fast.device)

    def _said(self, prompt: str | None, few: Batch) -> list[str]:
        return list(few.prompts) if prompt is None else [prompt] * len(few.id_cond)

    def _text(self, fast: BaseModel, prompts: list[str], guided: bool = False) -> Any:
        return fast.encode_text(prompts, pixels=self.recipe.pixels, guided=guided)

    def _shown(
        self, base: BaseModel, people: Batch, guided: bool = False
    ) -> AbstractContextManager[PuLID]:
        """The adapter with these people in use on a base."""
        return self.adapter.use_tokens(
            self.adapter.encode(people.id_cond, people.hidden),
            projection=self.recipe.projection,
            num_zero=self.recipe.num_zero,
            negative=self.adapter.unconditional(people.id_cond[:1], [h[:1] for h in people.hidden])
            if guided
            else None,
            guided=guided,
            pipe=base.pipe,
        )


def drop_identity(batch: Batch, dropped: Tensor) -> Batch:
    """The identity left out where `dropped` (B,): all features zero, as for the unconditional identity at
    inference."""
    kept = (~dropped).to(batch.id_cond)
    hidden = [level * kept[:, None, None].to(level) for level in batch.hidden]
    return batch._replace(id_cond=batch.id_cond * kept[:, None], hidden=hidden)


def swap_identities(batch: Batch) -> Batch:
    """Everyone's identity is the next one's."""
    return batch._replace(
        id_cond=batch.id_cond.roll(1, 0), hidden=[level.roll(1, 0) for level in batch.hidden]
    )
