"""PhotoMaker v1 and v2 (arXiv 2312.04461) inside any SDXL pipeline: the word for a person is said once for each
of their tokens, and each of these words is melted with one token.

Nothing is told to the pipeline. Hooks on the text encoders hear what is said and say it again with the repeated word; a hook on
the U-Net puts the melted words in the place of the plain ones. Shapes: B batch of the U-Net, L tokens of a prompt, D its width.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig

from openpulid.errors import OptionError, WeightsError
from openpulid.identity.clip_extractor import ClipExtractor, FaceRecognition
from openpulid.identity.detection import FaceDetection
from openpulid.identity.identity import Identity
from openpulid.io.checkpoints import read_metadata
from openpulid.methods.hooks import PipelineState, Serving, exclusive_use, unet_of
from openpulid.methods.ip_adapter.base import IPAdapterBase, low_rank
from openpulid.methods.photomaker.encoder import PhotoMakerEncoder

SUBJECTS = ("person", "man", "woman", "boy", "girl", "child", "lady", "guy")
"""The words that may become somebody, the first one found; where there is none, the first of these is put in front."""


@dataclass(frozen=True)
class Said:
    """One prompt through one text encoder: plain, and with the repeated word. States (L, D'), pooled (P,)."""

    plain: Tensor
    repeated: Tensor
    pooled: Tensor
    place: int


class PhotoMaker(Serving):
    """Its method protocol is `methods.base.Method`; identities are those of `features`.

    Args:
        encoder: from `PhotoMakerEncoder.of`.
        lora: the file's low-rank change of the U-Net, by diffusers' or peft's names.
    """

    start: ClassVar[float] = 0.2
    """The authors let the words alone lay the picture out for this fraction of the steps."""

    def __init__(self, encoder: PhotoMakerEncoder, lora: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.encoder, self.lora = encoder, low_rank_pairs(lora)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PhotoMaker:
        """From `photomaker-v1.bin` or `photomaker-v2.bin`; of another tower a safetensors file says what it is (`tower`).

        Raises:
            WeightsError: no such file, or another kind of adapter.
        """
        parts = IPAdapterBase.read(path)
        if set(parts) != {"id_encoder", "lora_weights"}:
            raise WeightsError(
                f"{path} has {', '.join(parts) or 'nothing'}; PhotoMaker's has id_encoder and lora_weights."
            )
        said = read_metadata(path).get("tower") if Path(path).suffix == ".safetensors" else None
        config = CLIPVisionConfig(**json.loads(said)) if said else None
        return cls(PhotoMakerEncoder.of(parts["id_encoder"], config), parts["lora_weights"])

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> PhotoMaker:
        """Moves the encoder and the low-rank part."""
        self.encoder.to(device, dtype)
        self.lora = {
            name: (down.to(device, dtype), up.to(device, dtype))
            for name, (down, up) in self.lora.items()
        }
        return self

    def features(
        self,
        detection: FaceDetection,
        recognition: FaceRecognition | None = None,
        models: Mapping[str, str] | None = None,
    ) -> ClipExtractor:
        """Return the extractor for this file, with its own vision encoder on whole images.

        Args:
            detection: face detection.
            recognition: face recognition model; version 2 needs buffalo_l's.
            models: name -> hash of the models; written into every identity.

        Raises:
            OptionError: version 2 without a recognition model.
        """
        if self.encoder.face and recognition is None:
            raise OptionError("PhotoMaker v2 needs a face recognition model (buffalo_l's).")
        embedder = recognition if self.encoder.face else None
        return ClipExtractor(detection, self.encoder, "image", -1, embedder, models)

    def attach(self, target: Any) -> None:
        """Serves a StableDiffusionXL pipeline from now on; nothing in it changes before `use`.

        Raises:
            OptionError: it is no such pipeline.
        """
        unet_of(target)
        if getattr(target, "text_encoder_2", None) is None:
            raise OptionError(
                f"{type(target).__name__} has no two text encoders; PhotoMaker rewrites what SDXL's say."
            )
        self.serve(target)

    @contextmanager
    def use(
        self,
        people: Identity | Sequence[Identity],
        scale: float = 1.0,
        start: float | None = None,
        end: float = 1.0,
        pipe: Any = None,
    ) -> Iterator[PhotoMaker]:
        """The attached pipelines show an identity while this is open.

        Args:
            people: an identity, or one for each prompt.
            scale: of the low-rank change; at 0 nothing is changed at all.
            start, end: fractions of the schedule between which the melted words are read, (start, end), as the authors count;
                from the first step where start is 0.
            pipe: only this one of the attached pipelines.

        Raises:
            OptionError: nothing is attached, or an argument is outside its range.
        """
        everyone = [people] if isinstance(people, Identity) else list(people)
        span = (self.start if start is None else start, end)
        if not everyone or not all(0 <= at <= 1 for at in span):
            raise OptionError(
                "give an identity, or one for each prompt; start and end are fractions of the schedule, from 0 to 1."
            )
        serving = self.serving(pipe)
        with ExitStack() as stack:
            for attachment in serving if scale and span[0] < span[1] else []:
                stack.enter_context(_Opened(self, attachment, everyone, scale, span).hooks())
            yield self


class _Opened:
    """One pipeline while `use` is open."""

    def __init__(
        self,
        method: PhotoMaker,
        attachment: PipelineState,
        people: Sequence[Identity],
        scale: float,
        span: tuple[float, float],
    ) -> None:
        self.attachment, self.scale, self.span, self.lora = attachment, scale, span, method.lora
        self.encoder = method.encoder
        self.tokens = [tokens_of(self.encoder, identity) for identity in people]
        if len({len(tokens) for tokens in self.tokens}) > 1:
            raise OptionError(
                "PhotoMaker shows several people in one batch only from as many photos each."
            )
        self.said: tuple[list[Said], list[Said]] = ([], [])
        self.speaking = self.drawn = False

    @contextmanager
    def hooks(self) -> Iterator[None]:
        pipe, unet = self.attachment.target, self.attachment.unet
        with exclusive_use(unet, mark="_photomaker_in_use"), ExitStack() as hooks:
            for index, (encoder, words) in enumerate(
                ((pipe.text_encoder, pipe.tokenizer), (pipe.text_encoder_2, pipe.tokenizer_2))
            ):
                hooks.callback(
                    encoder.register_forward_hook(
                        partial(self._hear, index, words), with_kwargs=True
                    ).remove
                )
            for name, (down, up) in self.lora.items():
                hooks.callback(
                    unet.get_submodule(name)
                    .register_forward_hook(low_rank(down, self.scale * up))
                    .remove
                )
            # first of the hooks: a ControlNet beside it reads the melted words, too
            hooks.callback(
                unet.register_forward_pre_hook(self._tell, with_kwargs=True, prepend=True).remove
            )
            yield

    @torch.no_grad()
    def _hear(
        self, index: int, words: Any, module: nn.Module, args: Any, named: Any, output: Any
    ) -> None:
        """What a text encoder was given, once more with the repeated word; kept beside what it said."""
        if self.speaking:
            return
        if self.drawn:  # another run begins: what was said for the last one is not kept
            self.said, self.drawn = ([], []), False
        ids = args[0] if args else named["input_ids"]
        again, places = repeated(ids, words, len(self.tokens[0]))
        self.speaking = True
        try:
            other = module(
                again, **{name: value for name, value in named.items() if name != "input_ids"}
            )
        finally:
            self.speaking = False
        layer = -((getattr(self.attachment.target, "clip_skip", None) or 0) + 2)
        for row, place in enumerate(places):
            known = output.hidden_states[layer][row], other.hidden_states[layer][row], other[0][row]
            self.said[index].append(Said(*known, place))

    def _tell(
        self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The prompt with melted words, and its pooled embedding, where an image is asked for."""
        first = (
            dict(zip(("sample", "timestep", "encoder_hidden_states"), args, strict=False)) | named
        )
        self.drawn = True
        start, end = self.span
        laid_out = (
            not start or self.attachment.progress(first["timestep"]) > start
        )  # the step at `start` is the words' own
        if not laid_out or not self.attachment.within(first["timestep"], (0, end)):
            return args, named
        states, added = first["encoder_hidden_states"].clone(), dict(named["added_cond_kwargs"])
        pooled = added["text_embeds"].clone()
        begin = len(states) // 2 if self.attachment.guided() else 0
        images = len(states) - begin
        if images % len(self.tokens):
            raise OptionError(
                f"{len(self.tokens)} identities for {images} images: give one, or one for each prompt."
            )
        for row in range(images):
            tokens = self.tokens[row // (images // len(self.tokens))]
            states[begin + row], pooled[begin + row] = self._melted(states[begin + row], tokens)
        kept = args[:2]  # what was given by place is given by name
        return kept, named | {
            "encoder_hidden_states": states,
            "added_cond_kwargs": added | {"text_embeds": pooled},
        }

    def _melted(self, plain: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(L, D) a prompt as the pipeline says it -> the same with somebody in it, and pooled (P,)."""
        for first, second in zip(*self.said, strict=True):
            if torch.equal(torch.cat([first.plain, second.plain], -1).to(plain), plain):
                states = torch.cat([first.repeated, second.repeated], -1).to(tokens)
                place = slice(second.place, second.place + len(tokens))
                if place.stop >= len(states):  # the last place is the end's
                    raise OptionError(
                        f"PhotoMaker says the word for the person {len(tokens)} times, once for each token of the photos, and "
                        "it stands too late in the prompt for that; name the person earlier, or take fewer photos."
                    )
                states[place] = self.encoder.fuse_module(states[place], tokens)
                return states.to(plain), second.pooled.to(plain)
        raise OptionError(
            "PhotoMaker rewrites the prompt; give the pipeline words while it is in use, no embeddings."
        )


def tokens_of(encoder: PhotoMakerEncoder, identity: Identity) -> Tensor:
    """(n * k, D): the tokens of all photos.

    Raises:
        OptionError: another reader made the identity.
    """
    width = encoder.config.hidden_size
    if len(identity.hidden) != 2 or identity.hidden[0].shape[-1] != width:
        raise OptionError(
            "this identity is not of PhotoMaker's own picture tower; make it with PhotoMaker.features(...)."
        )
    states = (
        identity.hidden[0][0].unflatten(0, (identity.photos, -1)).to(encoder.device, encoder.dtype)
    )
    faces = identity.id_cond[0, :, : encoder.face].to(states) if encoder.face else None
    return encoder.people(states, faces).flatten(0, 1)


def repeated(ids: Tensor, words: Any, count: int) -> tuple[Tensor, list[int]]:
    """(P, L) prompts -> the same with the word for the person `count` times, and the first place of it in each.

    The end stays where prompts become too long: the pooled embedding is read there.
    """
    subjects = {
        words.convert_tokens_to_ids(form) for word in SUBJECTS for form in (word, f"{word}</w>")
    } - {words.unk_token_id}
    subjects.discard(None)
    rows, places = [], []
    for row in ids.tolist():
        place = next((index for index, token in enumerate(row) if token in subjects), None)
        known = place is not None
        token = row[place] if place is not None else next(iter(_first(words)))
        place = place if place is not None else 1
        longer = row[:place] + [token] * count + row[place + known :]
        kept = longer[: len(row)]
        if words.eos_token_id not in kept[place + count :]:
            kept[-1] = words.eos_token_id
        rows.append(kept)
        places.append(place)
    return torch.tensor(rows, device=ids.device), places


def _first(words: Any) -> list[int]:
    """The token of the first subject that a tokenizer knows."""
    found: list[int] = words(list(SUBJECTS[:1]), add_special_tokens=False).input_ids[0]
    return found[:1]


def low_rank_pairs(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A layer's name -> its two matrices, from any of diffusers' ways to name a LoRA."""
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    named: dict[str, Tensor] = convert_unet_state_dict_to_peft(dict(tensors))
    down = {name.split(".lora_A")[0]: x for name, x in named.items() if ".lora_A" in name}
    up = {name.split(".lora_B")[0]: x for name, x in named.items() if ".lora_B" in name}
    if set(down) != set(up) or len(down) + len(up) != len(named):
        raise WeightsError(
            "the low-rank part of this file has other names than diffusers gives; get the published file."
        )
    return {
        name.removeprefix("unet.").replace(".processor", ""): (down[name], up[name])
        for name in down
    }
