"""The Ray Serve application: one deployment per preset, and the ingress in front of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig

from openpulid.pipelines.request import ModelSelection
from openpulid.pipelines.selection import resolve_preset
from openpulid.service.cluster.ingress import Ingress
from openpulid.service.cluster.replica import INGRESS, Replica
from openpulid.service.config import ServiceConfig

REQUESTS_PER_JOB = 4
"""Requests that the ingress serves at once, for each job that can wait: most only wait."""

INGRESS_DRAIN = 10.0
"""Seconds that requests may go on when the ingress stops. Their jobs stay in the queue."""


UPSCALE_DELAY = 5.0
"""Seconds that a batch waits until another replica starts, which takes longer."""

CONSTRUCTOR_RETRIES = 3
"""Attempts of a replica to load its preset, until the application fails."""


LOGGING = {"enable_access_log": False}
"""The ids of jobs, which are secrets, stay out of Ray's logs."""


class ClusterOptions(BaseModel):
    """The arguments of the application, also in `serve.yaml`.

    Attributes:
        service: presets, data folder, limits and lifetimes.
        api_keys: file of the API keys on the machine of the ingress; None answers requests to a
            loopback address only.
        min_replicas: of each preset; they are always loaded.
        initial_replicas: of each preset, at the start; `min_replicas` by default.
        max_replicas: of each preset; Ray starts and stops them as batches wait.
        gpus_per_replica: 0 computes on the CPU.
        cpus_per_replica: threads of a replica.
        ingress_resources: Ray's resources that the ingress needs, for a place on a machine with the
            data folder: `{"node:ADDRESS": 0.001}`, or one that you give to several machines.
        idle_seconds: after which a replica without work is stopped.
        drain_seconds: for which a replica may finish its batch before it is stopped.
    """

    model_config = ConfigDict(extra="forbid")

    service: ServiceConfig
    api_keys: Path | None
    min_replicas: int = Field(default=1, ge=0)
    initial_replicas: PositiveInt | None = None
    max_replicas: PositiveInt = 1
    gpus_per_replica: float = Field(default=1, ge=0)
    cpus_per_replica: float = Field(default=1, ge=0)
    ingress_resources: dict[str, float] = {}
    idle_seconds: float = Field(default=300, ge=0)
    drain_seconds: float = Field(default=60, ge=0)


def build(options: ClusterOptions | dict[str, Any]) -> Application:
    """Build the application, for `serve.run`, or as the import path of a `serve.yaml`.

    Args:
        options: the options, or the `args` of the file.

    Raises:
        ValidationError: an option is unknown or invalid (pydantic's).
        OptionError: there is no such preset.
    """
    options = ClusterOptions.model_validate(options)
    models = {resolve_preset(selection).name: selection for selection in options.service.models}
    replicas = {name: _bind_replicas(name, models[name], options) for name in models}
    num_workers = dict.fromkeys(models, options.max_replicas)
    ingress = serve.deployment(serve.ingress()(Ingress)).options(
        name=INGRESS,
        ray_actor_options={"num_cpus": 0, "resources": options.ingress_resources},
        max_ongoing_requests=REQUESTS_PER_JOB * options.service.limits.jobs,
        graceful_shutdown_timeout_s=INGRESS_DRAIN,
        logging_config=LOGGING,
    )
    return ingress.bind(options.service, options.api_keys, replicas, num_workers)


def _bind_replicas(name: str, models: ModelSelection, options: ClusterOptions) -> Any:
    """Return the deployment of a preset; a replica runs one batch at a time."""
    deployment = serve.deployment(Replica).options(
        name="preset-" + re.sub(r"[^\w.-]", "-", name),
        ray_actor_options={
            "num_cpus": options.cpus_per_replica,
            "num_gpus": options.gpus_per_replica,
        },
        max_ongoing_requests=1,
        max_constructor_retry_count=CONSTRUCTOR_RETRIES,
        autoscaling_config=AutoscalingConfig(
            min_replicas=options.min_replicas,
            initial_replicas=options.initial_replicas,
            max_replicas=options.max_replicas,
            target_ongoing_requests=1,
            upscale_delay_s=UPSCALE_DELAY,
            downscale_delay_s=options.idle_seconds,
            metrics_interval_s=1,
            look_back_period_s=2,
        ),
        graceful_shutdown_timeout_s=options.drain_seconds,
        logging_config=LOGGING,
    )
    return deployment.bind(models, options.service.device)
