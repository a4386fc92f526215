"""How much an identity adds to the image tokens of a transformer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from statistics import fmean
from typing import Any

from torch import Tensor

from openpulid.methods.pulid import PuLIDFlux
from openpulid.methods.transformer_kinds import find_transformer, identity_blocks
from openpulid.training import StepRNG
from openpulid.training.pulid import BatchSource, PuLIDTask, diffusion_branch


def measure_added_sizes(task: PuLIDTask, adapter: PuLIDFlux, data: BatchSource) -> dict[str, float]:
    """Measure what the own identity adds after each block, on a batch at uniform noise levels.

    Args:
        task: of the adapter; its base is the model.
        adapter: the adapter.
        data: images with identities.

    Returns:
        Name of the block -> size, see `record_added_sizes`.
    """
    rng = StepRNG(0, 0)
    base = task.base
    batch = data.batch(rng).to(base.device)
    tokens = adapter.encode(batch.id_cond, batch.hidden)
    text = base.encode_text(batch.prompts)
    with (
        adapter.use_tokens(tokens, pipe=base.pipe),
        record_added_sizes(adapter, base.pipe) as sizes,
    ):
        diffusion_branch(base, rng, batch.latents, text, timestep_bias=None)
    return {block: fmean(values) for block, values in sizes.items()}


@contextmanager
def record_added_sizes(adapter: PuLIDFlux, target: Any) -> Iterator[dict[str, list[float]]]:
    """Record what the identity in use adds after each block, relative to the block's image tokens.

    Open it inside `adapter.use` or `adapter.use_tokens`.

    Args:
        adapter: in use on the target.
        target: a pipeline of FLUX.1, or its transformer.

    Yields:
        Name of the block, such as "double 0" -> one size per call: the norm of what is added over
        the norm of the tokens, mean over images. It is zero if the identity has no effect.
    """
    transformer, kind = find_transformer(target)
    intervals = {
        "double_interval": adapter.double_interval,
        "single_interval": adapter.single_interval,
    }
    sizes: dict[str, list[float]] = {}
    with ExitStack() as stack:
        for group, index in identity_blocks(transformer, **intervals):
            name = f"{group} {index}"
            sizes[name] = []
            recorder = _BlockRecorder(sizes[name])
            block = kind.blocks(transformer, (group, index))
            before = block.register_forward_hook(recorder.before_identity, prepend=True)
            after = block.register_forward_hook(recorder.after_identity)
            stack.callback(before.remove)
            stack.callback(after.remove)
        yield sizes


class _BlockRecorder:
    """Hooks on a block, before and after the one that adds the identity."""

    def __init__(self, sizes: list[float]) -> None:
        self.sizes = sizes
        self._tokens: Tensor

    def before_identity(self, block: Any, args: Any, output: Any) -> None:
        _, self._tokens = output

    def after_identity(self, block: Any, args: Any, output: Any) -> None:
        added = (output[1].float() - self._tokens.float()).flatten(1).norm(dim=1)
        size = added / self._tokens.float().flatten(1).norm(dim=1)
        self.sizes.append(size.mean().item())
