"""The base class of all methods: attaching, replacing, slots, and copies."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest

from openpulid.errors import OptionError
from openpulid.methods.adapter import Adapter, exclusive_use
from openpulid.methods.hooks import PipelineState, find_unet


class Counter(Adapter):
    """A minimal method: counts the calls of the U-Net while it is in use."""

    slot: ClassVar[str] = "counter"

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def check(self, target: Any) -> None:
        find_unet(target)

    @contextmanager
    def use(self, people: Any = None, /, pipe: Any = None) -> Iterator[Counter]:
        with self.activate(self.select_pipelines(pipe), self._open):
            yield self

    @contextmanager
    def _open(self, state: PipelineState) -> Iterator[None]:
        def count(*call: Any) -> None:
            self.calls += 1

        with exclusive_use(state.network, self.slot):
            handle = state.network.register_forward_pre_hook(count)
            try:
                yield
            finally:
                handle.remove()


class OtherCounter(Counter):
    """A method of another slot."""

    slot: ClassVar[str] = "other counter"


@pytest.fixture
def pipe(tiny_pipeline: Any) -> Any:
    return tiny_pipeline()


def run(pipe: Any) -> None:
    pipe("portrait", num_inference_steps=2, output_type="latent", guidance_scale=1.0)


def test_method_acts_only_while_in_use(pipe: Any) -> None:
    method = Counter()
    attributes = set(vars(pipe.unet))
    method.attach(pipe)
    run(pipe)
    assert method.calls == 0
    with method.use():
        run(pipe)
    run(pipe)
    assert method.calls == 2
    assert set(vars(pipe.unet)) == attributes and not pipe.unet._forward_pre_hooks


def test_methods_of_other_slots_combine(pipe: Any) -> None:
    first, second = Counter(), OtherCounter()
    first.attach(pipe)
    second.attach(pipe)
    with first.use(), second.use():
        run(pipe)
    assert first.calls == second.calls == 2


def test_methods_of_one_slot_exclude_each_other(pipe: Any) -> None:
    first, second = Counter(), Counter()
    first.attach(pipe)
    second.attach(pipe)
    with first.use(), pytest.raises(OptionError, match="already in use"), second.use():
        pass
    with second.use():
        run(pipe)
    assert second.calls == 2


def test_detached_methods_and_copies_cannot_be_used(pipe: Any) -> None:
    method = Counter()
    method.attach(pipe)
    with (
        pytest.raises(OptionError, match="Counter is not attached"),
        copy.deepcopy(method).use(),
    ):
        pass
    method.detach(pipe)
    method.detach(pipe)  # not an error
    with pytest.raises(OptionError, match="Counter is not attached"), method.use():
        pass
