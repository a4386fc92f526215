"""Image tokens beside the text's: what IP-Adapter, FaceID and InstantID's adapter share.

Everything that diffusers has is used as it is: `load_ip_adapter` builds the projection and the attention processors. What is
ours is to open and close it around a generation, for any SDXL pipeline and without telling the pipeline anything: the
embeddings go in by a hook on the U-Net.

Shapes: B batch of the U-Net, P prompts, n photos, D width of an embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from openpulid.errors import OptionError, WeightsError
from openpulid.identity.identity import Identity
from openpulid.methods.attachment import Attachment, unet_of
from openpulid.weights import read_tensors

Parts = Mapping[str, Mapping[str, Tensor]]
"""A published file: {"image_proj": {...}, "ip_adapter": {...}}."""


class TokenMethod:
    """A method whose file diffusers opens with `load_ip_adapter`; what it embeds is a subclass's.

    Args:
        parts: the published file.
    """

    scale: ClassVar[float] = 1.0
    """What the authors use it with."""

    def __init__(self, parts: Parts) -> None:
        if set(parts) != {"image_proj", "ip_adapter"} or not all(parts.values()):
            raise WeightsError(f"this file has {', '.join(parts) or 'nothing'}; such an adapter has image_proj and ip_adapter.")
        self.parts = {part: dict(tensors) for part, tensors in parts.items()}
        self.lora = {name: self.parts["ip_adapter"].pop(name) for name in list(self.parts["ip_adapter"]) if "_lora." in name}
        self._attachments: list[Attachment] = []
        self._built: dict[int, tuple[dict[str, Any], nn.Module]] = {}

    @classmethod
    def load(cls, path: Any) -> TokenMethod:
        """From a published file, safetensors or `.bin`.

        Raises:
            WeightsError: no such file, or another kind of adapter.
        """
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in read_tensors(path).items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = tensor
        return cls(parts)

    def embeddings(self, identity: Identity) -> Tensor:
        """(1, n, ...) for diffusers' projection layer."""
        raise NotImplementedError

    def attach(self, target: Any) -> None:
        """Serves a StableDiffusionXL pipeline from now on; nothing in it changes before `use`.

        Raises:
            OptionError: it has no U-Net, or cannot load an IP-Adapter.
        """
        unet_of(target)
        if not hasattr(target, "load_ip_adapter"):
            raise OptionError(f"{type(target).__name__} is no pipeline; attach this method to a StableDiffusionXL pipeline.")
        self.detach(target)
        self._attachments.append(Attachment(target))

    def detach(self, target: Any = None) -> None:
        """Serves this pipeline no longer; without an argument, none."""
        for attachment in [a for a in self._attachments if target is None or a.target is target]:
            self._attachments.remove(attachment)
            self._built.pop(id(attachment.unet), None)

    @contextmanager
    def use(
        self,
        people: Identity | Sequence[Identity],
        scale: float | None = None,
        start: float = 0.0,
        end: float = 1.0,
        pipe: Any = None,
    ) -> Iterator[TokenMethod]:
        """The attached pipelines show an identity while this is open.

        Args:
            people: an identity, or one for each prompt.
            scale: weight of the image tokens; the authors' where it is None.
            start, end: fractions of the schedule between which they act, [start, end).
            pipe: only this one of the attached pipelines.

        Raises:
            OptionError: nothing is attached, or an argument is outside its range.
        """
        everyone = [people] if isinstance(people, Identity) else list(people)
        if not everyone or not 0 <= start <= 1 or not 0 <= end <= 1:
            raise OptionError(
                "give an identity, or one for each prompt; start and end are fractions of the schedule, from 0 to 1."
            )
        serving = [a for a in self._attachments if pipe is None or a.target is pipe]
        if not serving:
            raise OptionError("this method serves no pipeline (any more); call attach(pipe) first.")
        strength = self.scale if scale is None else scale
        with ExitStack() as stack:
            for attachment in serving if strength and start < end else []:
                unet = attachment.unet
                embeddings = torch.cat([self.embeddings(identity) for identity in everyone]).to(unet.device, unet.dtype)
                stack.enter_context(self._opened(attachment, embeddings, strength, (start, end)))
            yield self

    @contextmanager
    def _opened(self, attachment: Attachment, embeddings: Tensor, scale: float, span: tuple[float, float]) -> Iterator[None]:
        unet = attachment.unet
        with restored(attachment.target), ExitStack() as hooks:
            processors, projection = self._processors(attachment.target)

            def tell(
                module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
            ) -> tuple[tuple[Any, ...], dict[str, Any]]:
                sample, time = (
                    kwargs.get(name, args[k] if k < len(args) else None) for k, name in enumerate(("sample", "timestep"))
                )
                acting = span[0] <= attachment.progress(time) < span[1]
                for processor in processors.values():
                    if hasattr(processor, "scale"):
                        processor.scale = [scale if acting else 0.0]
                told = for_batch(embeddings, len(sample), attachment.guided())
                self.told(projection, told)
                known = kwargs.get("added_cond_kwargs") or {}
                return args, kwargs | {"added_cond_kwargs": {**known, "image_embeds": [told]}}

            hooks.callback(unet.register_forward_pre_hook(tell, with_kwargs=True).remove)
            for module, down, up in lora_layers(unet, self.lora):
                hooks.callback(module.register_forward_hook(low_rank(down, up)).remove)
            yield

    def told(self, projection: nn.Module, embeddings: Tensor) -> None:
        """For methods whose projection must know more than the embeddings (B, n, ...) of a call."""

    def _processors(self, pipe: Any) -> tuple[dict[str, Any], nn.Module]:
        """The U-Net's attention processors and projection of this method, built by diffusers once and set again later."""
        unet = pipe.unet
        if id(unet) not in self._built:
            pipe.load_ip_adapter(self.parts, subfolder="", weight_name="", image_encoder_folder=None)
            self._built[id(unet)] = dict(unet.attn_processors), unet.encoder_hid_proj
            return self._built[id(unet)]
        processors, projection = self._built[id(unet)]
        unet.set_attn_processor(dict(processors))
        unet.encoder_hid_proj = projection.to(unet.device, unet.dtype)
        unet.config.encoder_hid_dim_type = "ip_image_proj"
        return processors, projection


@contextmanager
def restored(pipe: Any) -> Iterator[None]:
    """What `load_ip_adapter` changes is as it was when this closes: processors, projection, feature extractor."""
    unet = pipe.unet
    processors, projection, kind = dict(unet.attn_processors), unet.encoder_hid_proj, unet.config.encoder_hid_dim_type
    extractor = getattr(pipe, "feature_extractor", None)
    try:
        yield
    finally:
        unet.set_attn_processor(processors)
        unet.encoder_hid_proj = projection
        unet.config.encoder_hid_dim_type = kind
        if hasattr(pipe, "feature_extractor"):
            pipe.register_modules(feature_extractor=extractor)


def for_batch(embeddings: Tensor, batch: int, guided: bool) -> Tensor:
    """(P, n, ...) -> (B, n, ...): equally many images of each prompt, in order; zeros for the negative half.

    Raises:
        OptionError: the batch cannot be shared by so many prompts.
    """
    positive = batch // 2 if guided else batch
    if positive % len(embeddings):
        raise OptionError(f"{len(embeddings)} identities for {positive} images: give one, or one for each prompt.")
    shown = embeddings.repeat_interleave(positive // len(embeddings), 0)
    return torch.cat([torch.zeros_like(shown), shown]) if guided else shown


def lora_layers(unet: Any, tensors: Mapping[str, Tensor]) -> Iterator[tuple[nn.Module, Tensor, Tensor]]:
    """The linear layers of a U-Net, each with its low-rank pair, of names such as "3.to_q_lora.down.weight".

    The number is the place among all attention processors.
    """
    names = [name.removesuffix(".processor") for name in unet.attn_processors]
    for name, down in tensors.items():
        place, layer, side, _ = name.split(".")
        if side != "down":
            continue
        attention = unet.get_submodule(names[int(place)])
        linear = layer.removesuffix("_lora")
        module = attention.to_out[0] if linear == "to_out" else getattr(attention, linear)
        like = next(module.parameters())
        yield module, down.to(like), tensors[f"{place}.{layer}.up.weight"].to(like)


def low_rank(down: Tensor, up: Tensor) -> Any:
    """A forward hook that adds up(down(x)). A hook, not a LoRA of the pipeline's: loading one there would switch off the
    user's own, and leave its layers behind."""

    def add(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + nn.functional.linear(nn.functional.linear(args[0], down), up)

    return add
