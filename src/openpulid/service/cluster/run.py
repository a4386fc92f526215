"""Run the application until the process is stopped.

Ray reads its environment when it is imported, so that happens in the functions.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from openpulid.errors import OptionError, first_line
from openpulid.io.registry import WEIGHTS
from openpulid.pipelines.presets import PRESETS
from openpulid.pipelines.request import OPEN_FACES, ModelSelection
from openpulid.ray_session import LOCAL, check_address, connect_ray
from openpulid.service.config import ServiceConfig

if TYPE_CHECKING:
    from openpulid.service.cluster.application import ClusterOptions

APPLICATION = "openpulid"
"""Name of the application in Ray Serve."""


@dataclass(frozen=True)
class Place:
    """Where the application runs.

    Attributes:
        address: of a Ray cluster: `auto`, HOST:PORT, or `local` for a new one on this machine.
        max_replicas: of each preset; by default one for each GPU.
        host: address to serve.
        port: port to serve.
    """

    address: str
    max_replicas: int | None
    host: str
    port: int


def run_cluster(
    config: ServiceConfig,
    api_keys: Path | None,
    place: Place,
    on_listening: Callable[[str], object],
) -> None:
    """Serve the application until the process gets SIGINT or SIGTERM.

    Args:
        config: of the service. The data folder is on this machine, and so is the ingress.
        api_keys: file of the API keys, if they are required.
        place: where it runs.
        on_listening: receives the address, as soon as the presets are loaded.

    Raises:
        OptionError: Ray is not installed, the cluster cannot be reached, or the application does
            not start.
    """
    if place.port == 0:
        raise OptionError("--ray cannot find a free port; choose one with --port.")
    check_address(place.address)
    with _connect(place.address):
        from ray import serve

        from openpulid.service.cluster.application import build

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        http = {"host": place.host, "port": place.port, "location": "HeadOnly"}
        serve.start(http_options=http, logging_config={"log_level": "WARNING"})
        application = build(_choose_options(config, api_keys, place.max_replicas))
        try:
            serve.run(application, name=APPLICATION, route_prefix="/")
            on_listening(f"http://{place.host}:{place.port}")
            _wait_for_signal()
        except RuntimeError as error:  # of `serve.run`; Ray has logged the cause
            raise OptionError(
                f"the presets did not start ({first_line(error)}); the reason is in "
                "Ray's logs, on this machine in /tmp/ray/session_latest/logs/serve."
            ) from None
        finally:
            serve.delete(APPLICATION)


@contextmanager
def _connect(address: str) -> Iterator[None]:
    """Start Ray, or join a cluster, until the block ends."""
    with connect_ray(address):
        from ray import serve

        yield
        if address == LOCAL:
            serve.shutdown()


def _choose_options(
    config: ServiceConfig, api_keys: Path | None, max_replicas: int | None
) -> ClusterOptions:
    """Give each replica a GPU, or without any the same part of the processors."""
    import ray

    from openpulid.service.cluster.application import ClusterOptions

    resources = ray.cluster_resources()
    num_gpus = int(resources.get("GPU", 0))
    max_replicas = max_replicas or max(num_gpus, 1)
    return ClusterOptions(
        service=make_paths_absolute(config),
        api_keys=None if api_keys is None else api_keys.absolute(),
        max_replicas=max_replicas,
        gpus_per_replica=1 if num_gpus else 0,
        cpus_per_replica=1 if num_gpus else max(1, int(resources["CPU"]) // max_replicas),
        ingress_resources={f"node:{ray.util.get_node_ip_address()}": 0.001},
    )


def make_paths_absolute(config: ServiceConfig) -> ServiceConfig:
    """Return a configuration for processes with another working directory."""
    signer_files = config.signer_files
    if signer_files is not None:
        certificate, key = signer_files
        signer_files = certificate.absolute(), key.absolute()
    return replace(
        config,
        data=config.data.absolute(),
        models=tuple(map(_with_absolute_paths, config.models)),
        signer_files=signer_files,
    )


def _with_absolute_paths(selection: ModelSelection) -> ModelSelection:
    names = (*PRESETS, *WEIGHTS, OPEN_FACES)
    paths = {
        name: str(Path(value).absolute())
        for name in selection.files
        if (value := getattr(selection, name)) and value not in names and Path(value).exists()
    }
    return selection.model_copy(update=paths)


def _wait_for_signal() -> None:
    stopped = threading.Event()
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, lambda *_: stopped.set()) for number in signals]
    try:
        stopped.wait()
    finally:
        for number, handler in zip(signals, previous, strict=True):
            signal.signal(number, handler)
