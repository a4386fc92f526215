"""What an adapter knows of a pipeline that it serves: its U-Net, its guidance, and how far its schedule has come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from openpulid.errors import OptionError

MARK = "_identity_method"
"""The U-Net's attribute that names the adapter serving it: attaching another replaces it."""

IN_USE = "_identity_in_use"
"""The network's attribute while somebody is: a second one would be added to the first without being asked."""


@dataclass(eq=False)
class PipelineState:
    """A diffusers pipeline, or a bare U-Net (then nothing is guided unless `use` says so)."""

    target: Any

    @property
    def unet(self) -> Any:
        """The U-Net as it is now; a pipeline's may have been exchanged."""
        return getattr(self.target, "unet", self.target)

    @property
    def pixels(self) -> int:
        """Of an image's side for each of its latents'."""
        return int(getattr(self.target, "vae_scale_factor", 8))

    def guided(self) -> bool:
        """Whether the U-Net's batch holds negatives and positives. Asked during a call, not guessed from
        the batch size: a guidance scale of exactly 1 has no negative half.

        Raises:
            OptionError: perturbed attention guidance adds a third part to the batch.
        """
        if getattr(self.target, "do_perturbed_attention_guidance", False):
            raise OptionError(
                "an identity cannot join perturbed attention guidance; load the pipeline again, without it."
            )
        return bool(
            getattr(self.target, "do_classifier_free_guidance", False)
        )  # before its first run it has none

    def within(self, timestep: Any, span: tuple[float, float]) -> bool:
        """Whether a timestep is in [start, end) of the schedule; to an end of 1 belong all that follow."""
        begin, end = span
        return begin <= self.progress(timestep) and (end >= 1 or self.progress(timestep) < end)

    def progress(self, timestep: Any) -> float:
        """The fraction of the schedule at which a timestep stands: step i of n is at i / n.

        An image-to-image run begins inside its scheduler's steps; the fraction is of the steps it takes.
        Where there is no scheduler, or it does not know the timestep, the fraction is of the noise: 1 - t / T.
        """
        scheduler = getattr(self.target, "scheduler", None)
        now = float(torch.as_tensor(timestep).flatten()[0])
        steps = getattr(scheduler, "timesteps", None)
        if steps is not None:
            places = (torch.as_tensor(steps).float().cpu() == now).nonzero().flatten().tolist()
            if places:
                begin = getattr(scheduler, "begin_index", None)
                if begin is None:  # DDIM and others keep none
                    begin = self._left_out(steps)
                index = getattr(scheduler, "step_index", None)
                # schedulers of second order visit a timestep twice; their own count tells which time this is
                place = index if index in places else places[0]
                return max((place or 0) - begin, 0) / max(len(steps) - begin, 1)
        config = getattr(scheduler, "config", None)
        return 1 - now / getattr(config, "num_train_timesteps", 1000)

    def _left_out(self, steps: Sequence[Any]) -> int:
        """How many of a scheduler's steps lie before those that the pipeline takes; `denoising_end` leaves out some behind."""
        taken = getattr(self.target, "num_timesteps", None)  # before its first run it has none
        if taken is None:
            return 0
        share = getattr(self.target, "denoising_end", None)
        total = self.target.scheduler.config.num_train_timesteps
        behind = (
            sum(t < round(total - share * total) for t in steps) if share and 0 < share < 1 else 0
        )
        return max(len(steps) - int(taken) - behind, 0)


class Serving:
    """A method of U-Nets and the pipelines that it serves."""

    def __init__(self) -> None:
        self._attachments: list[PipelineState] = []

    def serve(self, target: Any) -> None:
        """This pipeline, too. One that is served already keeps all that was built for it."""
        if all(a.target is not target for a in self._attachments):
            self._attachments.append(PipelineState(target))

    def detach(self, target: Any = None) -> None:
        """Serves this pipeline no longer; without an argument, none."""
        self._attachments = [
            a for a in self._attachments if target is not None and a.target is not target
        ]

    def serving(self, pipe: Any = None) -> list[PipelineState]:
        """Those that are served, or this one of them.

        Raises:
            OptionError: it is none, or there are two of one U-Net, of which one must be named.
        """
        found = [a for a in self._attachments if pipe is None or a.target is pipe]
        if not found:
            raise OptionError(
                f"this {type(self).__name__} serves no pipeline (any more); call attach(pipe) first."
            )
        one_of_each([a.unet for a in found])
        return found


def one_of_each(networks: Sequence[Any]) -> None:
    """Whether a batch is guided, and where a schedule stands, only the pipeline that runs knows.

    Raises:
        OptionError: two pipelines share a network.
    """
    if len({id(network) for network in networks}) < len(networks):
        raise OptionError(
            "several attached pipelines share one network; say which one runs: use(..., pipe=pipe)."
        )


def unet_of(target: Any) -> Any:
    """The U-Net of a pipeline, or the U-Net itself.

    Raises:
        OptionError: it is neither, or has rows in its batch that no identity is made for.
    """
    unet = getattr(target, "unet", target)
    if "InstructPix2Pix" in type(target).__name__:
        raise OptionError(
            f"{type(target).__name__} has three rows for each image, which an identity cannot join; change pictures with "
            "image-to-image or inpainting instead."
        )
    if not hasattr(unet, "attn_processors") or not hasattr(unet, "up_blocks"):
        raise OptionError(
            f"{type(target).__name__} has no U-Net; attach to a StableDiffusionXL pipeline or its U-Net, or take an adapter "
            "for FLUX."
        )
    return unet


@contextmanager
def exclusive_use(
    network: Any, around: Iterable[nn.Module] = (), mark: str = IN_USE
) -> Iterator[None]:
    """Marks a network while an identity joins it.

    Args:
        mark: of those that cannot join at once.
        around: the modules that hold those which get hooks. Compiled code does not look again whether what it holds has
            hooks: the identity would not be seen, or stay for ever.

    Raises:
        OptionError: another identity is in use on it, or one of `around` is compiled.
    """
    if getattr(network, mark, False):
        raise OptionError(
            "an identity is already in use on this pipeline; close it first, or give `use` all identities as one list."
        )
    if any(map(_compiled, around)) and torch._dynamo.config.skip_nnmodule_hook_guards:
        raise OptionError(
            "this network is compiled, and compiled code would not notice an identity; set torch._dynamo.config."
            "skip_nnmodule_hook_guards = False before its first run, or on FLUX call transformer.compile_repeated_blocks()."
        )
    setattr(network, mark, True)
    try:
        yield
    finally:
        delattr(network, mark)


def _compiled(module: nn.Module) -> bool:
    forward = vars(module).get("forward")  # compiled by hand, it lies on the module itself
    ways = (
        hasattr(module, "_orig_mod"),
        module._compiled_call_impl is not None,
        hasattr(forward, "_torchdynamo_orig_callable"),
    )
    return any(ways)
