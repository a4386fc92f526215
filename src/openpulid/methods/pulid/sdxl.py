"""PuLID on SDXL: the adapter that is trained, saved, attached to a pipeline, and opened around a generation."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import Tensor, nn

from openpulid.errors import OptionError, WeightsError
from openpulid.identity.identity import find_mismatched_models
from openpulid.io import hub as published
from openpulid.io.checkpoints import read_metadata
from openpulid.methods.hooks import PipelineState, unet_of
from openpulid.methods.pulid.base import PuLIDBase
from openpulid.methods.pulid.encoders import ENCODERS, IDEncoder, IDFormer
from openpulid.methods.pulid.flux import PuLIDFlux
from openpulid.methods.pulid.masks import People, normalize_people, stack_masks
from openpulid.methods.pulid.projection import PROJECTIONS, Projection
from openpulid.methods.pulid.sdxl_attention import (
    IdentityLayer,
    Injection,
    KeyValue,
    cross_attentions,
    identity_layers,
    injected,
)

VARIANTS = ("v1", "v1.1", "flux-v0.9.0", "flux-v0.9.1")
PLACES = [str(place) for place in range(1, 140, 2)]
"""The published keys of SDXL's cross-attentions; a published adapter has a layer for each of them."""


class PuLID(PuLIDBase):
    """Identity encoder and identity attention; `state_dict` has the published names.

    Args:
        encoder: `IDEncoder` (v1) or `IDFormer` (v1.1).
        layers: one `IdentityLayer` per cross-attention, by published key ("1", "3", ...).

    Attributes:
        models: name -> fingerprint of what read faces while it learned, where its file says; published ones do not.
    """

    def __init__(self, encoder: IDEncoder | IDFormer, layers: nn.ModuleDict) -> None:
        super().__init__()
        self.id_adapter = encoder
        self.id_adapter_attn_layers = layers
        self.models: dict[str, str] = {}

    network = staticmethod(unet_of)

    @property
    def encoder(self) -> IDEncoder | IDFormer:
        return self.id_adapter

    # --- making, saving, loading

    @classmethod
    def for_unet(cls, unet: nn.Module, encoder: IDEncoder | IDFormer) -> PuLID:
        """A fresh adapter for a U-Net's layers: until it is trained it changes nothing (values start at zero)."""
        return cls(encoder, identity_layers(unet))

    def save(
        self, path: str | os.PathLike[str], metadata: Mapping[str, object] | None = None
    ) -> Path:
        """Writes the published names, and what is needed to rebuild the encoder, as one safetensors file."""
        path = Path(path)
        facts = {key: str(value) for key, value in (metadata or {}).items()}
        facts |= {
            "encoder": type(self.id_adapter).__name__,
            "config": json.dumps(self.id_adapter.config),
        }
        tensors = {name: x.detach().cpu().contiguous() for name, x in self.state_dict().items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        save_file(tensors, unfinished, metadata=facts)
        os.replace(unfinished, path)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PuLID:
        """Reads what `save` wrote, or a published file, v1's `.bin` or v1.1's safetensors: float32, in eval mode.

        Raises:
            WeightsError: no such file, not an adapter, or names that are missing or too many; it lists them.
        """
        state = cls.read(path)
        facts = read_metadata(path) if Path(path).suffix == ".safetensors" else {}
        former = "IDFormer" if "id_adapter.latents" in state else "IDEncoder"
        with init_empty_weights(
            include_buffers=False
        ):  # what is read below need not be drawn before
            encoder = ENCODERS[facts.get("encoder", former)](
                **json.loads(facts.get("config", "{}"))
            )
        adapter = cls.from_state_dict(state, encoder)
        adapter.models = json.loads(facts.get("models", "{}"))
        return adapter

    def require(self, models: Mapping[str, str]) -> None:
        """That faces are read by what this adapter learned with, so that it shows whom they show.

        Raises:
            OptionError: they are not.
        """
        if self.models and (differing := find_mismatched_models(self.models, models)):
            raise OptionError(
                f"this adapter learned with {' and '.join(sorted(self.models))}, and faces would be read by another "
                f"{' and another '.join(differing)}; name the pack that it learned with (--faces), or another adapter."
            )

    @classmethod
    def from_pretrained(
        cls, repo_or_folder: str | os.PathLike[str] = "guozinan/PuLID", variant: str = "v1.1"
    ) -> PuLID | PuLIDFlux:
        """The published adapter: from a folder that holds its file, or from the hub, downloaded where it is not here yet.

        Args:
            variant: "v1" or "v1.1" for SDXL; "flux-v0.9.0" or "flux-v0.9.1", which give a `PuLIDFlux`.

        Raises:
            OptionError: another variant.
            WeightsError: it could not be had, or is not what it says, or not all of it.
        """
        if variant not in VARIANTS:
            raise OptionError(
                f"there is no variant {variant!r} of PuLID; the published ones are {', '.join(VARIANTS)}."
            )
        entry = published.find_weight(f"pulid-{variant}")
        if Path(repo_or_folder).is_dir():
            path = Path(repo_or_folder) / entry.file
        elif os.fspath(repo_or_folder) == entry.repo:
            path = published.download(f"pulid-{variant}")
        else:
            raise WeightsError(
                f"{repo_or_folder} is no folder; the published adapters are in {entry.repo}."
            )
        if variant.startswith("flux"):
            return PuLIDFlux.load(path)
        adapter = cls.load(path)
        if lost := set(PLACES) - set(adapter.id_adapter_attn_layers.keys()):
            raise _lacking(str(path), lost, len(PLACES))
        return adapter

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], encoder: IDEncoder | IDFormer) -> PuLID:
        """An adapter with these weights under their published names; the layers' sizes are the tensors'.

        Raises:
            WeightsError: a name is missing or too many, or a shape differs; it lists them.
        """
        known = {
            place: tensor.shape
            for name, tensor in state.items()
            if (place := _place(name)) and tensor.ndim == 2
        }
        layers = nn.ModuleDict()
        with init_empty_weights(include_buffers=False):
            for place in sorted(known, key=int):
                layers[place] = IdentityLayer(*known[place])
        return cls(encoder, layers).filled(state)  # which names what is no layer

    def check(self, network: Any) -> None:
        theirs = {
            place: (a.inner_dim, a.cross_attention_dim)
            for place, a in cross_attentions(network).items()
        }
        ours = {
            place: tuple(cast(IdentityLayer, layer).id_to_k.weight.shape)
            for place, layer in self.id_adapter_attn_layers.items()
        }
        if ours and ours.items() < theirs.items():
            raise _lacking("this adapter", theirs.keys() - ours.keys(), len(theirs))
        if theirs != ours:
            widths = [
                " and ".join(map(str, sorted({cross for _, cross in x.values()})))
                for x in (ours, theirs)
            ]
            raise WeightsError(
                f"this adapter was made for another U-Net: {len(ours)} layers with tokens of width {widths[0]}, "
                f"this one has {len(theirs)} of width {widths[1]}; take the adapter of this base model."
            )

    def keys_values(self, tokens: Tensor) -> dict[str, KeyValue]:
        """(..., T, width) -> per layer keys and values (..., T, hidden)."""
        return {place: layer(tokens) for place, layer in self.id_adapter_attn_layers.items()}

    # --- use

    @contextmanager
    def use(
        self,
        people: People,
        scale: float = 0.8,
        start: float = 0.0,
        end: float = 1.0,
        projection: Projection = "ortho_v2",
        num_zero: int = 20,
        mix: bool = False,
        pipe: Any = None,
        guided: bool | None = None,
    ) -> Iterator[PuLID]:
        """The attached pipelines show an identity while this is open.

        Args:
            people: an identity; a list of (identity, mask) for several in one image, masks of any size,
                soft or hard; or a list with one of these per prompt.
            scale: weight of the identity; 0 costs nothing.
            start, end: fractions of the schedule between which it acts, [start, end).
            projection: "none", "ortho" or "ortho_v2", see `projection.contribution`.
            num_zero: zero tokens beside the identity's; more of them weaken it.
            mix: v1 only: further photos of an identity give all their tokens, not only those of their embeddings.
            pipe: only this one of the attached pipelines; of several that share a U-Net, the one that runs.
            guided: whether the batch holds negatives and positives; None asks the pipeline, and a bare U-Net has none.

        Raises:
            OptionError: an argument outside its range, nothing attached, or another identity is still in use.
            IdentityError: an identity of other sizes than the encoder reads.
        """
        prompts = normalize_people(people)
        first = prompts[0][0][0]

        @torch.no_grad()
        def positive() -> dict[str, KeyValue]:
            return self.keys_values(self.tokens(prompts, mix))

        @torch.no_grad()
        def negative() -> dict[str, KeyValue]:
            return self.keys_values(self.unconditional(first.id_cond, first.hidden, mix)[:, None])

        options = {
            "scale": scale,
            "start": start,
            "end": end,
            "projection": projection,
            "num_zero": num_zero,
        }
        with self._opened(
            positive, negative, options, pipe, masks=stack_masks(prompts), guided=guided
        ):
            yield self

    @contextmanager
    def use_tokens(
        self,
        tokens: Tensor,
        scale: float = 1.0,
        start: float = 0.0,
        end: float = 1.0,
        projection: Projection = "ortho_v2",
        num_zero: int = 0,
        negative: Tensor | None = None,
        guided: bool | None = None,
        pipe: Any = None,
    ) -> Iterator[PuLID]:
        """As `use`, from tokens and with gradient: what training opens around forward *and* backward.

        Keys and values are computed once here and shared by all calls of the U-Net, so their graph is
        walked by one backward (or by several with `retain_graph=True`).

        Args:
            tokens: (B, T, width), one per image of the batch (or one for equally many images each, in order).
            negative: (1, T, width) for the negative half of a guided batch.
            guided: whether the batch holds negatives and positives; None asks the pipeline, and a bare U-Net has none.

        Raises:
            OptionError: see `use`; or the batch is guided and `negative` is missing.
        """

        def positive() -> dict[str, KeyValue]:
            return self.keys_values(tokens[:, None])

        def nobody() -> dict[str, KeyValue]:
            if negative is None:
                raise OptionError(
                    "a guided batch needs negative tokens; give negative=adapter.unconditional(...)."
                )
            return self.keys_values(negative[:, None])

        options = {
            "scale": scale,
            "start": start,
            "end": end,
            "projection": projection,
            "num_zero": num_zero,
        }
        with self._opened(positive, nobody, options, pipe, guided=guided):
            yield self

    @contextmanager
    def _opened(
        self,
        positive: Callable[[], dict[str, KeyValue]],
        negative: Callable[[], dict[str, KeyValue]],
        options: dict[str, Any],
        pipe: Any,
        masks: Tensor | None = None,
        guided: bool | None = None,
    ) -> Iterator[None]:
        """Opens keys and values (P, J, T, hidden) on every U-Net in question; nothing is computed where
        nothing would act."""
        _check_options(options)
        attachments = [PipelineState(target) for target in self.serving(pipe)]
        if options["scale"] == 0 or options["start"] >= options["end"]:
            yield
            return
        keys_values = positive()
        with ExitStack() as stack:
            for attachment in attachments:
                injection = Injection(
                    keys_values,
                    negative=negative,
                    guided=attachment.guided if guided is None else lambda: bool(guided),
                    progress=attachment.progress,
                    masks=masks,
                    **options,
                )
                stack.enter_context(injected(attachment.unet, injection))
            yield


def _place(name: str) -> str:
    """The layer that a tensor of this name is of; empty where it is of none."""
    found = re.fullmatch(r"id_adapter_attn_layers\.([0-9]{1,6})\.id_to_[kv]\.weight", name)
    return found[1] if found else ""


def _lacking(adapter: str, lost: Collection[str], total: int) -> WeightsError:
    """What is said of a file that is whole but for some layers."""
    named = shorten(", ".join(sorted(lost, key=int)), 200, placeholder=" ...")
    return WeightsError(
        f"{adapter} lacks {len(lost)} of {total} layers (id_adapter_attn_layers {named}); "
        "get its file again, or take the adapter of this base model."
    )


def _check_options(options: Mapping[str, Any]) -> None:
    if options["projection"] not in PROJECTIONS:
        raise OptionError(
            f"projection is one of {', '.join(PROJECTIONS)}; it is {options['projection']!r}."
        )
    if not 0 <= options["start"] <= 1 or not 0 <= options["end"] <= 1:
        raise OptionError("start and end are fractions of the schedule, from 0 to 1.")
    if not isinstance(options["num_zero"], int) or options["num_zero"] < 0:
        raise OptionError(
            f"num_zero is a number of tokens, 0 or more; it is {options['num_zero']!r}."
        )
