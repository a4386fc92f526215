"""What a tuning trains: parameters of a pipeline, which become a method and are restored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn

from openpulid.errors import OptionError
from openpulid.methods.lora import parse_lora
from openpulid.methods.tuned import (
    ENCODERS,
    PARTS,
    CustomDiffusion,
    DreamBooth,
    TextualInversion,
    Trigger,
    TunedAdapter,
    TunedLora,
    detach_first_token,
    encoder_words,
    find_token,
    read_words,
)
from openpulid.training.tuning.recipes import TuningRecipe

ATTENTION_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
"""Layers of the U-Net with a LoRA, as in diffusers' script."""
TEXT_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj"]
"""The same of a text encoder."""

ADAPTER_NAME = "tuning"


class TrainedPart(Protocol):
    """Parameters in training.

    Attributes:
        modules: what the trainer optimizes and checkpoints.
        trains_text: whether the gradient goes through the text encoders.
    """

    modules: Mapping[str, nn.Module]
    trains_text: bool

    def open_hooks(self, stack: ExitStack) -> None:
        """Register the hooks of the training, until the stack closes."""

    def create_method(self) -> TunedAdapter:
        """Return the method with a copy of the parameters."""

    def restore(self) -> None:
        """Make the pipeline what it was."""


def check_words(pipe: Any, trigger: Trigger) -> None:
    """Check that the word and the class word are one token each.

    Raises:
        OptionError: one of them is not.
    """
    for tokenizer in (pipe.tokenizer, pipe.tokenizer_2):
        for word in (trigger.word, trigger.class_word):
            find_token(tokenizer, word)


@contextmanager
def open_part(recipe: TuningRecipe, pipe: Any, trigger: Trigger) -> Iterator[TrainedPart]:
    """Prepare what a recipe trains on a frozen pipeline, and restore the pipeline afterwards.

    Args:
        recipe: the recipe.
        pipe: a pipeline of SDXL whose parameters need no gradient.
        trigger: the word for the person.

    Raises:
        OptionError: the word or the class word is not one token.
    """
    check_words(pipe, trigger)
    part = _PARTS[recipe.trained](recipe, pipe, trigger)
    with ExitStack() as stack:
        stack.callback(part.restore)
        if recipe.gradient_checkpointing:
            pipe.unet.enable_gradient_checkpointing()
            stack.callback(pipe.unet.disable_gradient_checkpointing)
        part.open_hooks(stack)
        yield part


class WordVectors(nn.Module):
    """Embeddings of a word for both text encoders, which begin as those of its noun."""

    def __init__(self, pipe: Any, noun: str, count: int) -> None:
        super().__init__()
        vectors: dict[str, Tensor] = {}
        for name, suffix in ENCODERS.items():
            encoder = getattr(pipe, f"text_encoder{suffix}")
            tokenizer = getattr(pipe, f"tokenizer{suffix}")
            row = encoder.get_input_embeddings().weight[find_token(tokenizer, noun)]
            vectors[name] = nn.Parameter(row.detach().float().repeat(count, 1))
        self.parameters_by_name = nn.ParameterDict(vectors)

    @property
    def vectors(self) -> dict[str, Tensor]:
        """Name of the text encoder -> (n, D), in training."""
        return dict(self.parameters_by_name.items())


class TrainedWord:
    """The embeddings of a word alone, for Textual Inversion."""

    trains_text = True

    def __init__(self, recipe: TuningRecipe, pipe: Any, trigger: Trigger) -> None:
        self.pipe = pipe
        self.trigger = trigger
        self.word = WordVectors(pipe, trigger.class_word, recipe.num_vectors).to(pipe.device)
        self.modules: dict[str, nn.Module] = {"word": self.word}

    def open_hooks(self, stack: ExitStack) -> None:
        """Register the hooks of the text encoders."""
        words = encoder_words(self.pipe, self.trigger.word, self.word.vectors)
        stack.enter_context(read_words(words))

    def create_method(self) -> TunedAdapter:
        """Return the method with a copy of the embeddings."""
        return TextualInversion(_copy(self.word.vectors), self.trigger)

    def restore(self) -> None:
        """Do nothing: the pipeline is unchanged."""


class TrainedCrossAttention:
    """Keys and values of the cross-attention with a word, for Custom Diffusion."""

    trains_text = True

    def __init__(self, recipe: TuningRecipe, pipe: Any, trigger: Trigger) -> None:
        self.pipe = pipe
        self.trigger = trigger
        self.word = WordVectors(pipe, trigger.class_word, 1).to(pipe.device)
        self.layers: dict[str, Any] = {
            name: layer
            for name, layer in pipe.unet.named_modules()
            if name.endswith((".attn2.to_k", ".attn2.to_v"))
        }
        self.original = {name: layer.weight.data for name, layer in self.layers.items()}
        for layer in self.layers.values():
            layer.weight.data = layer.weight.data.float().clone()
            layer.weight.requires_grad_(True)
        matrices = nn.ModuleDict({x.replace(".", "-"): y for x, y in self.layers.items()})
        self.modules: dict[str, nn.Module] = {"matrices": matrices, "word": self.word}

    def open_hooks(self, stack: ExitStack) -> None:
        """Register the hooks of keys, values and text encoders."""
        for layer in self.layers.values():
            stack.callback(layer.register_forward_hook(detach_first_token).remove)
        words = encoder_words(self.pipe, self.trigger.word, self.word.vectors)
        stack.enter_context(read_words(words))

    def create_method(self) -> TunedAdapter:
        """Return the method with a copy of matrices and word."""
        matrices = {f"{name}.weight": layer.weight for name, layer in self.layers.items()}
        return CustomDiffusion(_copy(matrices), _copy(self.word.vectors), self.trigger)

    def restore(self) -> None:
        """Put back the matrices."""
        for name, layer in self.layers.items():
            layer.weight.requires_grad_(False)
            layer.weight.data = self.original[name]


class TrainedUNet:
    """All weights of the U-Net, for DreamBooth."""

    trains_text = False

    def __init__(self, recipe: TuningRecipe, pipe: Any, trigger: Trigger) -> None:
        self.unet = pipe.unet
        self.trigger = trigger
        self.original = {name: x.data for name, x in self.unet.named_parameters()}
        for parameter in self.unet.parameters():
            parameter.data = parameter.data.float().clone()
            parameter.requires_grad_(True)
        self.modules: dict[str, nn.Module] = {"unet": self.unet}

    def open_hooks(self, stack: ExitStack) -> None:
        """Do nothing: there are no hooks."""

    def create_method(self) -> TunedAdapter:
        """Return the method with a copy of the weights."""
        return DreamBooth(_copy(dict(self.unet.named_parameters())), self.trigger)

    def restore(self) -> None:
        """Put back the weights."""
        for name, parameter in self.unet.named_parameters():
            parameter.requires_grad_(False)
            parameter.data = self.original[name]


class TrainedLora:
    """Low-rank matrices of the attention, for LoRA and DreamBooth with LoRA; peft trains them.

    Raises:
        OptionError: the pipeline has LoRAs, which would be inactive in the training.
    """

    def __init__(self, recipe: TuningRecipe, pipe: Any, trigger: Trigger) -> None:
        loaded = {name for names in pipe.get_list_adapters().values() for name in names}
        if loaded:
            raise OptionError(
                f"the pipeline has LoRAs ({', '.join(sorted(loaded))}): call "
                "unload_lora_weights() before the training, and load them again afterwards."
            )
        self.pipe = pipe
        self.trigger = trigger
        self.trains_text = recipe.with_text_encoders
        parts = PARTS if recipe.with_text_encoders else PARTS[:1]
        self.networks = {part: getattr(pipe, part) for part in parts}
        torch.manual_seed(recipe.seed)
        for part, network in self.networks.items():
            config = LoraConfig(
                r=recipe.rank,
                lora_alpha=recipe.rank,
                init_lora_weights="gaussian",
                target_modules=ATTENTION_LAYERS if part == "unet" else TEXT_LAYERS,
            )
            network.add_adapter(config, ADAPTER_NAME)
            for parameter in network.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        self.modules: dict[str, nn.Module] = dict(self.networks)

    def open_hooks(self, stack: ExitStack) -> None:
        """Do nothing: peft has wrapped the layers."""

    def create_method(self) -> TunedAdapter:
        """Return the method with a copy of the matrices."""
        layers = {
            part: parse_lora(
                _copy(get_peft_model_state_dict(network, adapter_name=ADAPTER_NAME)),
                is_text_encoder=part != "unet",
            )
            for part, network in self.networks.items()
        }
        return TunedLora(layers, self.trigger)

    def restore(self) -> None:
        """Remove the matrices."""
        self.pipe.unload_lora_weights()


_PARTS: dict[str, Any] = {
    "word": TrainedWord,
    "cross-attention": TrainedCrossAttention,
    "unet": TrainedUNet,
    "lora": TrainedLora,
}


def _copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().float().clone() for name, x in tensors.items()}
