"""The command `pulid serve`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from openpulid.cli.options import Base, Device, FacePack, Memory, name_options, print_status
from openpulid.cli.signing import Certificate, Key, Sign, find_signer_files
from openpulid.errors import OptionError, require_libraries

HOUR = 3600.0
DAY = 24 * HOUR


def serve(
    preset: Annotated[
        list[str] | None,
        typer.Option(help="Preset to offer; repeat it for several. The first one is the default."),
    ] = None,
    base: Base = None,
    memory: Memory = None,
    faces: FacePack = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Another adapter file of PuLID, such as one of your own.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to serve; another than 127.0.0.1 needs --api-keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to serve.")] = 8100,
    data: Annotated[
        Path, typer.Option(help="Folder of jobs, images and identities; created if missing.")
    ] = Path("pulid-data"),
    api_keys: Annotated[
        Path | None, typer.Option(help="File with one NAME KEY per line; then a key is needed.")
    ] = None,
    database: Annotated[
        str | None,
        typer.Option(help="postgresql://USER@HOST/NAME, instead of SQLite in the data folder."),
    ] = None,
    worker: Annotated[
        str, typer.Option(help="Name of this process among those with the same data folder.")
    ] = "local",
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Generate on Ray Serve: `local` starts Ray on this machine, `auto` or HOST:PORT "
            "joins a cluster.",
        ),
    ] = None,
    replicas: Annotated[
        int | None,
        typer.Option(min=1, help="Most replicas of each preset (--ray); by default one per GPU."),
    ] = None,
    device: Device = None,
    studios: Annotated[
        int, typer.Option(min=1, help="Presets and methods that are in memory at once.")
    ] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Images that are computed at once.")] = 4,
    max_megabytes: Annotated[int, typer.Option(min=1, help="Largest request.")] = 64,
    max_megapixels: Annotated[int, typer.Option(min=1, help="Largest uploaded image.")] = 64,
    max_side: Annotated[int, typer.Option(min=1, help="Longest side of an image.")] = 2048,
    max_steps: Annotated[int, typer.Option(min=1, help="Most steps of an image.")] = 100,
    max_images: Annotated[int, typer.Option(min=1, help="Most images of a request.")] = 16,
    max_jobs: Annotated[int, typer.Option(min=1, help="Unfinished jobs of all API keys.")] = 1000,
    max_jobs_per_key: Annotated[
        int, typer.Option(min=1, help="Unfinished jobs of one API key.")
    ] = 100,
    rate: Annotated[str, typer.Option(help="Requests of one API key.")] = "600/minute",
    keep_hours: Annotated[
        float,
        typer.Option(
            min=0.01, max=1e6, help="Hours until a finished job and its images are removed."
        ),
    ] = 24.0,
    keep_identity_days: Annotated[
        float, typer.Option(min=0.001, max=1e5, help="Days until an identity is removed.")
    ] = 30.0,
    c2pa: Sign = False,
    c2pa_cert: Certificate = None,
    c2pa_key: Key = None,
) -> None:
    """Serve an HTTP API for programs, in the shape of OpenAI's image API.

    Base, memory, faces and adapter apply to the first preset.
    """
    if math.isnan(keep_hours) or math.isnan(keep_identity_days):
        raise OptionError("--keep-hours and --keep-identity-days must be numbers, not nan.")
    require_libraries("the HTTP API", ("fastapi", "sqlalchemy", "uvicorn"), extra="service")
    from openpulid.io.content_credentials import ContentSigner
    from openpulid.io.serving import check_address, is_loopback
    from openpulid.service.api.access import ApiKeys
    from openpulid.service.api.app import create_app
    from openpulid.service.arenas import limit_arenas
    from openpulid.service.config import Limits, ServiceConfig, select_models
    from openpulid.service.listening import run_app
    from openpulid.service.server import open_backend

    if api_keys is None and not is_loopback(host):
        raise OptionError(
            f"--host {host} is open to other machines; add --api-keys, or use 127.0.0.1."
        )
    keys = None if api_keys is None else ApiKeys.read(api_keys)
    check_address(host, port)
    signer_files = find_signer_files(c2pa, c2pa_cert, c2pa_key)
    if signer_files is not None:  # a bad file is reported before a model is loaded
        ContentSigner.load(*signer_files)
    changes = {"base": base, "memory": memory, "face_pack": faces, "adapter": adapter}
    options = {name: str(value) for name, value in changes.items() if value is not None}
    config = ServiceConfig(
        data=data,
        models=select_models(preset or ["mini"], **options),
        limits=Limits(
            body_bytes=max_megabytes * 2**20,
            file_bytes=max_megabytes * 2**20,
            pixels=max_megapixels * 1_000_000,
            images=max_images,
            steps=max_steps,
            side=max_side,
            jobs=max_jobs,
            jobs_per_key=max_jobs_per_key,
            rate=rate,
        ),
        job_seconds=keep_hours * HOUR,
        identity_seconds=keep_identity_days * DAY,
        database=database,
        worker=worker,
        device=device,
        max_studios=studios,
        max_batch=batch,
        signer_files=signer_files,
    )

    def on_listening(url: str) -> None:
        print_status(f"serving {url}; stop it with Ctrl-C.")

    if ray is not None:
        from openpulid.service.cluster.run import Place, run_cluster

        with name_options():
            run_cluster(config, api_keys, Place(ray, replicas, host, port), on_listening)
        return
    limit_arenas()
    with name_options(), open_backend(config) as backend:
        run_app(create_app(backend, keys), host, port, on_listening)
