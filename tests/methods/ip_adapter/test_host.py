"""Image tokens in a program that calls back in each cross-attention, against diffusers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from openpulid.errors import OptionError, WeightsError
from openpulid.identity.identity import Identity
from openpulid.methods.ip_adapter.base import IPAdapterBase
from openpulid.methods.ip_adapter.faceid import FaceID, FaceIDPlus
from openpulid.methods.ip_adapter.host import (
    IPAdapterHostIdentity,
    build_projection,
    check_layers,
    compute_tokens,
)
from openpulid.methods.ip_adapter.instantid import InstantID
from openpulid.methods.ip_adapter.ip_adapter import IPAdapter
from tests.support.clip_files import FACE, embedding, faceid_plus, features, plain, plus
from tests.support.token_files import generate, person, published, resampler


@pytest.fixture
def pipe(tiny_pipeline: Any) -> Any:
    return tiny_pipeline()


class CallBack:
    """A program's cross-attention, which adds what the identity contributes."""

    def __init__(self, identity: IPAdapterHostIdentity, key: str, is_negative: list[bool]) -> None:
        self.identity = identity
        self.key = key
        self.is_negative = is_negative

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None,
    ) -> Tensor:
        query = attn.to_q(hidden_states)
        heads = (
            x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for x in (query, attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))
        )
        text = scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        added = self.identity.contribution(
            self.key, query, text, attn.heads, self.is_negative, (1, query.shape[1])
        )
        return attn.to_out[0](text + added)


def generate_with_calls(pipe: Any, identity: IPAdapterHostIdentity, guidance: float) -> Tensor:
    is_negative = [True, False] if guidance > 1 else [False]
    processors = dict(pipe.unet.attn_processors)
    for index, name in enumerate(processors):
        if name.endswith("attn2.processor"):
            processors[name] = CallBack(identity, str(index), is_negative)
    pipe.unet.set_attn_processor(processors)
    return generate(pipe, guidance=guidance)


def create(kind: str, unet: Any) -> tuple[IPAdapterBase, Identity]:
    """Create an adapter without LoRA, and an identity with what it reads."""
    file, method = {
        "faceid": (published, FaceID),
        "faceid-plus": (faceid_plus, FaceIDPlus),
        "instantid": (resampler, lambda parts: InstantID(parts, None)),
        "ip-adapter": (plain, IPAdapter),
        "ip-adapter-plus": (plus, IPAdapter),
    }[kind]
    parts = file(unet)
    tensors = parts["ip_adapter"]
    parts["ip_adapter"] = {name: x for name, x in tensors.items() if "_lora" not in name}
    if kind in ("faceid", "instantid"):
        return method(parts), person(1, photos=2)
    extractor = features(recognition=embedding if kind == "faceid-plus" else None)
    return method(parts), extractor.extract([FACE])[0]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize(
    "kind", ["faceid", "faceid-plus", "instantid", "ip-adapter", "ip-adapter-plus"]
)
def test_called_back_equals_diffusers(pipe: Any, kind: str, guidance: float) -> None:
    method, identity = create(kind, pipe.unet)
    base = generate(pipe, guidance=guidance)
    method.attach(pipe)
    with method.use(identity, scale=0.7):
        expected = generate(pipe, guidance=guidance)
    method.detach(pipe)
    assert (expected - base).abs().max() > 0.05
    ours = generate_with_calls(pipe, IPAdapterHostIdentity.prepare(method, identity, 0.7), guidance)
    assert torch.allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precision_rounds_alone(pipe: Any, dtype: torch.dtype) -> None:
    """A program in half precision gets its own dtype, from keys and values in float32."""
    method, identity = create("instantid", pipe.unet)
    host = IPAdapterHostIdentity.prepare(method, identity, 0.7)
    query = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(3)).to(dtype)
    reduced = host.contribution("1", query, query, 2, [True, False], (4, 4))
    whole = host.contribution("1", query.float(), query.float(), 2, [True, False], (4, 4))
    assert reduced.dtype is dtype
    assert (reduced.float() - whole).abs().max() < 0.02 * whole.abs().max()


def test_projection_keeps_no_features(pipe: Any) -> None:
    method, identity = create("faceid-plus", pipe.unet)
    projection = build_projection(method.parts).float()
    method.image_tokens(projection, identity)
    assert projection.image_projection_layers[0].clip_embeds is None


def test_masked_identity_acts_inside(pipe: Any) -> None:
    method, identity = create("faceid", pipe.unet)
    query = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(3))
    mask = torch.zeros(4, 4)
    mask[:2] = 1

    def contribute(**options: Any) -> Tensor:
        host = IPAdapterHostIdentity.prepare(method, identity, **options)
        return host.contribution("1", query, query, 2, [True, False], (4, 4))

    everywhere, inside = contribute(scale=0.7), contribute(scale=0.7, masks=mask[None])
    assert torch.equal(inside[:, :8], everywhere[:, :8]) and not inside[:, 8:].any()
    assert torch.allclose(contribute(scale=1.4), 2 * everywhere)


def test_unsuitable_adapters_and_identities_raise(pipe: Any) -> None:
    method, identity = create("faceid", pipe.unet)
    widths = {
        str(index): (attention.to_q.out_features, attention.to_k.in_features)
        for index, name in enumerate(pipe.unet.attn_processors)
        if name.endswith("attn2.processor")
        for attention in [pipe.unet.get_submodule(name.removesuffix(".processor"))]
    }
    check_layers(method, widths)
    with pytest.raises(WeightsError, match="another base model"):
        check_layers(method, {key: (width, 2048) for key, (width, _) in widths.items()})
    with pytest.raises(OptionError, match="scale must be"):
        IPAdapterHostIdentity.prepare(method, identity, -1.0)
    plus_face, _ = create("ip-adapter-plus", pipe.unet)
    with pytest.raises(OptionError, match="no CLIP image features"):
        compute_tokens(plus_face, identity)
    del method.parts["image_proj"]["norm.bias"]
    with pytest.raises(WeightsError, match="damaged"):
        compute_tokens(method, identity)
