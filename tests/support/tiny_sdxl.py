"""A StableDiffusionXLPipeline of a few thousand random weights, an adapter, and random people."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
)

from openpulid.faces.align import TEMPLATE
from openpulid.faces.embed import FaceEmbedder
from openpulid.faces.face import Face
from openpulid.faces.miniature import ResNetRecognition
from openpulid.methods.pulid.encoders import IDEncoder, IDFormer
from openpulid.methods.pulid.sdxl import PuLID
from openpulid.training.pulid.batch import Batch
from openpulid.training.pulid.models import SDXLModel
from openpulid.training.pulid.recipe import Recipe
from openpulid.training.pulid.task import PuLIDTask, Validation

PEOPLE, ID, PATCHES, WIDTH = 24, 12, 4, 8
WORDS = ["portrait", "of", "a", "person", "noir", "red", "hat"]


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="</s>"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=64,
    )


def text_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(WORDS) + 2,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        projection_dim=16,
        bos_token_id=0,
        eos_token_id=1,
    )


def pipe(prediction: str = "epsilon") -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        norm_num_groups=8,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 1),
        cross_attention_dim=32,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=16,
    )
    return StableDiffusionXLPipeline(
        vae=vae,
        unet=unet,
        text_encoder=CLIPTextModel(text_config()).eval(),
        text_encoder_2=CLIPTextModelWithProjection(text_config()).eval(),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        scheduler=DDPMScheduler(beta_schedule="scaled_linear", prediction_type=prediction),
    )


class People:
    """Latents that depend on the identity, so that there is something to learn."""

    def __init__(self, batch: int = 4) -> None:
        generator = torch.Generator().manual_seed(5)
        self.size = batch
        self.id_cond = torch.randn(PEOPLE, ID, generator=generator)
        self.hidden = [
            torch.randn(PEOPLE, 1 + PATCHES, WIDTH, generator=generator) for _ in range(5)
        ]
        self.latents = self.id_cond[:, :4, None, None].expand(-1, -1, 8, 8) + 0.1 * torch.randn(
            PEOPLE, 4, 8, 8, generator=generator
        )
        self.images = torch.rand(PEOPLE, 3, 16, 16, generator=generator)
        self.masks = torch.zeros(PEOPLE, 1, 8, 8)
        self.masks[..., 2:6, 2:6] = 1

    def batch(self, rng) -> Batch:
        i = rng.indices(PEOPLE, self.size)
        prompts = [("portrait of a person", "noir red hat")[k % 2] for k in i.tolist()]
        features = self.id_cond[i], [h[i] for h in self.hidden]
        return Batch(self.latents[i], self.masks[i], prompts, *features, self.images[i])


def recipe(**changes) -> Recipe:
    figures = {
        "base": "tiny",
        "min_snr_gamma": 5.0,
        "face_loss_weight": 3.0,
        "steps": 12,
        "lr": 1e-2,
        "warmup": 2,
    }
    return Recipe("tiny", **{**figures, **changes})


def base(pipe=None) -> SDXLModel:
    return SDXLModel(pipe or globals()["pipe"]())


def encoder(kind: str = "IDEncoder") -> IDEncoder | IDFormer:
    if kind == "IDEncoder":
        return IDEncoder(width=ID, context_dim=32, num_token=2, vit_dim=WIDTH, hidden_dim=16)
    sizes = {
        "dim": 16,
        "depth": 5,
        "dim_head": 8,
        "heads": 2,
        "num_id_token": 2,
        "num_queries": 4,
        "ff_mult": 1,
    }
    return IDFormer(output_dim=32, width=ID, vit_dim=WIDTH, hidden_dim=16, **sizes)


def adapter(base: SDXLModel, kind: str = "IDEncoder") -> PuLID:
    """An attached adapter with random values; untrained values of zero have no effect."""
    torch.manual_seed(1)
    made = PuLID.for_unet(base.unet, encoder(kind))
    for layer in made.id_adapter_attn_layers.values():
        torch.nn.init.normal_(layer.id_to_v.weight, std=0.3)
    made.attach(base.pipe)
    return made


def faces() -> FaceEmbedder:
    """A face in every image, and a small random recognition model."""
    torch.manual_seed(2)
    recogniser = ResNetRecognition(stem=4, widths=(8, 8, 8), depths=(1, 1, 1), dim=6)

    def find(images):
        side = images.shape[-1]
        box, mask = torch.tensor([0.0, 0.0, side, side]), torch.ones(1, side, side)
        return [Face(image, box, TEMPLATE * side, 1.0, mask) for image in images]

    return FaceEmbedder(find, recogniser)


def task(pipe=None, batch: int = 4, **changes) -> PuLIDTask:
    """Stage 1, or a later stage by `changes`, with rollouts on the same base."""
    one = base(pipe)
    torch.manual_seed(1)
    made = adapter(one) if changes.get("few_step_batch") else PuLID.for_unet(one.unet, encoder())
    more = (
        {"few_step_models": [one], "face_embedder": faces()}
        if changes.get("few_step_batch")
        else {}
    )
    return PuLIDTask(
        recipe(**changes), one, made, People(batch), validation=Validation(People(batch)), **more
    )
