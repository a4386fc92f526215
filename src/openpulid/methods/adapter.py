"""Base class of all methods: which pipelines a method serves, and what is active on them.

How to add a method:

1. Create a folder `methods/NAME/` with the modules that the other folders have: one module per
   variant, named after it (`sdxl.py`, `faceid.py`); `base.py` for what variants share;
   `encoders.py` for networks; one module for what is hooked into the base model.
2. Subclass `Adapter`. Implement `load`, `check` and, as a context manager, `use`: compute what does
   not change between steps, then call `activate_span` with a function that registers the hooks of
   one pipeline. Keep all state in objects that this function creates.
3. Set `slot` to what the method changes in the network, so that two methods that would disturb each
   other cannot be active at once.
4. Add the class to `registry.METHODS`, its published files to `openpulid.io.hub`, and its default
   options to `openpulid.pipelines.presets`.
5. Test it on the tiny pipelines of `tests/support`: an identity changes the image, diffusers' own
   implementation or the reference gives the same numbers, and nothing is left after `use` closes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from openpulid.errors import OptionError, WeightsError
from openpulid.io.checkpoint_kinds import CheckpointKind, require_kind
from openpulid.methods.hooks import PipelineState, Span, check_scale, refuse_guider

OpenInSpan = Callable[[PipelineState, Span], AbstractContextManager[Any]]
"""Activates a method on one pipeline, in a span of the schedule."""

_ADAPTER_ATTR = "_openpulid_adapter"
"""Attribute of a network: id of the adapter that is attached to it. An id, not a reference, because
networks are copied and pickled."""

_ACTIVE_ATTR = "_openpulid_active_"
"""Prefix of a network's attribute that exists while a method is active in a slot."""


class Adapter:
    """A method that shows an identity, or anything else, with a diffusers pipeline.

    `attach` names the pipelines that the method serves and changes nothing in them. `use` is a
    context manager: the method is active while it is open. Afterwards the pipeline gives bit for
    bit what it gave before. `detach` forgets the pipeline. What is active belongs to the open
    `use`, so several pipelines in several threads do not affect each other.

    Attributes:
        slot: the part of the network that the method changes. Two methods with the same slot
            cannot be active on one network at once; without a slot any number can.
        replaces: whether attaching an adapter to a network replaces the one attached before.
        kinds: of the files that the method opens.
    """

    slot: ClassVar[str] = ""
    replaces: ClassVar[bool] = False
    kinds: ClassVar[tuple[CheckpointKind, ...]] = ()

    def __init__(self) -> None:
        self._attached: list[PipelineState] = []

    def __getstate__(self) -> dict[str, Any]:
        # a copy, such as an average of the weights, serves no pipeline: it would copy the pipeline
        return {**self.__dict__, "_attached": []}

    @classmethod
    def check_file(cls, path: str | os.PathLike[str]) -> None:
        """Refuse a file of another kind, before the values of any model are read.

        Raises:
            WeightsError: it is missing, a folder, or another kind of file.
        """
        if not Path(path).is_file():
            problem = "is a folder" if Path(path).is_dir() else "does not exist"
            raise WeightsError(f"{path} {problem}; pass the adapter's file.")
        require_kind(path, *cls.kinds)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Adapter:
        """Load the method from its file or folder."""
        raise NotImplementedError

    def check(self, target: Any) -> None:
        """Raise an error if the method does not fit a pipeline or network."""
        raise NotImplementedError

    def use(self, people: Any, /, *args: Any, **options: Any) -> AbstractContextManager[Any]:
        """Apply the method to the attached pipelines while the context is open.

        Methods share these options: `scale`, `start` and `end` as fractions of the schedule, and
        `pipe` to name one of the attached pipelines.
        """
        raise NotImplementedError

    def insert_trigger(self, prompt: str) -> str:
        """Return a prompt that names the person, for methods that need a word for it."""
        return prompt

    def attach(self, target: Any) -> None:
        """Serve a pipeline, or a bare network, from now on. Nothing in it changes before `use`.

        Raises:
            OptionError: The target has no network that the method supports, or is a modular
                pipeline with a guider.
            WeightsError: The method was trained for a network of another shape.
        """
        refuse_guider(target)
        self.check(target)
        if all(state.target is not target for state in self._attached):
            self._attached.append(PipelineState(target))
        if self.replaces:
            setattr(PipelineState(target).network, _ADAPTER_ATTR, id(self))

    def detach(self, target: Any = None) -> None:
        """Stop serving a pipeline, or all of them. A pipeline that is not attached is no error."""
        for state in list(self._attached):
            if target is not None and state.target is not target:
                continue
            self._attached.remove(state)
            if all(remaining.network is not state.network for remaining in self._attached):
                self._release(state.network)

    def _release(self, network: Any) -> None:
        """Remove what belongs to a network that no attached pipeline has any more."""
        if getattr(network, _ADAPTER_ATTR, None) == id(self):
            delattr(network, _ADAPTER_ATTR)

    def select_pipelines(self, pipe: Any = None) -> list[PipelineState]:
        """Select the attached pipelines that `use` opens: all of them, or the given one.

        Raises:
            OptionError: Nothing is attached, or two pipelines share a network and none is named.
        """
        states = []
        for state in self._attached:
            is_selected = pipe is None or state.target is pipe
            if is_selected and (not self.replaces or self._is_attached_to(state.network)):
                states.append(state)
        if not states:
            raise OptionError(
                f"{type(self).__name__} is not attached to this pipeline; call attach(pipe) first."
            )
        # whether a batch is guided, and its step, only the pipeline that runs knows
        if len({id(state.network) for state in states}) < len(states):
            raise OptionError(
                "several attached pipelines share one network; name the one that runs: "
                "use(..., pipe=pipe)."
            )
        return states

    def _is_attached_to(self, network: Any) -> bool:
        """Return whether no other adapter has replaced this one."""
        return getattr(network, _ADAPTER_ATTR, None) == id(self)

    @contextmanager
    def activate(
        self,
        states: Iterable[PipelineState],
        open_pipeline: Callable[[PipelineState], AbstractContextManager[Any]],
    ) -> Iterator[None]:
        """Keep contexts of several pipelines open together.

        Args:
            states: from `select_pipelines`.
            open_pipeline: activates the method on one pipeline.
        """
        with ExitStack() as stack:
            for state in states:
                stack.enter_context(open_pipeline(state))
            yield

    @contextmanager
    def activate_span(
        self,
        open_pipeline: OpenInSpan,
        scale: float,
        span: Span,
        pipe: Any,
        subject: str = "the identity",
    ) -> Iterator[None]:
        """Open the attached pipelines, unless the method would change nothing.

        Args:
            open_pipeline: activates the method on one pipeline.
            scale: weight of the method; 0 disables it.
            span: of the schedule in which it acts.
            pipe: one of the attached pipelines; None for all of them.
            subject: what has no effect, for warnings.

        Raises:
            OptionError: nothing is attached, or the scale is out of range.
        """
        check_scale(scale)
        states = self.select_pipelines(pipe)
        with span.watch(subject) as watched:
            if not scale or span.is_empty:
                yield
                return
            with self.activate(states, lambda state: open_pipeline(state, watched)):
                yield


@contextmanager
def exclusive_use(network: Any, slot: str, hooked: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Mark a slot of a network as occupied.

    Args:
        network: a U-Net or transformer.
        slot: see `Adapter.slot`.
        hooked: modules that contain hooked modules. Compiled code does not check again whether a
            module has hooks: an identity would have no effect, or would remain after `use` closes.

    Raises:
        OptionError: The slot is occupied, or one of `hooked` is compiled.
    """
    attribute = _ACTIVE_ATTR + slot
    if getattr(network, attribute, False):
        raise OptionError(
            "an identity or a method of the same kind is already in use on this pipeline; close it "
            "first, or pass all identities to `use` as one list."
        )
    check_hooks_are_called(hooked)
    setattr(network, attribute, True)
    try:
        yield
    finally:
        delattr(network, attribute)


def check_hooks_are_called(modules: Iterable[nn.Module]) -> None:
    """Refuse modules whose compiled code would ignore hooks.

    Raises:
        OptionError: One of the modules is compiled.
    """
    if any(map(_is_compiled, modules)) and torch._dynamo.config.skip_nnmodule_hook_guards:
        raise OptionError(
            "this network is compiled, and compiled code ignores hooks that are added later; "
            "set torch._dynamo.config.skip_nnmodule_hook_guards = False before its first run, "
            "or on FLUX call transformer.compile_repeated_blocks()."
        )


def check_projections_are_called(network: nn.Module) -> None:
    """Refuse a network whose attention ignores hooks on its keys and values.

    Raises:
        OptionError: `fuse_qkv_projections` joined these layers into others.
    """
    if any(getattr(module, "fused_projections", False) for module in network.modules()):
        raise OptionError(
            "the attention of this network has fused projections, which ignore this method; call "
            "unfuse_qkv_projections() first."
        )


def check_text_encoders(target: Any) -> None:
    """Raise OptionError if a pipeline lacks one of SDXL's two text encoders."""
    if getattr(target, "text_encoder_2", None) is None:
        raise OptionError(
            f"{type(target).__name__} does not have SDXL's two text encoders; "
            "use a StableDiffusionXL pipeline."
        )


def resident_weight(weight: Tensor) -> Tensor:
    """Return a weight of the base model, if it is in memory.

    Raises:
        OptionError: sequential offloading has removed it.
    """
    if weight.is_meta:
        raise OptionError(
            "this method reads the weights of the U-Net, which sequential offloading removes; call "
            "enable_model_cpu_offload() instead of enable_sequential_cpu_offload()."
        )
    return weight


def _is_compiled(module: nn.Module) -> bool:
    """Return whether a module was compiled: wrapped, in place, or by its `forward` alone."""
    forward = vars(module).get("forward")
    is_wrapped = hasattr(module, "_orig_mod")
    is_compiled_in_place = module._compiled_call_impl is not None
    return is_wrapped or is_compiled_in_place or hasattr(forward, "_torchdynamo_orig_callable")
