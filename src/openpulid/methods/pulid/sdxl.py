"""PuLID for SDXL: save and load the adapter, attach it to a pipeline, use it in a generation."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any, ClassVar, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from openpulid.errors import OptionError, WeightsError, suggest
from openpulid.io import hub
from openpulid.io.checkpoint_kinds import PULID_SDXL, CheckpointKind
from openpulid.io.checkpoints import explain_bad_weights
from openpulid.methods.hooks import PipelineState, Span, check_scale, find_unet
from openpulid.methods.pulid.base import AdapterMetadata, PuLIDBase
from openpulid.methods.pulid.encoders import ENCODERS, IDEncoder, IDFormer
from openpulid.methods.pulid.flux import PuLIDFlux
from openpulid.methods.pulid.masks import People, normalize_people, stack_masks
from openpulid.methods.pulid.projection import Projection
from openpulid.methods.pulid.sdxl_attention import (
    AttentionOptions,
    IdentityLayer,
    KeyValue,
    SDXLInjection,
    create_identity_layers,
    cross_attentions,
    inject_sdxl,
)

VARIANTS = ("v1", "v1.1", "flux-v0.9.0", "flux-v0.9.1")
CONVERTED_NAMES = {
    "image_proj.": "id_adapter.",
    "ip_adapter.": "id_adapter_attn_layers.",
    ".to_k_ip.": ".id_to_k.",
    ".to_v_ip.": ".id_to_v.",
}
"""Names in the file of v1 that was converted for ComfyUI (ip-adapter_pulid_sdxl_fp16.safetensors),
and the published names."""
LAYER_KEYS = [str(index) for index in range(1, 140, 2)]
"""Published keys of SDXL's cross-attentions. A published adapter has a layer for each of them."""

COMPILED_IMAGES = 16
"""More images of one request than these are generated with compiled identity attention on a CUDA
device. An estimate, not measured on a GPU: compiling both sizes of layers is expected to take 10 to
20 seconds once per size of the image. On an H200 the identity took 1.3 seconds of an image of 25
guided steps (`benchmarks/gpu-h200.md`), most of it the launches of kernels that compilation
joins."""

KeysValues = dict[str, KeyValue]


class PuLID(PuLIDBase):
    """Identity encoder and identity attention; `state_dict` has the published names.

    Args:
        encoder: `IDEncoder` (v1) or `IDFormer` (v1.1).
        layers: one `IdentityLayer` per cross-attention, by published key ("1", "3", ...).
    """

    kinds: ClassVar[tuple[CheckpointKind, ...]] = (PULID_SDXL,)

    def __init__(self, encoder: IDEncoder | IDFormer, layers: nn.ModuleDict) -> None:
        super().__init__()
        self.id_adapter = encoder
        self.id_adapter_attn_layers = layers

    @property
    def encoder(self) -> IDEncoder | IDFormer:
        """Identity features -> tokens."""
        return self.id_adapter

    # --- create, save, load

    @classmethod
    def for_unet(cls, unet: nn.Module, encoder: IDEncoder | IDFormer) -> PuLID:
        """Create an untrained adapter for a U-Net. Its values are zero, so it changes nothing."""
        return cls(encoder, create_identity_layers(unet))

    @staticmethod
    def read(path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Read an adapter's file in one dtype, under the published names.

        Raises:
            WeightsError: The file does not exist, or cannot be read.
        """
        state = PuLIDBase.read(path, dtype)
        if not any(name.startswith("image_proj.") for name in state):
            return state
        return {_published_name(name): tensor for name, tensor in state.items()}

    @classmethod
    def load(cls, path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> PuLID:
        """Load a file written by `save`, or a published one (v1's `.bin`, v1.1's safetensors).

        Args:
            path: the file.
            dtype: of the weights; they are cast on reading, one at a time.

        Returns:
            The adapter in eval mode.

        Raises:
            WeightsError: The file does not exist or is not an adapter, or names are missing or
                unexpected; the message has the first of them.
        """
        cls.check_file(path)
        state = cls.read(path, dtype)
        default_encoder = "IDFormer" if "id_adapter.latents" in state else "IDEncoder"
        message = f"{path} is damaged; download or train it again"
        metadata = AdapterMetadata.read(path, message)
        config = metadata.sizes("config")
        name = metadata.entries.get("encoder", default_encoder)
        if name not in ENCODERS:
            raise WeightsError(f"{message} (its encoder is unknown).")
        with explain_bad_weights(message):
            encoder_class = ENCODERS[name]
            with init_empty_weights(include_buffers=False):  # the weights are loaded below
                encoder = encoder_class(**config)
            adapter = cls.from_state_dict(state, encoder)
        adapter.models = metadata.models()
        return adapter

    @classmethod
    def from_pretrained(
        cls, repo_or_folder: str | os.PathLike[str] = "guozinan/PuLID", variant: str = "v1.1"
    ) -> PuLID | PuLIDFlux:
        """Load a published adapter from a folder or from the Hugging Face hub.

        Args:
            repo_or_folder: a folder that contains the file, or the hub's repository, from which the
                file is downloaded unless it is cached.
            variant: "v1" or "v1.1" for SDXL; "flux-v0.9.0" or "flux-v0.9.1" for a `PuLIDFlux`.

        Raises:
            OptionError: There is no such variant.
            WeightsError: The file is not available, damaged or incomplete.
        """
        if variant not in VARIANTS:
            raise OptionError(
                f"no variant {variant!r} of PuLID{suggest(variant, VARIANTS)}; "
                f"choose one of {', '.join(VARIANTS)}."
            )
        entry = hub.find_weight(f"pulid-{variant}")
        if Path(repo_or_folder).is_dir():
            path = Path(repo_or_folder) / entry.file
        elif os.fspath(repo_or_folder) == entry.repo:
            path = hub.download(f"pulid-{variant}")
        else:
            raise WeightsError(
                f"{repo_or_folder} is not a folder; the published adapters are in {entry.repo}."
            )
        if variant.startswith("flux"):
            return PuLIDFlux.load(path)
        adapter = cls.load(path)
        missing = set(LAYER_KEYS) - set(adapter.id_adapter_attn_layers.keys())
        if missing:
            raise _missing_layers_error(str(path), missing, len(LAYER_KEYS))
        return adapter

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], encoder: IDEncoder | IDFormer) -> PuLID:
        """Create an adapter from weights under their published names.

        The sizes of the layers are those of the tensors.

        Raises:
            WeightsError: A name is missing or unexpected, or a shape differs.
        """
        shapes = {}
        for name, tensor in state.items():
            key = _layer_key(name)
            if key and tensor.ndim == 2:
                shapes[key] = tensor.shape
        layers = nn.ModuleDict()
        with init_empty_weights(include_buffers=False):
            for key in sorted(shapes, key=int):
                layers[key] = IdentityLayer(*shapes[key])
        adapter = cls(encoder, layers).load_weights(state)
        token_width = encoder.config.get("context_dim") or encoder.config["output_dim"]
        if widths := {shape[1] for shape in shapes.values()} - {token_width}:
            raise WeightsError(
                f"the encoder of this adapter creates tokens of width {token_width}, and its "
                f"layers read {' and '.join(map(str, sorted(widths)))}; use a complete file."
            )
        return adapter

    # --- compatibility

    def check(self, target: Any) -> None:
        """Raise an error if the adapter does not fit a pipeline or U-Net.

        Raises:
            OptionError: The target has no U-Net.
            WeightsError: The adapter was trained for another U-Net, or lacks layers.
        """
        self.check_layers(
            {
                key: (layer.inner_dim, layer.cross_attention_dim)
                for key, layer in cross_attentions(find_unet(target)).items()
            }
        )

    def check_layers(self, unet_shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise an error if the adapter does not have one layer per cross-attention.

        Args:
            unet_shapes: published key -> width of the queries, width of the text tokens.

        Raises:
            WeightsError: The adapter was trained for another U-Net, or lacks layers.
        """
        shapes = {
            key: tuple(cast(IdentityLayer, layer).id_to_k.weight.shape)
            for key, layer in self.id_adapter_attn_layers.items()
        }
        if shapes and shapes.items() < unet_shapes.items():
            missing = unet_shapes.keys() - shapes.keys()
            raise _missing_layers_error("this adapter", missing, len(unet_shapes))
        if unet_shapes != shapes:
            raise WeightsError(
                f"this adapter was trained for another U-Net: it has {len(shapes)} layers with "
                f"tokens of width {_token_widths(shapes)}, this U-Net has {len(unet_shapes)} of "
                f"width {_token_widths(unet_shapes)}; use the adapter for this base model."
            )

    # --- use

    def keys_values(self, tokens: Tensor) -> KeysValues:
        """Compute each layer's keys and values (..., T, D) of tokens (..., T, width)."""
        return {key: layer(tokens) for key, layer in self.id_adapter_attn_layers.items()}

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
        compiled: bool = False,
    ) -> Iterator[PuLID]:
        """Show an identity with the attached pipelines while the context is open.

        Args:
            people: an identity; a list of (identity, mask) for several in one image, masks of any
                size, soft or hard; or a list with one of these per prompt.
            scale: weight of the identity; 0 disables it at no cost.
            start: fraction of the schedule at which it begins to act.
            end: fraction of the schedule at which it stops acting; 1 includes the last step.
            projection: "none", "ortho" or "ortho_v2", see `projection.compute_contribution`.
            num_zero: number of zero tokens next to the identity's; more of them weaken the
                identity.
            mix: v1 only: further reference images of an identity add all their tokens, not only
                those of their embeddings.
            pipe: one of the attached pipelines; all of them by default. Required if several of them
                share a U-Net.
            guided: whether the batch holds a negative and a positive half. By default the pipeline
                tells; a bare U-Net is not guided.
            compiled: compile identity attention, which pays for many images of one size. Without a
                compiler on the machine it runs as it is, after a warning.

        Raises:
            OptionError: An argument is out of range, nothing is attached, or another identity is
                in use.
            IdentityError: The identity has other sizes than the encoder reads.
        """
        prompts = normalize_people(people)
        first_identity, _ = prompts[0][0]

        @torch.no_grad()
        def positive() -> KeysValues:
            return self.keys_values(self.encode_people(prompts, mix))

        @torch.no_grad()
        def negative() -> KeysValues:
            tokens = self.unconditional(first_identity.id_cond, first_identity.hidden, mix)
            return self.keys_values(tokens[:, None])

        check_scale(scale)
        masks = stack_masks(prompts)
        with Span(start, end).watch("the identity") as span:
            options = AttentionOptions(scale, span, projection, num_zero, compiled)
            with self._open(positive, negative, options, masks, guided, pipe):
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
        compiled: bool = False,
    ) -> Iterator[PuLID]:
        """Use tokens with gradient: training opens this around forward *and* backward.

        Keys and values are computed once and shared by all calls of the U-Net, so one backward
        consumes their graph (or several with `retain_graph=True`).

        Args:
            tokens: (B, T, width), one per image of the batch, or one per group of consecutive
                images.
            scale: see `use`, as the following.
            start: see `use`.
            end: see `use`.
            projection: see `use`.
            num_zero: see `use`.
            negative: (1, T, width) for the negative half of a guided batch.
            guided: see `use`.
            pipe: see `use`.
            compiled: see `use`; with gradient nothing is compiled.

        Raises:
            OptionError: See `use`; or the batch is guided and `negative` is missing.
        """

        def positive() -> KeysValues:
            return self.keys_values(tokens[:, None])

        def negative_keys_values() -> KeysValues:
            if negative is None:
                raise OptionError(
                    "a guided batch needs negative tokens; "
                    "pass negative=adapter.unconditional(...)."
                )
            return self.keys_values(negative[:, None])

        options = AttentionOptions(scale, Span(start, end), projection, num_zero, compiled)
        with self._open(positive, negative_keys_values, options, None, guided, pipe):
            yield self

    @contextmanager
    def _open(
        self,
        positive: Callable[[], KeysValues],
        negative: Callable[[], KeysValues],
        options: AttentionOptions,
        masks: Tensor | None,
        guided: bool | None,
        pipe: Any,
    ) -> Iterator[None]:
        """Inject keys and values (P, J, T, D) into each U-Net; compute none if none would act."""
        states = self.select_pipelines(pipe)
        if options.scale == 0 or options.span.is_empty:
            yield
            return
        keys_values = positive()

        def inject(state: PipelineState) -> AbstractContextManager[None]:
            is_guided = state.is_guided if guided is None else lambda: bool(guided)
            injection = SDXLInjection(
                keys_values, negative, is_guided, state.position, options, masks
            )
            return inject_sdxl(state, self.slot, injection)

        with self.activate(states, inject):
            yield


def compiling_pays(device: torch.device, num_images: int) -> bool:
    """Return whether compiling takes less time than it saves, see `COMPILED_IMAGES`."""
    return device.type == "cuda" and num_images > COMPILED_IMAGES


def _published_name(name: str) -> str:
    for converted, published in CONVERTED_NAMES.items():
        name = name.replace(converted, published)
    return name


def _layer_key(name: str) -> str:
    """Return the key of the layer that a tensor belongs to; empty if it belongs to none."""
    match = re.fullmatch(r"id_adapter_attn_layers\.([0-9]{1,6})\.id_to_[kv]\.weight", name)
    return match[1] if match else ""


def _token_widths(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Format the widths of the tokens that layers read."""
    return " and ".join(map(str, sorted({shape[1] for shape in shapes.values()})))


def _missing_layers_error(adapter: str, missing: Collection[str], total: int) -> WeightsError:
    """Create the error for a file that is complete but for some layers."""
    keys = shorten(", ".join(sorted(missing, key=int)), 200, placeholder=" ...")
    return WeightsError(
        f"{adapter} lacks {len(missing)} of {total} layers (id_adapter_attn_layers {keys}); "
        "download its file again, or use the adapter for this base model."
    )
