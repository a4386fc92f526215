"""Options that add something to the base model: LoRAs, textual inversion, a style image."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from openpulid.cli.add_ons import describe_embeddings, describe_loras, describe_style
from openpulid.pipelines.request_inputs import Embedding, Lora
from tests.cli.conftest import FakeStudio, Run

LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tensors = {f"{LAYER}.lora_{side}.weight": torch.zeros(2, 2) for side in "AB"}
    for name in ("a.safetensors", "C:b 1.safetensors"):
        save_file(tensors, name)
    save_file({"clip_l": torch.zeros(1, 4), "clip_g": torch.zeros(1, 4)}, "noir-x.safetensors")
    return tmp_path


def test_add_ons_of_a_request_and_of_its_image(
    pulid: Run, studio: FakeStudio, folder: Path
) -> None:
    files = ("--lora", "a.safetensors", "--lora", "C:b 1.safetensors")
    embedding = ("--embedding", "noir-x.safetensors")
    scales = ("--lora-scale", 0.5, "--lora-scale", -1)
    token = ("--embedding-token", "noirx")
    done = pulid("generate", "portrait, noirx", *files, *scales, *embedding, *token, "-o", "out")
    assert done.code == 0, done.err
    [request] = studio.requests
    assert request.loras == (Lora("a.safetensors", 0.5), Lora("C:b 1.safetensors", -1))
    assert request.embeddings == (Embedding("noir-x.safetensors", "noirx"),)

    again = ("generate", "--from", "out/portrait-noirx-0.png", "-o", "again")
    refused = pulid(*again)
    expected = "with a.safetensors and C:b 1.safetensors and noir-x.safetensors; pass --lora and "
    assert refused.is_one_sentence and expected in refused.err
    assert pulid(*again, *files, *embedding).code == 0
    assert studio.requests[1].loras == request.loras
    assert studio.requests[1].embeddings == request.embeddings
    refused = pulid(*again, *files, *embedding, *scales)
    assert refused.is_one_sentence and "cannot be combined with: --lora-scale" in refused.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--lora-scale", 1), "0 --lora and 1 --lora-scale: pass one --lora-scale for all, or"),
        (
            ("--lora", "a.safetensors", "--lora-scale", 1, "--lora-scale", 2),
            "1 --lora and 2 --lora-scale",
        ),
        (
            ("--lora", "a.safetensors", "--lora-scale", 11),
            "--lora-scale must be at most 10, got 11",
        ),
        (("--lora", "none.safetensors"), "none.safetensors does not exist"),
        (("--lora", "someone/none"), "`pulid weights get someone/none` downloads it"),
        (("--lora", "noir-x.safetensors"), "noir-x.safetensors is not a LoRA"),
        (("--embedding-token", "x"), "0 --embedding and 1 --embedding-token"),
        (("--embedding", "C:b 1.safetensors"), "is no embedding for SDXL or FLUX.1: it is a LoRA"),
        (
            ("--style", "style.png", "--style-model", "ip-adapter"),
            "is not for the miniature, which has an IP-Adapter of its own",
        ),
        (("--style-scale", 0.5), "--style is missing"),
    ],
)
def test_mistakes_are_one_sentence_before_loading(
    options: tuple[object, ...], message: str, pulid: Run, studio: FakeStudio, folder: Path
) -> None:
    Image.new("RGB", (8, 8)).save("style.png")
    refused = pulid("generate", "portrait", *options, "-o", "out")
    assert refused.is_one_sentence and message in refused.err, refused.err
    assert not studio.requests


def test_lora_for_another_base_is_refused_before_loading(
    pulid: Run, studio: FakeStudio, folder: Path
) -> None:
    save_file({f"{LAYER.replace('attn1.to_q', 'attn2.to_k')}.lora_A.weight": torch.zeros(2, 768)},
              "old.safetensors")  # fmt: skip
    refused = pulid("generate", "portrait", "--lora", "old.safetensors", "-o", "out")
    expected = "old.safetensors is a LoRA for Stable Diffusion 1, and the base model is the mini"
    assert refused.is_one_sentence and expected in refused.err
    assert not studio.requests


def test_weights_in_a_prompt_are_refused_for_flux(pulid: Run, folder: Path) -> None:
    refused = pulid("generate", "a man, (smile:1.3)", "--preset", "flux", "-o", "out")
    assert refused.is_one_sentence
    assert "PROMPT has weights, (smile:1.3), which FLUX.1 does not support" in refused.err


def test_options_become_fields() -> None:
    assert describe_loras(["a", "b"], [0.5]) == [
        {"model": "a", "scale": 0.5},
        {"model": "b", "scale": 0.5},
    ]
    assert describe_loras(["a"], []) == [{"model": "a"}]
    assert describe_embeddings(["a"], []) == [{"file": "a"}]
    assert describe_style(None, None, None) is None
    assert describe_style("a.png", None, "ip-adapter-plus") == {
        "image": "a.png",
        "model": "ip-adapter-plus",
    }
