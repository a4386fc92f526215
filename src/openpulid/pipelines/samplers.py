"""The sampler of an SDXL pipeline: what its base model says, and what the preset asks for."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openpulid.diffusion.schedulers import PREDICTION_TYPES, KarrasScheduler
from openpulid.errors import WeightsError
from openpulid.io.checkpoint_kinds import Header
from openpulid.pipelines.model_set import ModelSet

logger = logging.getLogger(__name__)

DISTILLED_SCHEDULERS = ("LCMScheduler", "TCDScheduler")
"""Schedulers of bases that were distilled for a few steps of this scheduler alone."""

_EPSILON = ("epsilon", "eps")
_V_PREDICTION = ("v", "v_prediction", "v-prediction", "v_pred")


@dataclass(frozen=True)
class Prediction:
    """What the U-Net of a single file predicts.

    Attributes:
        prediction_type: "epsilon" or "v_prediction".
        zero_snr: the training schedule ends at a signal-to-noise ratio of zero (arXiv 2305.08891).
    """

    prediction_type: str = "epsilon"
    zero_snr: bool = False

    @classmethod
    def read(cls, path: Path, header: Header) -> Prediction:
        """Read the marks that trainers leave in a file: additional tensors, or text in its header.

        Raises:
            WeightsError: the base has another kind of prediction, such as EDM's.
        """
        marks = set(header.shapes)
        edm = sorted(
            name for name in marks if name.startswith(("edm_mean", "edm_std", "edm_vpred"))
        )
        if edm:
            raise WeightsError(
                f"{path} was trained with EDM (it has {edm[0]}), which no preset samples; "
                "use an SDXL checkpoint with epsilon or v prediction."
            )
        stated = header.metadata.get("modelspec.prediction_type", "").lower()
        if stated and stated not in _EPSILON + _V_PREDICTION:
            raise WeightsError(
                f"{path} predicts {stated!r}, which no preset samples; "
                "use an SDXL checkpoint with epsilon or v prediction."
            )
        is_v = "v_pred" in marks or stated in _V_PREDICTION
        zero_snr = "ztsnr" in marks or header.metadata.get("ss_zero_terminal_snr") == "True"
        return cls("v_prediction" if is_v else "epsilon", zero_snr)

    def apply(self, scheduler: Any) -> Any:
        """Return a scheduler of another pipeline with this prediction."""
        from diffusers import EulerDiscreteScheduler

        settings: dict[str, Any] = {"prediction_type": self.prediction_type}
        kind = type(scheduler)
        if self.zero_snr or getattr(scheduler.config, "rescale_betas_zero_snr", False):
            settings["rescale_betas_zero_snr"] = self.zero_snr
            if not hasattr(scheduler.config, "rescale_betas_zero_snr"):
                kind = EulerDiscreteScheduler
        return kind.from_config(scheduler.config, **settings)


def check_scheduler(path: Path, class_name: str, config: Mapping[str, Any]) -> None:
    """Check that the scheduler of a base model describes a model that the presets can sample.

    Args:
        path: of the base model.
        class_name: of its scheduler.
        config: of its scheduler.

    Raises:
        WeightsError: the base was trained with EDM, flow matching or another kind of prediction.
    """
    reason = ""
    prediction = config.get("prediction_type", "epsilon")
    # what the schedulers have without this setting
    is_scaled = class_name in (*DISTILLED_SCHEDULERS, KarrasScheduler.__name__)
    default = "scaled_linear" if is_scaled else "linear"
    schedule = config.get("beta_schedule", default)
    # diffusers reads settings of one class into another, which ignores what it does not know
    saved_by = str(config.get("_class_name") or class_name)
    if saved_by.startswith(("EDM", "FlowMatch")):
        class_name = saved_by
    if class_name.startswith("EDM"):
        reason = "the base was trained with EDM"
    elif "FlowMatch" in class_name or config.get("use_flow_sigmas"):
        reason = "the base was trained with flow matching"
    elif prediction not in PREDICTION_TYPES:
        reason = f"the base predicts {prediction!r}"
    elif config.get("trained_betas"):
        reason = "the base has a noise schedule of its own, 'trained_betas'"
    elif schedule != "scaled_linear":
        reason = f"the base has the noise schedule {schedule!r}"
    if reason:
        raise WeightsError(
            f"{path} cannot be sampled: its scheduler is {class_name}, so {reason}; use an SDXL "
            "base with epsilon or v prediction, with an Euler, DDIM or DPM-Solver scheduler."
        )
    if class_name in DISTILLED_SCHEDULERS:
        logger.warning(
            "%s was distilled for %s; choose the number of steps and the guidance scale that its "
            "authors recommend.",
            path,
            class_name,
        )


def build_scheduler(scheduler: Any, models: ModelSet) -> Any:
    """Return the scheduler of a preset for a base model.

    Args:
        scheduler: of the base model; its prediction and its noise schedule are kept.
        models: name the sampler and its settings.
    """
    if models.sampler is None:
        if not models.scheduler:
            return scheduler
        return type(scheduler).from_config(scheduler.config, **models.scheduler)
    if models.sampler == "dpm":
        from diffusers import DPMSolverMultistepScheduler

        return DPMSolverMultistepScheduler.from_config(scheduler.config, **models.scheduler)
    names = ("num_train_timesteps", "beta_start", "beta_end", "prediction_type")
    base = {name: scheduler.config[name] for name in names if name in scheduler.config}
    base["rescale_betas_zero_snr"] = bool(scheduler.config.get("rescale_betas_zero_snr", False))
    return KarrasScheduler(algorithm=models.sampler, **{**base, **models.scheduler})
