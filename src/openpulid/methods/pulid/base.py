"""What PuLID is on every base: an encoder, layers beside the base's own, and the pipelines that it serves."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from openpulid.errors import IdentityError, OptionError, WeightsError
from openpulid.io.checkpoints import load_state, read_tensors
from openpulid.methods.hooks import MARK, one_of_each
from openpulid.methods.pulid.encoders import LEVELS, IDEncoder, IDFormer
from openpulid.methods.pulid.masks import Person

Adapter = TypeVar("Adapter", bound="PuLIDBase")


class PuLIDBase(nn.Module):
    """Nothing of an attached pipeline changes before `use` opens, and everything is as it was when it closes. What is in
    use belongs to the open `use`, so several pipelines in several threads do not see each other."""

    def __init__(self) -> None:
        super().__init__()
        self._targets: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        # a copy (an average of the weights, say) serves no pipeline: it would copy the pipeline too
        return {**self.__dict__, "_targets": []}

    # --- what a subclass says

    @property
    def encoder(self) -> IDEncoder | IDFormer:
        """Features -> tokens."""
        raise NotImplementedError

    @staticmethod
    def network(target: Any) -> Any:
        """The part of a pipeline that is served, or the target itself. Raises OptionError when it has none."""
        raise NotImplementedError

    def check(self, network: Any) -> None:
        """Raises WeightsError where the adapter was made for a network of another shape."""
        raise NotImplementedError

    # --- loading

    @staticmethod
    def read(path: str | os.PathLike[str]) -> dict[str, Tensor]:
        """An adapter's file in float32. Raises WeightsError where there is none."""
        if not Path(path).is_file():
            raise WeightsError(f"{path} does not exist; name the adapter's file.")
        return {name: value.float() for name, value in read_tensors(path).items()}

    def filled(self: Adapter, state: Mapping[str, Tensor]) -> Adapter:
        """With these weights instead of its own, in eval mode.

        Raises:
            WeightsError: a name is missing or too many, or a shape differs; it names the first of them.
        """
        load_state(
            self, state, "these are not the weights of this adapter, name its own file", assign=True
        )
        return self.eval()

    # --- which pipelines it serves

    def attach(self, target: Any) -> None:
        """Serves a pipeline, or a bare network, from now on. Another adapter on it is replaced.

        Raises:
            OptionError: it has no network of this adapter's kind.
            WeightsError: the adapter was made for one of another shape.
        """
        network = self.network(target)
        self.check(network)
        self.detach(target)
        self._targets.append(target)
        setattr(network, MARK, id(self))

    def detach(self, target: Any = None) -> None:
        """Serves this pipeline no longer; without an argument, none. A pipeline that was not attached is no error."""
        for one in [t for t in self._targets if target is None or t is target]:
            self._targets = [t for t in self._targets if t is not one]
            network = self.network(one)
            shared = any(self.network(t) is network for t in self._targets)
            if not shared and getattr(network, MARK, None) == id(self):
                delattr(network, MARK)

    def serving(self, target: Any = None) -> list[Any]:
        """The targets to open: all that are attached; `target` alone when it is given.

        Raises:
            OptionError: nothing is attached (any more), or two pipelines of one network, of which one must be named.
        """
        chosen = [t for t in self._targets if target is None or t is target]
        chosen = [t for t in chosen if getattr(self.network(t), MARK, None) == id(self)]
        if not chosen:
            raise OptionError(
                "this adapter serves no pipeline (any more); call attach(pipe) first."
            )
        one_of_each([self.network(t) for t in chosen])
        return chosen

    # --- tokens

    def encode(self, id_cond: Tensor, hidden: Sequence[Tensor], mix: bool = False) -> Tensor:
        """Features -> tokens, with gradient.

        Args:
            id_cond: (B, C) or (B, n, C) for n photos.
            hidden: five times (B, n * (1 + N), D).
            mix: v1 only: further photos of an identity give all their tokens, not only those of their embeddings.

        Returns:
            (B, T, width).

        Raises:
            IdentityError: the features are of other sizes than the encoder reads.
        """
        if mix and not isinstance(self.encoder, IDEncoder):
            raise OptionError(
                "mix is an option of v1; the encoder of v1.1 reads all of every photo anyway."
            )
        self._require(id_cond, hidden)
        like = next(self.encoder.parameters())
        options = {"mix": True} if mix else {}
        tokens: Tensor = self.encoder(id_cond.to(like), [x.to(like) for x in hidden], **options)
        return tokens

    def _require(self, id_cond: Tensor, hidden: Sequence[Tensor]) -> None:
        """Raises IdentityError for features of other models than the encoder reads, as far as their shapes tell."""
        read = self.encoder.config["width"], [self.encoder.config["vit_dim"]] * LEVELS
        given = id_cond.shape[-1], [level.shape[-1] for level in hidden]
        if given != read:
            raise IdentityError(
                f"this adapter reads {read[0]} numbers and {LEVELS} levels of {read[1][0]} of a face, and this identity has "
                f"{given[0]} and {', '.join(map(str, given[1])) or 'none'}; make it again with this adapter's preset."
            )

    def unconditional(self, id_cond: Tensor, hidden: Sequence[Tensor], mix: bool = False) -> Tensor:
        """(1, T, width): the tokens of nobody, zeros of these shapes through the encoder; guidance's negative half."""
        like = next(self.encoder.parameters())
        options = {"mix": True} if mix else {}
        tokens: Tensor = self.encoder.unconditional(
            id_cond.to(like), [x.to(like) for x in hidden], **options
        )
        return tokens

    def tokens(self, prompts: Sequence[Sequence[Person]], mix: bool = False) -> Tensor:
        """(P, J, T, width): every identity encoded once; prompts with fewer people are filled up with zeros."""
        known: dict[int, Tensor] = {}
        for identity in {id(i): i for prompt in prompts for i, _ in prompt}.values():
            known[id(identity)] = self.encode(identity.id_cond, identity.hidden, mix)[0]
        if len({len(tokens) for tokens in known.values()}) > 1:
            raise OptionError(
                "identities used together must be made from the same number of photos each."
            )
        nobody = torch.zeros_like(next(iter(known.values())))
        most = max(map(len, prompts))
        rows = [
            [known[id(i)] for i, _ in prompt] + [nobody] * (most - len(prompt))
            for prompt in prompts
        ]
        return torch.stack([torch.stack(row) for row in rows])
