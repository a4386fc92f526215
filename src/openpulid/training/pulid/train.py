"""Training of a PuLID adapter on any base model and any source of batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from openpulid.errors import OptionError, WeightsError
from openpulid.faces.embed import FaceEmbedder
from openpulid.io.checkpoints import fingerprint, load_state
from openpulid.io.lock import check_directory
from openpulid.methods.pulid import ENCODERS, IDFormer, PuLID, PuLIDFlux, transfer_adapter
from openpulid.training.checkpointing import CHECKPOINT
from openpulid.training.distributed import DistributedContext, is_first_process
from openpulid.training.pulid.batch import BatchSource
from openpulid.training.pulid.export import save_adapter
from openpulid.training.pulid.models import BaseModel
from openpulid.training.pulid.recipe import Recipe
from openpulid.training.pulid.task import PuLIDTask, Validation
from openpulid.training.run_dir import delete_files, delete_run
from openpulid.training.sharding import shard_network
from openpulid.training.trainer import TrainingResult, run

ADAPTER_FILE = "adapter.safetensors"
"""The trained adapter in its run directory."""
FACE_MODELS_FILE = "face-models.json"
FACE_FILES = ("faces.json", "held-out-faces.json", FACE_MODELS_FILE)
"""What a training on photos writes before the first checkpoint. The models are deleted last: while
they exist, the other files are known as those of a run."""
PULID_FILES = (ADAPTER_FILE, *FACE_FILES)
"""What a training of PuLID writes in addition to the trainer's files."""


def build_adapter(
    recipe: Recipe,
    model: BaseModel,
    encoder_config: Mapping[str, Any],
    *,
    init_adapter: Path | None = None,
    extractor_models: Mapping[str, str] | None = None,
) -> PuLID | PuLIDFlux:
    """Create the adapter to train, in float32 on the model's device.

    Args:
        recipe: names the encoder, and seeds the weights of a new adapter.
        model: the base model.
        encoder_config: constructor arguments of the encoder: input widths of the extracted
            features, and sizes that differ from the published ones.
        init_adapter: the adapter that the recipe continues; None starts from random weights.
        extractor_models: name -> fingerprint of the models that extract identities; None does not
            compare them with those of `init_adapter`.

    Raises:
        OptionError: the recipe continues an adapter and none is given, or that adapter has another
            encoder or was trained with other extractor models.
        WeightsError: `init_adapter` is not an adapter, has values that are not numbers, or is one
            of another network or with other sizes.
    """
    check_init_adapter(recipe, init_adapter)
    state = None
    if init_adapter is not None:
        state = _load_init_adapter(recipe, init_adapter, model, extractor_models)
    torch.manual_seed(recipe.seed)
    adapter = create_adapter(recipe, model, encoder_config).to(model.device, torch.float32)
    if state is not None:
        load_state(
            adapter,
            state,
            f"{init_adapter} does not have the sizes of {recipe.name}, choose another adapter",
        )
    return adapter


def create_adapter(
    recipe: Recipe, model: BaseModel, encoder_config: Mapping[str, Any]
) -> PuLID | PuLIDFlux:
    """Create an adapter of a recipe with random weights, see `build_adapter`."""
    sizes = {"hidden_dim": recipe.encoder_width, **encoder_config}
    if recipe.is_flow:
        adapter = PuLIDFlux.for_transformer(
            model.network,
            IDFormer(**sizes),
            dim_head=recipe.attention_head_dim,
            heads=recipe.attention_heads,
            double_interval=recipe.double_interval,
            single_interval=recipe.single_interval,
        )
        if not recipe.zero_output:
            for layer in adapter.layers:
                layer.to_out.reset_parameters()
        return adapter
    token_width = {_TOKEN_WIDTH[recipe.encoder]: model.network.config.cross_attention_dim}
    encoder = ENCODERS[recipe.encoder](**token_width, **sizes)
    return PuLID.for_unet(model.network, encoder)


def prepare_run_dir(
    run_dir: Path, init_adapter: Path | None = None, *, is_fresh: bool = False
) -> None:
    """Check a run directory before anything is loaded, and delete an earlier run if `is_fresh`.

    Raises:
        OptionError: the run would overwrite the adapter that it continues or an adapter of another
            origin, another process uses the directory, or it cannot be written.
    """
    if init_adapter is not None and init_adapter.resolve() == (run_dir / ADAPTER_FILE).resolve():
        raise OptionError(
            f"{init_adapter} is the adapter to continue, and this run would overwrite it: choose "
            "another directory with -o."
        )
    if not is_first_process():
        return
    adapter = run_dir / ADAPTER_FILE
    if adapter.exists() and not (run_dir / CHECKPOINT).exists():
        raise OptionError(
            f"{adapter} exists already, and {run_dir} contains no run: choose another directory "
            "with -o."
        )
    if is_fresh:
        delete_run(run_dir, PULID_FILES)
        if (run_dir / FACE_MODELS_FILE).exists():  # the run ended before its first checkpoint
            delete_files(run_dir, FACE_FILES)
    check_directory(run_dir)


def check_init_adapter(recipe: Recipe, init_adapter: Path | None) -> None:
    """Raise OptionError if a recipe continues an adapter and none is given."""
    if recipe.init_from is not None and init_adapter is None:
        raise OptionError(
            f"{recipe.name} continues {recipe.init_from}: pass its adapter with --begin."
        )


def hash_init_adapter(init_adapter: Path | None) -> dict[str, str]:
    """Return the entry of the adapter that a run continues, for `TrainerConfig.inputs`."""
    return {} if init_adapter is None else {"--begin": fingerprint(init_adapter)}


_TOKEN_WIDTH = {"IDEncoder": "context_dim", "IDFormer": "output_dim"}
"""The encoders' argument for the width of their tokens."""


def _load_init_adapter(
    recipe: Recipe, path: Path, model: BaseModel, extractor_models: Mapping[str, str] | None
) -> dict[str, torch.Tensor]:
    """Load the weights that a recipe continues, and check that they fit."""
    adapter: Any = (PuLIDFlux if recipe.is_flow else PuLID).load(path)
    if extractor_models is not None:
        adapter.require(extractor_models)
    encoder = type(adapter.encoder).__name__
    if encoder != recipe.encoder:
        raise OptionError(
            f"{recipe.name} trains an {recipe.encoder}, but {path} has an {encoder}: choose an "
            "adapter with that encoder, or the recipe's other version, with or without _v11."
        )
    if recipe.base in ("flux2-klein", "qwen-image") and recipe.init_from is None:
        with suppress(WeightsError):
            adapter = transfer_adapter(
                adapter,
                model.network,
                double_interval=recipe.double_interval,
                single_interval=recipe.single_interval,
            )
    adapter.check(model.network)
    state = adapter.state_dict()
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise WeightsError(
                f"{path} has values that are not numbers, in {name}: continue another adapter."
            )
    return state


def train_adapter(
    recipe: Recipe,
    model: BaseModel,
    adapter: PuLID | PuLIDFlux,
    dataset: BatchSource,
    run_dir: Path,
    *,
    few_step_models: Sequence[BaseModel] = (),
    face_embedder: FaceEmbedder | None = None,
    validation: Validation | None = None,
    minutes: float | None = None,
    metadata: Mapping[str, object] | None = None,
    inputs: Mapping[str, str] | None = None,
    is_sharded: bool = False,
) -> TrainingResult:
    """Train an adapter, or continue its run.

    Writes `adapter.safetensors` into the run directory. Frozen models compute in the precision they
    are loaded in, the adapter in float32.

    Args:
        recipe: what to train.
        model: base model of the diffusion branch.
        adapter: from `build_adapter`.
        dataset: batches to train on.
        run_dir: the run directory.
        few_step_models: models of the lightning branch, used in round-robin order.
        face_embedder: embeds faces for the ID loss, with another recognition model than the
            encoder's.
        validation: what to measure; nothing by default.
        minutes: time budget.
        metadata: further entries for the adapter's file.
        inputs: see `TrainerConfig`.
        is_sharded: share the frozen networks among the processes, see `training.sharding`.

    Raises:
        OptionError: the recipe's losses need parts that are missing, or a single process shards.
        TrainingError: see `trainer.run`.
    """
    if recipe.gradient_checkpointing:
        for trained in (model, *few_step_models):
            if trained is model or trained.checkpoints_blocks:
                trained.network.enable_gradient_checkpointing()
    if is_sharded:
        for shared in (model, *few_step_models):
            shard_network(shared.network, shared.blocks)
    task = PuLIDTask(
        recipe,
        model,
        adapter,
        dataset,
        validation=validation,
        few_step_models=few_step_models,
        face_embedder=face_embedder,
        is_sharded=is_sharded,
    )
    result = run(
        task,
        replace(recipe.trainer_config(), inputs=inputs or {}),
        run_dir,
        minutes=minutes,
        device=model.device,
        is_sharded=is_sharded,
    )
    if DistributedContext(model.device).rank == 0:
        save_adapter(adapter, run_dir / ADAPTER_FILE, recipe, result, metadata)
    return result
