"""The transformers in which identities act: where their blocks are, and what a call tells.

`KINDS` is the only place that knows how one model differs from another. diffusers' classes are
compared by name, so nothing of it is imported.

Tokens: text T, generated image L, references, padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from openpulid.errors import OptionError

BlockKey = tuple[str, int]
"""("double" | "single", index)."""

BlockOutput = Literal["pair", "sequence"]
"""A pair is (text, image); a sequence has all tokens in one tensor."""


@dataclass(frozen=True)
class TransformerCall:
    """What the arguments of one call tell.

    Attributes:
        time: of the noise, falls from 1 to 0 in a run.
        batch_size: B.
        grid: rows and columns of the generated tokens.
        generated: first and end of the generated ones among the image tokens.
        num_leading: tokens before those of the image in a sequence.
        has_negative_rows: whether the second half of the batch is that of the negative prompts.
    """

    time: float
    batch_size: int
    grid: tuple[int, int]
    generated: tuple[int, int]
    num_leading: int
    has_negative_rows: bool = False


@dataclass(frozen=True)
class BlockGroup:
    """Blocks of one type in a transformer.

    Attributes:
        attribute: of the transformer, the list of blocks.
        output: of a block.
        interval: identity attention follows every n-th block by default.
    """

    attribute: str
    output: BlockOutput
    interval: int


@dataclass(frozen=True)
class TransformerKind:
    """One family of transformers.

    Attributes:
        name: of the base models, as messages call them.
        class_name: in diffusers.
        width: attribute of the transformer, the width of its tokens.
        groups: "double" and, if there are any, "single" -> blocks.
        arguments: names of the positional arguments of a call.
        read: reads them; gets the pipeline as well.
        training: how to get an adapter; None if one is published.
    """

    name: str
    class_name: str
    width: str
    groups: Mapping[str, BlockGroup]
    arguments: Sequence[str]
    read: Callable[[Any, Mapping[str, Any]], TransformerCall]
    training: str | None = None

    def name_arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call by name."""
        return {**dict(zip(self.arguments, args, strict=False)), **kwargs}

    def read_call(
        self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> TransformerCall:
        """Read the arguments of a call.

        Args:
            target: the pipeline that calls, or the transformer itself.
            args: positional arguments.
            kwargs: keyword arguments.

        Raises:
            OptionError: The call is of a kind that identities do not support.
        """
        return self.read(target, self.name_arguments(args, kwargs))

    def blocks(self, transformer: Any, key: BlockKey) -> nn.Module:
        """Return the block of a key."""
        group, index = key
        block: nn.Module = getattr(transformer, self.groups[group].attribute)[index]
        return block

    def count_blocks(self, transformer: Any) -> tuple[int, int]:
        """Return the number of double and of single blocks."""
        double, single = (
            len(getattr(transformer, self.groups[name].attribute)) if name in self.groups else 0
            for name in ("double", "single")
        )
        return double, single

    def intervals(self) -> dict[str, int]:
        """Return the default intervals by the names of the adapter's arguments."""
        default = {"double_interval": 2, "single_interval": 4}
        return default | {f"{name}_interval": group.interval for name, group in self.groups.items()}


def _read_ids(target: Any, call: Mapping[str, Any]) -> TransformerCall:
    """Read a call whose tokens have positions: (image or reference, row, column, ...)."""
    ids = call["img_ids"]
    # copied once: every value that is read from an accelerator waits for it
    ids = (ids[0] if ids.ndim == 3 else ids).cpu()
    is_generated = ids[:, 0] == 0  # references, as of Kontext, have another first id
    indices = is_generated.nonzero()
    rows, columns = (int(x) + 1 for x in ids[is_generated, 1:3].amax(0))
    return TransformerCall(
        time=float(call["timestep"].flatten()[0]),
        batch_size=len(call["hidden_states"]),
        grid=(rows, columns),
        generated=(int(indices[0]), int(indices[-1]) + 1),
        num_leading=call["encoder_hidden_states"].shape[1],
    )


def _read_shapes(target: Any, call: Mapping[str, Any]) -> TransformerCall:
    """Read a call of Qwen-Image: per image the sizes of the generated one and of its references."""
    shapes = call["img_shapes"][0]
    generated = shapes[0] if isinstance(shapes, list) else shapes
    frames, rows, columns = generated
    return TransformerCall(
        time=float(call["timestep"].flatten()[0]),
        batch_size=len(call["hidden_states"]),
        grid=(rows, columns),
        generated=(0, frames * rows * columns),
        num_leading=0,
    )


def _read_latents(target: Any, call: Mapping[str, Any]) -> TransformerCall:
    """Read a call of Z-Image: a list of latents; a sequence has padding and text after the image.

    Raises:
        OptionError: There are references, or the images have different sizes.
    """
    latents = call["x"]
    if any(isinstance(x, list) for x in latents) or len({x.shape for x in latents}) > 1:
        raise OptionError(
            "identities support Z-Image with images of one size and without reference images; "
            "use the text-to-image pipeline."
        )
    patch = call.get("patch_size", 2)
    frames, height, width = latents[0].shape[1:]
    time = float(call["t"].flatten()[0])  # rises from 0 to 1
    rows, columns = height // patch, width // patch
    return TransformerCall(
        time=1 - time,
        batch_size=len(latents),
        grid=(rows, columns),
        generated=(0, frames // call.get("f_patch_size", 1) * rows * columns),
        num_leading=0,
        has_negative_rows=_is_z_image_guided(target, time),
    )


def _is_z_image_guided(pipe: Any, time: float) -> bool:
    """Return whether a pipeline of Z-Image guides in this step; a transformer alone never does."""
    # the property fails before the first run
    if not getattr(pipe, "do_classifier_free_guidance", False):
        return False
    truncation = getattr(pipe, "_cfg_truncation", None)
    return truncation is None or float(truncation) > 1 or time <= float(truncation)


_ID_ARGUMENTS = ("hidden_states", "encoder_hidden_states", "timestep", "img_ids", "txt_ids")
_FLUX_ARGUMENTS = (
    "hidden_states",
    "encoder_hidden_states",
    "pooled_projections",
    "timestep",
    "img_ids",
)
_QWEN_ARGUMENTS = (
    "hidden_states",
    "encoder_hidden_states",
    "encoder_hidden_states_mask",
    "timestep",
    "img_shapes",
)

FLUX = TransformerKind(
    name="FLUX.1",
    class_name="FluxTransformer2DModel",
    width="inner_dim",
    groups={
        "double": BlockGroup("transformer_blocks", "pair", 2),
        "single": BlockGroup("single_transformer_blocks", "pair", 4),
    },
    arguments=_FLUX_ARGUMENTS,
    read=_read_ids,
)
CHROMA = TransformerKind(
    name="Chroma",
    class_name="ChromaTransformer2DModel",
    width="inner_dim",
    groups={
        "double": BlockGroup("transformer_blocks", "pair", 2),
        "single": BlockGroup("single_transformer_blocks", "sequence", 4),
    },
    arguments=_ID_ARGUMENTS,
    read=_read_ids,
)
FLUX2 = TransformerKind(
    name="FLUX.2",
    class_name="Flux2Transformer2DModel",
    width="inner_dim",
    groups={
        "double": BlockGroup("transformer_blocks", "pair", 2),
        "single": BlockGroup("single_transformer_blocks", "sequence", 4),
    },
    arguments=_ID_ARGUMENTS,
    read=_read_ids,
    training="train one with pulid train flux2_klein_stage1.",
)
QWEN_IMAGE = TransformerKind(
    name="Qwen-Image",
    class_name="QwenImageTransformer2DModel",
    width="inner_dim",
    groups={"double": BlockGroup("transformer_blocks", "pair", 3)},  # 20 of 60, as many as in FLUX
    arguments=_QWEN_ARGUMENTS,
    read=_read_shapes,
    training="train one with pulid train qwen_image_stage1.",
)
Z_IMAGE = TransformerKind(
    name="Z-Image",
    class_name="ZImageTransformer2DModel",
    width="dim",
    groups={"double": BlockGroup("layers", "sequence", 2)},  # 15 of 30
    arguments=("x", "t", "cap_feats"),
    read=_read_latents,
    training="train one with pulid train z_image_stage1.",
)
KINDS = (FLUX, CHROMA, FLUX2, QWEN_IMAGE, Z_IMAGE)


def find_kind(transformer: Any) -> TransformerKind | None:
    """Return the kind of a transformer, also of a compiled or wrapped one; None if unknown."""
    for module in transformer.modules() if isinstance(transformer, nn.Module) else ():
        names = {cls.__name__ for cls in type(module).__mro__}
        for kind in KINDS:
            if kind.class_name in names:
                return kind
    return None


def find_transformer(target: Any) -> tuple[Any, TransformerKind]:
    """Return the transformer of a pipeline, or the target itself if it is one, and its kind.

    Raises:
        OptionError: The target has no transformer of a known kind.
    """
    transformer = getattr(target, "transformer", target)
    kind = find_kind(transformer)
    if kind is None:
        *names, last = (kind.name for kind in KINDS)
        raise OptionError(
            f"{type(target).__name__} has no FLUX transformer; attach to a pipeline of "
            f"{', '.join(names)} or {last}, or to its transformer, or use an adapter for SDXL."
        )
    return transformer, kind


def select_block_keys(
    num_double: int, num_single: int, double_interval: int = 2, single_interval: int = 4
) -> list[BlockKey]:
    """List the blocks that are followed by identity attention, of these numbers of blocks."""
    double: list[BlockKey] = [("double", i) for i in range(0, num_double, double_interval)]
    single: list[BlockKey] = [("single", i) for i in range(0, num_single, single_interval)]
    return double + single


def identity_blocks(transformer: Any, **intervals: int) -> list[BlockKey]:
    """List the blocks that are followed by identity attention, in the order of `pulid_ca.K`.

    Args:
        transformer: of a known kind.
        intervals: double_interval and single_interval, instead of the kind's.

    Raises:
        OptionError: The transformer is of an unknown kind.
    """
    transformer, kind = find_transformer(transformer)
    return select_block_keys(*kind.count_blocks(transformer), **(kind.intervals() | intervals))
