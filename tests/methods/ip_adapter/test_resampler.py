"""The Resampler that is built from published names alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from openpulid.errors import WeightsError
from openpulid.methods.ip_adapter.export import projection_state
from openpulid.methods.ip_adapter.host import build_projection
from openpulid.methods.ip_adapter.resampler import build_resampler
from tests.support.infinite_you import tiny_resampler
from tests.support.token_files import WIDTH, resampler


def test_equals_that_of_diffusers_loader(tiny_pipeline: Any) -> None:
    parts = resampler(tiny_pipeline().unet)
    (theirs,) = build_projection(parts).image_projection_layers
    ours = build_resampler(parts["image_proj"])
    x = torch.randn(2, 1, WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


def test_any_depth_survives_its_published_names() -> None:
    expected = tiny_resampler()
    tensors = projection_state(expected)
    assert "layers.1.0.to_kv.weight" in tensors and "layers.2.0.to_kv.weight" not in tensors
    state = build_resampler(tensors).state_dict()
    assert state.keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert torch.equal(state[name], value), name


def test_tensors_must_be_all_used() -> None:
    tensors = projection_state(tiny_resampler())
    with pytest.raises(WeightsError, match="other tensors, such as more"):
        build_resampler({**tensors, "more": torch.ones(1)})
    with pytest.raises(WeightsError, match=r"tensors of other shapes: .*norm_out"):
        build_resampler({**tensors, "norm_out.bias": torch.ones(3)})
    with pytest.raises(KeyError, match="proj_in"):
        build_resampler({name: x for name, x in tensors.items() if name != "proj_in.bias"})
