"""What a file of weights is, by the names and shapes of its tensors.

A checkpoint describes itself: names tell the architecture, additional tensors the kind of
prediction or quantization. Loaders use this to name a file that they cannot open.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open

from openpulid.errors import WeightsError
from openpulid.io.checkpoints import map_pickle
from openpulid.io.gguf_files import import_gguf

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """What a file of weights says without its values.

    Attributes:
        shapes: shape of each tensor by its name.
        metadata: the text in the header of a safetensors file; GGUF's architecture.
    """

    shapes: Mapping[str, Shape]
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckpointKind:
    """A kind of file.

    Attributes:
        name: with its article, as messages call it.
        use: how such a file is used.
        weights: names of published weights of this kind.
        patterns: regular expressions; each of them matches the beginning of some tensor's name.
    """

    name: str
    use: str
    patterns: tuple[str, ...]
    weights: tuple[str, ...] = ()

    def matches(self, names: Collection[str]) -> bool:
        """Whether these are the names of the tensors of such a file."""
        return all(
            any(re.match(pattern, name) is not None for name in names) for pattern in self.patterns
        )


UNET = "model.diffusion_model."
"""Prefix of the U-Net or transformer in a single file with a whole base model."""

_ANY = r"(model\.diffusion_model\.)?"

SDXL = CheckpointKind(
    "an SDXL checkpoint", "pass it with --preset sdxl --base", (rf"{UNET}label_emb\.",)
)
FLUX = CheckpointKind(
    "a FLUX.1 transformer",
    "pass it with --preset flux --base",
    (
        rf"{_ANY}(double_blocks\.0\.img_mod\.lin|transformer_blocks\.0\.norm1_context)\.",
        rf"{_ANY}single_(transformer_)?blocks\.0\.",
    ),
)
CHROMA = CheckpointKind(
    "a Chroma transformer",
    "pass it with --preset chroma --base",
    (rf"{_ANY}distilled_guidance_layer\.",),
)
FLUX2 = CheckpointKind(
    "a FLUX.2 transformer",
    "pass it with --preset flux2-klein --base",
    (rf"{_ANY}double_stream_modulation",),
)
Z_IMAGE = CheckpointKind(
    "a Z-Image transformer", "use it for training alone", (rf"{_ANY}cap_pad_token$",)
)
QWEN_IMAGE = CheckpointKind(
    "a Qwen-Image transformer",
    "use it for training alone",
    (rf"{_ANY}transformer_blocks\.0\.img_mod\.", rf"{_ANY}txt_norm\."),
)
PULID_SDXL = CheckpointKind(
    "PuLID's adapter for SDXL",
    "use it with an SDXL preset",
    (r"id_adapter(_attn_layers)?\.|image_proj\.mapping_0\.",),
    ("pulid-v1.1", "pulid-v1"),
)
PULID_FLUX = CheckpointKind(
    "PuLID's adapter for FLUX",
    "use it with a FLUX preset",
    (r"pulid_(encoder|ca)\.",),
    ("pulid-flux-v0.9.1", "pulid-flux-v0.9.0"),
)
PHOTOMAKER = CheckpointKind(
    "a PhotoMaker adapter",
    "use --method photomaker",
    (r"id_encoder\.",),
    ("photomaker", "photomaker-v2"),
)
FASTCOMPOSER = CheckpointKind(
    "a FastComposer adapter",
    "use --method fastcomposer",
    (r"image_encoder\.", r"postfuse_module\."),
)
ELITE_MAPPERS = CheckpointKind(
    "a file of ELITE",
    "use --method elite",
    (r"(global_mapper\.)?mapping_patch_0\.", r".*attn2_to_k\.weight$"),
)
FACEID_PLUS = CheckpointKind(
    "an IP-Adapter-FaceID-Plus adapter",
    "use --method faceid-plus",
    (r"image_proj\.perceiver_resampler\.",),
    ("faceid-plus",),
)
FACEID = CheckpointKind(
    "an IP-Adapter-FaceID adapter", "use --method faceid", (r"image_proj\.proj\.0\.",), ("faceid",)
)
RESAMPLER = CheckpointKind(
    "an IP-Adapter-Plus or InstantID adapter",
    "use --method ip-adapter-plus or instantid",
    (r"image_proj\.latents", r"ip_adapter\."),
    ("ip-adapter-plus", "instantid"),
)
INFINITEYOU = CheckpointKind(
    "InfiniteYou's projection",
    "use --preset flux --method infiniteyou",
    (r"image_proj\.latents",),
    ("infiniteyou", "infiniteyou-sim"),
)
IP_ADAPTER = CheckpointKind(
    "an IP-Adapter", "use --method ip-adapter", (r"(image_proj|ip_adapter)\.",), ("ip-adapter",)
)
LORA = CheckpointKind(
    "a LoRA",
    "pass it with --lora",
    (r"lora_(unet|te\d?|transformer)_|.*[._](lora[._](A|B|down|up)|hada_w1|lokr_w1)",),
)

UNET_ALONE = CheckpointKind(
    "a U-Net without autoencoder and text encoders",
    "pass a pipeline, or a file with all networks",
    (r"(down_blocks\.\d+\.(attentions|resnets)|input_blocks\.\d+)\.",),
)
EMBEDDING = CheckpointKind(
    "an embedding for SDXL", "pass it with --embedding", (r"clip_l$", r"clip_g$")
)
W_PLUS = CheckpointKind(
    "a W+ Adapter", "use --method w-plus", (r"w_proj\.proj_3\.", r"wplus_adapter\.")
)
FACE0 = CheckpointKind("a file of Face0", "use --method face0", (r"face_mlp\.0\.",))
PHOTOVERSE = CheckpointKind(
    "a file of PhotoVerse",
    "use --method photoverse",
    (r"text_adapter\.mapping_0\.", r"image_adapter\.mapping_0\."),
)
CUSTOM_DIFFUSION = CheckpointKind(
    "a file of Custom Diffusion",
    "use --method custom-diffusion",
    (r"unet\..*attn2\.to_k\.weight(\.[uv])?$",),
)

KINDS: tuple[CheckpointKind, ...] = (
    PULID_SDXL,
    PULID_FLUX,
    CheckpointKind("an identity", "pass it with --id", (r"id_cond$", r"hidden\.0$")),
    PHOTOMAKER,
    FASTCOMPOSER,
    ELITE_MAPPERS,
    W_PLUS,
    FACE0,
    PHOTOVERSE,
    CheckpointKind(
        "an IP-Adapter for FLUX",
        "it is not supported",
        (r"ip_adapter_proj_model\.|.*ip_adapter_double_stream",),
    ),
    FACEID_PLUS,
    FACEID,
    RESAMPLER,
    INFINITEYOU,
    IP_ADAPTER,
    LORA,
    EMBEDDING,
    CUSTOM_DIFFUSION,
    CheckpointKind(
        "a ControlNet",
        "pass its folder with --control",
        (r"control_model\.|controlnet_(cond|x)_embed|input_hint_block\.",),
    ),
    CheckpointKind(
        "SDXL's refiner",
        "use an SDXL base model",
        (r"conditioner\.embedders\.0\.model\.",),
    ),
    FLUX2,
    Z_IMAGE,
    QWEN_IMAGE,
    CHROMA,
    SDXL,
    CheckpointKind(
        "a Stable Diffusion 3 checkpoint",
        "use a base model for the preset",
        (rf"{_ANY}joint_blocks\.0\.",),
    ),
    FLUX,
    CheckpointKind(
        "a Stable Diffusion 1 or 2 checkpoint",
        "use an SDXL or FLUX.1 base model",
        (rf"{UNET}(input|output)_blocks\.",),
    ),
    UNET_ALONE,
    CheckpointKind(
        "an autoencoder",
        "pass a pipeline, or a file with all networks",
        (r"(first_stage_model\.)?decoder\.(conv_in|up|mid)",),
    ),
    CheckpointKind(
        "a text encoder",
        "pass a pipeline, or a file with all networks",
        (r"(text_model\.|encoder\.block\.0\.|.*transformer\.resblocks\.0\.)",),
    ),
    CheckpointKind(
        "a vision encoder",
        "pass a pipeline, or a file with all networks",
        (r"(vision_model|visual)\.",),
    ),
)
"""Known kinds; the first that matches a file is its kind."""

_QUANTIZATIONS = (
    (r".*\.(absmax|quant_map|quant_state\.)", "in 4 bits with bitsandbytes"),
    (r".*\.SCB$", "in 8 bits with bitsandbytes"),
    (r".*\.(qweight|wscales|smooth_orig)$", "with SVDQuant (Nunchaku)"),
    (r".*\.weight_scale_2$", "in NVFP4"),
    (r".*\.(weight_)?scale_inv$", "in float8 with scales per block"),
    (r".*\.(weight_packed|qzeros|g_idx)$", "in packed integers"),
)


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read the names and shapes of the tensors of a file, without its values.

    Args:
        path: safetensors, GGUF, or a PyTorch file, which is unpickled with `weights_only=True`.

    Raises:
        WeightsError: the file is missing or damaged, or a GGUF file needs the package gguf.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        return _read_gguf_header(path)
    if path.suffix != ".safetensors":
        tensors = map_pickle(path)
        return Header({name: tuple(x.shape) for name, x in tensors.items()})
    if not path.is_file():
        raise WeightsError(f"{path} does not exist; name an existing file.")
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            return Header(shapes, dict(file.metadata() or {}))
    except SafetensorError as error:
        raise WeightsError(
            f"{path} cannot be loaded: it is damaged or cut short; download or copy it again."
        ) from error


def _read_gguf_header(path: Path) -> Header:
    gguf = import_gguf()
    # its reader has no exception class of its own
    try:
        reader = gguf.GGUFReader(path)
        entry = reader.get_field("general.architecture")
        metadata = {} if entry is None else {"architecture": str(entry.contents())}
        shapes = {x.name: tuple(map(int, reversed(x.shape))) for x in reader.tensors}
    except Exception as error:
        raise WeightsError(
            f"{path} cannot be loaded: it is no complete GGUF file; download it again."
        ) from error
    return Header(shapes, metadata)


def find_kind(names: Collection[str]) -> CheckpointKind | None:
    """Return the kind of file that has tensors of these names; None if it is unknown."""
    for kind in KINDS:
        if kind.matches(names):
            return kind
    return None


def describe_kind(names: Collection[str]) -> str:
    """Describe a file by the names of its tensors, for the end of a message.

    Returns:
        Such as "it is a LoRA (load it into ...)"; or the first name of a file of unknown kind.
    """
    kind = find_kind(names)
    if kind is not None:
        return f"it is {kind.name} ({kind.use})"
    return f"its tensors are of an unknown kind, such as {min(names)}" if names else "it is empty"


def require_kind(path: str | os.PathLike[str], *kinds: CheckpointKind) -> None:
    """Refuse a file of weights of another kind, before its values are read.

    Args:
        path: of the file. A loader itself reports that it is missing.
        kinds: that are accepted; the first is named in the message.

    Raises:
        WeightsError: it is of another kind; the message names that, and the weights to get instead.
    """
    if not Path(path).is_file():
        return
    names = read_header(path).shapes
    if find_kind(names) in kinds:
        return
    fix = "use one that is"
    if weights := kinds[0].weights:
        fix = (
            f"the file to use instead is {' or '.join(weights)} (`pulid weights get {weights[0]}`)"
        )
    raise WeightsError(f"{path} is not {kinds[0].name}: {describe_kind(names)}; {fix}.")


def find_quantization(names: Collection[str]) -> str | None:
    """Return how a file's weights are quantized if names tell it, in words; else None.

    Scaled float8 is not among these, see `networks.SCALE_SUFFIXES`.
    """
    for pattern, description in _QUANTIZATIONS:
        if any(re.match(pattern, name) for name in names):
            return description
    return None
