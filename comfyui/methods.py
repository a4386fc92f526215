"""Other methods than PuLID in ComfyUI: InstantID, FaceID and PhotoMaker."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.lora
import comfy.model_management
import comfy.utils
import torch

from .adapters import ApplyOptions, check_options, convert_mask
from .folders import MINIATURE, find_face_pack, find_method_file
from .patching import find_layer_widths, patch_unet, schedule, transformer_blocks

if TYPE_CHECKING:
    from openpulid.pipelines.presets import Preset

METHODS = ("instantid", "faceid", "faceid-plus", "photomaker", "photomaker-v2")
"""Names in openpulid's registry."""

LowRank = tuple[torch.Tensor, torch.Tensor]
"""Matrices of a LoRA: down (rank, in), up (out, rank)."""


@dataclass(frozen=True)
class LoadedMethod:
    """The output of *Load method*.

    Attributes:
        name: of the method.
        path: of its file.
        adapter: the loaded file.
        is_miniature: whether it is the miniature's.
    """

    name: str
    path: Path
    adapter: Any
    is_miniature: bool


def load_method(name: str, file: str) -> LoadedMethod:
    """Load the adapter of a method.

    Raises:
        OptionError: The miniature does not have this method.
        WeightsError: The file is of another method, or is damaged.
    """
    from openpulid.methods.registry import find_method
    from openpulid.pipelines.selection import resolve_preset

    is_miniature = file == MINIATURE
    if is_miniature:
        path = Path(resolve_preset("mini", method=name).models.require_adapter())
        path = path / "ip-adapter.safetensors" if path.is_dir() else path
    else:
        path = find_method_file(file)
    method: Any = find_method(name)
    load = method.load_tokens if name == "instantid" else method.load
    return LoadedMethod(name, path, load(path), is_miniature)


def load_face_models(loaded: LoadedMethod, pack: str | None) -> Any:
    """Load the identity extractor that a method was trained with.

    Args:
        loaded: the method.
        pack: an insightface pack in models/insightface/models; the method's own by default.

    Raises:
        WeightsError: A file is missing or damaged.
    """
    from openpulid.pipelines.factory import load_extractor

    preset = find_preset(loaded, pack)
    device = comfy.model_management.get_torch_device()
    if loaded.name.startswith("photomaker"):  # has a vision encoder of its own
        loaded.adapter.to(device)
    return load_extractor(preset, device, loaded.adapter)


def find_preset(loaded: LoadedMethod, pack: str | None) -> Preset:
    """Return the preset with the models of a method.

    Raises:
        OptionError: There is no such pack.
    """
    from openpulid.errors import OptionError
    from openpulid.pipelines.selection import resolve_preset

    if loaded.is_miniature:
        return resolve_preset("mini", method=loaded.name)
    directory = None if pack is None else find_face_pack(pack)
    if pack is not None and directory is None:
        raise OptionError(
            f"there is no face pack {pack} in models/insightface/models; choose another one."
        )
    return resolve_preset("sdxl", method=loaded.name, adapter=loaded.path, face_pack=directory)


def check_identity(loaded: LoadedMethod, identity: Any) -> None:
    """Raise OptionError if an identity is of another face recognition model than the method."""
    from openpulid.errors import OptionError, WeightsError
    from openpulid.pipelines.weights import resolve_path

    recognition = find_preset(loaded, None).models.recognition
    if recognition is None:
        return
    try:
        name = resolve_path(recognition).stem
    except WeightsError:  # the identity comes from a file, so it need not be installed
        return
    if name not in identity.models:
        raise OptionError(
            f"{loaded.name} reads the embeddings of {name}, and the identity has those of "
            f"{' and '.join(sorted(identity.models))}; create it with the face models of the "
            "method."
        )


def apply_method(model: Any, loaded: LoadedMethod, identity: Any, options: ApplyOptions) -> Any:
    """Return a clone of an SDXL model in which a method acts.

    Raises:
        OptionError: A value is out of range, the model is no SDXL, or the identity is of another
            face recognition model.
        WeightsError: The adapter was trained for another base model.
    """
    from openpulid.errors import OptionError
    from openpulid.methods.hooks import Span

    span = check_options(options)
    check_identity(loaded, identity)
    unet = model.get_model_object("diffusion_model")
    if not hasattr(unet, "input_blocks"):
        raise OptionError(f"{loaded.name} acts in SDXL models; this one is {type(unet).__name__}.")
    if options.scale == 0:
        return model.clone()
    if loaded.name.startswith("photomaker"):
        if span != Span() or options.mask is not None:
            raise OptionError(
                f"{loaded.name} acts in all steps and in the whole image: set start to 0 and end "
                "to 1, and leave out the mask."
            )
        lora = dict(_named_like_diffusers(model, loaded.adapter.lora))
        return patch_weights(model, lora, options.scale)
    from openpulid.methods.ip_adapter.host import IPAdapterHostIdentity, check_layers

    check_layers(loaded.adapter, find_layer_widths(unet))
    masks = convert_mask(options.mask)
    prepared = IPAdapterHostIdentity.prepare(loaded.adapter, identity, options.scale, masks)
    patched = patch_unet(model, schedule(model, prepared, span.start, span.end))
    lora = dict(_numbered_by_attention(unet, loaded.adapter.lora))
    return patch_weights(patched, lora, 1.0) if lora else patched


def patch_weights(model: Any, lora: Mapping[str, LowRank], strength: float) -> Any:
    """Return a clone of a model with a LoRA.

    Args:
        model: a `ModelPatcher`.
        lora: name of a linear layer of the network -> its matrices.
        strength: weight of the LoRA.

    Raises:
        WeightsError: A layer does not exist, or has another size.
    """
    from openpulid.errors import WeightsError
    from openpulid.methods.lora import check_low_rank

    network = model.get_model_object("diffusion_model")
    tensors = {}
    for name, (down, up) in lora.items():
        try:
            layer = network.get_submodule(name)
        except AttributeError:
            raise WeightsError(
                f"this adapter was trained for another base model: {name} does not exist."
            ) from None
        check_low_rank(layer, down, up)
        tensors[f"{name}.lora_down.weight"] = down
        tensors[f"{name}.lora_up.weight"] = up
    clone = model.clone()
    targets = {name: f"diffusion_model.{name}.weight" for name in lora}
    clone.add_patches(comfy.lora.load_lora(tensors, targets), strength)
    return clone


def _named_like_diffusers(model: Any, lora: Mapping[str, LowRank]) -> Iterator[tuple[str, LowRank]]:
    """Rename the layers of a LoRA from diffusers' names."""
    names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    for name, matrices in lora.items():
        yield names.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight"), matrices


def _numbered_by_attention(
    unet: Any, tensors: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, LowRank]]:
    """Name the layers of a LoRA that an IP-Adapter file numbers, such as 3.to_q_lora.down.weight.

    The number is the index among all attentions: of each transformer block, first the image's own,
    then that to the text.
    """
    names = {module: name for name, module in unet.named_modules()}
    attentions = [
        names[attention]
        for _, block in transformer_blocks(unet)
        for attention in (block.attn1, block.attn2)
    ]
    for name, down in tensors.items():
        index, layer, side, _ = name.split(".")
        if side == "down":
            part = layer.removesuffix("_lora")
            part = "to_out.0" if part == "to_out" else part
            up = tensors[f"{index}.{layer}.up.weight"]
            yield f"{attentions[int(index)]}.{part}", (down, up)


def encode_prompt(
    clip: Any, loaded: LoadedMethod, identity: Any, text: str, start: float
) -> list[Any]:
    """Encode a prompt whose class word is fused with an identity; PhotoMaker only.

    Args:
        clip: ComfyUI's text encoders.
        loaded: PhotoMaker.
        identity: the person.
        text: the prompt, with a class word such as "woman".
        start: fraction of the schedule that has the prompt without the identity.

    Returns:
        ComfyUI's conditioning.

    Raises:
        OptionError: The method is another one, the prompt is too long, `start` is out of range, or
            the identity is of another face recognition model.
    """
    from node_helpers import conditioning_set_values

    from openpulid.errors import OptionError
    from openpulid.methods.photomaker.fusion import encode_identity, fuse_class_word
    from openpulid.methods.prompt_fusion import remove_trigger_word, repeat_class_word

    if not loaded.name.startswith("photomaker"):
        raise OptionError(f"{loaded.name} does not change the prompt; only PhotoMaker does.")
    check_options(ApplyOptions(1.0, start))
    check_identity(loaded, identity)
    adapter = loaded.adapter.to(comfy.model_management.get_torch_device())
    tokens = encode_identity(adapter.encoder, identity)
    position = 0

    def repeat(input_ids: torch.Tensor, tokenizer: Any) -> torch.Tensor:
        nonlocal position
        repeated, (position,) = repeat_class_word(input_ids, tokenizer, len(tokens))
        return repeated

    states, pooled = encode_text(clip, text, repeat)
    fused = fuse_class_word(states[0].to(tokens), position, tokens, adapter.encoder.fuse_module)
    with_person = [[fused[None].to(states), {"pooled_output": pooled}]]
    states, pooled = encode_text(clip, text, remove_trigger_word)
    plain = [[states, {"pooled_output": pooled}]]
    return [
        *conditioning_set_values(plain, {"start_percent": 0.0, "end_percent": start}),
        *conditioning_set_values(with_person, {"start_percent": start, "end_percent": 1.0}),
    ]


def encode_text(clip: Any, text: str, change: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode a prompt whose tokens are changed for each text encoder.

    Args:
        clip: ComfyUI's text encoders of SDXL.
        text: the prompt.
        change: called with token ids (1, L) and the tokenizer; returns (1, L).

    Returns:
        (1, L, D) and the pooled embedding (1, P).

    Raises:
        OptionError: The prompt has embeddings, or more tokens than a text encoder reads.
    """
    from openpulid.errors import OptionError

    tokens = {}
    for name, rows in clip.tokenize(text).items():
        if len(rows) != 1:
            raise OptionError("PhotoMaker reads prompts of at most 75 tokens; shorten the prompt.")
        tokenizer = getattr(clip.tokenizer, f"clip_{name}").tokenizer
        if not all(isinstance(token, int) for token, *_ in rows[0]):
            raise OptionError("PhotoMaker reads prompts without embeddings; leave them out.")
        ids = torch.tensor([[token for token, *_ in rows[0]]])
        tokens[name] = [[(token, 1.0) for token in change(ids, tokenizer)[0].tolist()]]
    states, pooled = clip.encode_from_tokens(tokens, return_pooled=True)
    return states, pooled


def apply_identity_net(
    loaded: LoadedMethod,
    identity: Any,
    pose: Any,
    control_net: Any,
    conditionings: tuple[Any, Any],
    latent: Mapping[str, torch.Tensor],
    options: ApplyOptions,
) -> tuple[Any, Any]:
    """Add IdentityNet to a positive and a negative conditioning; InstantID only.

    Args:
        loaded: InstantID.
        identity: whom IdentityNet reads.
        pose: identity whose landmarks it reads.
        control_net: IdentityNet.
        conditionings: positive, negative.
        latent: whose size the image will have.
        options: scale, start and end.

    Raises:
        OptionError: The method is another one, a value is out of range, or the identity is of
            another face recognition model.
    """
    import node_helpers
    from nodes import ControlNetApplyAdvanced

    from openpulid.errors import OptionError
    from openpulid.methods.ip_adapter.host import compute_tokens
    from openpulid.methods.ip_adapter.instantid import draw_landmarks

    if loaded.name != "instantid":
        raise OptionError(f"{loaded.name} has no IdentityNet; only InstantID has.")
    check_options(options)
    check_identity(loaded, identity)
    height, width = (8 * side for side in latent["samples"].shape[-2:])
    image = draw_landmarks(pose, (width, height)).movedim(1, -1)
    positive, negative = ControlNetApplyAdvanced().apply_controlnet(
        *conditionings, control_net, image, options.scale, options.start, options.end
    )
    tokens = compute_tokens(loaded.adapter, identity)
    return tuple(
        node_helpers.conditioning_set_values(one, {"cross_attn_controlnet": rows})
        for one, rows in ((positive, tokens[:1]), (negative, tokens[1:]))
    )
