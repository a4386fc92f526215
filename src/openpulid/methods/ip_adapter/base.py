"""Image tokens beside the text's: what IP-Adapter, FaceID and InstantID's adapter share.

Everything that diffusers has is used as it is: `load_ip_adapter` builds the projection and the attention processors. What is
ours is to open and close it around a generation, for any SDXL pipeline and without telling the pipeline anything: the
embeddings go in by a hook on the U-Net.

Shapes: B batch of the U-Net, P prompts, n photos, D width of an embedding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from openpulid.errors import OptionError, WeightsError
from openpulid.identity.identity import Identity
from openpulid.io.checkpoints import read_tensors
from openpulid.methods.hooks import PipelineState, Serving, exclusive_use, unet_of

Parts = Mapping[str, Mapping[str, Tensor]]
"""A published file: {"image_proj": {...}, "ip_adapter": {...}}."""


PROCESSORS = "_token_method_in_use"
"""The mark of those that exchange the U-Net's processors: of two, the first would not be seen."""


@dataclass(frozen=True)
class Call:
    """One call of the U-Net: (B, c, h, w), the time, and its other arguments by name."""

    sample: Tensor
    time: Any
    named: Mapping[str, Any]


class IPAdapterBase(Serving):
    """A method whose file diffusers opens with `load_ip_adapter`; what it embeds is a subclass's.

    Args:
        parts: the published file.
    """

    scale: ClassVar[float] = 1.0
    """What the authors use it with."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        if set(parts) != {"image_proj", "ip_adapter"} or not all(parts.values()):
            raise WeightsError(
                f"this file has {', '.join(parts) or 'nothing'}; such an adapter has image_proj and ip_adapter."
            )
        self.parts = {part: dict(tensors) for part, tensors in parts.items()}
        self.lora = {
            name: self.parts["ip_adapter"].pop(name)
            for name in list(self.parts["ip_adapter"])
            if "_lora." in name
        }
        self._built: WeakKeyDictionary[nn.Module, tuple[dict[str, Any], nn.Module]] = (
            WeakKeyDictionary()
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> IPAdapterBase:
        """From a published file, safetensors or `.bin`.

        Raises:
            WeightsError: no such file, or another kind of adapter.
        """
        return cls(cls.read(path))

    @staticmethod
    def read(path: str | os.PathLike[str]) -> Parts:
        """A published file in its parts. Raises WeightsError where there is none."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in read_tensors(path).items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = tensor
        return parts

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> IPAdapterBase:
        """Moves the low-rank part; what diffusers builds from the file follows the U-Net."""
        self.lora = {name: x.to(device, dtype) for name, x in self.lora.items()}
        return self

    def embeddings(self, identity: Identity) -> Tensor:
        """(1, n, ...) for diffusers' projection layer."""
        raise NotImplementedError

    def nobody(self, identity: Identity) -> Tensor | None:
        """What the negative half of a guided batch is told, as `embeddings`; zeros where it is None."""
        return None

    def attach(self, target: Any) -> None:
        """Serves a StableDiffusionXL pipeline from now on; nothing in it changes before `use`.

        Raises:
            OptionError: it has no U-Net, is no pipeline, or has its weights elsewhere.
        """
        unet_of(target)
        if not hasattr(target, "load_ip_adapter"):
            raise OptionError(
                f"{type(target).__name__} is no pipeline; attach this method to a StableDiffusionXL pipeline."
            )
        self.built(target)  # now, and not within the first image
        self.serve(target)

    def detach(self, target: Any = None) -> None:
        """Serves this pipeline no longer; without an argument, none."""
        for attachment in self._attachments:
            if target is None or attachment.target is target:
                self._built.pop(attachment.unet, None)
        super().detach(target)

    @contextmanager
    def use(
        self,
        people: Identity | Sequence[Identity],
        scale: float | None = None,
        start: float = 0.0,
        end: float = 1.0,
        pipe: Any = None,
    ) -> Iterator[IPAdapterBase]:
        """The attached pipelines show an identity while this is open.

        Args:
            people: an identity, or one for each prompt.
            scale: weight of the image tokens; the authors' where it is None.
            start, end: fractions of the schedule between which they act, [start, end).
            pipe: only this one of the attached pipelines.

        Raises:
            OptionError: nothing is attached, an argument is outside its range, or another such method is in use.
        """
        everyone = [people] if isinstance(people, Identity) else list(people)
        if not everyone or not 0 <= start <= 1 or not 0 <= end <= 1:
            raise OptionError(
                "give an identity, or one for each prompt; start and end are fractions of the schedule, from 0 to 1."
            )
        serving = self.serving(pipe)
        strength = self.scale if scale is None else scale
        with ExitStack() as stack:
            for attachment in serving if strength and start < end else []:
                stack.enter_context(self._opened(attachment, everyone, strength, (start, end)))
            yield self

    def tell(
        self, attachment: PipelineState, people: Sequence[Identity], call: Call, strength: float
    ) -> dict[str, Any]:
        """What a call of the U-Net is told beside what the pipeline says.

        Args:
            strength: 0 where nobody is to be seen at this time.
        """
        embeddings = torch.cat([self.embeddings(identity) for identity in people])
        nobody = cat_or_none([self.nobody(identity) for identity in people])
        shown = per_image(embeddings, len(call.sample), attachment.guided(), nobody).to(call.sample)
        known = call.named.get("added_cond_kwargs") or {}
        return {"added_cond_kwargs": {**known, "image_embeds": [shown]}}

    @contextmanager
    def _opened(
        self,
        attachment: PipelineState,
        people: Sequence[Identity],
        scale: float,
        span: tuple[float, float],
    ) -> Iterator[None]:
        unet = attachment.unet
        strength = 0.0
        with (
            exclusive_use(unet, mark=PROCESSORS),
            restored(attachment.target),
            ExitStack() as hooks,
        ):
            processors, projection = self.built(attachment.target)
            set_up(unet, processors, projection, "ip_image_proj")

            def hook(
                module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
            ) -> tuple[tuple[Any, ...], dict[str, Any]]:
                first = dict(zip(("sample", "timestep"), args, strict=False)) | named
                call = Call(first["sample"], first["timestep"], named)
                nonlocal strength
                strength = scale if attachment.within(call.time, span) else 0.0
                move_to([projection, *processors.values()], call.sample.device, unet.dtype)
                for processor in processors.values():
                    if hasattr(processor, "scale"):
                        processor.scale = [strength]
                return args, named | self.tell(attachment, people, call, strength)

            hooks.callback(unet.register_forward_pre_hook(hook, with_kwargs=True).remove)
            for module, down, up in lora_layers(unet, self.lora):
                hooks.callback(
                    module.register_forward_hook(low_rank(down, up, lambda: strength != 0)).remove
                )
            yield

    def built(self, pipe: Any) -> tuple[dict[str, Any], nn.Module]:
        """The U-Net's attention processors with this method's, and the projection: built by diffusers once."""
        unet = pipe.unet
        if unet not in self._built:
            if unet.device.type == "meta":
                raise OptionError(
                    "this pipeline is offloaded already; attach the method before enable_sequential_cpu_offload()."
                )
            with restored(pipe):
                pipe.load_ip_adapter(
                    self.parts, subfolder="", weight_name="", image_encoder_folder=None
                )
                projection, unet.encoder_hid_proj = unet.encoder_hid_proj, None
                self._built[unet] = dict(unet.attn_processors), projection
        return self._built[unet]


@contextmanager
def restored(pipe: Any) -> Iterator[None]:
    """What `load_ip_adapter` changes is as it was when this closes: processors, projection, feature extractor."""
    unet = pipe.unet
    processors, projection, kind = (
        dict(unet.attn_processors),
        unet.encoder_hid_proj,
        unet.config.encoder_hid_dim_type,
    )
    extractor = getattr(pipe, "feature_extractor", None)
    try:
        yield
    finally:
        set_up(unet, processors, projection, kind)
        if hasattr(pipe, "feature_extractor"):
            pipe.register_modules(feature_extractor=extractor)


def set_up(
    unet: Any, processors: Mapping[str, Any], projection: nn.Module | None, kind: str | None
) -> None:
    """The processors first: a Resampler has attention of its own, which the U-Net would count among its layers."""
    unet.encoder_hid_proj = None
    unet.set_attn_processor(dict(processors))
    unet.encoder_hid_proj = projection
    unet.config.encoder_hid_dim_type = kind


def move_to(modules: Iterable[Any], device: torch.device, dtype: torch.dtype) -> None:
    """Moves what is not there. Asked in a call, by what the U-Net is given: a U-Net that is offloaded lies elsewhere, or
    nowhere, until it is called."""
    for module in modules:
        if isinstance(module, nn.Module):
            first = next(module.parameters())
            if (first.device, first.dtype) != (device, dtype):
                module.to(device, dtype)


def cat_or_none(several: Sequence[Tensor | None]) -> Tensor | None:
    """One tensor of all, (P, ...); None where one of them is."""
    present = [one for one in several if one is not None]
    return torch.cat(present) if len(present) == len(several) else None


def per_image(values: Tensor, batch: int, guided: bool, negative: Tensor | None = None) -> Tensor:
    """(P, ...) -> (B, ...): equally many images of each prompt, in order; before them, in a guided batch, as many of
    `negative`, or zeros.

    Raises:
        OptionError: the batch cannot be shared by so many prompts.
    """
    positive = batch // 2 if guided else batch
    if positive % len(values):
        raise OptionError(
            f"{len(values)} identities for {positive} images: give one, or one for each prompt."
        )
    each = positive // len(values)
    shown = values.repeat_interleave(each, 0)
    if not guided:
        return shown
    return torch.cat(
        [
            torch.zeros_like(shown) if negative is None else negative.repeat_interleave(each, 0),
            shown,
        ]
    )


def lora_layers(
    unet: Any, tensors: Mapping[str, Tensor]
) -> Iterator[tuple[nn.Module, Tensor, Tensor]]:
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
        yield module, down, tensors[f"{place}.{layer}.up.weight"]


def low_rank(down: Tensor, up: Tensor, acts: Callable[[], bool] = lambda: True) -> Any:
    """A forward hook that adds up(down(x)) while it acts. A hook, not a LoRA of the pipeline's: loading one there would switch
    off the user's own, and leave its layers behind."""

    def add(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not acts():
            return None
        x: Tensor = args[0]
        return output + nn.functional.linear(nn.functional.linear(x, down.to(x)), up.to(x))

    return add
