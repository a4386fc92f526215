"""What several tests share: the reference's figures, and the seeded tensors behind them."""

from __future__ import annotations

import gc
import json
import os
import secrets
import sys
import zlib
from collections.abc import Callable, Generator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def pytest_configure() -> None:
    # Tiny networks gain nothing from threads, and sums would depend on the machine.
    torch.set_num_threads(1)
    # Ray keeps the first token that it reads, and would write one into the user's folder.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # By default Ray's workers have the lowest priority, and would wait for all other tests.
    os.environ.setdefault("RAY_worker_niceness", "0")


@pytest.fixture(scope="module", autouse=True)
def frozen_objects() -> None:
    """Let the garbage collector ignore what is imported, and what is left of other modules.

    Every command ends with a full collection, which searched a million objects: a quarter of the
    time of the tests of the page and of `pulid generate`.
    """
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    # Reports are sent between processes as UTF-8, which cannot hold all file names.
    report = yield
    report.sections = [
        (title, text.encode("utf-8", "backslashreplace").decode())
        for title, text in report.sections
    ]
    return report


class Golden:
    """Outputs of the reference on weights and inputs determined by name, shape and seed."""

    folder = Path(__file__).parent / "golden"
    seed = 1

    @cached_property
    def outputs(self) -> dict[str, Tensor]:
        rivals = load_file(self.folder / "rivals.safetensors")  # the other methods
        return rivals | load_file(self.folder / "outputs.safetensors")

    @cached_property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.folder / "manifest.json").read_text("utf-8"))

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        """Standard normal float32, the same on every machine."""
        generator = np.random.Generator(np.random.PCG64([self.seed, zlib.crc32(name.encode())]))
        return torch.from_numpy(generator.standard_normal(tuple(shape), dtype=np.float32))

    def input(self, name: str, *shape: int) -> Tensor:
        return self.normal("input." + name, shape)

    def weight(self, key: str, shape: Sequence[int]) -> Tensor:
        """Scaled like a new network: matrices by their fan-in, norms around 1, small biases."""
        values = self.normal(key, shape)
        if len(shape) >= 2:
            last_axis = key.endswith(("latents", "proj_out", "cls_token", "pos_embed"))
            return values / (shape[-1] if last_axis else int(np.prod(shape[1:]))) ** 0.5
        return 1 + 0.1 * values if key.endswith(("weight", "scale")) else 0.1 * values

    @torch.no_grad()
    def fill(self, module: M, prefix: str = "") -> M:
        """Overwrites every floating entry of the module's state with `weight(prefix + key)`."""
        for key, value in module.state_dict().items():
            if value.is_floating_point():
                value.copy_(self.weight(prefix + key, value.shape))
        return module.eval()

    def error(self, name: str, ours: Tensor) -> float:
        """Norm of the difference over the norm of the reference's output."""
        theirs = self.outputs[name]
        assert ours.shape == theirs.shape
        return float((ours - theirs).norm() / theirs.norm())


@pytest.fixture
def set_bf16(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Return a function that makes the package believe that devices have bfloat16 or not.

    A CPU without instructions for bfloat16 emulates them, so both paths run on any machine.
    """
    import openpulid.device  # noqa: F401 (defines the query)

    def set_(available: bool) -> None:
        for name, module in list(sys.modules.items()):
            if name.startswith("openpulid") and hasattr(module, "supports_bf16"):
                monkeypatch.setattr(module, "supports_bf16", lambda device: available)

    return set_


@pytest.fixture(params=[True, False], ids=["bf16", "fp32"])
def both_precisions(request: pytest.FixtureRequest, set_bf16: Callable[[bool], None]) -> bool:
    """Run a test once as on a CPU with bfloat16 (True) and once as on a CPU without it."""
    set_bf16(request.param)
    return bool(request.param)


@pytest.fixture(scope="session")
def golden() -> Golden:
    return Golden()


WORDS = (
    "portrait",
    "film",
    "noir",
    "of",
    "a",
    "person",
    "smiling",
    "red",
    "blue",
    "green",
    "hat",
    "background",
    ",",
)


@pytest.fixture(scope="session")
def tiny_pipeline() -> Any:
    """A function that creates a tiny random SDXL pipeline: 16 px, closed vocabulary."""
    from diffusers import (
        AutoencoderKL,
        EulerDiscreteScheduler,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        PreTrainedTokenizerFast,
    )

    def tokenizer() -> Any:
        special = ["<|startoftext|>", "<|endoftext|>", "<unk>"]
        vocabulary = {word: index for index, word in enumerate([*special, *WORDS])}
        words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        words.normalizer = normalizers.Lowercase()
        words.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
        )
        words.post_processor = processors.TemplateProcessing(
            single=f"{special[0]} $A {special[1]}",
            special_tokens=[(special[0], 0), (special[1], 1)],
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=words,
            bos_token=special[0],
            eos_token=special[1],
            pad_token=special[1],
            unk_token=special[2],
            model_max_length=12,
        )

    def make(seed: int = 0) -> Any:
        torch.manual_seed(seed)
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 37,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
        }
        text = CLIPTextConfig(
            **sizes,
            vocab_size=20,
            max_position_embeddings=12,
            projection_dim=32,
            bos_token_id=0,
            eos_token_id=1,
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 2),
            projection_class_embeddings_input_dim=80,
            cross_attention_dim=64,
            norm_num_groups=16,
        )
        vae = AutoencoderKL(
            block_out_channels=(16, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=16,
        )
        pipe = StableDiffusionXLPipeline(
            vae=vae,
            text_encoder=CLIPTextModel(text),
            text_encoder_2=CLIPTextModelWithProjection(text),
            tokenizer=tokenizer(),
            tokenizer_2=tokenizer(),
            unet=unet,
            scheduler=EulerDiscreteScheduler(
                beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
            ),
            add_watermarker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make
